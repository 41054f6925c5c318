"""OpenStreetView-5M and its 129 K subset OSV-Mini: street views from Mapillary with region and climate.

OSV-Mini unpacks to `{split}_mini.csv` and `{split}_images/{region}/{id}.jpg`; OSV-5M to `{split}.csv` and
`images/{split}/{number of its archive}/{id}.jpg`.
"""

from pathlib import Path

import pandas as pd

from geoclip.datasets import folder

COLUMNS = {"file": "id", "lat": "latitude", "lon": "longitude"}
CLIMATES = 30  # Köppen–Geiger classes, counted from 0


def read_mini(directory: Path | str, split: str = "test", trust_header: bool = False) -> folder.Geotagged:
    """OSV-Mini, split "train" or "test", with region, climate (0–29, -1 unknown) and captured_at (UTC or NaT).

    Raises as folder.read does, FileNotFoundError where the folder is laid out in another way, and ValueError
    for a climate outside 0–29 or a time that is no number of milliseconds.
    """
    directory = Path(directory)
    csv, images = directory / f"{split}_mini.csv", directory / f"{split}_images"
    keep = ["region", "sub-region", "city", "unique_city", "unique_sub-region", "climate", "captured_at"]
    photos = folder.read(csv, images, f"OSV-Mini {split}", COLUMNS, keep, trust_header)
    table = photos.table
    table["file"] = table["region"] + "/" + table["file"] + ".jpg"
    climate = _numbers(csv, table, "climate", f"not a class from 0 to {CLIMATES - 1}")
    known = climate.dropna()
    outside = known[~known.isin(range(CLIMATES))]
    if len(outside):
        row = outside.index[0]
        raise ValueError(
            f"{csv}, line {table.at[row, 'line']}: climate is {table.at[row, 'climate']}, not 0 to {CLIMATES - 1}"
        )
    milliseconds = _numbers(csv, table, "captured_at", "not a number of milliseconds since 1970")
    table["climate"] = climate.fillna(-1).astype(int)
    table["captured_at"] = pd.to_datetime(milliseconds, unit="ms", utc=True)
    return photos


def read_5m(directory: Path | str, split: str = "test", trust_header: bool = False) -> folder.Geotagged:
    """OSV-5M, split "train" or "test"; `file` is found by its id in whichever archive's folder holds it.

    Images that are not on disk keep the bare name `{id}.jpg`, so that they count as missing. Raises as
    folder.read does.
    """
    directory = Path(directory)
    images = directory / "images" / split
    photos = folder.read(
        directory / f"{split}.csv", images, f"OSV-5M {split}", COLUMNS, trust_header=trust_header
    )
    where = {path.name: str(path.relative_to(images)) for path in images.rglob("*.jpg")}
    names = photos.table["file"] + ".jpg"
    photos.table["file"] = names.map(where).fillna(names)
    return photos


def _numbers(csv: Path, table: pd.DataFrame, column: str, reason: str) -> pd.Series:
    """A column as numbers, NaN where the cell is empty; anything else is refused."""
    text = table[column].str.strip()
    numbers = pd.to_numeric(text, errors="coerce")
    bad = numbers.isna() & (text != "")
    if bad.any():
        row = bad.idxmax()
        raise ValueError(f"{csv}, line {table.at[row, 'line']}: {column} is {text[row]!r}, {reason}")
    return numbers
