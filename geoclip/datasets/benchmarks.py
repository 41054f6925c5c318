"""The public benchmarks and training sets: what each contains, its file format, and where to get it.

The environment variable GEOCLIP_DATA names the folder that holds the data you bring:

    GEOCLIP_DATA/im2gps3k_places365.csv     the CSV of a card, here or in benchmarks/
    GEOCLIP_DATA/images/im2gps3k/…          its images, named as in the CSV
    GEOCLIP_DATA/osv-mini/…                 OSV-5M, OSV-Mini and NUS-WIDE keep their own folder layout

A card's sha256 is that of the CSV from which this project's coordinate results were computed. Files with
another hash are accepted, and the difference is reported.
"""

import hashlib
from dataclasses import dataclass
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

TRANSLOCATOR = "github.com/ShramanPramanick/Transformer_Based_Geo-localization"
FLICKR = "Flickr photos under their photographers' licences; the metadata file: MIT"


@dataclass(frozen=True)
class Card:
    """One data set.

    format: "places365", "csv" (path,lat,lon), "osv-mini", "osv-5m" or "nus-wide". n: the published number of
    rows, or None if no source gives it. csv: file name, or "" for a folder GEOCLIP_DATA/<name>. sha256: of
    the CSV, or None.
    """

    name: str
    title: str
    format: str
    n: int | None
    csv: str
    what: str
    source: str
    licence: str
    sha256: str | None = None


_CARDS = (
    Card(
        "mp16",
        "MP-16",
        "places365",
        4_723_695,
        "mp16_places365.csv",
        "Geotagged Flickr photos of the MediaEval 2016 Placing Task (from YFCC100M); the paper's training "
        "set.",
        "MediaEval 2016 Placing Task; as images: huggingface.co/datasets/Jia-py/MP16-Pro (4.12 M still "
        "alive in 2024, "
        "`/` in names written `_`). The URL list that went with it was withdrawn by its project.",
        "Creative Commons, each photo its own; academic research",
    ),
    Card(
        "im2gps",
        "Im2GPS",
        "places365",
        237,
        "im2gps_places365.csv",
        "The field's first benchmark (Hays, Efros 2008): 237 geotagged Flickr photos.",
        f"graphics.cs.cmu.edu/projects/im2gps; metadata: {TRANSLOCATOR}, resources/",
        FLICKR,
        "213c4d27f805c616948d582f20fe2bd4ab0c7a1ab5af08bee05f6481b0c7077f",
    ),
    Card(
        "im2gps3k",
        "Im2GPS3k",
        "places365",
        2997,
        "im2gps3k_places365.csv",
        "Three thousand photos (Vo, Jacobs, Hays 2017); the archive has 3,000 files and the metadata lists "
        "2,997.",
        f"github.com/lugiavn/revisiting-im2gps (im2gps3ktest.zip); metadata: {TRANSLOCATOR}, resources/",
        FLICKR,
        "0f243d1e23cbb4ab8f0a83fa045ebae642dac2458fb94a1540db6f5f5588031d",
    ),
    Card(
        "yfcc4k",
        "YFCC4k",
        "places365",
        4536,
        "yfcc4k_places365.csv",
        "4,536 geotagged Flickr photos of YFCC100M (Vo, Jacobs, Hays 2017).",
        f"images: {TRANSLOCATOR}; metadata: huggingface.co/Jia-py/G3-checkpoint",
        FLICKR,
    ),
    Card(
        "yfcc26k",
        "YFCC26k",
        "places365",
        25_600,
        "yfcc25600_places365.csv",
        "Geotagged Flickr photos of YFCC100M by 13,018 photographers; the largest of the four Flickr "
        "benchmarks.",
        f"metadata: {TRANSLOCATOR}, resources/; images: from Flickr by id (a growing share has been deleted)",
        FLICKR,
        "a49363ef7d87e8a2484169a2b0971f07355743d0741b9fcff7ffc8441afd397d",
    ),
    Card(
        "gws15k",
        "GWS15k",
        "csv",
        14_955,
        "gws15k.csv",
        "Google World Streets 15K: Google Street View images; the photographers are not named.",
        "not published: ask the authors of GeoGuessNet (github.com/AHKerrigan/GeoGuessNet)",
        "Google Street View imagery, Google's terms",
    ),
    Card(
        "osv5m",
        "OSV-5M",
        "osv-5m",
        210_122,
        "",
        "OpenStreetView-5M, test split: Mapillary street views of 225 countries and territories, at least "
        "1 km from "
        "the 4,894,685 images of the training split.",
        "huggingface.co/datasets/osv5m/osv5m; unpack to GEOCLIP_DATA/osv5m/{test.csv,images/test/…}",
        "CC BY-SA 4.0",
    ),
    Card(
        "osv-mini",
        "OSV-Mini",
        "osv-mini",
        None,
        "",
        "A subset of OSV-5M of about 129 K images with region, climate and time of capture; test split.",
        "kaggle.com/datasets/josht000/osv-mini-129k; unpack to GEOCLIP_DATA/osv-mini/"
        "{test_mini.csv,test_images/{region}/{id}.jpg}",
        "CC BY-SA 4.0, as OSV-5M",
    ),
    Card(
        "nus-wide",
        "NUS-WIDE, geo-tagged",
        "nus-wide",
        68_574,
        "",
        "Flickr photos with 81 concepts; those with a geotag: 41,173 for training, 27,401 for testing.",
        "the National University of Singapore on request; its geotag files have no public mirror",
        "research use",
    ),
)
CARDS = {card.name: card for card in _CARDS}


