"""Image sources for embedding: photos listed in a CSV, webdataset tar shards, and rendered tiles.

A source is divided into fixed parts, so that an interrupted run resumes at the first missing part with any
number of processes. Each part is read in chunks of photos with their views.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from geoclip import photos
from geoclip.datasets import benchmarks, blue_marble, folder, tars
from geoclip.image_encoder import Preprocessing
from geoclip.photos import PhotoError, Upload

PHOTOS_A_PART = 4096
TILES_A_CHUNK = 256
# JPEGs are decoded at 1/2, 1/4 or 1/8 while their short side stays at least this many times the tower's.
DRAFT_MARGIN = 2


@dataclass(frozen=True)
class Views:
    """How the `number` views of a photo are made.

    View 0 is the photo as in prediction (short side resized, centre crop), the others are random crops that
    cover `crop_area` of the photo with an aspect ratio within `crop_ratio`, half of them mirrored; photo i has
    the same ones in every run. ten_crop: instead, the paper's ten crops (photos.ten_crop); number must be 10.
    """

    number: int = 1
    crop_area: tuple[float, float] = (0.6, 1.0)
    crop_ratio: float = 4 / 3
    seed: int = 0
    ten_crop: bool = False

    def __post_init__(self):
        if self.ten_crop and self.number != 10:
            raise ValueError(f"ten crops are 10 views of a photo, not {self.number}")


@dataclass
class Chunk:
    """Consecutive photos of a part."""

    ids: list[str] = field(default_factory=list)
    latlon: list[tuple[float, float]] = field(default_factory=list)
    images: Tensor | None = None  # (m, v, 3, p, p), uint8, or float for sources that render tensors
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # (id, reason)

    def pin_memory(self) -> "Chunk":
        """Move the images to pinned memory; called by the DataLoader."""
        self.images = None if self.images is None else self.images.pin_memory()
        return self


class _Photos:
    """Photos that are decoded one by one: a subclass names them in `samples`."""

    def chunks(self, part: int, views: Views, tower: Preprocessing, size: int) -> Iterator[Chunk]:
        """Part `part`, `size` photos at a time; unusable ones are listed with the reason."""
        chunk, images = Chunk(), []
        for name, place, photo, number in self.samples(part):
            try:
                check_name(name)
                if isinstance(place, PhotoError):
                    raise place
                image = decode(photo, DRAFT_MARGIN * tower.pixels)
                draw = np.random.default_rng([views.seed, part, number])
                images.append(photo_views(image, views, tower, draw))
            except PhotoError as error:
                chunk.unreadable.append((printable(name), printable(error.reason)))
                continue
            chunk.ids.append(name)
            chunk.latlon.append(place)
            if len(images) == size:
                chunk.images = torch.stack(images)
                yield chunk
                chunk, images = Chunk(), []
        if images:
            chunk.images = torch.stack(images)
        if chunk.ids or chunk.unreadable:
            yield chunk


class PhotoTable(_Photos):
    """The photos of a CSV (datasets.folder), 4,096 per part."""

    def __init__(self, data: folder.Geotagged, photos_a_part: int = PHOTOS_A_PART):
        if data.images is None:
            raise ValueError(f"{data.name} has coordinates but no photos: name their folder with --images")
        self.data, self.photos_a_part = data, photos_a_part
        self.name, self.latlon, self.files = data.name, data.latlon, data.table["file"].to_numpy()
        rows = data.table[["file", "lat", "lon"]].to_csv(index=False)
        self.hash = hashlib.sha256(f"{photos_a_part}\n{rows}".encode()).hexdigest()[:16]
        self.parts = -(-len(data) // photos_a_part)

    def samples(self, part: int) -> Iterator[tuple[str, tuple[float, float], Path | Upload, int]]:
        """(id, (lat, lon), the photo, row) of each photo."""
        for row in range(part * self.photos_a_part, min((part + 1) * self.photos_a_part, len(self.data))):
            yield self.files[row], tuple(self.latlon[row]), self.data[row], row


class TarShards(_Photos):
    """webdataset tar shards, local or over http, one part each: photos, each with its coordinates in a json file.

    `pipe:COMMAND` runs a shell command for each shard and is accepted only with allow_pipe.
    """

    def __init__(self, pattern: str, allow_pipe: bool = False):
        self.urls = tars.expand(pattern, remote=True)
        schemes = [urlparse(url).scheme for url in self.urls]
        if "pipe" in schemes and not allow_pipe:
            raise ValueError(f"{pattern} would run a shell command; pass --allow-pipe if you trust it")
        sizes = [
            Path(url).stat().st_size for url, scheme in zip(self.urls, schemes, strict=True) if not scheme
        ]
        self.name, self.parts = pattern, len(self.urls)
        self.hash = hashlib.sha256(json.dumps([self.urls, sizes]).encode()).hexdigest()[:16]

    def samples(self, part: int) -> Iterator[tuple[str, tuple[float, float] | PhotoError, Upload, int]]:
        """(id, (lat, lon) or the reason why it cannot be used, the photo, number) of each sample.

        Raises OSError if the tar is missing, damaged or truncated.
        """
        from webdataset.gopen import gopen

        url = self.urls[part]
        try:
            with gopen(url) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
                for number, (name, place, photo) in enumerate(tars.samples(tar, whole=True)):
                    yield name, place, Upload(name, photo or b""), number
        except Exception as error:  # tarfile, curl and the pipe each raise their own
            # webdataset appends stream and address
            text = next((part for part in error.args if isinstance(part, str)), "") or type(error).__name__
            raise OSError(f"{url}: {text.strip().splitlines()[0]}") from error


class Tiles:
    """The tiles of a split of geoclip.datasets.blue_marble, rendered for each view; 4,096 per part."""

    def __init__(
        self,
        split: str,
        config: blue_marble.TileConfig | None = None,
        tiles_a_part: int = PHOTOS_A_PART,
        sizes: blue_marble.SplitConfig | None = None,
    ):
        splits = blue_marble.splits(sizes or blue_marble.SplitConfig())
        if split not in splits:
            raise ValueError(f"blue_marble has no split {split!r}; choose from {', '.join(splits)}")
        self.latlon, self.config = splits[split], config or blue_marble.TileConfig()
        self.name, self.tiles_a_part = f"blue_marble:{split}", tiles_a_part
        key = f"{blue_marble.data_hash()} {split} {self.config} {tiles_a_part}"
        self.hash = hashlib.sha256(key.encode() + self.latlon.numpy().tobytes()).hexdigest()[:16]
        self.parts = -(-len(self.latlon) // tiles_a_part)

    def chunks(self, part: int, views: Views, tower: Preprocessing, size: int) -> Iterator[Chunk]:
        """Part `part`, 256 tiles at a time whatever `size`, because a chunk's augmentation is drawn at once."""
        first, last = part * self.tiles_a_part, min((part + 1) * self.tiles_a_part, len(self.latlon))
        for start in range(first, last, TILES_A_CHUNK):
            rows = range(start, min(start + TILES_A_CHUNK, last))
            latlon = self.latlon[rows.start : rows.stop]
            generator = torch.Generator().manual_seed(views.seed * 2**32 + start)
            draws = [blue_marble.augmentation(len(latlon), generator) for _ in range(views.number)]
            rendered = [blue_marble.render(latlon, self.config, part) for part in draws]
            ids = [f"{self.name}/{row}" for row in rows]
            yield Chunk(ids, [tuple(place) for place in latlon.tolist()], torch.stack(rendered, 1))


