"""Image encoder, model and gallery: shapes, geometry, search against brute force."""

import math

import pytest
import torch

from geoclip import earth, gallery
from geoclip.gallery import Gallery
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig
from geoclip.location_encoder import LocationEncoderConfig
from geoclip.model import GeoCLIP

CONV = ImageEncoderConfig(tower="conv", weights=None, frozen=False, hidden=24, dim=16)
SMALL = LocationEncoderConfig(sigmas=(1.0, 16.0), frequencies=8, width=16, dim=16)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model():
    places = Gallery(earth.sample_sphere(300, seeded(1)), "random places")
    return GeoCLIP.build(CONV, SMALL, seeded(), places).eval()


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
    first = model.gallery.embed(model.location_encoder, keep=True)
    assert torch.allclose(first, model.gallery.embed(model.location_encoder), atol=1e-6)
    assert len(list(tmp_path.rglob("*.npy"))) == 1
    monkeypatch.setattr(gallery, "embed", lambda *_, **__: pytest.fail("it was kept, and is computed again"))
    assert torch.equal(model.gallery.embed(model.location_encoder, keep=True), first)
    with torch.no_grad():
        model.location_encoder.levels[0].mlp[0].bias[0] += 1e-3
    with pytest.raises(BaseException, match="computed again"):
        model.gallery.embed(model.location_encoder, keep=True)


@pytest.mark.parametrize("k", [0, 301])
def test_more_answers_than_places(model, images, k):
    with pytest.raises(ValueError, match="the gallery has 300 places"):
        model.locate(model.encode_images(images), k=k)


def test_galleries_that_cannot_be():
    with pytest.raises(ValueError, match="empty"):
        Gallery(torch.empty(0, 2))
    with pytest.raises(ValueError, match="row 1"):
        Gallery(torch.tensor([[0.0, 0.0], [math.nan, 0.0]]))
    assert Gallery(torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]])).unique == 2


def test_the_official_gallery_has_94_123_places():
    official = Gallery.official()
    assert len(official) == 100_000 and official.unique == 94_123


def test_the_conv_tower_needs_training_and_learns():
    with pytest.raises(ValueError, match="frozen=False"):
        ImageEncoder(ImageEncoderConfig(tower="conv", weights=None, frozen=True))
    encoder = ImageEncoder(CONV, seeded())
    assert all(p.requires_grad for p in encoder.parameters())
    images = torch.rand(5, 3, 32, 32, generator=seeded(6))
    # an image's embedding does not depend on its batch
    assert torch.allclose(encoder(images[:1]), encoder(images)[:1], atol=1e-6)


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
