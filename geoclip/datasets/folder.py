"""Any CSV of photos and places beside a folder of images: the data set that everything else reads.

The exact public formats have modules of their own (places365, gws15k, osv) and all end here, so that one set of
checks refuses swapped columns, NaN and rows that are no place.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

# Header names that mean one thing, in lower case. IMG_FILE,LAT,LON is the released training format.
ALIASES = {
    "file": ("img_file", "img_id", "path", "file", "image"),
    "lat": ("lat", "latitude"),
    "lon": ("lon", "lng", "longitude"),
    "author": ("author", "creator_id"),
}

# The test for swapped columns. On YFCC26k and the 100 K gallery cut into blocks of 1° to 180° it refused none in
# the right order and, swapped, found 3 of the Earth's 4 quarters and half of the 5° blocks (elsewhere both orders
# are land, or neither).
SWAPPED_GIVEN, SWAPPED_OTHER, SWAPPED_PLACES = 0.6, 0.9, 10
COAST_DEG = 0.05  # photos are taken on beaches, piers and ferries that the 1 km mask calls sea


@dataclass(frozen=True, eq=False)
class Geotagged:
    """Photos and where they were taken.

    name: what tables call it; table: columns file, lat, lon (degrees), author (None where unknown), line (in
    the CSV) and whatever its format has besides; images: the folder that `file` is relative to, or None where
    only coordinates are at hand.
    """

    name: str
    table: pd.DataFrame
    images: Path | None = None

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Path, float, float, str | None]:
        """(path, lat, lon, author) of one photo; the path need not exist."""
        row = self.table.iloc[index]
        return self.path(index), row["lat"], row["lon"], row["author"]

    @property
    def latlon(self) -> np.ndarray:
        """(n, 2) float64, (lat, lon) degrees."""
        return self.table[["lat", "lon"]].to_numpy(np.float64, copy=True)

    @property
    def authors(self) -> np.ndarray | None:
        """(n,) photographers, or None where the data does not name them all."""
        author = self.table["author"]
        return None if author.isna().any() else author.to_numpy()

    def path(self, index: int) -> Path:
        """Where photo `index` lies. Public copies write `45/77/1.jpg` also as `45_77_1.jpg`; both are found."""
        if self.images is None:
            raise FileNotFoundError(f"{self.name}: only coordinates were given, no folder of images")
        name = self.table["file"].iloc[index]
        path = self.images / name
        flat = self.images / name.replace("/", "_")
        return flat if flat != path and not path.exists() and flat.exists() else path

    def missing(self) -> list[str]:
        """The files that the CSV names and the folder does not hold, in the CSV's order."""
        return [self.table["file"].iloc[i] for i in range(len(self)) if not self.path(i).exists()]


def read(
    csv: Path | str,
    images: Path | str | None = None,
    name: str | None = None,
    columns: dict[str, str] | None = None,
    keep: Sequence[str] = (),
    trust_header: bool = False,
) -> Geotagged:
    """A CSV of photos and places; by default the header's names are recognised in any case (ALIASES).

    columns: the format's own names of file, lat, lon and author; keep: further columns, as they are. Raises
    FileNotFoundError for an absent file or folder, ValueError that names file, line and value for an empty set,
    a missing column, a value that is no coordinate, and for swapped columns (`trust_header` accepts them where
    the photos were really taken at sea).
    """
    csv = Path(csv)
    if images is not None and not Path(images).is_dir():
        raise FileNotFoundError(f"{images}: no such folder of images")
    table = _read_text(csv)
    columns = columns or _recognise(csv, table.columns, ("file", "lat", "lon"))
    lacking = [column for column in (*columns.values(), *keep) if column not in table.columns]
    if lacking:
        raise ValueError(f"{csv}: no column {', '.join(lacking)}; the header is {','.join(table.columns)}")
    places = _checked_places(csv, table, columns, trust_header)
    places["file"] = table[columns["file"]]
    places["author"] = table[columns["author"]].replace("", None) if "author" in columns else None
    for column in keep:
        places[column] = table[column]
    unnamed = places["file"].str.strip() == ""
    if unnamed.any():
        raise ValueError(f"{csv}, line {places['line'][unnamed].iloc[0]}: no file name in {columns['file']}")
    return Geotagged(
        name or csv.stem, places.reset_index(drop=True), None if images is None else Path(images)
    )


def read_places(csv: Path | str, trust_header: bool = False) -> np.ndarray:
    """(n, 2) places of any CSV with lat and lon (ALIASES), files or not; raises as read does."""
    csv = Path(csv)
    table = _read_text(csv)
    places = _checked_places(csv, table, _recognise(csv, table.columns, ("lat", "lon")), trust_header)
    return places[["lat", "lon"]].to_numpy(np.float64, copy=True)


def near_land(latlon: np.ndarray) -> np.ndarray:
    """Whether each place (n, 2) has land within about 5 km, on the 1 km mask of global-land-mask."""
    from geoclip.datasets import real_geography  # imports torch, which reading a CSV can do without

    shifts = np.array([(north, east) for north in (-1, 0, 1) for east in (-1, 0, 1)]) * COAST_DEG
    around = latlon[:, None] + shifts
    around[..., 0] = around[..., 0].clip(-90, 90)
    around[..., 1] = (around[..., 1] + 180) % 360 - 180
    return (real_geography.surface(around.reshape(-1, 2)) == "land").reshape(len(latlon), -1).any(axis=1)


