"""The index finds what an exact search finds, but for a part that it measures itself."""

import pytest
import torch

from geoclip import gallery
from geoclip.engines import place_index
from geoclip.engines.place_index import PlaceIndex
from geoclip.gallery import Gallery
from geoclip.location_encoder import LocationEncoder


@pytest.fixture(scope="module")
def places():
    """5,000 real places in the released encoder's embedding, all different."""
    latlon = torch.unique(Gallery.official().latlon, dim=0)
    latlon = latlon[torch.randperm(len(latlon), generator=torch.Generator().manual_seed(0))[:5000]]
    return gallery.embed(LocationEncoder.pretrained(), latlon)


@pytest.fixture(scope="module")
def query(places):
    return place_index.synthetic_queries(places, 200)


@pytest.mark.slow
def test_all_lists_give_the_exact_answer_and_few_give_most_of_it(places, query, tmp_path):
    path = tmp_path / "places.faiss"
    whole = PlaceIndex(places, path, probes=10**6)
    score, index, _ = whole.scan(query, 5)
    expected, exact, _ = gallery.scan(query, places, 5)
    assert torch.equal(index, exact) and torch.allclose(score, expected, atol=1e-6)
    assert whole.recall(query) == whole.measured == 1
    recalls = [PlaceIndex(places, path, probes).recall(query) for probes in (1, 8, 48)]
    assert recalls == sorted(recalls) and recalls[0] < 0.9 and recalls[-1] > 0.95, recalls


def test_probabilities_are_bounds_from_above(places, query, tmp_path):
    score, _, total = PlaceIndex(places, tmp_path / "places.faiss", probes=16).scan(query, 1, scale=40.0)
    best, _, whole = gallery.scan(query, places, 1, scale=40.0)
    assert (total <= whole + 1e-4).all()
    same = torch.isclose(score, best)[:, 0]
    assert ((40 * score[:, 0] - total).exp() >= (40 * best[:, 0] - whole).exp() - 1e-4)[same].all()


def test_kept_and_mapped(places, query, tmp_path, monkeypatch):
    first = PlaceIndex(places, tmp_path / "places.faiss", probes=48)
    monkeypatch.setattr(place_index, "build", lambda *_: pytest.fail("built again"))
    monkeypatch.setattr(place_index, "synthetic_queries", lambda *_: pytest.fail("measured again"))
    again = PlaceIndex(places, tmp_path / "places.faiss", probes=48)
    assert torch.equal(first.scan(query, 5)[1], again.scan(query, 5)[1])
    assert again.measured == first.measured == pytest.approx(again.recall(query), abs=0.1)
    assert again.measured > 0.9
    with pytest.raises(ValueError, match="the gallery has 5000 places"):
        again.scan(query, 5001)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)


def replace_by_another(path):
    other = torch.nn.functional.normalize(torch.ones(4, 512), dim=1)
    PlaceIndex(other, path.with_name("other.faiss"))
    path.with_name("other.faiss").replace(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        flip,
        replace_by_another,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(1000)),
    ],
)
def test_a_damaged_or_foreign_file_is_built_again(places, query, tmp_path, capsys, damage):
    path = tmp_path / "places.faiss"
    expected = PlaceIndex(places, path, probes=4).scan(query, 5)[1]
    damage(path)
    path.with_name("places.recall-4.json").write_text("[")
    again = PlaceIndex(places, path, probes=4)
    assert torch.equal(again.scan(query, 5)[1], expected)
    assert "places.faiss is damaged or indexes other places; building it again" in capsys.readouterr().err
    assert torch.equal(PlaceIndex(places, path, probes=4).scan(query, 5)[1], expected)
    assert len(PlaceIndex(places[1:], path).places) == 4999  # stored under the name of other places
    assert "indexes other places" in capsys.readouterr().err


def test_without_faiss_it_says_what_to_install(places, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu, or search exactly"):
        PlaceIndex(places, tmp_path / "places.faiss")


def test_where_the_lists_hold_too_few_all_places_are_compared(places, query, tmp_path):
    index = PlaceIndex(places, tmp_path / "places.faiss", probes=1)
    score, found, total = index.scan(query, 300, scale=40.0)
    _, exact, whole = gallery.scan(query, places, 300, scale=40.0)
    assert (found >= 0).all() and torch.isfinite(score).all()
    same = (found == exact).all(1)
    assert same.any() and torch.allclose(total[same], whole[same], atol=1e-4)
