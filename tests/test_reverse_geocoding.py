"""The nearest town: correct across ±180°, at the poles and far out at sea."""

import numpy as np
import pandas as pd
import pytest
import torch

from geoclip import earth, paths
from geoclip.datasets import reverse_geocoding
from geoclip.datasets.reverse_geocoding import _towns, describe, nearest_town


def test_known_places():
    found = nearest_town([[48.8566, 2.3522], [40.7128, -74.0060], [-33.8568, 151.2153], [35.68, 139.76]])
    assert list(found["country"]) == ["France", "United States", "Australia", "Japan"]
    assert found["town"].iloc[0].startswith("Paris")  # GeoNames lists its arrondissements too
    assert (found["town_km"] < 5).all()


def test_the_published_demonstrations_lie_where_data_paper_says():
    published = pd.read_csv(paths.PAPER / "demonstrations.csv")
    found = nearest_town(published[["lat", "lon"]].to_numpy(), states=True)["state"]
    assert published["lies_in"].tolist() == found.tolist()
    assert published.groupby("photo")["rank"].apply(list).tolist() == [[1, 2, 3]] * 4
    assert (published.groupby("photo")["probability"].diff().dropna() <= 0).all()


def test_the_town_is_the_nearest_of_all_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    places = earth.sample_sphere(30, generator)
    # where degrees mislead: on both sides of ±180°, and around the poles
    hard = torch.tensor(
        [[-16.8, 179.99], [-16.8, -179.99], [89.9, 12.0], [-89.9, -170.0], [78.2, 15.6], [0.0, -180.0]]
    )
    places = torch.cat([places, hard]).double()
    towns, _ = _towns()
    there = torch.from_numpy(towns[["lat", "lon"]].to_numpy(np.float64, copy=True))
    brute = torch.stack([earth.haversine_km(place, there).min() for place in places])
    np.testing.assert_allclose(nearest_town(places)["town_km"], brute, rtol=1e-9)


def test_states_across_the_date_line_and_beside_each_other():
    # Both sides of ±180° belong to Northern Fiji; in degrees, the eastern side is closest to the Americas.
    found = nearest_town([[-16.8, 179.99], [-16.8, -179.99], [48.137, 11.575], [40.71, -74.006]], states=True)
    assert found["state"].tolist() == ["Northern, FJ", "Northern, FJ", "Bavaria, DE", "New York, US"]
    assert "state" not in nearest_town([[0, 0]])


def test_across_the_date_line():
    east, west = nearest_town([[-16.8, 179.99], [-16.8, -179.99]]).itertuples()
    assert east.country == west.country == "Fiji"
    assert abs(east.town_km - west.town_km) < 3


def test_oceans_and_antarctica_say_how_far():
    pole, nemo = nearest_town([[-90, 0], [-48.88, -123.39]]).itertuples()
    assert pole.town_km > 1000
    assert nemo.town_km > 2000
    assert describe(nemo.town, nemo.country, nemo.town_km).startswith("2,")
    assert " km from " in describe(nemo.town, nemo.country, nemo.town_km)


def test_words():
    assert describe("Paris", "France", 1.2) == "Paris, France"
    assert describe("Ushuaia", "Argentina", 912.4) == "912 km from Ushuaia, Argentina"


def test_no_places():
    assert len(nearest_town(np.zeros((0, 2)))) == 0


@pytest.mark.slow
def test_the_table_is_cached_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(reverse_geocoding.paths, "CACHE", tmp_path)
    first = reverse_geocoding._table()
    [path] = (tmp_path / "towns").iterdir()
    pd.testing.assert_frame_equal(reverse_geocoding._table(), first, check_exact=True)
    path.write_bytes(path.read_bytes().replace(b"Paris", b"Pires"))
    pd.testing.assert_frame_equal(reverse_geocoding._table(), first, check_exact=True)
    monkeypatch.setattr(reverse_geocoding.paths, "CACHE", path)  # a file, so no folder can be made
    assert len(reverse_geocoding._table()) == len(first)
