"""Image towers for the baselines: the small convolutional one, any of timm's, any of open_clip's."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoclip.image_encoder import (
    CONV_TOWER,
    TIMM,
    ConvTower,
    ImageEncoderConfig,
    clip_feature_dim,
    load_clip,
    timm_name,
)
from geoclip.location_encoder import initialise


class Tower(nn.Module):
    """Images (n, channels, h, w) → features (n, c).

    config.tower is "conv", "timm/NAME" or an open_clip name; weights "pretrained" are timm's own. `channels`
    other than 3 are for segmentation maps. Raises OSError where weights cannot be had, ValueError for a tower
    that is not known.
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
            clip = load_clip(config.tower, config.weights)
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


def timm_tower(config: ImageEncoderConfig) -> tuple[nn.Module, int]:
    """A timm model without its classifier, and the width of its features.

    Raises ValueError for an unknown name, OSError where its weights cannot be had.
    """
    import timm

    name = timm_name(config.tower)
    try:
        body = timm.create_model(name, pretrained=config.weights is not None, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"the weights of {config.tower} are not kept here and could not be downloaded; connect to the "
            f"network once, or start from random weights with image.weights null"
        ) from error
    return body, body.num_features
