"""The OpenVINO engine computes what the PyTorch tower computes, is kept, and is rebuilt when damaged."""

import pytest
import torch

from geoclip import image_encoder
from geoclip.engines import openvino_tower
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig

pytest.importorskip("openvino", reason="OpenVINO is not installed")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(openvino_tower.paths, "CACHE", tmp_path)
    return tmp_path / "towers"


@pytest.fixture
def encoder(tiny_clip):
    torch.manual_seed(0)  # open_clip draws from the global state
    image_encoder._report_once.cache_clear()  # another test may have been told already
    return ImageEncoder(ImageEncoderConfig(tiny_clip, None)).eval()


def images(encoder, n):
    side = encoder.preprocess.pixels
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def cosine(one, other):
    return torch.cosine_similarity(one, other).min().item()


@pytest.mark.slow
@torch.inference_mode()
def test_engine_equals_the_tower_at_any_batch_size(encoder, cache, capsys):
    given = images(encoder, 11)  # more than are computed at once
    expected = encoder.features(given)
    encoder.use_precision("auto")
    assert isinstance(encoder.engine, openvino_tower.OpenVINOTower)
    found = encoder.features(given)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert cosine(found, expected) > (0.999 if encoder.precision == "bf16" else 1 - 1e-6)
    assert torch.allclose(encoder.features(given[:1]), found[:1], atol=1e-5)
    assert "through OpenVINO" in capsys.readouterr().err
    encoder.use_precision("fp32")
    assert encoder.engine is None and torch.equal(encoder.features(given), expected)


@pytest.mark.slow
@torch.inference_mode()
def test_kept_model_is_opened_without_the_torch_tower(encoder, cache, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    weights = tmp_path / "clip.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in encoder.tower.state_dict().items()}, weights)
    config = ImageEncoderConfig(encoder.config.tower, str(weights))
    given = images(encoder, 2)
    first = ImageEncoder(config, with_tower=False).use_precision("auto").features(given)
    assert cosine(first, encoder.features(given)) > 0.999
    monkeypatch.setattr(image_encoder, "load_clip", lambda *_: pytest.fail("the PyTorch tower was built"))
    again = ImageEncoder(config, with_tower=False).use_precision("auto")
    assert torch.equal(again.features(given), first) and again.tower is None


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("name", ["tower.xml", "tower.bin", "sha256.json"])
def test_damaged_model_is_reported_and_converted_again(encoder, cache, name):
    given = images(encoder, 1)
    expected = encoder.use_precision("auto").features(given)
    encoder.use_precision("fp32")
    (kept,) = cache.glob("*/" + name)
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 0xFF
    kept.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged: the tower is converted again"):
        encoder.use_precision("auto")
    assert torch.equal(encoder.features(given), expected)
    assert not list(cache.glob(".*"))  # nothing temporary is left


@torch.inference_mode()
@pytest.mark.slow
def test_int8_is_close_on_random_weights(encoder, cache):
    pytest.importorskip("nncf", reason="nncf is not installed")
    crops = torch.cat(encoder._calibration())
    expected = encoder.features(crops)
    found = encoder.use_precision("int8").features(crops)
    assert encoder.precision == "int8" and cosine(found, expected) > 0.98


def test_precisions_that_are_refused(encoder, monkeypatch):
    with pytest.raises(ValueError, match="no precision 'fp16': give one of auto, fp32, bf16, int8"):
        encoder.use_precision("fp16")
    monkeypatch.setattr(openvino_tower, "is_available", lambda: False)
    with pytest.raises(ValueError, match="bf16 is not available on this device"):
        encoder.use_precision("bf16")
    assert encoder.use_precision("auto").engine is None and encoder.precision == "fp32"


@torch.inference_mode()
def test_conv_tower_always_stays_in_fp32():
    conv = ImageEncoder(ImageEncoderConfig("conv", None, frozen=False, hidden=8, dim=4)).eval()
    assert conv.use_precision("bf16").precision == "fp32" and conv.engine is None


@torch.inference_mode()
def test_a_tower_that_cannot_be_converted_runs_in_torch(encoder, cache, monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("no conversion rule")

    monkeypatch.setattr(openvino_tower, "convert", refuse)
    given = images(encoder, 1)
    expected = encoder.features(given)
    encoder.use_precision("auto")
    assert encoder.engine is None and torch.equal(encoder.features(given), expected)
    assert "OpenVINO cannot convert it (no conversion rule)" in capsys.readouterr().err
