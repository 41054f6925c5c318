"""Training data: rendered tiles, photos or features, in an order that depends on seed and epoch alone."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from geoclip import earth, paths
from geoclip.datasets import blue_marble, features, folder, sources
from geoclip.datasets.blue_marble import TileConfig
from geoclip.datasets.features import FeatureData
from geoclip.datasets.folder import Geotagged
from geoclip.image_encoder import Preprocessing
from geoclip.photos import PhotoError
from geoclip.training.config import RunConfig, TrainConfig

TRIES = 1000  # photos in a row that cannot be read, before training stops


def seeded(*keys: int | str) -> torch.Generator:
    """Return a generator whose state is a function of the keys alone."""
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class EpochSampler(Sampler):
    """Yields (epoch, index) in an order that is a function of (seed, epoch), in whole global batches only.

    With several ranks, each global batch is cut into equal consecutive parts, one for each rank.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1):
        if n < batch_size:
            raise ValueError(f"{n} samples are fewer than one batch of {batch_size}: lower batch_size")
        if batch_size % ranks:
            raise ValueError(f"batch_size {batch_size} cannot be divided over {ranks} devices")
        self.n, self.batch_size, self.seed, self.rank, self.ranks = n, batch_size, seed, rank, ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n // self.batch_size * self.batch_size // self.ranks

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(self.n, generator=seeded(self.seed, "order", self.epoch))
        whole = order[: self.n // self.batch_size * self.batch_size]
        mine = whole.view(-1, self.ranks, self.batch_size // self.ranks)[:, self.rank].flatten()
        for part in mine.split(1 << 16):  # one list of all would take 36 bytes an image, 4 GB for 100 M
            for index in part.tolist():
                yield self.epoch, index


class TileTraining(Dataset):
    """Blue Marble tiles, rendered anew each epoch: batches of `image` (b, v, 3, p, p), `latlon`, `index`."""

    def __init__(self, latlon: Float[Tensor, "n 2"], tiles: TileConfig, views: int = 1, seed: int = 0):
        self.latlon, self.tiles, self.views, self.seed = latlon, tiles, views, seed
        self.drawn: tuple[int, Tensor] | None = None  # the epoch and its augmentation

    def __len__(self) -> int:
        return len(self.latlon)

    def at(self, latlon: Float[Tensor, "n 2"]) -> "TileTraining":
        """Return the same data set at other places."""
        return type(self)(latlon, self.tiles, self.views, self.seed)

    def augmentation(self, epoch: int) -> Float[Tensor, "n v 9"]:
        """Return the random draws of an epoch."""
        if self.drawn is None or self.drawn[0] != epoch:
            n = len(self.latlon)
            draws = blue_marble.augmentation(n * self.views, seeded(self.seed, "tiles", epoch))
            self.drawn = epoch, draws.view(n, self.views, -1)
        return self.drawn[1]

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        index = torch.tensor([index for _, index in keys])
        latlon = self.latlon[index]
        draws = self.augmentation(keys[0][0])[index]
        images = blue_marble.render(latlon.repeat_interleave(self.views, 0), self.tiles, draws.flatten(0, 1))
        return {"image": images.unflatten(0, (len(index), self.views)), "latlon": latlon, "index": index}


class PhotoTraining(Dataset):
    """Geotagged photos: batches of `image` (b, v, 3, p, p), `latlon` (b, 2) and `index`.

    A view is a random crop of 0.6 to 1 of the area, resized to p × p, mirrored in half of the cases and
    normalised as the tower requires; before epoch 0, in validation, it is as in prediction. It depends on seed, epoch,
    view and photo alone. Where a photo cannot be read, the next one takes its place in the batch, which then has
    `left_out`, a list of (file, reason).
    """

    def __init__(
        self,
        photos: Geotagged,
        preprocessing: Preprocessing,
        views: int = 1,
        seed: int = 0,
        held_out: Geotagged | None = None,
        left_out: dict[str, str] | None = None,
    ):
        """held_out: photos left for evaluation. left_out: files of photos that are missing, with the reason."""
        self.photos, self.held_out, self.preprocessing = photos, held_out, preprocessing
        self.left_out = left_out or {}
        self.latlon = earth.check_latlon(torch.from_numpy(photos.latlon), photos.name).float()
        self.views, self.seed = views, seed

    def __len__(self) -> int:
        return len(self.photos)

    def view(self, epoch: int, row: int, number: int) -> Float[Tensor, "c p p"]:
        """Return one view of a photo; raises PhotoError for a photo that cannot be read."""
        # differs 2: the released loader crops to 8 % and more, and normalises by ImageNet's statistics though
        # CLIP was trained with its own; the ranges of sources.Views are those of the same lab's later code
        photo = sources.decode(self.photos[row], sources.DRAFT_MARGIN * self.preprocessing.pixels)
        if epoch < 0:
            squashed = self.preprocessing.resize == "squash"
            box = (0, 0, *photo.size) if squashed else sources.centre_box(photo.size)
            return self.crop(row, photo, box, False)
        generator = np.random.default_rng([self.seed, epoch, number, row])
        box = sources.random_box(photo.size, sources.Views(), generator)
        return self.crop(row, photo, box, generator.random() < 0.5)

    def crop(self, row: int, photo: Image.Image, box: tuple[float, ...], mirror: bool) -> Tensor:
        """Return the part of a photo in `box` (left, top, right, bottom) as the tower's input."""
        image = sources.crop(photo, box, self.preprocessing.pixels, self.preprocessing.filter, mirror)
        return self.preprocessing.normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1))

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        left_out: list[tuple[str, str]] = []
        rows, images = zip(*[self.readable(epoch, row, left_out) for epoch, row in keys], strict=True)
        index = torch.tensor(rows)
        batch = {"image": torch.stack(images), "latlon": self.latlon[index], "index": index}
        return batch | ({"left_out": left_out} if left_out else {})

    def readable(self, epoch: int, row: int, left_out: list) -> tuple[int, Float[Tensor, "v c p p"]]:
        """Return the first photo from `row` on that can be read, as row and views; ValueError if TRIES cannot."""
        for tried in range(row, row + TRIES):
            row = tried % len(self.photos)
            try:
                return row, torch.stack([self.view(epoch, row, number) for number in range(self.views)])
            except PhotoError as error:
                left_out.append((self.photos.table["file"].iloc[row], error.reason))
        last = ": ".join(left_out[-1])
        raise ValueError(f"{self.photos.name}: {TRIES} photos in a row cannot be read, the last is {last}")


