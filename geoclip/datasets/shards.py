"""Download photos known by URL (image id, url) into webdataset tar shards and lists the links that fail.

Lists of URLs are not trusted: only public addresses are contacted, also after redirects; each photo has a limit
of time and size; and only responses that start like an image file are kept.
"""

import asyncio
import hashlib
import ipaddress
import itertools
import json
import multiprocessing
import socket
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import aiohttp
import pandas as pd
from filelock import FileLock

from geoclip import paths
from geoclip.datasets import folder

CLAIM, UNAVAILABLE = "list.sha256", "unavailable.csv"
ID_COLUMNS = ("id", "image_id", "img_id", "img_file")
# How image files start: offset, bytes, suffix in the tar.
MAGIC = ((0, b"\xff\xd8\xff", "jpg"), (0, b"\x89PNG\r\n", "png"), (0, b"GIF8", "gif"), (8, b"WEBP", "webp"))
TEMPORARY = (429, 500, 502, 503, 504)  # answers that another attempt may improve
LOST = (
    (TimeoutError, "timed out"),
    (aiohttp.ClientPayloadError, "the connection was lost before the whole photo had arrived"),
    (aiohttp.ClientConnectorDNSError, "the host name cannot be resolved"),
    (aiohttp.ClientConnectorError, "the server cannot be reached"),
)


@dataclass(frozen=True)
class Limits:
    """Bounds on the downloads of one process."""

    connections: int = 64  # at the same time
    seconds: float = 30  # per photo, redirects included
    megabytes: float = 50
    retries: int = 2  # after a timeout, a lost connection or a server error
    allow_private: bool = False  # loopback and private addresses, and the proxy that the environment names


@dataclass(frozen=True)
class Downloaded:
    """The outcome: photos saved, number of failures by reason, and the shards as `embed` expects them."""

    photos: int
    failed: dict[str, int]
    pattern: str


def read_urls(path: Path | str) -> pd.DataFrame:
    """Columns id and url of a CSV of `image id, url`, with or without a header (MP-16's list has none).

    Raises ValueError, naming file, line and value, for a row without an http address or a repeated id.
    """
    table = folder.read_text(Path(path), header=None, skipinitialspace=True)
    header = table.iloc[0].str.strip()
    if "url" in header.str.lower().tolist():
        table = table[1:].set_axis(header, axis=1)
        columns = folder.recognise(Path(path), header, ("id", "url"), {"id": ID_COLUMNS, "url": ("url",)})
        table = table[[columns["id"], columns["url"]]]
    elif table.shape[1] != 2:
        raise ValueError(f"{path}: {table.shape[1]} columns and no header; expected image id and url")
    table = table.set_axis(["id", "url"], axis=1)
    if table.empty:
        raise ValueError(f"{path} contains no URLs")
    for wrong, what in (
        (~table["url"].str.match(r"https?://\S+$"), "is not an http address"),
        (table["id"].str.strip() == "", "has no image id"),
        (table["id"].duplicated(), "repeats an image id"),
    ):
        if wrong.any():
            row = wrong.idxmax()
            raise ValueError(f"{path}, line {row + 2}: {','.join(table.loc[row])!r} {what}")
    return table.reset_index(drop=True)


def join_places(urls: pd.DataFrame, places: pd.DataFrame) -> pd.DataFrame:
    """id, url, LAT, LON of the URLs whose image id is in `places` (columns file, lat, lon), in the list's order."""
    known = places.rename(columns={"file": "id", "lat": "LAT", "lon": "LON"})[["id", "LAT", "LON"]]
    known = known[known["id"].isin(urls["id"])]
    if twice := known.loc[known["id"].duplicated(), "id"].tolist():
        raise ValueError(f"the places list {twice[0]} twice")
    if known.empty:
        ids = f"the list has ids such as {urls['id'].iloc[0]!r}, the places {places['file'].iloc[0]!r}"
        raise ValueError(f"none of the {len(urls):,} URLs has a place: {ids}")
    return urls.merge(known, on="id")


