"""The public benchmarks and training sets: what each contains, its file format, and where to get it.

The environment variable GEOCLIP_DATA names the folder that holds the data you bring::

    GEOCLIP_DATA/im2gps3k_places365.csv     the CSV of a card, here or in benchmarks/
    GEOCLIP_DATA/images/im2gps3k/…          its images, named as in the CSV
    GEOCLIP_DATA/osv-mini/…                 OSV-5M, OSV-Mini and NUS-WIDE keep their own folder layout

The cards are in benchmarks.toml. Files with another SHA-256 than a card's are accepted and reported.
"""

import tomllib
from collections.abc import Sized
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from geoclip import paths
from geoclip.datasets import folder

# The metadata format of Im2GPS, Im2GPS3k, YFCC4k, YFCC26k and MP-16. AUTHOR is the Flickr photographer;
# S3_Label is what a Places365 classifier saw.
PLACES365 = "IMG_ID,AUTHOR,LAT,LON,S3_Label,S16_Label,S365_Label,Prob_indoor,Prob_natural,Prob_urban"
PLACES365_COLUMNS = {"file": "IMG_ID", "lat": "LAT", "lon": "LON", "author": "AUTHOR"}
SCENES = ("indoor", "natural", "urban")  # S3_Label 0, 1, 2
OSV_COLUMNS = {"file": "id", "lat": "latitude", "lon": "longitude"}
CLIMATES = 30  # Köppen–Geiger classes, counted from 0
REHEARSAL = "REHEARSAL.txt"  # marks a folder of `python -m geoclip rehearse`, whose sets are none


@dataclass(frozen=True)
class Card:
    """One data set."""

    name: str
    title: str
    what: str
    source: str
    licence: str
    csv: str = ""  # its path in GEOCLIP_DATA, or "" for a folder with a reader of its own
    n: int | None = None  # the published number of rows, if a source gives it
    sha256: str | None = None  # of the CSV


_CARDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
CARDS = {name: Card(name, **about) for name, about in _CARDS.items()}


def card(name: str) -> Card:
    """The card with this name or title (case is ignored, `_` equals `-`). ValueError lists the known names."""
    wanted = name.lower().replace("_", "-")
    for known in CARDS.values():
        if wanted in (known.name.lower().replace("_", "-"), known.title.lower()):
            return known
    raise ValueError(f"unknown benchmark {name!r}; choose from {', '.join(CARDS)}")


def data_folder() -> Path:
    """The folder GEOCLIP_DATA; FileNotFoundError explains how to set it."""
    found = paths.geoclip_data()
    if found is None:
        raise FileNotFoundError("benchmarks need GEOCLIP_DATA, which is not set (datasets/benchmarks.toml)")
    return found


def find_csv(wanted: Card, data: Path | None = None) -> Path:
    """The card's CSV in `data` (default: GEOCLIP_DATA). FileNotFoundError says where to get a missing file."""
    if not wanted.csv:
        raise ValueError(f"{wanted.title} has labels and coordinates: read it with geoclip.datasets.nus_wide")
    data = data or data_folder()
    tried = [data / wanted.csv, data / "benchmarks" / wanted.csv]
    for csv in tried:
        if csv.is_file():
            return csv
    missing = f"{wanted.csv} was not found at {tried[0]} or {tried[1]}"
    raise FileNotFoundError(f"{wanted.title}: {missing}; get it from: {wanted.source}")


def on_disk(name: str) -> str:
    """What GEOCLIP_DATA holds of a benchmark: "photos", "coordinates" (without photos), "nothing", or "damaged: …"."""
    if paths.geoclip_data() is None:
        return "nothing"
    try:
        return "coordinates" if load(name).images is None else "photos"
    except FileNotFoundError:
        return "nothing"
    except ValueError as error:
        return f"damaged: {error}"


def load(
    name: str, data: Path | None = None, images: Path | str | None = None, strict: bool = False
) -> folder.Geotagged:
    """Load a benchmark or training set by the name of its card.

    images: its image folder; default GEOCLIP_DATA/images/<name> if that exists, else only coordinates are read.
    A set with another number of rows than published is named after what it is ("Im2GPS3k, 2,990 of 2,997"),
    because scores on part of a benchmark cannot be compared; strict: raise ValueError for it instead.
    """
    wanted = card(name)
    data = data or data_folder()
    csv = find_csv(wanted, data)
    if wanted.name in OSV_READERS:
        photos = OSV_READERS[wanted.name](csv)
    else:
        default = data / "images" / wanted.name
        photos = read_csv(csv, images or (default if default.is_dir() else None), wanted.title)
    whole = wanted.n is None or len(photos) == wanted.n
    if strict and not whole:
        rows = f"{len(photos):,} rows, but the published set has {wanted.n:,}"
        raise ValueError(f"{wanted.title}: {rows}; without --strict, the part is used under another name")
    named = marked(photos.name, data)
    return replace(photos, name=named if whole else f"{named}, {expected(wanted, photos)}")


