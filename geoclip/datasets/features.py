"""Features: images embedded once by the frozen tower and kept, so that training never runs the tower again.

A folder of features holds `features.json` (what made them) and one folder a shard with features.npy (m, v, c)
float16, latlon.npy (m, 2) float32, ids.txt, unreadable.csv and shard.json. A shard appears whole, by one rename,
or not at all; so a run that was killed goes on at the first shard that is not there.
"""

import contextlib
import csv
import dataclasses
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from geoclip import paths, precision
from geoclip.datasets.sources import Chunk, Source, Tiles, Views
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig, Preprocessing, in_bf16

INFO = "features.json"
UNREADABLE = "unreadable.csv"


@dataclass(frozen=True)
class FeatureInfo:
    """What made a folder of features; two folders with one info hold the same numbers.

    tower, weights: as in ImageEncoderConfig, with the weights' own hash in tower_hash; source, data: name and
    hash of what was embedded; code: hash of the modules that embed; shards: how many there will be.
    """

    tower: str
    weights: str | None
    tower_hash: str
    preprocessing: Preprocessing
    views: Views
    dim: int
    source: str
    data: str
    code: str
    shards: int

    @classmethod
    def of(cls, source: Source, encoder: ImageEncoder, views: Views) -> "FeatureInfo":
        """The info of the features that `encoder` would make of `source`."""
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
            code=code_hash(),
            shards=source.parts,
        )

    @classmethod
    def read(cls, path: Path) -> "FeatureInfo":
        """From a JSON file; ValueError where it is not one of ours."""
        try:
            found = json.loads(path.read_text())
            for name, kind in (("preprocessing", Preprocessing), ("views", Views)):
                values = {key: tuple(v) if isinstance(v, list) else v for key, v in found[name].items()}
                found[name] = kind(**values)
            return cls(**{field.name: found[field.name] for field in dataclasses.fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not describe features ({error!r})") from error

    def differences(self, other: "FeatureInfo") -> list[str]:
        """One phrase for each field in which the two differ."""
        return [
            f"{field.name} {getattr(self, field.name)} instead of {getattr(other, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]


@dataclass(frozen=True)
class EmbedReport:
    """What one process did: images embedded now, found already there, unreadable, shards that failed and why."""

    embedded: int
    found: int
    unreadable: int
    failed: tuple[tuple[int, str], ...]
    seconds: float


def tower_hash(tower: nn.Module) -> str:
    """Hash of the weights that make image features; a CLIP model's text half does not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(getattr(tower, "visual", tower).state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@functools.cache
def code_hash() -> str:
    """Hash of the modules that decide what the features are."""
    folder = Path(__file__).parents[1]
    modules = [
        "datasets/features",
        "datasets/sources",
        "photos",
        "image_encoder",
        "cpu_bf16",
        "datasets/blue_marble",
    ]
    return hashlib.sha256(b"".join((folder / f"{module}.py").read_bytes() for module in modules)).hexdigest()[
        :16
    ]


def rank_and_world() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) under torchrun or SLURM; (0, 1, 0) elsewhere."""
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
    arithmetic: precision.Precision = "auto",
    rank: int = 0,
    world: int = 1,
    compiled: bool = False,
    progress: bool = False,
) -> EmbedReport:
    """Write the features of `source` to the folder `out`, going on where an earlier run stopped.

    batch_size: views through the tower at once; workers: processes that decode; rank, world: this process
    takes the shards rank, rank + world, … Photos that cannot be read are listed in unreadable.csv. A tar that
    cannot be read whole makes no shard and is reported. Raises ValueError where `out` holds features made
    otherwise or no photo can be read, OSError where the disk is full; whole shards stay in every case.
    """
    began = time.perf_counter()
    if views and views.ten_crop and isinstance(source, Tiles):
        raise ValueError("tiles are rendered in views of their own, not in ten crops: those are for photos")
    out = paths.make_folder(Path(out))
    views = dataclasses.replace(views or Views(), pixels=Preprocessing.of(encoder.config).pixels)
    info = FeatureInfo.of(source, encoder, views)
    claim(out, info)
    mine = [part for part in range(rank, source.parts, world)]
    wanted = missing_shards(out, mine)
    there = sorted(set(mine) - set(wanted))
    for part in wanted:  # what a killed run left of shards that are this process's to make
        for left in out.glob(f".{shard_folder(out, part).name}.*"):
            shutil.rmtree(left)
    tower = Tower(encoder, info.preprocessing, batch_size, arithmetic, compiled)
    stream = DataLoader(
        _Parts(source, wanted, views, max(1, batch_size // views.number)),
        batch_size=None,
        num_workers=min(workers, len(wanted)),
        pin_memory=tower.device.type == "cuda",
        prefetch_factor=4 if workers and wanted else None,
    )
    embedded, unreadable, failed, open_shards = 0, 0, [], {}
    with _progress(progress, f"rank {rank}: {len(there)} of {len(mine)} shards there") as tell:
        for chunk in stream:
            if isinstance(chunk, _Failed):
                open_shards.pop(chunk.part, None)
                failed.append((chunk.part, chunk.reason))
            elif isinstance(chunk, _End):
                shard = open_shards.pop(chunk.part, None) or Shard(chunk.part)
                if rank == 0 and not there and embedded == 0 and shard.unreadable:
                    raise ValueError(nothing_readable(source, shard))
                shard.write(out, info, tower.dtype)
                unreadable += len(shard.unreadable)
            else:
                shard = open_shards.setdefault(chunk.part, Shard(chunk.part))
                shard.add(chunk, tower)
                embedded += len(chunk.ids)
                tell(len(chunk.ids))
    merge_unreadable(out)
    found = sum(_shard_json(out, part)["n"] for part in there)
    return EmbedReport(embedded, found, unreadable, tuple(failed), time.perf_counter() - began)


class Tower:
    """The image tower as embedding runs it: one device, one arithmetic, bounded batches."""

    def __init__(self, encoder, preprocessing, batch_size, arithmetic: precision.Precision, compiled: bool):
        self.device = next(encoder.tower.parameters()).device
        self.dtype = precision.choose(arithmetic, self.device)
        tower = getattr(encoder.tower, "visual", encoder.tower).eval()
        if self.dtype != torch.float32:
            tower = in_bf16(tower, self.device)
        self.features = torch.compile(tower) if compiled else tower
        self.batch_size = batch_size
        self.preprocessing = preprocessing

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Float[Tensor, "n c"]:
        """float16 features, on the CPU, of images (n, 3, p, p): uint8, or floats as the tower takes them."""
        parts = [self.features(self.prepared(part)) for part in images.split(self.batch_size)]
        return torch.cat(parts).half().cpu()

    def prepared(self, images: Tensor) -> Tensor:
        """On the device and normalised there: bytes travel, not floats."""
        images = images.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = self.preprocessing.normalise(images)
        return images.to(self.dtype)


class Shard:
    """The features of one part while they gather, and how they become a folder."""

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

    def write(self, out: Path, info: FeatureInfo, dtype: torch.dtype) -> None:
        """Appear in `out` by one rename. Raises OSError where the disk is full, and leaves nothing behind."""
        if bad := [name for name in self.ids if "\n" in name]:
            raise ValueError(f"{info.source}: the name {bad[0]!r} has a line break in it")
        empty = np.empty((0, info.views.number, info.dim), np.float16)
        features = np.concatenate([empty, *self.features])
        final = shard_folder(out, self.part)
        temporary = out / f".{final.name}.{os.getpid()}"
        about = {
            **dataclasses.asdict(info),
            "shard": self.part,
            "n": len(self.ids),
            "unreadable": len(self.unreadable),
            "arithmetic": str(dtype).removeprefix("torch."),
            "features_sha256": hashlib.sha256(features.data).hexdigest(),
        }
        try:
            temporary.mkdir()
            _write_array(temporary / "features.npy", features)
            _write_array(temporary / "latlon.npy", np.array(self.latlon, np.float32).reshape(-1, 2))
            _write(temporary / "ids.txt", ("\n".join(self.ids) + "\n" * bool(self.ids)).encode())
            _write(temporary / UNREADABLE, _csv_bytes((self.part, *row) for row in self.unreadable))
            _write(temporary / "shard.json", json.dumps(about, indent=1).encode())
            os.rename(temporary, final)
            _sync_folder(out)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                whole = len(list(out.glob("shard-*")))
                raise OSError(
                    error.errno,
                    f"the disk is full: shard {self.part} was not written to {out}; {whole} whole shards stay. "
                    f"Make room and give the same command again",
                ) from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class FeatureData(Dataset):
    """A folder of features as a training set, memory-mapped: only what a batch needs is read.

    latlon: (n, 2) degrees; views, dim: how many views of each image are kept, and c. A key is (epoch, i), and a
    batch of keys gives {"feature": (b, views_a_step, c) float32, "latlon": (b, 2), "index": (b,)} with views
    drawn at random for each image and epoch. fraction: part that is used; smaller parts lie within larger ones.
    Raises ValueError for an incomplete or mixed folder, and, given the image encoder that is to be trained,
    for features of another tower, weights or preprocessing.
    """

    def __init__(
        self,
        folder: Path | str,
        encoder: ImageEncoderConfig | None = None,
        views_a_step: int = 1,
        fraction: float = 1.0,
        seed: int = 0,
    ):
        self.folder, self.views_a_step, self.seed = Path(folder), views_a_step, seed
        if not (self.folder / INFO).is_file():
            raise FileNotFoundError(
                f"{self.folder} holds no features: make them with `python -m geoclip embed`"
            )
        self.info = FeatureInfo.read(self.folder / INFO)
        self.views, self.dim = self.info.views.number, self.info.dim
        if encoder is not None:
            self.require(encoder)
        if views_a_step > self.views:
            raise ValueError(f"{self.folder} keeps {self.views} views of each image, not {views_a_step}")
        self.check_whole()
        shards = range(self.info.shards)
        self.starts = np.cumsum([0] + [_shard_json(self.folder, part)["n"] for part in shards])
        places = np.concatenate([np.load(self._file(part, "latlon.npy")) for part in shards])
        if len(places) == 0:
            raise ValueError(f"{self.folder}: not one image could be read, see {UNREADABLE} there")
        self.image = np.arange(len(places))
        if fraction < 1:
            order = np.random.default_rng(0).permutation(len(places))
            self.image = np.sort(order[: max(1, round(fraction * len(places)))])
        self.latlon = torch.from_numpy(places[self.image])
        self._all: Tensor | None = None  # on a GPU that has room for them

    def require(self, encoder: ImageEncoderConfig) -> None:
        """ValueError unless these features are what the tower of `encoder` makes."""
        wanted = {
            "tower": encoder.tower,
            "weights": encoder.weights,
            "preprocessing": Preprocessing.of(encoder),
        }
        for name, value in wanted.items():
            if getattr(self.info, name) != value:
                raise ValueError(
                    f"{self.folder} holds features of {name} {getattr(self.info, name)}, but the model has "
                    f"{value}: train with that {name}, or embed again"
                )

    def check_whole(self) -> None:
        """ValueError that names the first shard that is missing or was made otherwise."""
        if absent := missing_shards(self.folder, range(self.info.shards)):
            raise ValueError(
                f"{self.folder} is incomplete: {len(absent)} of {self.info.shards} shards are missing, the first "
                f"is {absent[0]}; give the embed command again to complete it"
            )
        for part in range(self.info.shards):
            made = FeatureInfo.read(shard_folder(self.folder, part) / "shard.json")
            if wrong := made.differences(self.info):
                raise ValueError(f"{shard_folder(self.folder, part)} was made otherwise: {'; '.join(wrong)}")

    def __len__(self) -> int:
        return len(self.image)

    def ids(self) -> list[str]:
        """The names of the images, in order."""
        parts = (self._file(part, "ids.txt").read_text() for part in range(self.info.shards))
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
        """Hold all features on a GPU from now on, where they take at most half of its free memory."""
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
        """Whether keep_on found room."""
        return self._all is not None

    def tensor(self) -> Float[Tensor, "n v c"]:
        """All features at once, float16; for sets that fit in memory."""
        return torch.from_numpy(self._read(self.image))

    def _read(self, image: np.ndarray, view: np.ndarray | None = None) -> np.ndarray:
        """(b, k, c) features of these images and views (b, k); all views without `view`."""
        if view is None:
            view = np.broadcast_to(np.arange(self.views), (len(image), self.views))
        features = np.empty((*view.shape, self.dim), np.float16)
        shard = np.searchsorted(self.starts, image, side="right") - 1
        # in the order in which they lie on the disk: neighbours share a read
        order = np.argsort(image, kind="stable")
        edges = np.flatnonzero(np.diff(shard[order], prepend=-1, append=self.info.shards))
        for start, stop in itertools.pairwise(edges):
            pick, part = order[start:stop], int(shard[order[start]])
            features[pick] = self._map(part)[(image[pick] - self.starts[part])[:, None], view[pick]]
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
        }  # maps stay with their process


def drawn_views(seed: int, epoch: int, image: np.ndarray, views: int, k: int) -> np.ndarray:
    """(b, k) different views of each image, a function of seed, epoch and image alone.

    So a batch has the same views on whichever rank, in whichever batch and worker it is read, and no table of
    draws is kept. splitmix64 (Steele, Lea, Flood 2014) gives each view of each image a number; the k smallest win.
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
    """Say in `out` what is being written there. Raises ValueError where something else is there already."""
    path = out / INFO
    if path.is_file():
        if wrong := FeatureInfo.read(path).differences(info):
            raise ValueError(f"{out} holds other features ({'; '.join(wrong)}); name another folder")
        return
    with paths.atomic(path) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(info), indent=1))


def shard_folder(out: Path, part: int) -> Path:
    """Where shard `part` lies; it exists if and only if it is whole."""
    return out / f"shard-{part:06d}"


def missing_shards(out: Path, parts: Iterable[int]) -> list[int]:
    """Those of `parts` that are not there."""
    return [part for part in parts if not shard_folder(out, part).is_dir()]


def merge_unreadable(out: Path) -> int:
    """Gather what the whole shards could not read in OUT/unreadable.csv (shard, id, reason); how many rows."""
    with FileLock(out / ".unreadable.lock"):  # the last process to come sees the shards of all others
        rows = []
        for path in sorted(out.glob(f"shard-*/{UNREADABLE}")):
            with path.open(newline="") as file:
                rows += list(csv.reader(file))
        with paths.atomic(out / UNREADABLE) as temporary:
            temporary.write_bytes(_csv_bytes([("shard", "id", "reason"), *rows]))
    return len(rows)


def count_unreadable(out: Path) -> int:
    """How many photos OUT/unreadable.csv lists; 0 without it."""
    if not (out / UNREADABLE).is_file():
        return 0
    with (out / UNREADABLE).open(newline="") as file:
        return sum(1 for _ in csv.reader(file)) - 1


def nothing_readable(source: Source, shard: Shard) -> str:
    """The message for a source of which no photo can be read."""
    name, reason = shard.unreadable[0]
    return (
        f"{source.name}: not one of the first {len(shard.unreadable):,} photos can be read ({name}: {reason}); "
        f"is the folder of images right?"
    )


@dataclass(frozen=True)
class _End:
    part: int


@dataclass(frozen=True)
class _Failed:
    part: int
    reason: str


class _Parts(IterableDataset):
    """The wanted parts as one stream, each with an end; every worker reads whole parts."""

    def __init__(self, source: Source, parts: list[int], views: Views, size: int):
        self.source, self.parts, self.views, self.size = source, parts, views, size

    def __iter__(self) -> Iterator[Chunk | _End | _Failed]:
        worker = get_worker_info()
        mine = self.parts if worker is None else self.parts[worker.id :: worker.num_workers]
        for part in mine:
            try:
                yield from self.source.chunks(part, self.views, self.size)
            except OSError as error:
                yield _Failed(part, str(error))
            else:
                yield _End(part)


@contextlib.contextmanager
def _progress(show: bool, description: str):
    if not show:
        yield lambda n: None
        return
    from tqdm import tqdm

    with tqdm(desc=description, unit=" images", smoothing=0.05) as bar:
        yield bar.update


def _shard_json(out: Path, part: int) -> dict:
    return json.loads((shard_folder(out, part) / "shard.json").read_text())


def _write_array(path: Path, array: np.ndarray) -> None:
    """As np.save, but through write(): numpy's own way loses the reason when the disk is full."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fsync(file.fileno())


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


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
