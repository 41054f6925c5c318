"""The configurations of the baselines; without torch, so that the command line can explain them at once."""

import re
from dataclasses import dataclass
from typing import Literal

from geoclip.config import ImageEncoderConfig
from geoclip.training.config import RunConfig

LEVELS = ("coarse", "middle", "fine")
ALL_SCENES = 3
VIT = ImageEncoderConfig("timm/vit_large_patch16_224.augreg_in21k", "pretrained", frozen=False)
TRAINED = ImageEncoderConfig(frozen=False)


@dataclass(frozen=True)
class GeocellsConfig(RunConfig):
    """Training of a classifier over geo-cells. Options are named as in the projects that it follows.

    Args:
        model: The model to train: geocells.
        validation: Photos that are located after each epoch: a CSV, tar shards, or a benchmark such as yfcc26k.
        cells: Partition files in the published columns: coarse, middle, fine. Without files, the training
            places are divided by img_min and img_max.
        img_min: Cells with fewer training images are dropped.
        img_max: Cells with more training images are divided; one number each for coarse, middle and fine.
        level_weights: Weights of the losses of the three levels.
        s2_cells: Level that answers: coarse, middle or fine.
        hierarchical: Answer by the product of a cell's probability and those of the coarser cells around it.
        scene: Learn the scene too.
        scene_weight: Weight of the scene's loss.
        scene_of_interest: Train on images of one scene: 0 indoor, 1 natural, 2 urban; 3 trains on all.
        seg_channels: Channels of the segmentation map that a second tower sees: 3 (a picture) or 150 (a plane
            for each class); 0 for no second tower.
        seg_images: Folder of the photos' segmentation maps, PNG files with the names of the photos.
    """

    model: Literal["geocells"] = "geocells"
    validation: str | None = None
    image: ImageEncoderConfig = VIT
    cells: tuple[str, ...] = ()
    img_min: int = 50
    img_max: tuple[int, int, int] = (5000, 2000, 1000)
    level_weights: tuple[float, float, float] = (0.5, 0.3, 0.2)
    s2_cells: Literal["coarse", "middle", "fine"] = "fine"
    hierarchical: bool = True
    scene: bool = False
    scene_weight: float = 1.0
    scene_of_interest: Literal[0, 1, 2, 3] = ALL_SCENES
    seg_channels: Literal[0, 3, 150] = 0
    seg_images: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.cells and len(self.cells) != len(LEVELS):
            raise ValueError(f"cells must be three files ({', '.join(LEVELS)}), got {len(self.cells)}")


@dataclass(frozen=True)
class ContextConfig(RunConfig):
    """Training of a regressor of coordinates with context heads.

    Args:
        model: The model to train: context.
        validation: Photos that are located after each epoch: a CSV, tar shards, or a benchmark such as osv-mini.
        heads: Labels to classify. The defaults are OSV-Mini's; the embedded tiles have climate, continent,
            country, state and scene.
        use_context: Use the heads; without them, the coordinates come from the feature alone.
        context_weight: Weight of the mean loss of the heads beside the distance.
        distance: Loss of the coordinates: the chord or the great_circle between the places, in Earth radii;
            or, for comparison, degrees: the mean of `|Δlat| / 90` and `|Δlon| / 180`, which is discontinuous
            at ±180°.
        context_input: What the heads pass on to the coordinates: probabilities, or logits as the published
            description says (its code passes probabilities). On 5,000 tiles, 117 steps and three seeds, logits
            place 10.2 % within 200 km, probabilities 14.3 % (difference of the pairs −4.1 ± 2.6).
        hidden: Width of the layer from feature and context to coordinates.
        caption_epochs: How many of `epochs`, at the start, train the tower on image-caption pairs; the decay
            of the learning rate starts again after them.
        caption: Template of the captions, with {names of labels}; unknown parts are left out.
        caption_dim: Dimension of the embeddings of images and captions; CLIP keeps its own.
    """

    model: Literal["context"] = "context"
    validation: str | None = None
    image: ImageEncoderConfig = TRAINED
    heads: tuple[str, ...] = ("climate", "month", "state", "county", "city")
    use_context: bool = True
    context_weight: float = 1.0
    distance: Literal["chord", "great_circle", "degrees"] = "chord"
    context_input: Literal["probabilities", "logits"] = "probabilities"
    hidden: int = 512
    caption_epochs: int = 0
    caption: str = "a photo in {city}, {county}, {state}, {climate} climate, in {month}"
    caption_dim: int = 256

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.caption_epochs < self.epochs:
            raise ValueError(f"caption_epochs {self.caption_epochs} leaves none of the {self.epochs} epochs")
        if self.caption_epochs and self.image.frozen:
            raise ValueError(
                "captions cannot train a frozen tower: set image.frozen false, or caption_epochs 0"
            )
        if self.use_context and not self.heads:
            raise ValueError("use_context needs heads: name some, or set use_context false")

    @property
    def used_heads(self) -> tuple[str, ...]:
        """The heads, unless they are off."""
        return self.heads if self.use_context else ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Labels that heads or captions need."""
        named = re.findall(r"{(.*?)}", self.caption) if self.caption_epochs else []
        return tuple(dict.fromkeys([*self.used_heads, *named]))
