"""Image encoder, model and gallery: shapes, geometry, search against brute force."""

import math
import os

import numpy as np
import pytest
import torch

from geoclip import earth, gallery, paths
from geoclip.engines import place_index
from geoclip.gallery import Gallery
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig
from geoclip.location_encoder import LocationEncoder, LocationEncoderConfig
from geoclip.model import GeoCLIP

CONV = ImageEncoderConfig(tower="conv", weights=None, frozen=False, hidden=24, dim=16)
SMALL = LocationEncoderConfig(sigmas=(1.0, 16.0), frequencies=8, width=16, dim=16)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def geoclip(generator, places):
    images, locations = ImageEncoder(CONV, generator), LocationEncoder(SMALL, generator)
    return GeoCLIP(images, locations, places).eval()


@pytest.fixture
def model():
    places = Gallery(earth.sample_sphere(300, seeded(1)), "random places")
    return geoclip(seeded(), places)


@pytest.fixture
def images():
    return torch.rand(6, 3, 32, 32, generator=seeded(2))


def test_logits_are_scaled_cosines(model, images):
    latlon = earth.sample_sphere(4, seeded(3))
    logits = model(images, latlon)
    cosine = torch.cosine_similarity(
        model.image_encoder(images)[:, None], model.location_encoder(latlon)[None], dim=-1
    )
    assert torch.allclose(logits, cosine / 0.07, atol=1e-4)
    assert model.encode_images(images).norm(dim=-1).tolist() == pytest.approx([1.0] * 6, rel=1e-5)


def test_locate_is_brute_force_softmax(model, images):
    latlon, probability = model.locate(model.encode_images(images), k=5)
    for i in range(6):
        row = model(images[i : i + 1], model.gallery.latlon)[0].softmax(0)
        best = sorted(range(300), key=lambda j: -row[j].item())[:5]
        assert torch.equal(latlon[i], model.gallery.latlon[best])
        assert torch.allclose(probability[i], row[best], atol=1e-6)


def test_features_give_the_images_answer(model, images):
    features = model.image_encoder.features(images)
    assert torch.allclose(model.encode_features(features), model.encode_images(images), atol=1e-6)


def test_training_or_another_gallery_drops_the_kept_embedding(model, images):
    before = model.places()
    with torch.no_grad():
        model.train().location_encoder.levels[0].mlp[0].bias += 1
    assert not torch.allclose(model.eval().places(), before)
    model.use_gallery(Gallery(earth.sample_sphere(10, seeded(4))))
    assert model.places().shape == (10, 16)


def test_a_gallery_kept_on_disk_is_found_by_weights_and_places(model, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery.paths, "CACHE", tmp_path)
    expected = model.gallery.embed(model.location_encoder)
    monkeypatch.setattr(gallery, "KEPT_AT_ONCE", 64)  # written in five parts
    first = model.gallery.embed(model.location_encoder, keep=True)
    assert torch.allclose(first, expected, atol=1e-6)
    assert len(list(tmp_path.rglob("*.npy"))) == 1
    monkeypatch.setattr(gallery, "embed", lambda *_, **__: pytest.fail("it was kept, and is computed again"))
    assert torch.equal(model.gallery.embed(model.location_encoder, keep=True), first)
    with torch.no_grad():
        model.location_encoder.levels[0].mlp[0].bias[0] += 1e-3
    with pytest.raises(BaseException, match="computed again"):
        model.gallery.embed(model.location_encoder, keep=True)


def flip(path):
    content = bytearray(path.read_bytes())
    content[200] ^= 64
    path.write_bytes(content)


def shuffle(path):
    rows = np.load(path)
    kept = path.read_bytes()
    path.write_bytes(kept[:128] + rows[::-1].tobytes() + kept[-32:])


def replace_by_another_gallery(path):
    other = geoclip(seeded(7), Gallery(earth.sample_sphere(300, seeded(8))))
    other.gallery.embed(other.location_encoder, keep=True)
    os.replace(other.gallery.kept_at(other.location_encoder), path)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        shuffle,
        replace_by_another_gallery,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
    ],
)
def test_a_damaged_or_foreign_cache_is_computed_again(model, tmp_path, monkeypatch, capsys, damage):
    monkeypatch.setattr(gallery.paths, "CACHE", tmp_path)
    expected = model.gallery.embed(model.location_encoder, keep=True).clone()
    damage(model.gallery.kept_at(model.location_encoder))
    assert torch.equal(model.gallery.embed(model.location_encoder, keep=True), expected)
    assert "is damaged or belongs to another gallery; computing it again" in capsys.readouterr().err
    assert torch.equal(model.gallery.embed(model.location_encoder, keep=True), expected)
    assert capsys.readouterr().err == ""


def test_large_caches_are_checked_by_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "SAMPLE", 64)
    monkeypatch.setattr(paths, "SAMPLES", 4)
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    paths.seal(path, "file")
    assert paths.is_sealed(path) and not paths.is_sealed(path.rename(tmp_path / "other"))
    path.write_bytes(bytes(256) + b"x" + bytes(743) + (tmp_path / "other").read_bytes()[-32:])
    assert not paths.is_sealed(path)  # byte 256 is in a sampled block: every fourth of 64 bytes


