"""bfloat16 changes answers by less than it may, and only where it should."""

import math

import pytest
import torch
from torch.nn import functional

from geoclip import cpu_bf16, earth, gallery, image_encoder, place_index, precision
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


def test_places_in_bf16_stay_within_a_ten_thousandth():
    """Of the released encoder, whose phases at σ = 256 would be destroyed in bf16 (cosines down to 0.08)."""
    encoder = LocationEncoder.pretrained()
    latlon = earth.sample_sphere(600, seeded(3))
    latlon = torch.cat([latlon, torch.tensor([[90.0, 0.0], [-90.0, 10.0], [0.0, -180.0], [0.0, 179.999]])])
    single, low = gallery.embed(encoder, latlon), gallery.embed(encoder, latlon, dtype=BF16)
    assert low.dtype == BF16
    assert torch.cosine_similarity(single, low.float()).min() >= 0.9999
    with torch.inference_mode(), torch.autocast("cpu", BF16):
        level = encoder.levels[2]
        assert torch.equal(
            level.features(encoder.project(latlon)), level.features(encoder.project(latlon)).float()
        )


def test_images_in_bf16_stay_within_a_thousandth(model):
    images = torch.randint(256, (6, 3, 224, 224), generator=seeded(4), dtype=torch.uint8)
    preprocessing = image_encoder.Preprocessing.of(model.image_encoder.config)
    single = features.Tower(model.image_encoder, preprocessing, 4, "fp32", False)(images)
    low = features.Tower(model.image_encoder, preprocessing, 4, "bf16", False)(images)
    assert torch.cosine_similarity(single.float(), low.float()).min() >= 0.999
    assert not torch.equal(single, low)


def test_top_1_is_the_same_place_or_near(model):
    """Queries as far from their place as photos are, among 5,000 real places of the released encoder.

    The rounding of a query is that of the tower in bfloat16: a cosine of .99999 to float32 (`make bench`).
    """
    places = Gallery(Gallery.official().latlon[::20])
    single = GeoCLIP(model.image_encoder, LocationEncoder.pretrained(), places).eval()
    low = GeoCLIP(ImageEncoder(model.image_encoder.config), LocationEncoder.pretrained(), places).eval()
    low.use_precision("bf16")
    query = place_index.synthetic_queries(single.places(), 1000)
    rounded = functional.normalize(query + 0.0045 * unit(1000, 9), dim=1)
    assert 0.99998 < torch.cosine_similarity(query, rounded).mean() < 0.999995
    one, same, other = single.locate(query)[0], low.locate(query)[0], low.locate(rounded)[0]
    assert (one == same).all(-1).double().mean() >= 0.998  # rounding the gallery changes nothing
    apart_km = earth.haversine_km(one, other)[:, 0]
    assert (apart_km == 0).double().mean() >= 0.95
    assert (apart_km <= 25).double().mean() >= 0.99


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
    assert got.dtype == torch.float32 and other.places().dtype == BF16
    assert torch.cosine_similarity(got, expected).min() >= 0.999
    one, other_answer = model.locate(expected, 3), other.locate(expected, 3)
    assert torch.allclose(one[1], other_answer[1], rtol=0.02)


@pytest.mark.parametrize("n", [50, 5_000, 70_001])
@pytest.mark.parametrize("queries", [1, 9])
def test_search_is_exact_in_blocks(n, queries, monkeypatch):
    query, places = unit(queries, 0, 16), unit(n, 1, 16)
    expected = (query.double() @ places.double().T).topk(5)
    monkeypatch.setitem(gallery.SCORES_AT_ONCE, "cpu", 1)  # so that blocks are as small as they get
    score, index = gallery.search(query, places, 5)
    assert torch.equal(index, expected.indices)
    assert torch.allclose(score.double(), expected.values, atol=1e-6)
    _, _, total = gallery.scan(query, places, 5, scale=30.0)
    assert torch.allclose(total.double(), (30 * query.double() @ places.double().T).logsumexp(1), atol=1e-4)
    low_score, low_index = gallery.search(query, places.to(BF16), 5)
    exact = (query.double() @ places.double().T).gather(1, low_index)
    assert (expected.values - exact).max() < 4e-3  # what it found is as near, to three digits
    assert torch.allclose(low_score.double(), exact, atol=4e-3)


@pytest.mark.parametrize("n", [20, 3000])
def test_probabilities_of_a_bf16_gallery_add_up(n):
    query, places = unit(3, 2), unit(n, 3)
    scores = 40 * query.double() @ places.to(BF16).double().T
    score, _, total = gallery.scan(query, places.to(BF16), min(n, 5), scale=40.0)
    assert torch.allclose(
        (40 * score - total[:, None]).exp().double(), scores.softmax(1).topk(min(n, 5)).values, rtol=2e-3
    )
    if n == 20:
        score, _, total = gallery.scan(query, places.to(BF16), n, scale=40.0)
        assert torch.allclose((40 * score - total[:, None]).exp().sum(1), torch.ones(3), atol=1e-5)


def test_groups_hold_the_best_whatever_their_place():
    scores = torch.randn(7, 10_003, generator=seeded(6))
    scores[0, -3:], scores[1, 64:70] = (
        9.0 + torch.arange(3),
        9.0 + torch.arange(6),
    )  # in the rest; all in one group
    assert torch.equal(gallery.top(scores.T.contiguous(), 6)[1], scores.topk(6).indices)


def test_gallery_in_bf16_is_kept_apart_and_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery.paths, "CACHE", tmp_path)
    monkeypatch.setattr(gallery, "KEPT_AT_ONCE", 64)  # written in four parts
    encoder = LocationEncoder(generator=seeded(0))
    places = Gallery(earth.sample_sphere(200, seeded(1)))
    single, low = (places.embed(encoder, keep=True, dtype=dtype) for dtype in (torch.float32, BF16))
    files = {path.name: path.stat().st_size for path in (tmp_path / "galleries").iterdir()}
    assert sorted(files.values()) == [200 * 512 * 2 + 128, 200 * 512 * 4 + 128]
    assert torch.equal(low, gallery.embed(encoder, places.latlon, dtype=BF16))
    assert torch.allclose(single, gallery.embed(encoder, places.latlon), atol=1e-6)
    monkeypatch.setattr(gallery, "embed", lambda *_, **__: pytest.fail("computed again"))
    assert torch.equal(places.embed(encoder, keep=True, dtype=BF16), low)
    assert math.isclose(low.float().norm(dim=1).mean(), 1, abs_tol=1e-3)


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
    single = gallery.embed(encoder, latlon)
    low = gallery.embed(encoder, latlon, dtype=BF16).float()
    assert torch.allclose(low, single, atol=4e-3)
    with torch.inference_mode(), torch.autocast("cpu", BF16):
        trained = encoder(latlon)
    assert not torch.equal(trained[0], trained[1])
