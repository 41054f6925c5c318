"""Embed images with the frozen tower and write the features to a folder (see geoclip.datasets.features).

A shard appears complete, by a rename, or not at all, so an interrupted run resumes at the first missing shard.
"""

import dataclasses
import errno
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from geoclip import paths
from geoclip.datasets import features as stored
from geoclip.datasets.sources import Chunk, Source, Tiles, Views
from geoclip.image_encoder import ImageEncoder, Precision


@dataclass(frozen=True)
class EmbedReport:
    """What one process did, in images."""

    embedded: int
    found: int  # that were there before
    unreadable: int
    failed: tuple[tuple[int, str], ...]  # (shard, reason)
    seconds: float


def rank_and_world() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) under torchrun or SLURM, otherwise (0, 1, 0)."""
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            environment = kind()
            return environment.global_rank(), environment.world_size(), environment.local_rank()
    return 0, 1, 0


def embed(
    source: Source,
    encoder: ImageEncoder,
    out: Path | str,
    views: Views | None = None,
    batch_size: int = 256,
    workers: int = 0,
    arithmetic: Precision = "auto",
    rank: int = 0,
    world: int = 1,
    compiled: bool = False,
    progress: bool = False,
    full: bool = False,
) -> EmbedReport:
    """Write the features of `source` to the folder `out`, resuming where an earlier run stopped.

    batch_size: views through the tower at once; workers: decoding processes; rank, world: this process makes
    the shards rank, rank + world, …; full: verify every byte of the shards that are there. Damaged shards are
    made again. Photos that cannot be read are listed in unreadable.csv; a tar that cannot be read to its end
    makes no shard and is reported.
    """
    began = time.perf_counter()
    views = views or Views()
    if views.ten_crop and isinstance(source, Tiles):
        raise ValueError("tiles are rendered, so ten crops cannot be cut from them")
    out = paths.make_folder(Path(out))
    info = stored.FeatureInfo.of(source, encoder, views)
    claim(out, info)
    mine, found = range(rank, source.parts, world), 0
    for part in set(mine) - set(stored.missing_shards(out, mine)):
        try:
            found += stored.check_shard(out, part, info, full)
        except ValueError as error:
            print(f"geoclip: {error}", file=sys.stderr)
            shutil.rmtree(stored.shard_folder(out, part))
    wanted = stored.missing_shards(out, mine)
    for part in wanted:  # temporary folders of a killed run
        for left in out.glob(f".{stored.shard_folder(out, part).name}.*"):
            shutil.rmtree(left)
    encoder.eval().use_precision(arithmetic)
    tower = torch.compile(encoder.features) if compiled else encoder.features
    stream = DataLoader(
        _Parts(source, wanted, info, max(1, batch_size // views.number)),
        batch_size=None,
        num_workers=min(workers, len(wanted)),
        pin_memory=encoder.head[0].weight.is_cuda,
        prefetch_factor=4 if workers and wanted else None,
    )
    embedded, unreadable, failed, shards = 0, 0, [], {}
    title = f"rank {rank}: {len(mine) - len(wanted)} of {len(mine)} shards found"
    with tqdm(desc=title, unit=" images", smoothing=0.05, disable=not progress) as bar:
        for part, chunk in stream:
            shard = shards.setdefault(part, Shard())
            if isinstance(chunk, Chunk):
                shard.unreadable += chunk.unreadable
                if chunk.ids:
                    shard.features.append(run_tower(encoder, chunk.images, batch_size, tower))
                    shard.ids += chunk.ids
                    shard.latlon += chunk.latlon
                embedded += len(chunk.ids)
                bar.update(len(chunk.ids))
                continue
            del shards[part]
            if chunk:
                failed.append((part, chunk))
                continue
            if rank == 0 and not found and not embedded and shard.unreadable:
                name, reason = shard.unreadable[0]
                none = f"none of the first {len(shard.unreadable):,} photos can be read"
                raise ValueError(f"{source.name}: {none} ({name}: {reason}); is the image folder right?")
            shard.write(out, part, info, encoder.precision)
            unreadable += len(shard.unreadable)
    merge_unreadable(out)
    return EmbedReport(embedded, found, unreadable, tuple(failed), time.perf_counter() - began)


@torch.inference_mode()
def run_tower(
    encoder: ImageEncoder, images: Tensor, batch_size: int, tower: Callable[[Tensor], Tensor]
) -> Float[np.ndarray, "n v c"]:
    """float16 features of images (n, v, 3, p, p): uint8, or floats that are already normalised."""
    device, parts = encoder.head[0].weight.device, []
    for part in images.flatten(0, 1).split(batch_size):
        part = part.to(device, non_blocking=True)  # bytes are copied, not floats
        parts.append(tower(encoder.preprocess.normalise(part) if part.dtype == torch.uint8 else part))
    return torch.cat(parts).half().cpu().unflatten(0, images.shape[:2]).numpy()


@dataclass
class Shard:
    """The features of one part, until they are written: blocks (m, v, c) float16, and (lat, lon) per image."""

    features: list[np.ndarray] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    latlon: list[tuple[float, float]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def write(self, out: Path, part: int, info: stored.FeatureInfo, arithmetic: str) -> None:
        """Write the shard to a temporary folder, then rename it."""
        features = np.concatenate([np.empty((0, info.views.number, info.dim), np.float16), *self.features])
        if bad := stored.not_finite(features):
            wrong = f"the features of {self.ids[bad[0]]} are not finite"
            raise ValueError(f"{info.source}, shard {part}: {wrong}; try --precision fp32")
        final = stored.shard_folder(out, part)
        temporary = out / f".{final.name}.{os.getpid()}"
        listed = pd.DataFrame([(part, *row) for row in self.unreadable], columns=["shard", "id", "reason"])
        try:
            temporary.mkdir()
            _write(temporary / "features.npy", _npy(features))
            _write(temporary / "latlon.npy", _npy(np.array(self.latlon, np.float32).reshape(-1, 2)))
            _write(temporary / "ids.txt", "".join(f"{name}\n" for name in self.ids).encode())
            _write(temporary / stored.UNREADABLE, listed.to_csv(index=False, header=False).encode())
            about = dataclasses.asdict(info) | {"shard": part, "n": len(self.ids), "arithmetic": arithmetic}
            about["unreadable"] = len(self.unreadable)
            about["sampled_sha256"] = stored.file_hash(temporary / "features.npy", stored.BLOCKS)
            about["sha256"] = {name: stored.file_hash(temporary / name) for name in stored.HASHED}
            _write(temporary / stored.SHARD, json.dumps(about, indent=1).encode())
            os.rename(temporary, final)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            kept = f"{len(list(out.glob('shard-*')))} complete shards are kept"
            left = f"shard {part} was not written to {out}, {kept}"
            raise OSError(error.errno, f"the disk is full: {left}; free some space and rerun") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def claim(out: Path, info: stored.FeatureInfo) -> None:
    """Record in `out` what is written there. Raises ValueError if it holds other features."""
    path = out / stored.INFO
    if path.is_file():
        if wrong := stored.FeatureInfo.read(path).differences(info):
            raise ValueError(f"{out} holds other features ({'; '.join(wrong)}); name another folder")
        return
    with paths.atomic(path) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(info), indent=1))


def merge_unreadable(out: Path) -> int:
    """Collect the unreadable photos of all shards in OUT/unreadable.csv; returns their number."""
    with FileLock(out / ".unreadable.lock"):  # the last process sees the shards of all others
        rows = b"".join(path.read_bytes() for path in sorted(out.glob(f"shard-*/{stored.UNREADABLE}")))
        with paths.atomic(out / stored.UNREADABLE) as temporary:
            temporary.write_bytes(b"shard,id,reason\n" + rows)
    return rows.count(b"\n")


class _Parts(IterableDataset):
    """Stream (part, chunk) of the wanted parts, then (part, "") or (part, why it failed)."""

    def __init__(self, source: Source, parts: list[int], info: stored.FeatureInfo, size: int):
        self.source, self.parts, self.info, self.size = source, parts, info, size

    def __iter__(self) -> Iterator[tuple[int, Chunk | str]]:
        worker = get_worker_info()
        mine = self.parts if worker is None else self.parts[worker.id :: worker.num_workers]
        for part in mine:
            try:
                chunks = self.source.chunks(part, self.info.views, self.info.preprocessing, self.size)
                yield from ((part, chunk) for chunk in chunks)
            except OSError as error:
                yield part, str(error)
            else:
                yield part, ""


def _write(path: Path, content) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _npy(array: np.ndarray) -> memoryview:
    """The content of a .npy file; np.save to a file loses the reason if the disk is full."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getbuffer()
