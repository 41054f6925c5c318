"""The contrastive loss against the paper's equation, term by term."""

import math

import pytest
import torch
from torch.nn import functional

from geoclip.loss import contrastive_loss


def test_equation_3_by_hand():
    generator = torch.Generator().manual_seed(0)
    images = functional.normalize(torch.randn(3, 8, generator=generator), dim=1)
    places = functional.normalize(torch.randn(7, 8, generator=generator), dim=1)
    scale, own = 2.0, [4, 0, 5]
    total = 0.0
    for image, row in zip(images, own, strict=True):
        similarity = [math.exp(math.exp(scale) * float(image @ place)) for place in places]
        total -= math.log(similarity[row] / sum(similarity)) / 3
    loss, _ = contrastive_loss(images, places, torch.tensor(scale), torch.tensor(own))
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_top1_is_the_share_of_images_whose_place_comes_first():
    places = torch.eye(4)
    loss, top1 = contrastive_loss(places[[0, 1, 2]], places, torch.tensor(5.0), torch.tensor([0, 1, 3]))
    assert top1.item() == pytest.approx(2 / 3) and loss.item() > 10