Source = PhotoTable | TarShards | Tiles


def open_source(
    name: str,
    images: Path | str | None = None,
    photos_a_part: int = PHOTOS_A_PART,
    strict: bool = False,
    allow_pipe: bool = False,
) -> Source:
    """Open the source called `name`.

    A CSV with its image folder (default: the folder of the CSV); tar shards, by path, http address or a
    pattern such as `shards/{00000..00999}.tar`; a card of datasets.benchmarks, such as `im2gps3k`; or
    `blue_marble:SPLIT`. strict: refuse a benchmark with another number of rows than published.
    """
    if name in benchmarks.CARDS:
        return PhotoTable(benchmarks.load(name, images=images, strict=strict), photos_a_part)
    if name.startswith("blue_marble:"):
        return Tiles(name.partition(":")[2], tiles_a_part=photos_a_part)
    if name.endswith(".tar") or name.startswith("pipe:"):
        return TarShards(name, allow_pipe)
    if name.endswith(".csv"):
        data = benchmarks.read_csv(name, images if images is not None else Path(name).parent)
        return PhotoTable(data, photos_a_part)
    known = f"a CSV, tar shards (….tar), one of {', '.join(benchmarks.CARDS)}, or blue_marble:SPLIT"
    raise ValueError(f"{name!r} is not a source: give {known}")


