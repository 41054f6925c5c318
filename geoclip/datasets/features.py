"""Features: images embedded once by the frozen tower and stored, so that training never runs the tower.

A feature folder holds `features.json`, which describes how the features were made, and one folder per shard
with features.npy (m, v, c) float16, latlon.npy (m, 2) float32, ids.txt, unreadable.csv and shard.json. A
shard appears complete, by a rename, or not at all, so an interrupted run resumes at the first missing shard.
Shards are verified against the hashes in shard.json when they are opened.
"""

import csv
import dataclasses
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from tqdm import tqdm

from geoclip import paths
from geoclip.datasets.sources import Chunk, Source, Tiles, Views
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig, Precision, Preprocessing, tower_hash

INFO, SHARD, UNREADABLE = "features.json", "shard.json", "unreadable.csv"
# Raised by hand whenever the same photo, tower and views no longer give the same features.
RECIPE = 1
# A quick verification hashes this many blocks of a file, evenly spaced; of small files, all.
BLOCKS, BLOCK_BYTES, SMALL_BYTES = 16, 1 << 12, 1 << 24
HASHED = ("features.npy", "latlon.npy", "ids.txt")


@dataclass(frozen=True)
class FeatureInfo:
    """How the features of a folder were made; two folders with equal info hold the same numbers.

    tower, weights: as in ImageEncoderConfig; tower_hash: of the weights themselves; source, data: name and
    hash of what was embedded; recipe: RECIPE; shards: their number.
    """

    tower: str
    weights: str | None
    tower_hash: str
    preprocessing: Preprocessing
    views: Views
    dim: int
    source: str
    data: str
    recipe: int
    shards: int

    @classmethod
    def of(cls, source: Source, encoder: ImageEncoder, views: Views) -> "FeatureInfo":
        """Describe the features that `encoder` makes of `source`."""
        config = encoder.config
        return cls(
            tower=config.tower,
            weights=config.weights,
            tower_hash=tower_hash(encoder.tower),
            preprocessing=Preprocessing.of(config),
            views=views,
            dim=encoder.feature_dim,
            source=source.name,
            data=source.hash,
            recipe=RECIPE,
            shards=source.parts,
        )

    @classmethod
    def read(cls, path: Path) -> "FeatureInfo":
        """Read a features.json or shard.json; ValueError if it is damaged or from another version."""
        found = _read_json(path)
        try:
            for name, kind in (("preprocessing", Preprocessing), ("views", Views)):
                values = {key: tuple(v) if isinstance(v, list) else v for key, v in found[name].items()}
                found[name] = kind(**values)
            return cls(**{field.name: found[field.name] for field in dataclasses.fields(cls)})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} does not describe features ({error!r}): it is damaged or was made by another "
                "version; embed "
                f"into another folder"
            ) from error

    def differences(self, other: "FeatureInfo") -> list[str]:
        """A phrase for each field that differs."""
        return [
            f"{field.name} {getattr(self, field.name)} instead of {getattr(other, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]


@dataclass(frozen=True)
class EmbedReport:
    """What one process did: images embedded, images already there, unreadable images, (shard, reason) that
    failed."""

    embedded: int
    found: int
    unreadable: int
    failed: tuple[tuple[int, str], ...]
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
    makes no shard and is reported. Raises ValueError if `out` holds other features or no photo can be read,
    OSError if the disk is full; complete shards are kept in every case.
    """
    began = time.perf_counter()
    if views and views.ten_crop and isinstance(source, Tiles):
        raise ValueError("tiles are rendered, so ten crops cannot be cut from them")
    out = paths.make_folder(Path(out))
    info = FeatureInfo.of(source, encoder, views := views or Views())
    claim(out, info)
    mine, found = range(rank, source.parts, world), 0
    for part in set(mine) - set(missing_shards(out, mine)):
        try:
            found += check_shard(out, part, info, full)
        except ValueError as error:
            print(f"geoclip: {error}", file=sys.stderr)
            shutil.rmtree(shard_folder(out, part))
    wanted = missing_shards(out, mine)
    for part in wanted:  # temporary folders of a killed run
        for left in out.glob(f".{shard_folder(out, part).name}.*"):
            shutil.rmtree(left)
    tower = Tower(encoder, batch_size, arithmetic, compiled)
    stream = DataLoader(
        _Parts(source, wanted, info, max(1, batch_size // views.number)),
        batch_size=None,
        num_workers=min(workers, len(wanted)),
        pin_memory=tower.device.type == "cuda",
        prefetch_factor=4 if workers and wanted else None,
    )
    embedded, unreadable, failed, open_shards = 0, 0, [], {}
    title = f"rank {rank}: {len(mine) - len(wanted)} of {len(mine)} shards found"
    with tqdm(desc=title, unit=" images", smoothing=0.05, disable=not progress) as bar:
        for part, chunk in stream:
            shard = open_shards.setdefault(part, Shard(part))
            if isinstance(chunk, Chunk):
                shard.add(chunk, tower)
                embedded += len(chunk.ids)
                bar.update(len(chunk.ids))
                continue
            del open_shards[part]
            if chunk:
                failed.append((part, chunk))
                continue
            if rank == 0 and not found and not embedded and shard.unreadable:
                name, reason = shard.unreadable[0]
                raise ValueError(
                    f"{source.name}: none of the first {len(shard.unreadable):,} photos can be read ({name}: "
                    f"{reason}); is the image folder right?"
                )
            shard.write(out, info, tower.arithmetic)
            unreadable += len(shard.unreadable)
    merge_unreadable(out)
    return EmbedReport(embedded, found, unreadable, tuple(failed), time.perf_counter() - began)


class Tower:
    """The image tower on its device, in one arithmetic and in batches of bounded size."""

    def __init__(self, encoder: ImageEncoder, batch_size: int, arithmetic: Precision, compiled: bool):
        encoder.eval().use_precision(arithmetic)
        self.arithmetic = encoder.precision
        self.device = encoder.head[0].weight.device
        self.preprocessing, self.batch_size = encoder.preprocess, batch_size
        self.features = torch.compile(encoder.features) if compiled else encoder.features

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Float[Tensor, "n c"]:
        """float16 features on the CPU of images (n, 3, p, p): uint8, or floats that are already normalised."""
        parts = []
        for part in images.split(self.batch_size):
            part = part.to(self.device, non_blocking=True)  # bytes are copied, not floats
            part = self.preprocessing.normalise(part) if part.dtype == torch.uint8 else part
            parts.append(self.features(part))
        return torch.cat(parts).half().cpu()


class Shard:
    """Collects the features of one part and writes them to a folder."""

    def __init__(self, part: int):
        self.part = part
        self.ids: list[str] = []
        self.latlon: list[tuple[float, float]] = []
        self.features: list[np.ndarray] = []
        self.unreadable: list[tuple[str, str]] = []

    def add(self, chunk: Chunk, tower: Tower) -> None:
        """Embed a chunk and keep its features."""
        self.unreadable += chunk.unreadable
        if not chunk.ids:
            return
        n, v = chunk.images.shape[:2]
        self.features.append(tower(chunk.images.flatten(0, 1)).view(n, v, -1).numpy())
        self.ids += chunk.ids
        self.latlon += chunk.latlon

    def write(self, out: Path, info: FeatureInfo, arithmetic: str) -> None:
        """Write the shard to a temporary folder, then rename it.

        Raises ValueError for features that are not finite, OSError if the disk is full; neither leaves
        anything.
        """
        empty = np.empty((0, info.views.number, info.dim), np.float16)
        features = np.concatenate([empty, *self.features])
        if bad := _not_finite(features):
            raise ValueError(
                f"{info.source}, shard {self.part}: the features of {self.ids[bad[0]]} are not finite; is "
                "the tower "
                f"whole? With --precision fp32 they may be finite"
            )
        final = shard_folder(out, self.part)
        temporary = out / f".{final.name}.{os.getpid()}"
        try:
            temporary.mkdir()
            _write(temporary / "features.npy", *_npy(features))
            _write(temporary / "latlon.npy", *_npy(np.array(self.latlon, np.float32).reshape(-1, 2)))
            _write(temporary / "ids.txt", ("\n".join(self.ids) + "\n" * bool(self.ids)).encode())
            _write(temporary / UNREADABLE, _csv_bytes((self.part, *row) for row in self.unreadable))
            about = {
                **dataclasses.asdict(info),
                "shard": self.part,
                "n": len(self.ids),
                "unreadable": len(self.unreadable),
                "arithmetic": arithmetic,
                "sampled_sha256": file_hash(temporary / "features.npy", BLOCKS),
                "sha256": {name: file_hash(temporary / name) for name in HASHED},
            }
            _write(temporary / SHARD, json.dumps(about, indent=1).encode())
            os.rename(temporary, final)
            _sync_folder(out)
        except OSError as error:
            kept = len(list(out.glob("shard-*")))
            reason = f"the disk is full: shard {self.part} was not written to {out}, {kept} complete shards are kept"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(error.errno, f"{reason}; free some space and rerun") from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class FeatureData(Dataset):
    """A feature folder as a training set, memory-mapped: only what a batch needs is read.

    latlon: (n, 2) degrees; views, dim: views stored per image, and c. A key is (epoch, i); a batch of keys
    gives {"feature": (b, views_a_step, c) float32, "latlon": (b, 2), "index": (b,)} with views drawn at
    random per image and epoch. fraction: part of the images to use; smaller fractions are subsets of larger
    ones. full: verify every byte, not only sampled blocks of large shards. encoder: the image encoder to be
    trained. Raises ValueError if the folder is incomplete, mixed or damaged, or was made by another tower,
    weights or preprocessing than the encoder's.
    """

    def __init__(
        self,
        folder: Path | str,
        encoder: ImageEncoderConfig | None = None,
        views_a_step: int = 1,
        fraction: float = 1.0,
        seed: int = 0,
        full: bool = False,
    ):
        self.folder, self.views_a_step, self.seed = Path(folder), views_a_step, seed
        if not (self.folder / INFO).is_file():
            raise FileNotFoundError(
                f"{self.folder} contains no features: create them with `python -m geoclip embed`"
            )
        self.info = FeatureInfo.read(self.folder / INFO)
        self.views, self.dim = self.info.views.number, self.info.dim
        if encoder is not None:
            self.require(encoder)
        if views_a_step > self.views:
            raise ValueError(f"{self.folder} stores {self.views} views of each image, not {views_a_step}")
        shards = range(self.info.shards)
        if absent := missing_shards(self.folder, shards):
            raise ValueError(
                f"{self.folder} is incomplete: {len(absent)} of {self.info.shards} shards are missing, the "
                "first "
                f"is {absent[0]}; rerun the embed command to complete it"
            )
        self.starts = np.cumsum([0] + [check_shard(self.folder, part, self.info, full) for part in shards])
        places = np.concatenate([np.load(self._file(part, "latlon.npy")) for part in shards])
        if len(places) == 0:
            raise ValueError(f"{self.folder}: no image could be read, see {UNREADABLE} there")
        self.image = np.arange(len(places))
        if fraction < 1:
            order = np.random.default_rng(0).permutation(len(places))
            self.image = np.sort(order[: max(1, round(fraction * len(places)))])
        self.latlon = torch.from_numpy(places[self.image])
        self._all: Tensor | None = None  # all features, on a GPU

    def require(self, encoder: ImageEncoderConfig) -> None:
        """Raise ValueError unless the tower of `encoder` makes these features."""
        wanted = {
            "tower": encoder.tower,
            "weights": encoder.weights,
            "preprocessing": Preprocessing.of(encoder),
        }
        for name, value in wanted.items():
            if getattr(self.info, name) != value:
                raise ValueError(
                    f"{self.folder} holds features of {name} {getattr(self.info, name)}, but the model has "
                    f"{value}: train "
                    f"with the same {name}, or embed again"
                )

    def __len__(self) -> int:
        return len(self.image)

    def ids(self) -> list[str]:
        """The names of the images, in order."""
        parts = (self._file(part, "ids.txt").read_text(encoding="utf-8") for part in range(self.info.shards))
        names = [name for text in parts for name in text.split("\n")[:-1]]
        return [names[image] for image in self.image]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        index = np.fromiter((index for _, index in keys), np.int64, len(keys))
        image, k = self.image[index], self.views_a_step
        view = drawn_views(self.seed, keys[0][0], image, self.views, k)
        rows = torch.from_numpy(index)
        if self._all is not None:
            rows = rows.to(self._all.device, non_blocking=True)
            feature = self._all[rows[:, None], torch.from_numpy(view).to(rows.device, non_blocking=True)]
        else:
            feature = torch.from_numpy(self._read(image, view))
        return {"feature": feature.float(), "latlon": self.latlon[rows], "index": rows}

    def keep_on(self, device: torch.device | str) -> None:
        """Move all features to a GPU if they take at most half of its free memory."""
        device = torch.device(device)
        if device.type != "cuda" or self.on_gpu:
            return
        needed = len(self) * self.views * self.dim * 2
        if needed <= torch.cuda.mem_get_info(device)[0] / 2:
            self._all = torch.empty(len(self), self.views, self.dim, dtype=torch.float16, device=device)
            for part, start in enumerate(range(0, len(self), 1 << 16)):  # bounded memory on the way
                rows = self.image[start : start + (1 << 16)]
                self._all[start : start + len(rows)].copy_(
                    torch.from_numpy(self._read(rows)), non_blocking=part > 0
                )
            self.latlon = self.latlon.to(device)

    @property
    def on_gpu(self) -> bool:
        """Whether `keep_on` moved the features to a GPU."""
        return self._all is not None

    def tensor(self) -> Float[Tensor, "n v c"]:
        """All features, float16, for sets that fit in memory."""
        return torch.from_numpy(self._read(self.image))

    def _read(self, image: np.ndarray, view: np.ndarray | None = None) -> np.ndarray:
        """(b, k, c) features of images (b,) and views (b, k), default all views; ValueError if one is not
        finite."""
        if view is None:
            view = np.broadcast_to(np.arange(self.views), (len(image), self.views))
        features = np.empty((*view.shape, self.dim), np.float16)
        shard = np.searchsorted(self.starts, image, side="right") - 1
        # in the order on disk, so that neighbours share a read
        order = np.argsort(image, kind="stable")
        edges = np.flatnonzero(np.diff(shard[order], prepend=-1, append=self.info.shards))
        for start, stop in itertools.pairwise(edges):
            pick, part = order[start:stop], int(shard[order[start]])
            features[pick] = self._map(part)[(image[pick] - self.starts[part])[:, None], view[pick]]
            if _not_finite(features[pick]):
                raise _damaged(shard_folder(self.folder, part), "features.npy has values that are not finite")
        return features

    def _file(self, part: int, name: str) -> Path:
        return shard_folder(self.folder, part) / name

    def _map(self, part: int) -> np.ndarray:
        if not hasattr(self, "_maps"):
            self._maps = {}
        if part not in self._maps:
            self._maps[part] = np.load(self._file(part, "features.npy"), mmap_mode="r")
        return self._maps[part]

    def __getstate__(self) -> dict:
        return {
            name: value for name, value in vars(self).items() if name != "_maps"
        }  # memory maps are not pickled


def drawn_views(seed: int, epoch: int, image: np.ndarray, views: int, k: int) -> np.ndarray:
    """(b, k) different views of each image, a function of seed, epoch and image alone.

    An image has the same views on every rank, in every batch and worker, without a table of draws. splitmix64
    (Steele, Lea, Flood 2014) gives each view of each image a number; the k smallest win.
    """
    key = np.array([seed, epoch], np.int64).view(np.uint64)
    base = _splitmix64(_splitmix64(_splitmix64(key[:1]) ^ key[1:]) ^ image.astype(np.uint64))
    numbers = _splitmix64(base[:, None] ^ np.arange(1, views + 1, dtype=np.uint64))
    return numbers.argsort(1, kind="stable")[:, :k]


def _splitmix64(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def claim(out: Path, info: FeatureInfo) -> None:
    """Record in `out` what is written there. Raises ValueError if it holds other features."""
    path = out / INFO
    if path.is_file():
        if wrong := FeatureInfo.read(path).differences(info):
            raise ValueError(f"{out} holds other features ({'; '.join(wrong)}); name another folder")
        return
    with paths.atomic(path) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(info), indent=1))


def shard_folder(out: Path, part: int) -> Path:
    """The folder of shard `part`; it exists if and only if the shard is complete."""
    return out / f"shard-{part:06d}"


def missing_shards(out: Path, parts: Iterable[int]) -> list[int]:
    """Those of `parts` that do not exist."""
    return [part for part in parts if not shard_folder(out, part).is_dir()]


def merge_unreadable(out: Path) -> int:
    """Collect the unreadable photos of all shards in OUT/unreadable.csv (shard, id, reason); returns their
    number."""
    with FileLock(out / ".unreadable.lock"):  # the last process sees the shards of all others
        rows = []
        for path in sorted(out.glob(f"shard-*/{UNREADABLE}")):
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                rows += list(csv.reader(line.replace("\0", "") for line in file))
        with paths.atomic(out / UNREADABLE) as temporary:
            temporary.write_bytes(_csv_bytes([("shard", "id", "reason"), *rows]))
    return len(rows)


class _Parts(IterableDataset):
    """Stream (part, chunk) of the wanted parts, then (part, "") or (part, why it failed); a worker reads
    whole parts."""

    def __init__(self, source: Source, parts: list[int], info: FeatureInfo, size: int):
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


def check_shard(out: Path, part: int, info: FeatureInfo, full: bool = False) -> int:
    """The number of images in a shard, after its description, headers and hashes are verified.

    Of a large features.npy, blocks are sampled unless `full`. Raises ValueError with the shard's folder.
    """
    folder = shard_folder(out, part)
    about = _read_json(folder / SHARD)
    if wrong := FeatureInfo.read(folder / SHARD).differences(info):
        raise ValueError(f"{folder} was made differently: {'; '.join(wrong)}")
    try:
        n, hashes, sampled = int(about["n"]), about["sha256"], about["sampled_sha256"]
        shapes = {"features.npy": (n, info.views.number, info.dim), "latlon.npy": (n, 2)}
        for name in HASHED:
            quick = not full and name == "features.npy" and (folder / name).stat().st_size > SMALL_BYTES
            if file_hash(folder / name, BLOCKS if quick else 0) != (sampled if quick else hashes[name]):
                raise ValueError(f"{name} has changed since it was written")
            if name in shapes and (found := np.load(folder / name, mmap_mode="r").shape) != shapes[name]:
                raise ValueError(f"{name} has shape {found} instead of {shapes[name]}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, str(error)) from error
    return n


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(f"{folder} is damaged: {what}; rerun the embed command to make it again")


def file_hash(path: Path, blocks: int = 0) -> str:
    """SHA-256 of a file, or of its size and so many evenly spaced blocks, the first and the last among them."""
    with path.open("rb") as file:
        if not blocks:
            return hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        for start in np.linspace(0, max(0, size - BLOCK_BYTES), blocks).astype(int):
            file.seek(start)
            digest.update(file.read(BLOCK_BYTES))
        return digest.hexdigest()


def _not_finite(features: np.ndarray) -> np.ndarray | list:
    """Rows of float16 features (n, v, c) with NaN or infinity, empty if there are none."""
    bad = (np.ascontiguousarray(features).view(np.uint16) & 0x7C00) == 0x7C00  # all exponent bits set
    return np.flatnonzero(bad.any((1, 2))).tolist() if bad.any() else []


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found, reason = None, str(error)
    if not isinstance(found, dict):
        raise _damaged(
            path.parent, f"{path.name} cannot be read ({reason if found is None else 'not an object'})"
        )
    return found


def _write(path: Path, *contents) -> None:
    with path.open("wb") as file:
        for content in contents:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _npy(array: np.ndarray) -> tuple[bytes, memoryview]:
    """Header and data of a .npy file; np.save loses the reason if the disk is full."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return header.getvalue(), np.ascontiguousarray(array).data


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _csv_bytes(rows: Iterable[Sequence]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