def _read_text(csv: Path) -> pd.DataFrame:
    """The CSV as text, wholly empty lines left out, indexed by line - 2."""
    if not csv.is_file():
        raise FileNotFoundError(f"{csv}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error", pd.errors.ParserWarning
            )  # pandas only warns of rows that are too long
            table = pd.read_csv(
                csv, dtype=str, keep_default_na=False, skip_blank_lines=False, index_col=False
            )
    except pd.errors.EmptyDataError:
        raise ValueError(f"{csv}: the file is empty") from None
    except (pd.errors.ParserError, pd.errors.ParserWarning, UnicodeDecodeError) as error:
        raise ValueError(f"{csv}: not a CSV file ({str(error).strip()})") from None
    table = table.rename(columns=str.strip).fillna("")
    table = table[(table != "").any(axis=1)]
    if table.empty:
        raise ValueError(f"{csv}: the header is there and no row below it: an empty set")
    return table


def _recognise(csv: Path, header: pd.Index, needed: Sequence[str]) -> dict[str, str]:
    """What each meaning is called in this header; ValueError where one of `needed` is not there."""
    lower = {name.lower(): name for name in reversed(header)}
    found = {
        meaning: next((lower[alias] for alias in aliases if alias in lower), None)
        for meaning, aliases in ALIASES.items()
    }
    for meaning in needed:
        if found[meaning] is None:
            raise ValueError(
                f"{csv}: no column for {meaning} (one of {', '.join(ALIASES[meaning])}); "
                f"the header is {','.join(header)}"
            )
    return {meaning: name for meaning, name in found.items() if name is not None}


def _checked_places(
    csv: Path, table: pd.DataFrame, columns: dict[str, str], trust_header: bool
) -> pd.DataFrame:
    """Columns lat, lon and line of the table, checked."""
    places = pd.DataFrame({name: _degrees(csv, table, columns[name]) for name in ("lat", "lon")})
    places["line"] = table.index + 2  # the header is line 1
    _check_range(csv, places, columns)
    if not trust_header:
        _check_order(csv, places, columns)
    places.loc[places["lon"] == 180, "lon"] = -180.0  # one meridian, one number
    return places


def _degrees(csv: Path, table: pd.DataFrame, column: str) -> pd.Series:
    value = pd.to_numeric(table[column], errors="coerce").astype(np.float64)
    bad = ~np.isfinite(value)
    if bad.any():
        first = bad.idxmax()
        raise ValueError(
            f"{csv}, line {first + 2}: {column} is {table.at[first, column]!r}, not a number of degrees; "
            f"{bad.sum():,} of {len(table):,} rows are like that"
        )
    return value


def _check_range(csv: Path, places: pd.DataFrame, columns: dict[str, str]) -> None:
    lat, lon = places["lat"], places["lon"]
    steep = lat.abs() > 90
    if steep.any() and (lat.abs() <= 180).all() and (lon.abs() <= 90).all():
        row = steep.idxmax()
        raise ValueError(
            f"{csv}: the columns {columns['lat']} and {columns['lon']} are swapped: line {places.at[row, 'line']} "
            f"has {columns['lat']} {lat[row]:g}, beyond ±90; exchange the two names in the header"
        )
    for column, value, limit in ((columns["lat"], lat, 90), (columns["lon"], lon, 180)):
        bad = value.abs() > limit
        if bad.any():
            row = bad.idxmax()
            raise ValueError(
                f"{csv}, line {places.at[row, 'line']}: {column} is {value[row]:g}, beyond ±{limit}; "
                f"{bad.sum():,} of {len(places):,} rows are like that"
            )


def _check_order(csv: Path, places: pd.DataFrame, columns: dict[str, str]) -> None:
    """Refuse a file whose places lie in the sea as they stand and on land the other way round.

    A longitude beyond ±90 settles it before: had the two been swapped, it would be a latitude. So this is for
    data of one part of the world, and counted over distinct places (0.1°), lest one busy beach decide.
    """
    distinct = np.unique(places[["lat", "lon"]].to_numpy().round(1), axis=0)
    if len(distinct) < SWAPPED_PLACES or (np.abs(distinct[:, 1]) > 90).any():
        return
    land = near_land(np.concatenate([distinct, distinct[:, ::-1]]))  # the mask is read once, in some seconds
    given, other = land[: len(distinct)].mean(), land[len(distinct) :].mean()
    if given <= SWAPPED_GIVEN and other >= SWAPPED_OTHER:
        lat, lon, line = places[["lat", "lon", "line"]].iloc[0]
        raise ValueError(
            f"{csv}: the columns {columns['lat']} and {columns['lon']} look swapped: of {len(distinct):,} places "
            f"{given:.0%} are on land as they stand and {other:.0%} the other way round (line {line:.0f}: "
            f"{lat:g}, {lon:g}); exchange the two names in the header, or say that the header "
            f"is to be trusted"
        )
