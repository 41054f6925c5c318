"""webdataset tar shards: how they name photos and places, and where each photo lies in them.

`embed` reads tars as streams. Training draws photos at random, so it looks them up in an index, which is made once
from the headers of the tars and kept in the cache. `{00000..00472}.tar` names many.
"""

import hashlib
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import pandas as pd

from geoclip import paths
from geoclip.photos import PhotoError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
# Where tar shards keep coordinates: keys of the json beside each photo.
LATLON_KEYS = (("LAT", "LON"), ("lat", "lon"), ("latitude", "longitude"))
COLUMNS = ["file", "lat", "lon", "tar", "offset", "size"]


def expand(pattern: str, remote: bool = False) -> list[str]:
    """The tars that a pattern names. Raises FileNotFoundError if one is missing, of the local ones if `remote`."""
    from webdataset.shardlists import expand_urls

    urls = [url.removeprefix("file:") for url in expand_urls(pattern)]
    here = [url for url in urls if not (remote and urlparse(url).scheme)]
    if absent := [url for url in here if not Path(url).is_file()]:
        what = f"no such tar on this machine; {len(absent)} of {len(urls)} are missing"
        raise FileNotFoundError(f"{absent[0]}: {what}")
    return urls


def samples(
    tar: tarfile.TarFile, whole: bool
) -> Iterator[tuple[str, tuple[float, float] | PhotoError, bytes | tarfile.TarInfo | None]]:
    """(id, (lat, lon) or the reason why it cannot be used, photo) of each sample of an open tar.

    The photo is None if there is none, its bytes if `whole`, else where it lies. Raises OSError, or what tarfile
    raises, if the tar is damaged or truncated.
    """
    from webdataset.tariterators import group_by_keys

    odd = []

    def note(error: Exception) -> bool:  # of a member without which its sample goes on
        odd.append(error.args[0])
        return True

    for sample in group_by_keys(_members(tar, whole), handler=note):
        about = _read_json(sample.get("json"))
        name = str(next((about[key] for key in ("IMG_ID", "id") if key in about), sample["__key__"]))
        photo = next((sample[kind] for kind in IMAGE_SUFFIXES if kind in sample), None)
        none = PhotoError(name, f"no photo in the shard ({', '.join(IMAGE_SUFFIXES)})")
        yield name, none if photo is None else _place_of(name, about), photo
    for reason in odd:
        member = reason.partition(": ")[0]
        yield member, PhotoError(member, reason), None


def _members(tar: tarfile.TarFile, whole: bool) -> Iterator[dict]:
    """The files of a tar as group_by_keys expects them, without webdataset's own (`__meta__/…`)."""
    for member in tar:
        if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):
            read = whole or member.name.lower().endswith(".json")
            data = tar.extractfile(member).read() if read else member
            yield {"__url__": "", "fname": member.name, "data": data}
    # only empty blocks may follow: tarfile takes a damaged header, or a truncated tar, for the end
    rest = tar.fileobj.read(512)
    if len(rest) < 512:
        raise OSError("the tar is truncated: it does not end with two empty blocks")
    while rest:
        if rest.strip(b"\0"):
            raise OSError("the tar is damaged: a file in it has no valid header")
        rest = tar.fileobj.read(1 << 20)


def index(pattern: str) -> pd.DataFrame:
    """Where each photo lies: columns file (its id), lat, lon (NaN if the tar has none), tar, offset, size (bytes).

    A tar that is damaged or cut off is named on stderr, and its first photos are used. Raises FileNotFoundError if
    a tar is missing.
    """
    tars = [Path(name).absolute() for name in expand(pattern)]
    state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in tars]
    kept = paths.CACHE / "tars" / f"{hashlib.sha256(repr(state).encode()).hexdigest()[:16]}.csv"
    if kept.is_file():
        unknown = {"lat": [""], "lon": [""]}
        return pd.read_csv(kept, dtype={"file": str}, keep_default_na=False, na_values=unknown)
    rows, damaged = [], False
    for path in tars:
        before = len(rows)
        try:
            with tarfile.open(path, "r:") as tar:
                for name, place, photo in samples(tar, whole=False):
                    if photo is not None:
                        known = (None, None) if isinstance(place, PhotoError) else place
                        rows.append((name, *known, str(path), photo.offset_data, photo.size))
        except (tarfile.TarError, OSError) as error:
            damaged, n = True, len(rows) - before
            print(f"geoclip: {path}: {error}; its first {n:,} photos are used", file=sys.stderr)
    table = pd.DataFrame(rows, columns=COLUMNS).drop_duplicates("file", ignore_index=True)
    if not damaged:  # those are named again each time
        with paths.atomic(kept) as temporary:
            table.to_csv(temporary, index=False)
    return table


def _read_json(text: bytes | None) -> dict:
    """The json beside a photo; {} if there is none, or it is damaged."""
    try:
        about = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _place_of(name: str, about: dict) -> tuple[float, float] | PhotoError:
    """(lat, lon) in degrees, or the reason why the json has no valid place."""
    for keys in LATLON_KEYS:
        if all(key in about for key in keys):
            try:
                lat, lon = (float(about[key]) for key in keys)
            except (TypeError, ValueError, OverflowError):
                break
            if abs(lat) <= 90 and abs(lon) <= 180:
                return lat, -180.0 if lon == 180 else lon
            return PhotoError(name, f"({lat:g}, {lon:g}) is not (lat, lon) in degrees")
    return PhotoError(name, "no coordinates in the shard's json (LAT and LON)")
