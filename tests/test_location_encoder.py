"""The location encoder: the paper's size, the geometry of its features, precision, the released weights."""

import math

import numpy as np
import pytest
import torch

from geoclip import earth, pretrained
from geoclip.location_encoder import LocationEncoder, LocationEncoderConfig

SMALL = LocationEncoderConfig(sigmas=(1.0, 16.0), frequencies=32, width=48, dim=24)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_paper_s_encoder_has_9_447_936_trainable_parameters():
    encoder = LocationEncoder()
    assert sum(p.numel() for p in encoder.parameters()) == 9_447_936
    assert encoder(torch.zeros(2, 2)).shape == (2, 512)


def test_the_embedding_is_the_sum_of_its_levels():
    encoder = LocationEncoder(SMALL, seeded())
    latlon = earth.sample_sphere(50, seeded())
    assert encoder.by_level(latlon).shape == (2, 50, 24)
    assert torch.allclose(encoder.by_level(latlon).sum(0), encoder(latlon), atol=1e-6)


def test_fourier_features_by_hand():
    encoder = LocationEncoder(SMALL, seeded())
    latlon = earth.sample_sphere(5, seeded())
    level, xy = encoder.levels[1], earth.equal_earth(latlon)
    for i in range(5):
        for j in range(32):
            phase = 2 * math.pi * float(xy[i] @ level.frequencies[j])
            assert level.features(xy)[i, j].item() == pytest.approx(math.cos(phase), abs=1e-3)
            assert level.features(xy)[i, 32 + j].item() == pytest.approx(math.sin(phase), abs=1e-3)


def test_frequencies_have_their_sigma_and_are_not_trained():
    encoder = LocationEncoder(LocationEncoderConfig(frequencies=4096, width=8, dim=8), seeded())
    for level, sigma in zip(encoder.levels, (1, 16, 256), strict=True):
        assert level.frequencies.std().item() == pytest.approx(sigma, rel=0.03)
        assert not level.frequencies.requires_grad
    assert not any("frequencies" in name for name, _ in encoder.named_parameters())


@pytest.mark.parametrize(("projection", "inputs"), [("equal_earth", 2), ("degrees", 2), ("sphere", 3)])
def test_controls_without_fourier_features(projection, inputs):
    encoder = LocationEncoder(LocationEncoderConfig(sigmas=(), width=16, dim=8, projection=projection))
    assert len(encoder.levels) == 1
    assert encoder.levels[0].mlp[0].in_features == inputs
    assert encoder(earth.sample_sphere(7)).shape == (7, 8)
    assert encoder.project(earth.sample_sphere(1000)).abs().max() <= 1.000001


def test_a_seed_fixes_the_encoder():
    same, other = LocationEncoder(SMALL, seeded(3)), LocationEncoder(SMALL, seeded(4))
    again = LocationEncoder(SMALL, seeded(3))
    latlon = earth.sample_sphere(9, seeded())
    assert torch.equal(same(latlon), again(latlon))
    assert not torch.allclose(same(latlon), other(latlon))


def test_the_phase_stays_in_single_precision_under_autocast():
    encoder = LocationEncoder(LocationEncoderConfig(width=64, dim=32), seeded())
    latlon = earth.sample_sphere(500, seeded())
    with torch.no_grad():
        exact = encoder(latlon)
        with torch.autocast("cpu", torch.bfloat16):
            features = encoder.levels[2].features(encoder.project(latlon))
            mixed = encoder(latlon).float()
        assert features.dtype == torch.float32
        rounded = encoder.levels[2].frequencies.bfloat16().float()  # what a bfloat16 phase would do
        phase = 2 * math.pi * encoder.project(latlon).bfloat16().float() @ rounded.T
    assert torch.cosine_similarity(exact, mixed).min() > 0.999
    destroyed = torch.cosine_similarity(features[:, :256], phase.cos())
    assert destroyed.mean() < 0.5


@pytest.mark.parametrize("sigmas", [(1.0, 256.0), ()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_phase_stays_in_single_precision_in_an_encoder_of_another_dtype(sigmas, dtype):
    config = LocationEncoderConfig(sigmas=sigmas, width=64, dim=32)
    encoder, latlon = LocationEncoder(config, seeded()), earth.sample_sphere(500, seeded())
    with torch.no_grad():
        exact, found = encoder(latlon), encoder.to(dtype)(latlon)
    assert found.dtype == dtype and torch.cosine_similarity(exact, found.float()).min() > 0.999
    assert all(
        level.frequencies is None or level.frequencies.dtype == torch.float32 for level in encoder.levels
    )
    assert encoder.float()(latlon).dtype == torch.float32


def test_released_weights_are_level_by_level_what_was_trained():
    encoder = LocationEncoder.pretrained()
    assert not encoder.training
    assert [round(level.frequencies.std().item()) for level in encoder.levels] == pytest.approx(
        [1, 16, 256], rel=0.1
    )
    paris, lyon, sydney = encoder(torch.tensor([[48.8566, 2.3522], [45.764, 4.8357], [-33.8688, 151.2093]]))
    near, far = torch.cosine_similarity(paris, lyon, 0), torch.cosine_similarity(paris, sydney, 0)
    assert near > far
    assert math.exp(pretrained.logit_scale()) == pytest.approx(39.69, abs=0.01)


def test_a_phase_in_double_is_the_exact_one():
    config = LocationEncoderConfig(sigmas=(256.0,), frequencies=32, width=16, dim=8)
    encoder = LocationEncoder(config, torch.Generator().manual_seed(0)).eval()
    latlon = torch.tensor([[48.8566, 2.3522], [-33.8688, 151.2093], [90.0, 0.0], [0.0, -180.0]])
    rounded = encoder.levels[0].features(encoder.project(latlon))
    encoder.double_phase = True
    turns = encoder.project(latlon).numpy() @ encoder.levels[0].frequencies.double().numpy().T
    exact = np.concatenate([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)], 1)
    features = encoder.levels[0].features(encoder.project(latlon))
    assert features.dtype == encoder(latlon).dtype == torch.float32
    np.testing.assert_allclose(features, exact, rtol=0, atol=1e-6)
    assert 1e-5 < np.abs(rounded.numpy() - exact).max() < 1e-2  # what the default, float32, loses
