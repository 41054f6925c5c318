"""Geolocalization as classification over cells of the Earth, with coarse, middle and fine heads.

After PlaNet (cells), the ISNs (three partitions, hierarchical inference, scenes) and TransLocator (a second
tower on a segmentation map). The answer is the mean place of a cell's training images. Options are named as
in those projects.
"""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from geoclip.baselines import labels, samples
from geoclip.baselines.config import ALL_SCENES, LEVELS, GeocellsConfig
from geoclip.baselines.partition import Partition, PartitionConfig, leaf_ids, partition
from geoclip.baselines.towers import Tower
from geoclip.datasets import blue_marble
from geoclip.image_encoder import Preprocessing
from geoclip.location_encoder import initialise
from geoclip.training.data import seeded
from geoclip.training.module import TrainingModule, accuracies


class Geocells(nn.Module):
    """Image, with a segmentation map behind its channels → logits over the cells of each level and scenes.

    Every part has a random generator of its own, so that adding one does not change the others.
    """

    def __init__(self, config: GeocellsConfig, partitions: dict[str, Partition]):
        super().__init__()
        self.config = config
        self.tower = Tower(config.image, seeded(config.seed, "tower"))
        dim = self.tower.dim
        sizes = {level: len(cells) for level, cells in partitions.items()}
        sizes |= {"scene": len(labels.SCENES)} if config.scene else {}
        self.heads = nn.ModuleDict({name: nn.Linear(dim, size) for name, size in sizes.items()})
        for name, head in self.heads.items():
            initialise(head, seeded(config.seed, "head", name))
        if config.seg_channels:
            self.map_tower = Tower(config.image, seeded(config.seed, "map tower"), config.seg_channels)
            self.attention = nn.Linear(2 * dim, 2)
            initialise(self.attention, seeded(config.seed, "attention"))
        for level, cells in partitions.items():
            self.register_buffer(f"{level}_latlon", torch.from_numpy(cells.latlon).float())
        for level, finer in itertools.pairwise(LEVELS):
            self.register_buffer(f"{level}_of_{finer}", partitions[level].parent(partitions[finer]))

    def fuse(self, images: Float[Tensor, "n s h w"]) -> Float[Tensor, "n c"]:
        """Return the features of images (n, 3 + s, h, w), of two towers weighed by attention."""
        if images.shape[1] != 3 + self.config.seg_channels:
            needed = f"3 channels of image and {self.config.seg_channels} of segmentation map"
            raise ValueError(f"this model needs {needed}, got {images.shape[1]} in all")
        seen = self.tower(images[:, :3])
        if not self.config.seg_channels:
            return seen
        mapped = self.map_tower(images[:, 3:])
        weights = self.attention(torch.cat([seen, mapped], 1)).softmax(1)
        return weights[:, :1] * seen + weights[:, 1:] * mapped

    def forward(self, images: Float[Tensor, "n s h w"]) -> dict[str, Float[Tensor, "n _"]]:
        """Return logits (n, cells) of each level, and "scene" (n, 3) if it is learnt."""
        features = self.fuse(images)
        return {name: head(features) for name, head in self.heads.items()}

    def place(self, logits: dict[str, Tensor], s2_cells: str, hierarchical: bool) -> Float[Tensor, "n 2"]:
        """Return the place of the most probable cell of a level; hierarchical: times the coarser cells around it."""
        total = logits[s2_cells].log_softmax(-1)
        ancestors = torch.arange(total.shape[1], device=total.device)  # of each cell, at the level reached
        levels = LEVELS[: LEVELS.index(s2_cells) + 1] if hierarchical else ()
        for coarser, finer in reversed(list(itertools.pairwise(levels))):
            ancestors = getattr(self, f"{coarser}_of_{finer}")[ancestors]
            total = total + logits[coarser].log_softmax(-1)[:, ancestors]
        return getattr(self, f"{s2_cells}_latlon")[total.argmax(-1)]


