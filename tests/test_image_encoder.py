"""The one preprocessing of each tower equals what open_clip and torchvision make of the same image."""

import functools
import sys

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms

from geoclip import photos
from geoclip.image_encoder import (
    OPENAI_MEAN,
    OPENAI_STD,
    ImageEncoder,
    ImageEncoderConfig,
    Preprocessing,
    load_clip,
    tower_hash,
)

SIZES = [(64, 48), (333, 517), (224, 224), (225, 1000), (1000, 223)]


@pytest.mark.parametrize(
    ("tower", "weights"), [("ViT-L-14-quickgelu", None), ("ViT-B-16-SigLIP", "webli"), ("conv", None)]
)
def test_preprocessing_is_the_towers_own(tower, weights):
    ours = Preprocessing.of(ImageEncoderConfig(tower, weights))
    released = open_clip.get_pretrained_cfg(tower, weights or "") or {}
    theirs = open_clip.image_transform(
        ours.pixels, False, ours.mean, ours.std, released.get("resize_mode"), released.get("interpolation")
    )
    # torchvision's crop rounds an odd margin to even, the authors' processor down
    steps = [
        functools.partial(photos.centre_crop, side=ours.pixels)
        if isinstance(step, transforms.CenterCrop)
        else step
        for step in theirs.transforms
    ]
    rng = np.random.default_rng(0)
    for width, height in SIZES:
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        expected = functools.reduce(lambda value, step: step(value), steps, image)
        assert torch.equal(ours(image), expected)


def test_statistics_follow_the_tower_and_not_clip():
    siglip = Preprocessing.of(ImageEncoderConfig("ViT-B-16-SigLIP", "webli"))
    clip = Preprocessing.of(ImageEncoderConfig("ViT-B-16", None))
    assert siglip.mean == siglip.std == (0.5, 0.5, 0.5) and siglip.resize == "squash"
    assert clip.mean == open_clip.OPENAI_DATASET_MEAN and clip.resize == "shortest"
    assert Preprocessing.of(ImageEncoderConfig("timm/vit_tiny_patch16_224", None)).pixels == 224
    with pytest.raises(ValueError, match="no tower 'timm/vit_of_nobody'"):
        Preprocessing.of(ImageEncoderConfig("timm/vit_of_nobody"))


def test_the_papers_tower_is_described_without_open_clip(monkeypatch):
    name = "ViT-L-14-quickgelu"
    for tag in open_clip.list_pretrained_tags_by_model(name):
        released = open_clip.get_pretrained_cfg(name, tag)
        assert (released["mean"], released["std"]) == (OPENAI_MEAN, OPENAI_STD)
        assert (released["interpolation"], released["resize_mode"]) == ("bicubic", "shortest")
    monkeypatch.setitem(sys.modules, "open_clip", None)  # importing it takes seconds, and fails here
    assert Preprocessing.of(ImageEncoderConfig(name, "/a/clip.safetensors")) == Preprocessing(
        224, "bicubic", OPENAI_MEAN, OPENAI_STD
    )


def test_a_timm_tower_embeds_and_is_the_same_each_time():
    config = ImageEncoderConfig("timm/test_vit", None, hidden=8, dim=8)
    encoder = ImageEncoder(config).eval().use_precision("fp32")
    images = torch.rand(2, 3, encoder.preprocess.pixels, encoder.preprocess.pixels)
    assert encoder.features(images).shape == (2, encoder.feature_dim)
    torch.manual_seed(5)
    assert tower_hash(ImageEncoder(config).load_tower()) == tower_hash(encoder.tower)
    with pytest.raises(ValueError, match="cannot read text"):
        encoder.text_features("a beach")
    with pytest.raises(ValueError, match="no tower 'timm/vit_of_nobody'"):
        ImageEncoder(ImageEncoderConfig("timm/vit_of_nobody", None))


def test_random_weights_are_the_same_whatever_was_drawn_before(tiny_clip):
    hashes = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        hashes.add(tower_hash(load_clip(tiny_clip, None)))
        drawn = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(drawn, torch.rand(1))  # and nothing is taken from the caller's draws
    assert len(hashes) == 1


def test_bytes_and_floats_are_normalised_alike():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    preprocess = Preprocessing(4, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    by_hand = (images.float() / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.4, 0.5, 0.6]
    ).view(3, 1, 1)
    assert torch.equal(preprocess.normalise(images), by_hand)
    assert torch.equal(preprocess.normalise(images.float() / 255), by_hand)