def download(
    listed: pd.DataFrame,
    out: Path | str,
    photos_a_shard: int = 10_000,
    processes: int = 1,
    limits: Limits | None = None,
    rank: int = 0,
    world: int = 1,
) -> Downloaded:
    """Download the photos of `join_places` into OUT/00000.tar, …; a rerun resumes at the first incomplete shard.

    Photos are stored as received, never re-encoded. Failures are listed with the reason in OUT/unavailable.csv.
    With several machines, this process makes the shards rank, rank + world, ….
    """
    out = paths.make_folder(Path(out).resolve())
    shards = -(-len(listed) // photos_a_shard)
    sizes = [min(photos_a_shard, len(listed) - part * photos_a_shard) for part in range(shards)]
    with FileLock(out / f".lock-{rank}"):
        claim(out, listed, photos_a_shard)
        wanted = [part for part in range(rank, shards, world) if statistics(out, part, sizes[part]) is None]
        for left in itertools.chain.from_iterable(out.glob(f".{part:05d}*") for part in wanted):
            left.unlink()  # temporary files of a killed run
        cut = [listed[part * photos_a_shard : (part + 1) * photos_a_shard] for part in wanted]
        jobs = (cut, [out] * len(cut), wanted, [limits or Limits()] * len(cut))
        if processes == 1:
            list(map(_download_shard, *jobs))
        else:
            with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
                list(pool.map(_download_shard, *jobs))
    made = [found for part in range(shards) if (found := statistics(out, part, sizes[part])) is not None]
    failed = pd.DataFrame([row for found in made for row in found["failed"]], columns=["id", "url", "reason"])
    with paths.atomic(out / UNAVAILABLE) as temporary:
        failed.to_csv(temporary, index=False)
    counts = failed["reason"].value_counts().sort_index().sort_values(ascending=False, kind="stable")
    photos = sum(found["successes"] for found in made)
    return Downloaded(photos, counts.to_dict(), f"{out}/{{{0:05d}..{shards - 1:05d}}}.tar")


def claim(out: Path, listed: pd.DataFrame, photos_a_shard: int) -> None:
    """Record in `out` what is downloaded there; ValueError if it holds another list or another shard size."""
    rows = listed.to_json(orient="records", lines=True, force_ascii=False, double_precision=15)
    digest = hashlib.sha256(f"{photos_a_shard}\n{rows}".encode()).hexdigest()
    kept = out / CLAIM
    if kept.read_text() != digest if kept.is_file() else any(out.glob("*.tar")):
        raise ValueError(f"{out} holds the shards of another list or of another size; choose another folder")
    with paths.atomic(kept) as temporary:
        temporary.write_text(digest)


def statistics(out: Path, part: int, rows: int) -> dict | None:
    """{"successes": n, "failed": [[id, url, reason], …]} of a shard, or None if it is incomplete or damaged."""
    try:
        found = json.loads((out / f"{part:05d}_stats.json").read_text(encoding="utf-8"))
        whole = found["successes"] + len(found["failed"]) == rows and {*map(len, found["failed"])} <= {3}
        return found if whole and (out / f"{part:05d}.tar").is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _download_shard(rows: pd.DataFrame, out: Path, part: int, limits: Limits) -> None:
    """Write one tar, in the list's order, and then its counts, each by renaming a temporary file."""
    from webdataset import TarWriter

    failed = []
    with (
        paths.atomic(out / f"{part:05d}.tar") as temporary,
        tempfile.TemporaryFile(dir=out) as arrived,
        temporary.open("wb") as file,
        TarWriter(file, mtime=0) as tar,
    ):
        outcomes = asyncio.run(_fetch_all(rows["url"], arrived, limits))
        for index, row in enumerate(rows.itertuples(index=False)):
            if isinstance(outcomes[index], str):
                failed.append([row.id, row.url, outcomes[index]])
                continue
            start, size = outcomes[index]
            arrived.seek(start)
            body = arrived.read(size)
            about = json.dumps({"id": row.id, "url": row.url, "LAT": row.LAT, "LON": row.LON})
            tar.write({"__key__": f"{part:05d}{index:05d}", _suffix(body): body, "json": about.encode()})
    counts = {"successes": len(rows) - len(failed), "failed": failed}
    with paths.atomic(out / f"{part:05d}_stats.json") as temporary:
        temporary.write_text(json.dumps(counts, ensure_ascii=False), encoding="utf-8")


async def _fetch_all(urls: Iterable[str], arrived: BinaryIO, limits: Limits) -> dict[int, tuple | str]:
    """Write photos to a file as they arrive; return where each lies, (start, size), or why there is none."""
    make_socket = None if limits.allow_private else _public_socket
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=limits.connections, socket_factory=make_socket),
        timeout=aiohttp.ClientTimeout(total=limits.seconds),
        headers={"User-Agent": "Mozilla/5.0 (compatible; geoclip-reproduced)", "Accept-Encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=limits.allow_private,
    )
    outcomes: dict[int, tuple | str] = {}
    free = asyncio.Semaphore(limits.connections)

    async def one(index: int, url: str) -> None:
        async with free:
            body, reason = await _fetch(session, url, limits)
        outcomes[index] = reason or (arrived.tell(), len(body))
        arrived.write(body)

    async with session:
        await asyncio.gather(*(one(index, url) for index, url in enumerate(urls)))
    return outcomes


async def _fetch(session: aiohttp.ClientSession, url: str, limits: Limits) -> tuple[bytes, str]:
    """(the photo, "") or (b"", the reason why there is none)."""
    reason = ""
    for attempt in range(limits.retries + 1):
        await asyncio.sleep(attempt)
        try:
            async with session.get(url) as response:
                if response.status == 200:
                    return await _body(response, limits.megabytes), ""
                reason = f"HTTP {response.status} {response.reason}"
                if response.status not in TEMPORARY:
                    break
        except (aiohttp.ClientError, OSError, ValueError) as error:
            cause = getattr(error, "os_error", error)
            if isinstance(cause, PermissionError | _NotAPhoto):
                return b"", str(cause)
            reason = next((text for kind, text in LOST if isinstance(error, kind)), type(error).__name__)
            if isinstance(error, ValueError):  # not an address
                break
    return b"", reason


class _NotAPhoto(ValueError):
    """A response that is not a photo within the limits; another attempt would not help."""


async def _body(response: aiohttp.ClientResponse, megabytes: float) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        body += chunk
        if len(body) > megabytes * 1e6:
            raise _NotAPhoto(f"larger than {megabytes:g} MB")
    photo = bytes(body)
    if not _suffix(photo):
        raise _NotAPhoto(f"not an image but {response.content_type}" if photo else "the response is empty")
    return photo


def _suffix(body: bytes) -> str:
    return next((suffix for at, magic, suffix in MAGIC if body[at : at + len(magic)] == magic), "")


def _public_socket(address_info: tuple) -> socket.socket:
    """A socket for one resolved address, called before each connection; PermissionError unless it is public."""
    family, kind, protocol, _, address = address_info
    ip = ipaddress.ip_address(address[0].partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if not ip.is_global or ip.is_multicast:
        raise PermissionError(f"refused: {ip} is not a public address")
    return socket.socket(family, kind, protocol)