def card(name: str) -> Card:
    """The card with this name or title (case is ignored, `_` equals `-`). ValueError lists the known names."""
    wanted = name.lower().replace("_", "-")
    for known in CARDS.values():
        if wanted in (known.name, known.title.lower()):
            return known
    raise ValueError(f"unknown benchmark {name!r}; choose from {', '.join(CARDS)}")


def data_folder() -> Path:
    """The folder GEOCLIP_DATA; FileNotFoundError explains how to set it."""
    found = paths.geoclip_data()
    if found is None:
        raise FileNotFoundError(
            "benchmarks are read from the folder named by the environment variable GEOCLIP_DATA, which is "
            "not set; "
            "geoclip/datasets/benchmarks.py describes its layout"
        )
    return found


def find_csv(wanted: Card, data: Path | None = None) -> Path:
    """The card's CSV in `data` (default: GEOCLIP_DATA). FileNotFoundError says where to get a missing file."""
    data = data or data_folder()
    if wanted.format.startswith("osv"):
        return data / wanted.name / ("test.csv" if wanted.format == "osv-5m" else "test_mini.csv")
    if not wanted.csv:
        raise ValueError(f"{wanted.title} is a folder with its own layout, not a CSV file")
    tried = [data / wanted.csv, data / "benchmarks" / wanted.csv]
    for csv in tried:
        if csv.is_file():
            return csv
    raise FileNotFoundError(
        f"{wanted.title}: {wanted.csv} was not found at {tried[0]} or {tried[1]}; get it from: "
        f"{wanted.source}"
    )


def on_disk(name: str) -> str:
    """What GEOCLIP_DATA holds of a benchmark: "photos", "coordinates" (without photos) or "nothing"."""
    data, wanted = paths.geoclip_data(), card(name)
    if data is None:
        return "nothing"
    try:
        csv = find_csv(wanted, data)
    except (FileNotFoundError, ValueError):
        return "nothing"
    if wanted.format.startswith("osv"):
        return "photos" if csv.is_file() else "nothing"
    return "photos" if (data / "images" / wanted.name).is_dir() else "coordinates"


def load(
    name: str, data: Path | None = None, images: Path | str | None = None, strict: bool = True
) -> folder.Geotagged:
    """Load a benchmark or training set by the name of its card.

    images: its image folder; default GEOCLIP_DATA/images/<name> if that exists, else only coordinates are
    read, which suffice for ceilings, floors and leakage. strict: raise ValueError if the number of rows
    differs from the published one, because scores on part of a benchmark cannot be compared. Raises as
    `folder.read` does.
    """
    wanted = card(name)
    data = data or data_folder()
    if wanted.format == "nus-wide":
        raise ValueError(
            "NUS-WIDE consists of labels and coordinates: read it with geoclip.datasets.nus_wide"
        )
    if wanted.format.startswith("osv"):
        photos = (read_osv_mini if wanted.format == "osv-mini" else read_osv5m)(data / wanted.name)
    else:
        default = data / "images" / wanted.name
        images = images or (default if default.is_dir() else None)
        read = read_places365 if wanted.format == "places365" else folder.read
        photos = read(find_csv(wanted, data), images, wanted.title)
    if strict and wanted.n is not None and len(photos) != wanted.n:
        raise ValueError(
            f"{wanted.title}: {len(photos):,} rows, but the published set has {wanted.n:,}. To use part of "
            "it, pass "
            f"it as a CSV of your own, so that its scores are not mistaken for the benchmark's"
        )
    return photos


