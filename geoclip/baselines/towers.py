"""Image towers of the baselines: the small convolutional one, or any of timm or open_clip."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoclip.config import ImageEncoderConfig
from geoclip.image_encoder import CONV_TOWER, TIMM, ConvTower, feature_dim, load_clip, load_timm
from geoclip.location_encoder import initialise


class Tower(nn.Module):
    """Images (n, channels, h, w) → features (n, c).

    config.tower: "conv", "timm/NAME" or an open_clip name. config.weights: for timm, "pretrained" or None.
    channels: other numbers than 3 are for segmentation maps. Raises ValueError for an unknown tower, and
    OSError for weights that cannot be downloaded.
    """

    def __init__(self, config: ImageEncoderConfig, generator: torch.Generator, channels: int = 3):
        super().__init__()
        self.frozen = config.frozen
        # every tower takes three channels; maps with more are mixed into three
        self.mix = nn.Conv2d(channels, 3, 1) if channels != 3 else nn.Identity()
        if config.tower == CONV_TOWER:
            self.body, self.dim = ConvTower(), ConvTower.feature_dim
            initialise(self.body, generator)
        elif config.tower.startswith(TIMM):
            self.body = load_timm(config)
            self.dim = self.body.num_features
        else:
            self.body, self.dim = load_clip(config.tower, config.weights).visual, feature_dim(config.tower)
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
