"""bfloat16 changes answers by less than it may, and only where it should."""

import pytest
import torch
from torch.nn import functional

from geoclip import cpu_bf16, earth, image_encoder, precision
from geoclip.datasets import features
from geoclip.gallery import Gallery
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig, in_bf16
from geoclip.location_encoder import LocationEncoder, LocationEncoderConfig
from geoclip.model import GeoCLIP

BF16 = torch.bfloat16


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    """A small CLIP tower and the paper's location encoder, random, over 2,000 places."""
    image = ImageEncoderConfig("ViT-B-32-quickgelu", None)
    torch.manual_seed(0)  # open_clip draws from the global state
    return GeoCLIP.build(image, None, seeded(1), Gallery(earth.sample_sphere(2000, seeded(2)))).eval()


def unit(n, seed, dim=512):
    return functional.normalize(torch.randn(n, dim, generator=seeded(seed)), dim=1)


def test_automatic_choice_is_said_once_and_can_be_set(capsys, monkeypatch):
    precision._automatic.cache_clear()
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: True)
    assert precision.choose("auto") == precision.choose("auto") == BF16
    assert capsys.readouterr().err.count("bf16") == 1
    precision._automatic.cache_clear()
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: False)
    assert precision.choose() == torch.float32
    assert "fp32" in capsys.readouterr().err
    precision._automatic.cache_clear()
    assert (precision.choose("bf16"), precision.choose("fp32")) == (BF16, torch.float32)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="no precision 'fp16': give one of auto, fp32, bf16"):
        precision.choose("fp16")


def test_bf16_is_found_by_the_processors_own_flags(monkeypatch):
    for flags, fast in (
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_f": True}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert precision.has_fast_bf16("cpu") == fast


def test_images_in_bf16_stay_within_a_thousandth(model):
    images = torch.randint(256, (6, 3, 224, 224), generator=seeded(4), dtype=torch.uint8)
    preprocessing = image_encoder.Preprocessing.of(model.image_encoder.config)
    single = features.Tower(model.image_encoder, preprocessing, 4, "fp32", False)(images)
    low = features.Tower(model.image_encoder, preprocessing, 4, "bf16", False)(images)
    assert torch.cosine_similarity(single.float(), low.float()).min() >= 0.999
    assert not torch.equal(single, low)


def test_a_model_answers_in_bf16_nearly_as_in_fp32(model):
    images = torch.randn(5, 3, 224, 224, generator=seeded(5))
    with torch.inference_mode():
        expected = model.encode_images(images)
    other = GeoCLIP(model.image_encoder, model.location_encoder, model.gallery)
    other.load_state_dict(model.state_dict())
    other.image_encoder = ImageEncoder(model.image_encoder.config)
    other.image_encoder.load_state_dict(model.image_encoder.state_dict())
    other.eval().use_precision("bf16")
    with torch.inference_mode():
        got = other.encode_images(images)
    assert got.dtype == other.places().dtype == torch.float32
    assert torch.cosine_similarity(got, expected).min() >= 0.999
    one, other_answer = model.locate(expected, 3), other.locate(expected, 3)
    assert torch.allclose(one[1], other_answer[1], rtol=0.02)


@pytest.mark.skipif(not precision.packs("cpu"), reason="oneDNN has no bfloat16 for this processor")
@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-32"])
def test_the_cpus_own_layout_is_the_same_tower(name, monkeypatch):
    """In float32 the other order of work gives the open_clip tower's features; quick and exact GELU."""
    tower = ImageEncoder(ImageEncoderConfig(name, None), seeded(0)).tower.visual
    images = torch.randn(5, 3, 224, 224, generator=seeded(6))
    with torch.inference_mode():
        expected = tower(images)
    assert cpu_bf16.is_plain(tower)
    low = cpu_bf16.Tower(tower)(images)
    assert low.dtype == BF16 and torch.cosine_similarity(low.float(), expected).min() >= 0.9999
    monkeypatch.setattr(cpu_bf16, "DTYPE", torch.float32)  # the same code without the rounding
    single = cpu_bf16.Tower(tower)(images)
    assert (single - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_towers_that_are_not_plain_run_as_they_are():
    tower = ImageEncoder(ImageEncoderConfig("ViT-B-32-quickgelu", None), seeded(0)).tower.visual
    tower.pool_type = "avg"
    assert not cpu_bf16.is_plain(tower) and not cpu_bf16.is_plain(torch.nn.Flatten())
    with pytest.raises(ValueError, match="no plain CLIP vision transformer"):
        cpu_bf16.Tower(tower)
    other = in_bf16(tower, torch.device("cpu"))
    assert type(other) is type(tower) and other.proj.dtype == BF16 and tower.proj.dtype == torch.float32


@pytest.mark.skipif(not precision.packs("cpu"), reason="oneDNN has no bfloat16 for this processor")
def test_a_model_in_bf16_stays_where_and_as_it_is():
    image = ImageEncoderConfig("ViT-B-32-quickgelu", None)
    low = (
        GeoCLIP.build(image, None, seeded(1), Gallery(earth.sample_sphere(50, seeded(2))))
        .eval()
        .use_precision("bf16")
    )
    assert low.use_precision("bf16") is low and low.to("cpu") is low
    with pytest.raises(ValueError, match="load the model again to answer in float32"):
        low.use_precision("fp32")
    with pytest.raises(RuntimeError, match="laid out for the CPU in bfloat16"):
        low.to(torch.float64)


def test_coordinates_without_fourier_features_are_not_rounded():
    """In bfloat16 178.5° and 178.9° of longitude are one."""
    encoder = LocationEncoder(
        LocationEncoderConfig(sigmas=(), projection="degrees", width=64, dim=32), seeded(0)
    )
    latlon = torch.tensor([[10.0, 178.5], [10.0, 178.9], [50.3, -3.1]])
    with torch.inference_mode():
        single = encoder(latlon)
    with torch.inference_mode(), torch.autocast("cpu", BF16):
        trained = encoder(latlon)
    assert not torch.equal(trained[0], trained[1])
    assert torch.allclose(trained.float(), single, atol=4e-3)