class GeocellsTraining(TrainingModule):
    """A classifier over geo-cells, trained by cross-entropy over three partitions, and over scenes."""

    config_class = GeocellsConfig
    ways = (*LEVELS, "hierarchical")

    def __init__(self, config: GeocellsConfig, cells: dict[str, Partition]):
        super().__init__(config)
        self.partitions = cells
        self.model = Geocells(config, cells)

    @classmethod
    def training_set(cls, config: GeocellsConfig) -> Dataset:
        """Return images of the scene of interest, with their scene and maps if the model learns from them."""
        one_scene = config.scene_of_interest != ALL_SCENES
        columns = ("scene",) if config.scene or one_scene else ()
        found = samples.Samples.of(config, columns)
        if one_scene:
            found = found.rows((found.context["scene"] == config.scene_of_interest).to_numpy())
            if len(found.latlon) == 0:
                raise ValueError(f"no training image has scene {config.scene_of_interest}: 3 trains on all")
        maps = maps_of(config) if config.seg_channels else None
        encode = functools.partial(labels.encode, classes=labels.classes_of(found.context, columns))
        return found.dataset(config, encode, maps)

    @classmethod
    def build(cls, config: GeocellsConfig, data: Dataset) -> "GeocellsTraining":
        return cls(config, partitions(config, data.latlon))

    @classmethod
    def rebuild(cls, config: GeocellsConfig, checkpoint: dict[str, Any]) -> "GeocellsTraining":
        kept = checkpoint["partitions"]
        cells = {
            level: Partition(**kept[level], source=f"the checkpoint's {level} cells") for level in LEVELS
        }
        return cls(config, cells)

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return the weighted cross-entropies; images in no cell, or of unknown scene, are left out."""
        logits, views = self.model(batch["image"].flatten(0, 1)), self.config.views
        leaves = leaf_ids(batch["latlon"].double().cpu().numpy())
        losses, values = [], {}
        for level, weight in zip(LEVELS, self.config.level_weights, strict=True):
            label = self.partitions[level].label_leaves(leaves).to(self.device).repeat_interleave(views)
            values[level] = labels.known_cross_entropy(logits[level], label)
            losses.append(weight * values[level])
        values["top1"] = (logits["fine"].argmax(-1) == label).float().mean()
        if not self.training:
            found = self.model.place(logits, self.config.s2_cells, self.config.hierarchical)
            values |= accuracies(found, batch["latlon"].repeat_interleave(views, 0))
        if self.config.scene:
            scene = batch["scene"].repeat_interleave(views)
            values["scene"] = labels.known_cross_entropy(logits["scene"], scene)
            losses.append(self.config.scene_weight * values["scene"])
        return {"loss": torch.stack(losses).sum()} | values

    @torch.inference_mode()
    def place(self, images: Float[Tensor, "n s h w"]) -> Float[Tensor, "n 2"]:
        return self.model.place(self.model(images), self.config.s2_cells, self.config.hierarchical).cpu()

    @torch.inference_mode()
    def answers(self, images: Float[Tensor, "n s h w"]) -> dict[str, Float[Tensor, "n 2"]]:
        """Return the best places of each level alone, and those of all levels together ("hierarchical")."""
        ways = {level: (level, False) for level in LEVELS} | {"hierarchical": ("fine", True)}
        logits = self.model(images)
        return {name: self.model.place(logits, *way).cpu() for name, way in ways.items()}

    def views(self, photo, ten_crop: bool = False) -> Float[Tensor, "1 c h w"]:
        """As TrainingModule.views, with the photo's segmentation map if the model has a second tower."""
        image = super().views(photo, ten_crop)
        if not self.config.seg_channels:
            return image
        maps, preprocess = maps_of(self.config), Preprocessing.of(self.config.image)
        drawn = dataclasses.replace(preprocess, resample="nearest").crop(maps.open(str(photo)))
        return torch.cat([image, maps.planes(drawn)[None]], 1)

    def test_tiles(self, split: str) -> tuple[Tensor, Tensor]:
        """As TrainingModule.test_tiles, with the land mask if the model has a second tower."""
        images, latlon = super().test_tiles(split)
        if self.config.seg_channels:
            draws = blue_marble.test_augmentation(split, len(latlon))
            images = torch.cat([images, samples.land_maps(latlon, self.config.tiles, draws)], 1)
        return images, latlon

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["partitions"] = {
            level: {"tokens": p.tokens, "images": torch.from_numpy(p.images), "latlon": p.latlon.tolist()}
            for level, p in self.partitions.items()
        }


def maps_of(config: GeocellsConfig) -> samples.Maps:
    """Return the segmentation maps that a configuration names."""
    return samples.Maps(config.seg_channels, Path(config.seg_images) if config.seg_images else None)


def partitions(config: GeocellsConfig, latlon: Float[Tensor, "n 2"]) -> dict[str, Partition]:
    """Return the three partitions: read from files, or made from training places."""
    if config.cells:
        return {level: Partition.read(path) for level, path in zip(LEVELS, config.cells, strict=True)}
    return {
        level: partition(latlon, PartitionConfig(config.img_min, img_max))
        for level, img_max in zip(LEVELS, config.img_max, strict=True)
    }
