"""webdataset tar shards: how they name photos and places, and where each photo lies in them.

`embed` reads tars as streams. Training draws photos at random, so it looks them up in an index, which is made once
from the headers of the tars and kept in the cache. `{00000..00472}.tar` names many.
"""

import hashlib
import json
import sys
import tarfile
from pathlib import Path

import pandas as pd

from geoclip import paths
from geoclip.photos import PhotoError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
# Where tar shards keep coordinates: keys of the json beside each photo.
LATLON_KEYS = (("LAT", "LON"), ("lat", "lon"), ("latitude", "longitude"))
COLUMNS = ["file", "lat", "lon", "tar", "offset", "size"]


def index(pattern: str) -> pd.DataFrame:
    """Where each photo lies: columns file (its id), lat, lon (NaN if the tar has none), tar, offset, size (bytes).

    A tar that is damaged or cut off is named on stderr, and its first photos are used. Raises FileNotFoundError if
    a tar is missing.
    """
    from webdataset.shardlists import expand_urls

    tars = [Path(name).absolute() for name in expand_urls(pattern)]
    if absent := [path for path in tars if not path.is_file()]:
        raise FileNotFoundError(
            f"{absent[0]}: no such tar on this machine; {len(absent)} of {len(tars)} are missing"
        )
    state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in tars]
    kept = paths.CACHE / "tars" / f"{hashlib.sha256(repr(state).encode()).hexdigest()[:16]}.csv"
    if kept.is_file():
        unknown = {"lat": [""], "lon": [""]}
        return pd.read_csv(kept, dtype={"file": str}, keep_default_na=False, na_values=unknown)
    damaged: list[str] = []
    table = pd.DataFrame([row for path in tars for row in _photos(path, damaged)], columns=COLUMNS)
    table = table.drop_duplicates("file", ignore_index=True)
    if not damaged:  # those are named again each time
        with paths.atomic(kept) as temporary:
            table.to_csv(temporary, index=False)
    return table


def _photos(path: Path, damaged: list[str]) -> list[tuple]:
    """Rows of `index` for one tar, whose name joins `damaged` if it cannot be read to its end."""
    photos, about = {}, {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                kind = member.name.rpartition("/")[2].partition(".")[2]
                key = member.name.removesuffix(f".{kind}")
                if kind.lower() in IMAGE_SUFFIXES:
                    photos[key] = (str(path), member.offset_data, member.size)
                elif kind.lower() == "json":
                    about[key] = read_json(tar.extractfile(member).read())
    except (tarfile.TarError, OSError) as error:
        damaged.append(path.name)
        print(f"geoclip: {path}: {error}; its first {len(photos):,} photos are used", file=sys.stderr)
    rows = []
    for key, where in photos.items():
        known = about.get(key, {})
        try:
            place = place_of(key, known)
        except PhotoError:
            place = (None, None)
        rows.append((name_of(key, known), *place, *where))
    return rows


def read_json(text: bytes | None) -> dict:
    """The json beside a photo; {} if there is none, or it is damaged."""
    try:
        about = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def name_of(key: str, about: dict) -> str:
    """The id of a photo, or its key in the tar."""
    return str(next((about[name] for name in ("IMG_ID", "id") if name in about), key))


def place_of(name: str, about: dict) -> tuple[float, float]:
    """(lat, lon) in degrees. Raises PhotoError, with the reason, if the json has no valid place."""
    for keys in LATLON_KEYS:
        if all(key in about for key in keys):
            try:
                lat, lon = (float(about[key]) for key in keys)
            except (TypeError, ValueError, OverflowError):
                break
            if abs(lat) <= 90 and abs(lon) <= 180:
                return lat, -180.0 if lon == 180 else lon
            raise PhotoError(name, f"({lat:g}, {lon:g}) is not (lat, lon) in degrees")
    raise PhotoError(name, "no coordinates in the shard's json (LAT and LON)")
