"""What can be embedded: photos of a CSV, webdataset tar shards, and the tiles that a data set renders.

A source is cut into parts that never change, so that a run that was stopped goes on at the first part that is
not there yet, with any number of processes. Each part is read in chunks of photos with their views.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from geoclip import photos
from geoclip.datasets import benchmarks, blue_marble, folder
from geoclip.photos import PhotoError

PHOTOS_A_PART = 4096
TILES_A_CHUNK = 256
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
# Where tar shards keep coordinates: keys of the json beside each photo.
LATLON_KEYS = (("LAT", "LON"), ("lat", "lon"), ("latitude", "longitude"))
# A JPEG is decoded at a half, a quarter or an eighth when its short side stays this many times the tower's.
DRAFT_MARGIN = 2


@dataclass(frozen=True)
class Views:
    """How views of a photo are made for a tower.

    pixels: side of the views. number: v; view 0 is the whole photo as in prediction (short side resized,
    centre cut out), the others are random crops of area `crop_area` of the photo and side ratio within
    `crop_ratio`, half of them mirrored. seed: of these crops; photo i has the same ones in every run.
    ten_crop: instead the ten views of the paper's evaluation (photos.ten_crop), for which number must be 10.
    """

    pixels: int = 224
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
    """Some photos of a part, in its order.

    images: (m, v, 3, p, p), uint8, or float as the tower takes them from sets that render tensors; unreadable: (id, reason).
    """

    part: int
    ids: list[str] = field(default_factory=list)
    latlon: list[tuple[float, float]] = field(default_factory=list)
    images: Tensor | None = None
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def pin_memory(self) -> "Chunk":
        """The same with its images where a GPU can fetch them while it computes; called by the DataLoader."""
        self.images = None if self.images is None else self.images.pin_memory()
        return self


class PhotoTable:
    """The photos of a CSV (see datasets.folder), 4,096 a part."""

    def __init__(self, data: folder.Geotagged, digest: str, photos_a_part: int = PHOTOS_A_PART):
        if data.images is None:
            raise ValueError(f"{data.name} has coordinates and no photos: name the folder with --images")
        self.data, self.photos_a_part = data, photos_a_part
        self.name, self.latlon, self.files = data.name, data.latlon, data.table["file"].to_numpy()
        self.hash = hashlib.sha256(f"{digest} {photos_a_part}".encode()).hexdigest()[:16]
        self.parts = -(-len(data) // photos_a_part)

    def chunks(self, part: int, views: Views, size: int) -> Iterator[Chunk]:
        """Part `part`, `size` photos at a time."""
        rows = range(part * self.photos_a_part, min((part + 1) * self.photos_a_part, len(self.data)))
        samples = ((self.files[row], tuple(self.latlon[row]), self.data.path(row), row) for row in rows)
        return decoded(samples, part, views, size)


class TarShards:
    """webdataset tar shards, local or over http: one part each.

    A sample is a photo and a json with its coordinates (LATLON_KEYS), as img2dataset writes them.
    """

    def __init__(self, pattern: str):
        from webdataset.shardlists import expand_urls

        self.urls = [url.removeprefix("file:") for url in expand_urls(pattern)]
        local = [Path(url) for url in self.urls if "://" not in url]
        absent = [path for path in local if not path.is_file()]
        if absent:
            raise FileNotFoundError(
                f"{absent[0]}: no such tar; {len(absent)} of {len(self.urls)} are missing"
            )
        self.name = pattern
        sizes = [path.stat().st_size for path in local]
        self.hash = hashlib.sha256(json.dumps([self.urls, sizes]).encode()).hexdigest()[:16]
        self.parts = len(self.urls)

    def chunks(self, part: int, views: Views, size: int) -> Iterator[Chunk]:
        """Tar `part`, `size` photos at a time. Raises OSError for a tar that is absent, broken or cut short."""
        return decoded(self.samples(part), part, views, size)

    def samples(self, part: int) -> Iterator[tuple[str, tuple[float, float] | PhotoError, bytes, int]]:
        """(id, (lat, lon) or why there is none, bytes of the photo, number) of each sample of a tar."""
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys, tar_file_expander

        url = self.urls[part]
        try:
            with gopen(url) as stream:
                tail = _Tail(stream)
                for number, sample in enumerate(
                    group_by_keys(tar_file_expander([{"url": url, "stream": tail}]))
                ):
                    name = sample["__key__"]
                    photo = next((sample[kind] for kind in IMAGE_SUFFIXES if kind in sample), None)
                    about = _json(sample.get("json"))
                    name = str(next((about[key] for key in ("IMG_ID", "id") if key in about), name))
                    try:
                        if photo is None:
                            raise PhotoError(name, f"no photo in the shard ({', '.join(IMAGE_SUFFIXES)})")
                        place = _place(name, about)
                    except PhotoError as error:
                        place, photo = error, b""
                    yield name, place, photo, number
                tail.check()
        except PhotoError:
            raise
        except Exception as error:  # tarfile, curl and the pipe each raise their own
            raise OSError(f"{url}: {_first_line(error)}") from error


class Tiles:
    """The tiles of a split of geoclip.datasets.blue_marble, rendered anew for each view; 4,096 a part."""

    def __init__(
        self, split: str, config: blue_marble.TileConfig | None = None, tiles_a_part: int = PHOTOS_A_PART
    ):
        splits = blue_marble.splits()
        if split not in splits:
            raise ValueError(f"blue_marble has no split {split!r}: there are {', '.join(splits)}")
        self.latlon, self.config = splits[split], config or blue_marble.TileConfig()
        self.name, self.tiles_a_part = f"blue_marble:{split}", tiles_a_part
        key = f"{blue_marble.data_hash()} {split} {self.config} {tiles_a_part}"
        self.hash = hashlib.sha256(key.encode() + self.latlon.numpy().tobytes()).hexdigest()[:16]
        self.parts = -(-len(self.latlon) // tiles_a_part)

    def chunks(self, part: int, views: Views, size: int) -> Iterator[Chunk]:
        """Part `part`, 256 tiles at a time whatever `size`: a chunk's disturbances are drawn together."""
        first, last = part * self.tiles_a_part, min((part + 1) * self.tiles_a_part, len(self.latlon))
        for start in range(first, last, TILES_A_CHUNK):
            rows = range(start, min(start + TILES_A_CHUNK, last))
            latlon = self.latlon[rows.start : rows.stop]
            generator = torch.Generator().manual_seed(views.seed * 2**32 + start)
            rendered = [
                blue_marble.render(latlon, self.config, blue_marble.augmentation(len(latlon), generator))
                for _ in range(views.number)
            ]
            ids = [f"{self.name}/{row}" for row in rows]
            yield Chunk(part, ids, [tuple(place) for place in latlon.tolist()], torch.stack(rendered, 1))