def printable(name: str) -> str:
    """`name` in UTF-8 on one line: line breaks and bytes that are not UTF-8 are written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n").replace("\r", "\\r")


def check_name(name: str) -> None:
    """Raise PhotoError for a file name that a list of names cannot hold."""
    if printable(name) != name:
        what = "contains a line break" if "\n" in name or "\r" in name else "is not UTF-8"
        raise PhotoError(printable(name), f"its name {what}; rename it")


def decode(photo: Path | Upload, short_side: int) -> Image.Image:
    """Open a photo upright, in RGB. JPEGs are decoded at reduced size while both sides stay ≥ `short_side`."""
    with photos.opened(photo) as image:
        image.draft("RGB", (short_side, short_side))  # has no effect on other formats
        return photos.open_photo(image)


def photo_views(photo: Image.Image, views: Views, tower: Preprocessing, generator) -> Tensor:
    """(v, 3, p, p) uint8: the photo as in prediction, then random crops; or its ten crops (see Views)."""
    if views.ten_crop:
        made = photos.ten_crop(photo, tower.pixels, tower.filter)
    else:
        made = [tower.crop(photo)]
        for _ in range(views.number - 1):
            box = random_box(photo.size, views, generator)
            made.append(crop(photo, box, tower.pixels, tower.filter, generator.random() < 0.5))
    return torch.from_numpy(np.stack([np.asarray(view) for view in made])).permute(0, 3, 1, 2).contiguous()


def crop(image: Image.Image, box: tuple[float, ...], side: int, how, mirror: bool) -> Image.Image:
    """Return `box` (left, top, right, bottom) of an image, resized to side × side by the filter `how`."""
    square = image.resize((side, side), how, box=box)
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else square


def centre_box(size: tuple[int, int]) -> tuple[float, ...]:
    """(left, top, right, bottom) of the central square of a photo of `size` (width, height)."""
    left, top = ((side - min(size)) / 2 for side in size)
    return left, top, left + min(size), top + min(size)


def random_box(size: tuple[int, int], views: Views, generator: np.random.Generator) -> tuple[float, ...]:
    """(left, top, right, bottom) of a random crop, in pixels and inside a photo of `size` (width, height)."""
    width, height = size
    area = generator.uniform(*views.crop_area) * width * height
    bound = np.log(views.crop_ratio)
    # drawn among the ratios that fit, so that no second attempt is needed
    low, high = max(-bound, np.log(area / height**2)), min(bound, np.log(width**2 / area))
    ratio = np.exp(generator.uniform(low, high) if low < high else (low + high) / 2)
    w, h = min(width, np.sqrt(area * ratio)), min(height, np.sqrt(area / ratio))
    left, top = generator.uniform(0, width - w), generator.uniform(0, height - h)
    return left, top, left + w, top + h
