"""Geotagged photos from a CSV file and an image folder; all CSV files of coordinates pass the same checks."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from csv import Error as CSVError
from csv import reader
from dataclasses import dataclass, replace
from os.path import exists
from pathlib import Path

import numpy as np
import pandas as pd

from geoclip.datasets import tars
from geoclip.photos import Upload

# Recognised column names, in lower case. The released training CSV has IMG_FILE,LAT,LON.
ALIASES = {
    "file": ("img_file", "img_id", "path", "file", "filename", "name", "image"),
    "lat": ("lat", "latitude"),
    "lon": ("lon", "lng", "longitude"),
    "author": ("author", "creator_id"),
}


@dataclass(frozen=True, eq=False)
class Geotagged(Sequence):
    """Photos, as a sequence, and the places where they were taken.

    table: columns file, lat, lon (degrees), author (None if unknown) and line (in the CSV), plus those that the
    format adds, and tar, offset and size for photos in tar shards; images: the folder that `file` is relative to,
    or None if there are only coordinates.
    """

    name: str
    table: pd.DataFrame
    images: Path | None = None

    def __len__(self) -> int:
        return len(self.table)

    @property
    def latlon(self) -> np.ndarray:
        """(n, 2) float64, (lat, lon) degrees."""
        return self.table[["lat", "lon"]].to_numpy(np.float64, copy=True)

    @property
    def authors(self) -> np.ndarray | None:
        """(n,) photographers, or None unless every photo names one."""
        author = self.table["author"]
        return None if author.isna().any() else author.to_numpy()

    def path(self, index: int) -> Path:
        """Path of photo `index`. Public copies also store `45/77/1.jpg` as `45_77_1.jpg`; both are found."""
        if self.images is None:
            raise FileNotFoundError(f"{self.name}: there is no image folder, only coordinates")
        name = self.table["file"].iloc[index]
        path, flat = self.images / name, self.images / name.replace("/", "_")
        return flat if not exists(path) and exists(flat) else path

    def __getitem__(self, index: int) -> Path | Upload:
        """Photo `index`: its path, or its name and bytes if it lies in a tar."""
        if "tar" not in self.table or pd.isna(self.table["tar"].iloc[index]):
            return self.path(index)
        name, tar, offset, size = self.table[["file", "tar", "offset", "size"]].iloc[index]
        with open(tar, "rb") as file:
            file.seek(int(offset))
            return Upload(name, file.read(int(size)))

    def rows(self, kept: np.ndarray | pd.Series) -> "Geotagged":
        """Some of the photos, by number or mask, numbered from 0."""
        return replace(self, table=self.table.loc[kept].reset_index(drop=True))

    def missing(self) -> list[str]:
        """The files that are listed in the CSV but absent from folder or tars, in the order of the CSV."""
        if "tar" in self.table:
            return self.table["file"][self.table["tar"].isna()].tolist()
        return [self.table["file"].iloc[i] for i in range(len(self)) if not exists(self.path(i))]


def read(
    csv: Path | str,
    images: Path | str | None = None,
    name: str | None = None,
    columns: dict[str, str] | None = None,
    keep: Sequence[str] = (),
) -> Geotagged:
    """Read a CSV of photos and places. By default, columns are recognised by name in any case (ALIASES).

    images: their folder, or tar shards that hold photos of these names; shards in place of the CSV bring the
    places. columns: the format's own names for file, lat, lon and author; keep: further columns to copy unchanged.
    Raises ValueError, naming file, line and value, if the set is empty, a column is missing, a coordinate is
    not a number or out of range, or the columns are swapped.
    """
    csv = Path(csv)
    if csv.suffix == ".tar":
        table = tars.index(str(csv)).dropna(subset="lat", ignore_index=True)
        return Geotagged(name or csv.name, table.assign(author=None, line=table.index + 1), csv)
    in_tars = images is not None and Path(images).suffix == ".tar"
    if images is not None and not in_tars and not Path(images).is_dir():
        raise FileNotFoundError(f"{images}: no such image folder")
    table = read_text(csv)
    columns = columns or recognise(csv, table.columns, ("file", "lat", "lon"))
    if lacking := [column for column in (*columns.values(), *keep) if column not in table.columns]:
        raise ValueError(f"{csv}: no column {', '.join(lacking)}; the header is {','.join(table.columns)}")
    places = _checked_places(csv, table, columns)
    places["file"] = table[columns["file"]]
    places["author"] = table[columns["author"]].replace("", None) if "author" in columns else None
    for column in keep:
        places[column] = table[column]
    unnamed = places["file"].str.strip() == ""
    if unnamed.any():
        raise ValueError(f"{csv}, line {places['line'][unnamed].iloc[0]}: {columns['file']} is empty")
    places = places.reset_index(drop=True)
    if in_tars:
        places = places.merge(tars.index(str(images)).drop(columns=["lat", "lon"]), how="left", on="file")
    return Geotagged(name or csv.stem, places, None if images is None else Path(images))


def read_places(csv: Path | str) -> np.ndarray:
    """(n, 2) places of any CSV with latitude and longitude columns (ALIASES). Raises as `read` does."""
    csv = Path(csv)
    table = read_text(csv)
    places = _checked_places(csv, table, recognise(csv, table.columns, ("lat", "lon")))
    return places[["lat", "lon"]].to_numpy(np.float64, copy=True)


def read_rows(csv: Path | str, rows: int) -> Iterator[tuple[pd.DataFrame, pd.DataFrame, list[dict]]]:
    """All rows of a CSV with latitude and longitude columns (ALIASES), also those with invalid coordinates.

    Yields, for each part of `rows` lines, the rows as text; their latitude and longitude in degrees, NaN for both in
    a refused row; and the file, line, column and value of each refused row.
    """
    for table, latlon, bad in _rough_places(Path(csv), rows):
        at = bad[bad.any(axis=1)].idxmax(axis=1).items()
        refused = [{"file": str(csv), "line": r + 2, "column": c, "value": table.at[r, c]} for r, c in at]
        yield table, latlon.mask(bad.any(axis=1)), refused


def count_rows(csv: Path | str, rows: int) -> tuple[int, int]:
    """Number of rows, and of those that read_rows refuses, from reading `rows` lines at a time.

    Raises as read_rows does, and ValueError if latitude and longitude are swapped.
    """
    n, refused, steep, extremes = 0, 0, 0, []
    for table, latlon, bad in _rough_places(Path(csv), rows):
        size = latlon.abs().fillna(0)
        lat = size.iloc[:, 0]
        n, refused, steep = n + len(table), refused + bad.any(axis=1).sum(), steep + (lat > 90).sum()
        extremes.append(latlon.loc[[(lat > 90).idxmax(), *size.idxmax()]])
    if steep > 0.1 * n:  # a single one is a bad row
        _check_order(Path(csv), pd.concat(extremes).groupby(level=0).first())
    return n, int(refused)


def _rough_places(csv: Path, rows: int) -> Iterator[tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]]:
    """Rows as text, latitude and longitude, NaN if not a number, and which of the two are no coordinates."""
    for table in read_parts(csv, rows=rows):
        columns = recognise(csv, table.columns, ("lat", "lon"))
        latlon = table[[columns["lat"], columns["lon"]]].apply(pd.to_numeric, errors="coerce")
        latlon = latlon.astype(np.float64)
        yield table, latlon, ~(latlon.abs() <= [90, 180])  # negated, so NaN is bad too


def header(csv: Path | str) -> list[str]:
    """The names of a CSV's columns."""
    return list(next(read_parts(Path(csv), rows=1)).columns)