Source = PhotoTable | TarShards | Tiles


def open_source(name: str, images: Path | str | None = None, photos_a_part: int = PHOTOS_A_PART) -> Source:
    """The source that `name` names.

    A CSV with its folder of images (default: the CSV's own folder); tar shards, by path, http address or a
    pattern such as `shards/{00000..00999}.tar`; a data set of datasets.cards, such as `im2gps3k`, in the folder
    that GEOCLIP_DATA names; or `blue_marble:SPLIT`. Raises ValueError or FileNotFoundError.
    """
    if name in benchmarks.CARDS:
        data = benchmarks.load(name, images=images)
        digest = hashlib.sha256(data.table.to_csv(index=False).encode()).hexdigest()
        return PhotoTable(data, digest, photos_a_part)
    if name.startswith("blue_marble:"):
        return Tiles(name.partition(":")[2], tiles_a_part=photos_a_part)
    if name.endswith(".tar"):
        return TarShards(name)
    if name.endswith(".csv"):
        data = benchmarks.read_csv(name, images if images is not None else Path(name).parent)
        digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()
        return PhotoTable(data, digest, photos_a_part)
    raise ValueError(
        f"{name!r} is no source: give a CSV, tar shards (a path or address that ends in .tar, with braces for "
        f"many), one of {', '.join(benchmarks.CARDS)}, or blue_marble:SPLIT"
    )