def read_csv(csv: Path | str, images: Path | str | None = None) -> folder.Geotagged:
    """Read any CSV of photos and places; files named `*_places365.csv` as benchmark metadata."""
    return (read_places365 if str(csv).endswith("_places365.csv") else folder.read)(csv, images)


def read_places365(
    csv: Path | str, images: Path | str | None = None, name: str | None = None
) -> folder.Geotagged:
    """Read a `*_places365.csv` (PLACES365) and adds a column `scene`: "indoor", "natural" or "urban".

    Raises as `folder.read` does, and ValueError if S3_Label is not 0, 1 or 2.
    """
    photos = folder.read(csv, images, name, PLACES365_COLUMNS, keep=["S3_Label"])
    label = photos.table.pop("S3_Label")
    scene = label.map({str(number): scene for number, scene in enumerate(SCENES)})
    if scene.isna().any():
        row = scene.isna().idxmax()
        raise ValueError(
            f"{csv}, line {photos.table.at[row, 'line']}: S3_Label is {label[row]!r}, not 0 (indoor), 1 "
            "(natural) "
            f"or 2 (urban)"
        )
    photos.table["scene"] = scene
    return photos


def read_osv_mini(directory: Path | str, split: str = "test") -> folder.Geotagged:
    """Read OSV-Mini: {split}_mini.csv and {split}_images/{region}/{id}.jpg, split "train" or "test".

    Adds region, sub-region, city, climate (0–29, -1 if unknown) and captured_at (UTC or NaT). Raises as
    `folder.read` does, and ValueError if a climate is outside 0–29 or a time is not a number of milliseconds.
    """
    directory = Path(directory)
    csv = directory / f"{split}_mini.csv"
    keep = ["region", "sub-region", "city", "unique_city", "unique_sub-region", "climate", "captured_at"]
    photos = folder.read(csv, directory / f"{split}_images", f"OSV-Mini {split}", OSV_COLUMNS, keep)
    table = photos.table
    table["file"] = table["region"] + "/" + table["file"] + ".jpg"
    climate = _numbers(csv, table, "climate", range(CLIMATES), f"not a class from 0 to {CLIMATES - 1}")
    milliseconds = _numbers(csv, table, "captured_at", None, "not a number of milliseconds since 1970")
    table["climate"] = climate.fillna(-1).astype(int)
    table["captured_at"] = pd.to_datetime(milliseconds, unit="ms", utc=True)
    return photos


def read_osv5m(directory: Path | str, split: str = "test") -> folder.Geotagged:
    """Read OSV-5M: {split}.csv and images/{split}/{archive number}/{id}.jpg, split "train" or "test".

    Images that are not on disk keep the bare name {id}.jpg and so count as missing. Raises as `folder.read`
    does.
    """
    directory = Path(directory)
    images = directory / "images" / split
    photos = folder.read(directory / f"{split}.csv", images, f"OSV-5M {split}", OSV_COLUMNS)
    where = {path.name: str(path.relative_to(images)) for path in images.rglob("*.jpg")}
    names = photos.table["file"] + ".jpg"
    photos.table["file"] = names.map(where).fillna(names)
    return photos


def is_pinned(wanted: Card, csv: Path) -> bool | None:
    """Whether the hash of `csv` is that of the card; None if the card has none."""
    if wanted.sha256 is None:
        return None
    return hashlib.sha256(csv.read_bytes()).hexdigest() == wanted.sha256


def _numbers(csv: Path, table: pd.DataFrame, column: str, allowed, reason: str) -> pd.Series:
    """A column as numbers, NaN where the cell is empty; ValueError for other text or a value that is not
    allowed."""
    text = table[column].str.strip()
    numbers = pd.to_numeric(text, errors="coerce")
    bad = numbers.isna() if allowed is None else ~numbers.isin(allowed)
    bad &= text != ""
    if bad.any():
        row = bad.idxmax()
        raise ValueError(f"{csv}, line {table.at[row, 'line']}: {column} is {text[row]!r}, {reason}")
    return numbers