def recognise(
    csv: Path, header: Iterable[str], needed: Sequence[str], aliases: Mapping[str, Sequence[str]] = ALIASES
) -> dict[str, str]:
    """Map file, lat, lon and author to their names in this header; ValueError if one of `needed` is missing."""
    header = list(header)
    lower = {name.lower(): name for name in reversed(header)}
    found = {}
    for meaning, names in aliases.items():
        found[meaning] = next((lower[name] for name in names if name in lower), None)
        if found[meaning] is None and meaning in needed:
            what = f"no column for {meaning} (one of {', '.join(names)})"
            raise ValueError(f"{csv}: {what}; the header is {','.join(header)}")
    return {meaning: name for meaning, name in found.items() if name is not None}


def read_text(path: Path, skip: int = 0, **options) -> pd.DataFrame:
    """A CSV as text without blank lines, indexed by line number - 2. skip: lines before the header."""
    return next(read_parts(path, skip, **options))


def read_parts(
    path: Path, skip: int = 0, rows: int | None = None, header: int | None = 0, **options
) -> Iterator[pd.DataFrame]:
    """The table of `read_text` in parts of at most `rows` lines (None: in one). header: None if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    options |= dict(keep_default_na=False, skip_blank_lines=False, index_col=False, dtype=str, header=header)
    empty, checked = True, False
    try:
        with pd.read_csv(path, skiprows=skip, iterator=True, **options) as parts:
            while True:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", pd.errors.ParserWarning)  # of rows that are too long
                    try:
                        table = parts.get_chunk(rows)
                    except StopIteration:
                        break
                table = table.rename(columns=lambda name: str(name).strip()).fillna("")
                table = table[(table != "").any(axis=1)]
                table.index += skip - (header is None)
                if not checked and (table.iloc[:, -1] == "").any():
                    _refuse_short_rows(path, skip, table.shape[1])
                    checked = True
                if len(table):
                    empty = False
                    yield table
        if empty:
            raise ValueError(f"{path}: there are no rows below the header")
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path}: the file is empty") from None
    except (CSVError, pd.errors.ParserError, pd.errors.ParserWarning, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({str(error).strip()})") from None


def _refuse_short_rows(path: Path, skip: int, columns: int) -> None:
    """Raise ValueError for a row with fewer fields than the header, which pandas fills with empty ones."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = reader(file)
        for row in itertools.islice(rows, skip, None):
            if any(row) and len(row) < columns:
                found = f"{len(row)} fields, but the header has {columns}"
                raise ValueError(f"{path}, line {rows.line_num}: {found}")


