"""Image towers for the baselines: the small convolutional one, any of timm's, any of open_clip's."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from geoclip.datasets.features import Preprocessing
from geoclip.image_encoder import CONV_TOWER, ConvTower, ImageEncoderConfig, clip_feature_dim, load_clip
from geoclip.location_encoder import initialise

TIMM = "timm/"


@dataclass(frozen=True)
class Pixels:
    """What a tower wants of a photo: a square of `side` pixels, less `mean`, over `std`, of values in [0, 1]."""

    side: int = 32
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def of(cls, config: ImageEncoderConfig) -> "Pixels":
        """Those of a tower, known without loading it; the conv tower takes what blue_marble renders."""
        if config.tower == CONV_TOWER:
            return cls()
        if config.tower.startswith(TIMM):
            import timm

            known = timm.models.get_pretrained_cfg(timm_name(config))
            data = timm.data.resolve_data_config(pretrained_cfg=known.to_dict())
            return cls(data["input_size"][-1], tuple(data["mean"]), tuple(data["std"]))
        clip = Preprocessing.of(config)
        return cls(clip.pixels, clip.mean, clip.std)

    def tensor(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """(3, side, side) of an RGB image of this size."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - mean) / std


class Tower(nn.Module):
    """Images (n, channels, h, w) → features (n, c).

    config.tower is "conv", "timm/NAME" or an open_clip name; weights "pretrained" are timm's own. `channels`
    other than 3 are for segmentation maps. Raises OSError where weights cannot be had, ValueError for a tower that is not known.
    """

    def __init__(self, config: ImageEncoderConfig, generator: torch.Generator, channels: int = 3):
        super().__init__()
        self.frozen = config.frozen
        # A map of other than three channels is mixed into three, which every tower can take.
        self.mix = nn.Conv2d(channels, 3, 1) if channels != 3 else nn.Identity()
        if config.tower == CONV_TOWER:
            self.body = ConvTower()
            self.dim = ConvTower.feature_dim
            initialise(self.body, generator)
        elif config.tower.startswith(TIMM):
            self.body, self.dim = timm_tower(config)
        else:
            clip, _ = load_clip(config.tower, config.weights)
            self.body, self.dim = clip.visual, clip_feature_dim(config.tower)
        initialise(self.mix, generator)
        self.body.requires_grad_(not config.frozen)

    def train(self, mode: bool = True) -> "Tower":
        """As nn.Module.train, but a frozen body stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self

    def forward(self, images: Float[Tensor, "n s h w"]) -> Float[Tensor, "n c"]:
        return self.body(self.mix(images))


def timm_name(config: ImageEncoderConfig) -> str:
    """The name that timm knows the tower by; ValueError where it knows none."""
    import timm

    name = config.tower.removeprefix(TIMM)
    if not timm.is_model(name):
        raise ValueError(
            f"no tower {config.tower!r}: timm.list_models() names those that may follow {TIMM!r}"
        )
    return name


def timm_tower(config: ImageEncoderConfig) -> tuple[nn.Module, int]:
    """A timm model without its classifier, and the width of its features.

    Raises ValueError for an unknown name, OSError where its weights cannot be had.
    """
    import timm

    name = timm_name(config)
    try:
        body = timm.create_model(name, pretrained=config.weights is not None, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"the weights of {config.tower} are not kept here and could not be downloaded; connect to the "
            f"network once, or start from random weights with image.weights null"
        ) from error
    return body, body.num_features
