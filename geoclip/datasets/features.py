"""Feature folders: images embedded once by the frozen tower and stored, so that training never runs the tower.

A feature folder holds `features.json`, which describes how the features were made, and one folder per shard
with features.npy (m, v, c) float16, latlon.npy (m, 2) float32, ids.txt, unreadable.csv and shard.json.
`geoclip.datasets.embedding` writes such folders; this module verifies and reads them.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from geoclip.datasets.sources import Source, Views
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig, Preprocessing, tower_hash

INFO, SHARD, UNREADABLE = "features.json", "shard.json", "unreadable.csv"
# Raised by hand whenever the same photo, tower and views no longer give the same features.
RECIPE = 1
# A quick verification hashes this many blocks of a file, evenly spaced; of small files, all.
BLOCKS, BLOCK_BYTES, SMALL_BYTES = 16, 1 << 12, 1 << 24
HASHED = ("features.npy", "latlon.npy", "ids.txt")


@dataclass(frozen=True)
class FeatureInfo:
    """How the features of a folder were made; two folders with equal info hold the same numbers."""

    tower: str
    weights: str | None
    tower_hash: str
    preprocessing: Preprocessing
    views: Views
    dim: int
    source: str  # name of what was embedded
    data: str  # and its hash
    recipe: int
    shards: int

    @classmethod
    def of(cls, source: Source, encoder: ImageEncoder, views: Views) -> "FeatureInfo":
        """Describe the features that `encoder` makes of `source`."""
        config = encoder.config
        return cls(
            tower=config.tower, weights=config.weights, tower_hash=tower_hash(encoder.tower),
            preprocessing=Preprocessing.of(config), views=views, dim=encoder.feature_dim,
            source=source.name, data=source.hash, recipe=RECIPE, shards=source.parts,
        )  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> "FeatureInfo":
        """Read a features.json or shard.json; ValueError if it is damaged or from another version."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            for name, kind in (("preprocessing", Preprocessing), ("views", Views)):
                values = {key: tuple(v) if isinstance(v, list) else v for key, v in found[name].items()}
                found[name] = kind(**values)
            return cls(**{field.name: found[field.name] for field in dataclasses.fields(cls)})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{path.name} does not describe features of this version ({error!r})"
            raise damaged(path.parent, what) from error

    def differences(self, other: "FeatureInfo") -> list[str]:
        """A phrase for each field that differs."""
        pairs = ((name, value, getattr(other, name)) for name, value in vars(self).items())
        return [f"{name} {mine} instead of {theirs}" for name, mine, theirs in pairs if mine != theirs]