def _checked_places(csv: Path, table: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """Columns lat, lon and line of the table, checked; 180° becomes -180°."""
    names = [columns["lat"], columns["lon"]]
    latlon = pd.DataFrame({name: numbers(csv, table, name, "a number of degrees") for name in names})
    _check_order(csv, latlon)
    for name, limit in zip(names, (90, 180), strict=True):
        bad = latlon[name].abs() > limit
        if bad.any():
            row, others = bad.idxmax(), f"{bad.sum():,} of {len(bad):,} rows are out of range"
            value = f"{name} is {latlon.at[row, name]:g}, beyond ±{limit}"
            raise ValueError(f"{csv}, line {row + 2}: {value}; {others}")
    places = latlon.set_axis(["lat", "lon"], axis=1).assign(line=table.index + 2)  # the header is line 1
    places.loc[places["lon"] == 180, "lon"] = -180.0
    return places


def _check_order(csv: Path, latlon: pd.DataFrame) -> None:
    """Raise ValueError if the two columns, latitude and longitude, can only be each other."""
    lat, lon = latlon.abs().max()
    if 90 < lat <= 180 and lon <= 90:
        (one, other), row = latlon.columns, (latlon.iloc[:, 0].abs() > 90).idxmax()
        found = f"line {row + 2} has {one} {latlon.at[row, one]:g}, beyond ±90"
        advice = "exchange the two names in the header"
        raise ValueError(f"{csv}: the columns {one} and {other} are swapped: {found}; {advice}")


def numbers(
    csv: Path | str,
    table: pd.DataFrame,
    column: str,
    what: str,
    valid: Callable = np.isfinite,
    gaps: bool = False,
    lines: pd.Series | None = None,
) -> pd.Series:
    """A column of text as numbers; ValueError, with line, value and `what` it is not, for one that is not `valid`.

    gaps: empty cells are allowed and become NaN. lines: of the rows, by default those of `read_text`.
    """
    value = pd.to_numeric(table[column], errors="coerce").astype(np.float64)
    bad = ~valid(value)
    if gaps:
        bad &= table[column].str.strip() != ""
    if bad.any():
        first = bad.idxmax()
        line = first + 2 if lines is None else lines[first]
        others = f"{bad.sum():,} of {len(table):,} rows have no valid number"
        raise ValueError(f"{csv}, line {line}: {column} is {table.at[first, column]!r}, not {what}; {others}")
    return value