def present(photos: Geotagged) -> tuple[np.ndarray, dict[str, str]]:
    """Return which photos are there (n,), and the files of the others with the reason; FileNotFoundError if none is."""
    missing = dict.fromkeys(photos.missing(), "no such file")
    there = ~photos.table["file"].isin(missing).to_numpy()
    if not there.any():
        none = f"none of its {len(photos):,} photos is in {photos.images}, not even {next(iter(missing))}"
        raise FileNotFoundError(f"{photos.name}: {none}")
    return there, missing


def part(n: int, fraction: float, seed: int) -> np.ndarray:
    """Return the rows of a random part of n samples, in order; fractions are nested."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, round(fraction * n))].sort().values.numpy()


def hold_out(photos: Geotagged, share: float) -> tuple[Geotagged, Geotagged]:
    """Split photos into a training set and a hold-out of at least this share, by photographer or by place.

    Whole photographers are held out where ten or more are known, else whole places (0.01°, about 1 km). They
    are taken in one fixed random order, so that larger parts contain smaller ones.
    """
    table = photos.table
    group = table["author"]
    if photos.authors is None or group.nunique() < 10:
        group = table["lat"].round(2).astype(str) + " " + table["lon"].round(2).astype(str)
    sizes = group.value_counts().sort_index()
    sizes = sizes.iloc[torch.randperm(len(sizes), generator=seeded("holdout")).numpy()]
    held = group.isin(sizes.index[(sizes.cumsum() - sizes) < share * len(table)])
    if held.all():
        raise ValueError(f"{photos.name}: holdout {share} of {len(table):,} photos leaves none for training")
    return photos.rows(~held), photos.rows(held)


def training_set(config: TrainConfig) -> Dataset:
    """Return the training samples of a configuration: `latlon` (n, 2), and batches through __getitems__."""
    of_photos = config.data.endswith(".tar") or Path(config.data).is_file()
    if config.holdout and not of_photos:
        raise ValueError("holdout needs a CSV of photos as data; split the CSV before features are embedded")
    if config.data == "blue_marble":
        return TileTraining(training_places(config), config.tiles, config.views, config.seed)
    if on_features(config):
        return FeatureData(config.data, config.image, config.views, config.fraction, config.seed)
    if of_photos:
        every = folder.read(config.data, config.images or Path(config.data).parent)
        kept, held_out = hold_out(every, config.holdout)
        kept = kept.rows(part(len(kept), config.fraction, config.seed))
        there, left_out = present(kept)
        preprocessing = Preprocessing.of(config.image)
        return PhotoTraining(kept.rows(there), preprocessing, config.views, config.seed, held_out, left_out)
    known = '"blue_marble" nor a folder of features (`embed`) nor a CSV of photos (`dataset`) nor tar shards'
    raise FileNotFoundError(f"data {config.data!r} is neither {known}")


def on_features(config: RunConfig) -> bool:
    """Return whether the data are features, so that training does not need the tower."""
    return (Path(config.data) / features.INFO).is_file()


def training_places(config: RunConfig) -> Float[Tensor, "n 2"]:
    """Return the training places of the embedded tiles; fractions are nested."""
    latlon = blue_marble.splits(config.splits)["train"]  # in random order
    return latlon[: max(1, round(config.fraction * len(latlon)))]


def fingerprint(config: RunConfig) -> str:
    """Return a hash of the training data."""
    if config.data == "blue_marble":
        return blue_marble.data_hash()
    if config.data.endswith(".tar"):
        return sources.TarShards(config.data).hash
    described = Path(config.data) / features.INFO if on_features(config) else Path(config.data)
    return hashlib.sha256(described.read_bytes()).hexdigest()[:16]


class Loaders(lightning.LightningDataModule):
    """Training batches of a rank, and validation batches of the embedded tiles or of the data's `validation`."""

    def __init__(self, config: RunConfig, data: Dataset):
        super().__init__()
        self.config, self.data = config, data

    def train_dataloader(self) -> DataLoader:
        if isinstance(self.data, FeatureData):
            self.data.keep_on(self.trainer.strategy.root_device)
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        sampler = EpochSampler(len(self.data), self.config.batch_size, self.config.seed, rank, ranks)
        return self.loader(self.data, sampler, self.config.batch_size // ranks)

    def val_dataloader(self) -> DataLoader | list:
        if self.config.data == "blue_marble":
            data = self.data.at(blue_marble.splits(self.config.splits)["val"])
        elif (data := getattr(self.data, "validation", None)) is None:
            return []
        keys = [(-1, index) for index in range(len(data))]  # epoch -1: one augmentation for all epochs
        return self.loader(data, keys, self.config.batch_size)

    def loader(self, data: Dataset, keys, batch_size: int) -> DataLoader:
        on_gpu = isinstance(data, FeatureData) and data.on_gpu  # needs neither workers nor pinned memory
        workers = 0 if on_gpu else self.config.workers
        pinned = torch.cuda.is_available() and not on_gpu
        how = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": pinned}
        return DataLoader(data, batch_size, sampler=keys, collate_fn=_whole_batch, **how)


def _whole_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch  # __getitems__ returns whole batches


class LeftOut(lightning.Callback):
    """Lists the photos that training leaves out, with the reason, in left_out.csv beside the checkpoint.

    Those that are missing are known from the start; those that turn out to be unreadable are added.
    """

    def __init__(self, directory: Path):
        self.directory, self.said = directory, 0

    def on_train_start(self, trainer, module) -> None:
        self.known = dict(getattr(trainer.datamodule.data, "left_out", {}))

    def on_train_batch_end(self, trainer, module, outputs, batch, *_) -> None:
        self.known |= dict(batch.get("left_out", ()))

    on_validation_batch_end = on_train_batch_end

    def on_train_epoch_start(self, trainer, module) -> None:
        if len(self.known) == self.said:
            return
        self.said, (name, reason) = len(self.known), next(iter(self.known.items()))
        rank = f"-{trainer.global_rank}" if trainer.global_rank else ""
        listed = self.directory / f"left_out{rank}.csv"
        print(f"geoclip: {self.said:,} photos are left out ({name}: {reason}, …): {listed}", file=sys.stderr)
        with paths.atomic(listed) as temporary:
            pd.DataFrame(self.known.items(), columns=["file", "reason"]).to_csv(temporary, index=False)

    on_train_end = on_train_epoch_start