def marked(title: str, data: Path) -> str:
    """`title`, or if the folder `data` is a rehearsal's, the title of a rehearsal."""
    return f"{title} rehearsal" if (data / REHEARSAL).is_file() else title


def expected(wanted: Card, photos: Sized) -> str:
    """How many of the published rows there are, such as "2,990 of 2,997"."""
    return f"{len(photos):,} of {wanted.n or len(photos):,}"


def called(title: str, photos: Sized) -> str:
    """`title`, or if the published set has another number of photos, what it is: "Im2GPS3k, 2,990 of 2,997"."""
    known = next((card for card in CARDS.values() if card.title == title.removesuffix(" rehearsal")), None)
    whole = known is None or known.n in (None, len(photos))
    return title if whole else f"{title}, {expected(known, photos)}"


def read_csv(csv: Path | str, images: Path | str | None = None, name: str | None = None) -> folder.Geotagged:
    """Read any CSV of photos and places: `*_places365.csv` as benchmark metadata, `*_mini.csv` as OSV-Mini's."""
    if str(csv).endswith("_mini.csv"):
        return read_osv_mini(Path(csv))
    return (read_places365 if str(csv).endswith("_places365.csv") else folder.read)(csv, images, name)


def read_places365(csv, images=None, name: str | None = None) -> folder.Geotagged:
    """Read a `*_places365.csv` (PLACES365) and add a column `scene`: "indoor", "natural" or "urban"."""
    photos = folder.read(csv, images, name, PLACES365_COLUMNS, keep=["S3_Label"])
    table = photos.table
    known = {"valid": lambda n: n.isin(range(3)), "lines": table["line"]}
    label = folder.numbers(csv, table, "S3_Label", "0, 1 or 2 (see SCENES)", **known)
    table["scene"] = label.map(dict(enumerate(SCENES)))
    del table["S3_Label"]
    return photos


def read_osv_mini(csv: Path) -> folder.Geotagged:
    """Read OSV-Mini's {split}_mini.csv, with {split}_images/{region}/{id}.jpg beside it.

    Adds region, sub-region, city, climate (0–29, -1 if unknown) and captured_at (UTC or NaT).
    """
    split = csv.name.removesuffix("_mini.csv")
    keep = ["region", "sub-region", "city", "climate", "captured_at"]
    photos = folder.read(csv, csv.parent / f"{split}_images", f"OSV-Mini {split}", OSV_COLUMNS, keep)
    table = photos.table
    table["file"] = table["region"] + "/" + table["file"] + ".jpg"
    what, known = f"a class from 0 to {CLIMATES - 1}", {"gaps": True, "lines": table["line"]}
    climate = folder.numbers(csv, table, "climate", what, lambda n: n.isin(range(CLIMATES)), **known)
    time = folder.numbers(csv, table, "captured_at", "a number of milliseconds since 1970", **known)
    table["climate"] = climate.fillna(-1).astype(int)
    table["captured_at"] = pd.to_datetime(time, unit="ms", utc=True)
    return photos


def read_osv5m(csv: Path) -> folder.Geotagged:
    """Read OSV-5M's test.csv, with images/test/{archive number}/{id}.jpg beside it.

    Images that are not on disk keep the bare name {id}.jpg and so count as missing.
    """
    images = csv.parent / "images" / "test"
    photos = folder.read(csv, images, "OSV-5M test", OSV_COLUMNS)
    where = {path.name: str(path.relative_to(images)) for path in images.rglob("*.jpg")}
    names = photos.table["file"] + ".jpg"
    photos.table["file"] = names.map(where).fillna(names)
    return photos


OSV_READERS = {"osv-mini": read_osv_mini, "osv5m": read_osv5m}


def is_pinned(wanted: Card, csv: Path) -> bool | None:
    """Whether the hash of `csv` is that of the card; None if the card has none."""
    return wanted.sha256 and paths.sha256(csv) == wanted.sha256