def test_a_cache_that_cannot_be_written_does_not_prevent_an_answer(
    model, images, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(gallery.paths, "CACHE", tmp_path / "file" / "cache")
    assert model.places(keep=True).shape == (300, 16)
    assert "cannot be cached" in capsys.readouterr().err
    assert model.locate(model.encode_images(images))[0].shape == (6, 1, 2)


def test_values_that_are_not_finite_are_an_error_and_never_an_answer(model, images):
    query = model.encode_images(images)
    with pytest.raises(ValueError, match="scores are not finite"):
        model.locate(torch.where(torch.arange(16) == 3, torch.nan, query))
    with torch.no_grad():
        model.logit_scale.fill_(math.nan)
        with pytest.raises(ValueError, match="scores are not finite"):
            model.locate(query)
        model.train().location_encoder.levels[1].mlp[0].bias[0] = math.nan
    with pytest.raises(ValueError, match="its weights are damaged"):
        model.eval().places()


def test_scores_are_the_logits_of_all_places(model, images):
    views = images[:, None]
    assert torch.allclose(model.scores(views), model(images, model.gallery.latlon), atol=1e-5)
    assert torch.equal(model.scores(views), model.scores(model.encode_views(views)))
    probability = model.scores(views).softmax(1).topk(5)
    latlon, expected = model.locate(views, 5)
    assert torch.allclose(probability.values, expected, atol=1e-6)
    assert torch.equal(model.gallery.latlon[probability.indices], latlon)


def unit(n, seed, dim=512):
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=seeded(seed)), dim=1)


@pytest.mark.parametrize("n", [50, 5_000, 70_001])
@pytest.mark.parametrize("queries", [1, 9])
def test_search_is_exact_in_blocks(n, queries, monkeypatch):
    query, places = unit(queries, 0, 16), unit(n, 1, 16)
    expected = (query.double() @ places.double().T).topk(5)
    monkeypatch.setitem(gallery.SCORES_AT_ONCE, "cpu", 1)  # the smallest blocks
    score, index = gallery.search(query, places, 5)
    assert torch.equal(index, expected.indices)
    assert torch.allclose(score.double(), expected.values, atol=1e-6)
    _, _, total = gallery.scan(query, places, 5, scale=30.0)
    assert torch.allclose(total.double(), (30 * query.double() @ places.double().T).logsumexp(1), atol=1e-4)


def test_the_best_groups_hold_the_best_scores():
    scores = torch.randn(7, 10_003, generator=seeded(6))
    scores[0, -3:] = 9.0 + torch.arange(3)  # in the rest
    scores[1, 64:70] = 9.0 + torch.arange(6)  # all in one group
    assert torch.equal(gallery.top(scores.T.contiguous(), 6)[1], scores.topk(6).indices)


@pytest.mark.slow
def test_float16_storage_keeps_the_best_places_of_the_official_gallery():
    """As a GPU stores places and multiplies: both factors rounded to float16, sums in float32."""
    encoder, official = LocationEncoder.pretrained(), Gallery.official()
    distinct = Gallery(official.latlon.unique(dim=0))
    places = distinct.embed(encoder)
    query = place_index.synthetic_queries(places, 4000)
    best = gallery.search(query, places, 1)[1][:, 0]
    rounded = gallery.search(query.half().float(), places.half().float(), 1)[1][:, 0]
    # the places that change are metres to a kilometre apart: below the finest threshold of the evaluation
    apart_km = earth.haversine_km(distinct.latlon[best], distinct.latlon[rounded])
    assert (best == rounded).double().mean() >= 0.985
    assert (apart_km <= 1).double().mean() >= 0.999


@pytest.mark.parametrize("k", [0, 301])
def test_more_answers_than_places(model, images, k):
    with pytest.raises(ValueError, match="the gallery has 300 places"):
        model.locate(model.encode_images(images), k=k)


def test_galleries_that_cannot_be():
    with pytest.raises(ValueError, match="empty"):
        Gallery(torch.empty(0, 2))
    with pytest.raises(ValueError, match="row 1"):
        Gallery(torch.tensor([[0.0, 0.0], [math.nan, 0.0]]))


def test_the_official_gallery_has_94_123_places():
    official = Gallery.official()
    assert len(official) == 100_000 and len(official.given.unique(dim=0)) == 94_123


def test_the_conv_tower_needs_training_and_learns():
    with pytest.raises(ValueError, match="frozen=False"):
        ImageEncoder(ImageEncoderConfig(tower="conv", weights=None, frozen=True))
    encoder = ImageEncoder(CONV, seeded())
    assert all(p.requires_grad for p in encoder.parameters())
    images = torch.rand(5, 3, 32, 32, generator=seeded(6))
    # an image's embedding does not depend on its batch
    assert torch.allclose(encoder(images[:1]), encoder(images)[:1], atol=1e-6)


@pytest.mark.slow
def test_a_clip_tower_is_frozen_and_its_head_is_the_paper_s():
    encoder = ImageEncoder(ImageEncoderConfig(tower="RN50-quickgelu", weights=None))
    assert encoder.feature_dim == 1024
    assert not any(p.requires_grad for p in encoder.tower.parameters())
    assert all(p.requires_grad for p in encoder.head.parameters())
    assert not encoder.train().tower.training and encoder.head.training
    # Linear 1024 → 768, ReLU, Linear 768 → 512
    assert sum(p.numel() for p in encoder.head.parameters()) == 1024 * 768 + 768 + 768 * 512 + 512


def test_a_tower_that_is_none():
    with pytest.raises(ValueError, match="no tower 'ViT-Z'"):
        ImageEncoder(ImageEncoderConfig(tower="ViT-Z", weights=None))