class FeatureData(Dataset):
    """A feature folder as a training set, memory-mapped: only what a batch needs is read.

    A key is (epoch, i); a batch of keys gives {"feature": (b, views_a_step, c) float32, "latlon": (b, 2),
    "index": (b,)} with views drawn at random per image and epoch. fraction: part of the images to use; smaller
    fractions are subsets of larger ones. full: verify every byte, not only sampled blocks of large shards.
    Raises ValueError if the folder is incomplete, mixed or damaged, or does not fit the encoder to be trained.
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
            raise FileNotFoundError(f"{self.folder} contains no features: run `python -m geoclip embed`")
        self.info = FeatureInfo.read(self.folder / INFO)
        self.views, self.dim = self.info.views.number, self.info.dim
        if encoder is not None:
            self.require(encoder)
        if views_a_step > self.views:
            raise ValueError(f"{self.folder} stores {self.views} views of each image, not {views_a_step}")
        shards = range(self.info.shards)
        if absent := missing_shards(self.folder, shards):
            lost = f"{len(absent)} of {self.info.shards} shards are missing, the first is {absent[0]}"
            raise ValueError(f"{self.folder} is incomplete: {lost}; rerun the embed command to complete it")
        self.starts = np.cumsum([0] + [check_shard(self.folder, part, self.info, full) for part in shards])
        places = np.concatenate([np.load(self._file(part, "latlon.npy")) for part in shards])
        if len(places) == 0:
            raise ValueError(f"{self.folder}: no image could be read, see {UNREADABLE} there")
        self.image = np.arange(len(places))
        if fraction < 1:
            order = np.random.default_rng(0).permutation(len(places))
            self.image = np.sort(order[: max(1, round(fraction * len(places)))])
        self.latlon = torch.from_numpy(places[self.image])
        self._maps: dict[int, np.ndarray] = {}
        self._all: Tensor | None = None  # all features, on a GPU

    def require(self, encoder: ImageEncoderConfig) -> None:
        """Raise ValueError unless the tower of `encoder` makes these features."""
        wanted = {"tower": encoder.tower, "weights": encoder.weights}
        for name, value in (wanted | {"preprocessing": Preprocessing.of(encoder)}).items():
            if (found := getattr(self.info, name)) != value:
                other = f"{name} {found}, but the model has {value}"
                raise ValueError(f"{self.folder} holds features of {other}: train with the same {name}")

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
                read = torch.from_numpy(self._read(rows))
                self._all[start : start + len(rows)].copy_(read, non_blocking=part > 0)
            self.latlon = self.latlon.to(device)

    @property
    def on_gpu(self) -> bool:
        return self._all is not None

    def tensor(self) -> Float[Tensor, "n v c"]:
        """All features, float16, for sets that fit in memory."""
        return torch.from_numpy(self._read(self.image))

    def _read(self, image: np.ndarray, view: np.ndarray | None = None) -> np.ndarray:
        """(b, k, c) features of images (b,) and views (b, k), default all views."""
        if view is None:
            view = np.broadcast_to(np.arange(self.views), (len(image), self.views))
        features = np.empty((*view.shape, self.dim), np.float16)
        shard = np.searchsorted(self.starts, image, side="right") - 1
        # in the order on disk, so that neighbours share a read
        order = np.argsort(image, kind="stable")
        edges = np.flatnonzero(np.diff(shard[order], prepend=-1, append=self.info.shards))
        for start, stop in itertools.pairwise(edges):
            pick, part = order[start:stop], int(shard[order[start]])
            if part not in self._maps:
                self._maps[part] = np.load(self._file(part, "features.npy"), mmap_mode="r")
            features[pick] = self._maps[part][(image[pick] - self.starts[part])[:, None], view[pick]]
            if not_finite(features[pick]):
                raise damaged(shard_folder(self.folder, part), "features.npy has values that are not finite")
        return features

    def _file(self, part: int, name: str) -> Path:
        return shard_folder(self.folder, part) / name

    def __getstate__(self) -> dict:
        return vars(self) | {"_maps": {}}  # memory maps are opened again, not pickled


def drawn_views(seed: int, epoch: int, image: np.ndarray, views: int, k: int) -> np.ndarray:
    """(b, k) different views of each image, a function of seed, epoch and image alone.

    splitmix64 (Steele, Lea, Flood 2014) gives each view of each image a number; the k smallest win.
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


def shard_folder(out: Path, part: int) -> Path:
    """The folder of shard `part`; it exists if and only if the shard is complete."""
    return out / f"shard-{part:06d}"


def missing_shards(out: Path, parts: Iterable[int]) -> list[int]:
    """Those of `parts` that do not exist."""
    return [part for part in parts if not shard_folder(out, part).is_dir()]


def check_shard(out: Path, part: int, info: FeatureInfo, full: bool = False) -> int:
    """The number of images in a shard, after its description, headers and hashes are verified.

    Of a large features.npy, blocks are sampled unless `full`.
    """
    folder = shard_folder(out, part)
    if wrong := FeatureInfo.read(folder / SHARD).differences(info):
        raise ValueError(f"{folder} was made differently: {'; '.join(wrong)}")
    about = json.loads((folder / SHARD).read_text(encoding="utf-8"))
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
        raise damaged(folder, str(error)) from error
    return n


def damaged(folder: Path, what: str) -> ValueError:
    """The error for a shard, or for a whole folder, that cannot be used."""
    return ValueError(f"{folder} is damaged: {what}; rerun the embed command, or embed elsewhere")


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


def not_finite(features: np.ndarray) -> list[int]:
    """Rows of float16 features (n, v, c) with NaN or infinity."""
    bad = (np.ascontiguousarray(features).view(np.uint16) & 0x7C00) == 0x7C00  # all exponent bits set
    return np.flatnonzero(bad.any((1, 2))).tolist() if bad.any() else []
