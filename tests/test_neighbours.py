import math

import pytest
import torch

from geoclip import earth
from geoclip.calibration import Calibration, NeighbourFit
from geoclip.neighbours import FLOOR, SHARES, Neighbours, fit_fused, fused
from geoclip.posterior import Places


@pytest.fixture
def neighbours():
    generator = torch.Generator().manual_seed(0)
    return Neighbours(
        torch.randn(70, 8, generator=generator), earth.sample_sphere(70, generator), ["a", "b"] * 35
    )


def test_the_nearest_are_those_of_the_largest_centred_cosine(neighbours):
    query = torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    cosine, latlon = neighbours.find(query, 3)
    slow = torch.nn.functional.cosine_similarity(
        (query - neighbours.mean)[:, None], neighbours.features, dim=-1
    )
    best = slow.argsort(1, descending=True)[:, :3]
    torch.testing.assert_close(cosine, 100 * slow.gather(1, best))
    torch.testing.assert_close(latlon, neighbours.latlon[best])


def test_the_querys_own_photographer_is_left_out(neighbours):
    query = neighbours.features + neighbours.mean  # each image is its own nearest one
    cosine, latlon = neighbours.find(query, 1)
    assert cosine.min() > 99.99
    cosine, latlon = neighbours.find(query, 1, ["a", "b"] * 35)
    own = {tuple(place) for place in neighbours.latlon[0::2].tolist()}
    assert cosine.max() < 99.9
    assert not own & {tuple(place) for place in latlon[0::2, 0].tolist()}
    assert own >= {tuple(place) for place in latlon[1::2, 0].tolist()}
    unknown = Neighbours(neighbours.features, neighbours.latlon)
    with pytest.raises(ValueError, match="photographers of the training images are not known"):
        unknown.find(query, 1, ["a"] * 70)


def test_neighbours_add_the_log_of_their_density():
    places = Places(torch.tensor([[0.0, 0.0], [0.0, 1.0], [50.0, 50.0]]))
    near = torch.tensor([[2.0, 1.0]]), torch.tensor([[[0.0, 0.0], [0.0, 1.0]]]).double()
    [half] = fused([torch.zeros(1, 3)], places, near, NeighbourFit("", 1.0, 0.5, 40.0, 0.0, share=0.5))
    [whole] = fused([torch.zeros(1, 3)], places, near, NeighbourFit("", 1.0, 0.5, 40.0, 0.0))
    torch.testing.assert_close(half, whole / 2)
    [found] = fused([torch.tensor([[3.0, 2.0, 1.0]])], places, near, NeighbourFit("", 2.0, 0.5, 40.0, 0.0))
    weight = torch.tensor([4.0, 2.0]).softmax(0).double()
    for i, logit in enumerate((1.5, 1.0, 0.5)):
        km = earth.haversine_km(places.latlon[i], near[1][0])
        kernel = torch.exp(-((km / 40) ** 2) / 2) / (2 * math.pi * 40**2)  # 1 − cos d is d² / 2 nearby
        density = (weight @ kernel).item() + FLOOR / (4 * math.pi * earth.EARTH_RADIUS_KM**2)
        assert found[0, i].item() == pytest.approx(logit + math.log(density), abs=2e-3)


@pytest.mark.slow
def test_neighbours_count_less_the_less_they_tell():
    generator = torch.Generator().manual_seed(0)
    places, n = Places(earth.sample_sphere(300, generator)), 60
    logits, index = (
        3 * torch.randn(n, 300, generator=generator),
        torch.randint(300, (n,), generator=generator),
    )
    logits[torch.arange(n), index] += 6
    truth = earth.destination(places.latlon[index], *(30 * torch.randn(2, n, generator=generator).double()))
    around = earth.destination(truth, *(200 * torch.randn(2, n, generator=generator).double()))
    for near, share in ((around, max(SHARES)), (earth.sample_sphere(n, generator).double(), min(SHARES))):
        known = torch.full((n, 1), 50.0), near[:, None]
        fitted = fit_fused([logits], places, Calibration(fitted_on="mine"), known, truth)
        assert (fitted.neighbours.share, fitted.fitted_on, fitted.images) == (share, "mine", n)
