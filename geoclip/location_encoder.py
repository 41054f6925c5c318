"""The location encoder: (lat, lon) → Equal Earth → random Fourier features at several σ → MLPs → sum.

Paper, section 3.2, figure 2 (right).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoclip import earth, pretrained
from geoclip.config import LocationEncoderConfig
from geoclip.layers import initialise, mlp


class FourierLevel(nn.Module):
    """One level: Fourier features [cos 2πvbᵀ, sin 2πvbᵀ] with fixed b ~ N(0, σ²), then an MLP.

    With sigma None there are no Fourier features.
    """

    def __init__(self, inputs: int, sigma: float | None, config: LocationEncoderConfig, generator):
        super().__init__()
        frequencies = None
        if sigma is not None:
            frequencies = torch.randn(config.frequencies, inputs, generator=generator) * sigma
            inputs = 2 * config.frequencies
        self.register_buffer("frequencies", frequencies)
        self.mlp = mlp(inputs, *[config.width] * config.hidden_layers, config.dim)

    def features(self, xy: Float[Tensor, "n c"]) -> Float[Tensor, "n f"]:
        """Fourier features, in float32 also under autocast: a phase in bfloat16 destroys the embedding."""
        with torch.autocast(xy.device.type, enabled=False):
            phase = (2 * math.pi * xy) @ self.frequencies.T
            return torch.cat([phase.cos(), phase.sin()], -1)

    def forward(self, xy: Float[Tensor, "n c"]) -> Float[Tensor, "n d"]:
        if self.frequencies is not None:
            return self.mlp(self.features(xy))
        with torch.autocast(xy.device.type, enabled=False):  # bfloat16 is as coarse as 0.7° here
            hidden = self.mlp[0](xy)
        return self.mlp[1:](hidden)


class LocationEncoder(nn.Module):
    """Embeds (lat, lon) degrees: the sum of the levels. generator: draws frequencies and initial weights."""

    def __init__(self, config: LocationEncoderConfig | None = None, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config = config or LocationEncoderConfig()
        inputs = 3 if config.projection == "sphere" else 2
        sigmas = config.sigmas or [None]
        self.levels = nn.ModuleList(FourierLevel(inputs, sigma, config, generator) for sigma in sigmas)
        initialise(self, generator)

    @classmethod
    def pretrained(cls) -> "LocationEncoder":
        """The authors' released location encoder, in evaluation mode; downloaded at first use."""
        encoder = cls(LocationEncoderConfig(sigmas=(1.0, 16.0, 256.0)))
        encoder.load_state_dict(pretrained.location_encoder_state())
        return encoder.eval()

    def project(self, latlon: Float[Tensor, "n 2"]) -> Float[Tensor, "n c"]:
        """The projected coordinates, within ±1, in float32, as the authors' are."""
        with torch.autocast(latlon.device.type, enabled=False):
            latlon = latlon.float()
            if self.config.projection == "equal_earth":
                return earth.equal_earth(latlon)
            if self.config.projection == "sphere":
                return earth.unit_sphere(latlon)
            return latlon / 180

    def by_level(self, latlon: Float[Tensor, "n 2"]) -> Float[Tensor, "s n d"]:
        """The embedding of each σ; their sum is the embedding."""
        xy = self.project(latlon)
        return torch.stack([level(xy) for level in self.levels])

    def forward(self, latlon: Float[Tensor, "n 2"]) -> Float[Tensor, "n d"]:
        """Embeddings, not normalised."""
        xy = self.project(latlon)
        return sum(level(xy) for level in self.levels)