def decoded(samples: Iterator, part: int, views: Views, size: int) -> Iterator[Chunk]:
    """Samples (id, place, photo, number) as chunks of `size`; what cannot be used is listed with the reason."""
    chunk, images = Chunk(part), []
    for name, place, photo, number in samples:
        try:
            if isinstance(place, PhotoError):
                raise place
            image = decode(photo, name, DRAFT_MARGIN * views.pixels)
            images.append(photo_views(image, views, np.random.default_rng([views.seed, part, number])))
        except PhotoError as error:
            chunk.unreadable.append((name, error.reason))
            continue
        chunk.ids.append(name)
        chunk.latlon.append(place)
        if len(images) == size:
            chunk.images = torch.stack(images)
            yield chunk
            chunk, images = Chunk(part), []
    if images:
        chunk.images = torch.stack(images)
    if chunk.ids or chunk.unreadable:
        yield chunk


def decode(photo: Path | bytes, name: str, short_side: int) -> Image.Image:
    """A photo upright in RGB, of which a JPEG is decoded smaller while its sides stay ≥ `short_side` pixels.

    Raises PhotoError with the reason.
    """
    file = io.BytesIO(photo) if isinstance(photo, bytes) else photo
    Image.init()
    try:
        image = Image.open(file, formats=[kind for kind in photos.FORMATS if kind in Image.OPEN])
        image.draft("RGB", (short_side, short_side))  # does nothing for other formats
    except Exception as error:
        if isinstance(photo, Path):
            return photos.open_photo(photo)  # which says what is wrong with the file
        raise PhotoError(
            name, "empty (0 bytes)" if not photo else "not an image in a known format"
        ) from error
    with image:
        return photos.open_photo(image)


def photo_views(photo: Image.Image, views: Views, generator: np.random.Generator) -> Tensor:
    """(v, 3, p, p) uint8: the whole photo as in prediction, then random crops; or its ten crops (see Views)."""
    from torchvision.transforms import functional

    p = views.pixels
    if views.ten_crop:
        return as_bytes(photos.ten_crop(photo, p))
    whole = functional.resize(photo, p, functional.InterpolationMode.BICUBIC)
    made = [photos.centre_crop(whole, p)]
    for _ in range(views.number - 1):
        # resized straight out of the box: no intermediate picture
        crop = photo.resize((p, p), Image.Resampling.BICUBIC, box=random_box(photo.size, views, generator))
        if generator.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        made.append(crop)
    return as_bytes(made)


def as_bytes(views: Sequence[Image.Image]) -> Tensor:
    """(v, 3, p, p) uint8 of RGB views of one size."""
    return torch.from_numpy(np.stack([np.asarray(view) for view in views])).permute(0, 3, 1, 2).contiguous()


def random_box(size: tuple[int, int], views: Views, generator: np.random.Generator) -> tuple[float, ...]:
    """(left, top, right, bottom) of a random crop, in pixels and inside a photo of `size` (width, height)."""
    width, height = size
    area = generator.uniform(*views.crop_area) * width * height
    bound = np.log(views.crop_ratio)
    # a ratio is drawn among those that fit, so that wide and tall photos need no second try
    low, high = max(-bound, np.log(area / height**2)), min(bound, np.log(width**2 / area))
    ratio = np.exp(generator.uniform(low, high) if low < high else (low + high) / 2)
    w, h = min(width, np.sqrt(area * ratio)), min(height, np.sqrt(area / ratio))
    left, top = generator.uniform(0, width - w), generator.uniform(0, height - h)
    return left, top, left + w, top + h


class _Tail:
    """A stream that remembers how it ended: a tar that was cut off between two files reads as if it were whole."""

    def __init__(self, stream):
        self.stream, self.last = stream, b""

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.last = (self.last + data)[-1024:]
        return data

    def check(self) -> None:
        """OSError unless the stream ends in the two empty blocks that end a tar."""
        while self.read(1 << 20):
            pass
        if self.last.strip(b"\0") or len(self.last) < 1024:
            raise OSError("the tar is cut short: it does not end in two empty blocks")


def _json(text: bytes | None) -> dict:
    try:
        about = json.loads(text) if text else {}
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def _place(name: str, about: dict) -> tuple[float, float]:
    for keys in LATLON_KEYS:
        if all(key in about for key in keys):
            try:
                lat, lon = (float(about[key]) for key in keys)
            except (TypeError, ValueError):
                break
            if abs(lat) <= 90 and abs(lon) <= 180:
                return lat, -180.0 if lon == 180 else lon
            raise PhotoError(name, f"({lat:g}, {lon:g}) is not (lat, lon) in degrees")
    raise PhotoError(name, "no coordinates in the shard's json (LAT and LON)")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
