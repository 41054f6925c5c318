"""The location encoder: (lat, lon) → Equal Earth → random Fourier features at several σ → MLPs → sum.

Paper, section 3.2, figure 2 (right).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

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

    def _apply(self, fn, recurse=True):
        """As nn.Module._apply, but `.half()` and `.to(dtype)` leave the frequencies in float32."""
        exact = self.frequencies
        super()._apply(fn, recurse)
        if exact is not None and self.frequencies.dtype != exact.dtype:
            self.frequencies = exact.to(self.frequencies.device)
        return self

    def features(self, xy: Float[Tensor, "n c"]) -> Float[Tensor, "n f"]:
        """Fourier features in float32, from a phase in the precision of `xy`: bfloat16 destroys the embedding."""
        with torch.autocast(xy.device.type, enabled=False):
            if xy.dtype == torch.float64:
                turns = xy @ self.frequencies.T.double()
                phase = 2 * math.pi * (turns - turns.round()).float()  # within ±π, where float32 will do
            else:
                phase = (2 * math.pi * xy) @ self.frequencies.T
            return torch.cat([phase.cos(), phase.sin()], -1)

    def forward(self, xy: Float[Tensor, "n c"]) -> Float[Tensor, "n d"]:
        if self.frequencies is not None:
            return self.mlp(self.features(xy).to(self.mlp[0].weight.dtype))
        first = self.mlp[0]
        with torch.autocast(xy.device.type, enabled=False):  # bfloat16 is as coarse as 0.7° here
            hidden = functional.linear(xy.float(), first.weight.float(), first.bias.float())
        return self.mlp[1:](hidden.to(first.weight.dtype))


class LocationEncoder(nn.Module):
    """Embeds (lat, lon) degrees: the sum of the levels. generator: draws frequencies and initial weights.

    double_phase: set it to compute projection and phase in float64. By default they are float32, as the authors'
    are; at σ 2⁸ its rounding changes embeddings by up to 4e-5, differently with each library and processor.
    """

    double_phase = False

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
        """The projected coordinates, within ±1, in float32, or in float64 with double_phase."""
        with torch.autocast(latlon.device.type, enabled=False):
            latlon = latlon.double() if self.double_phase else latlon.float()
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
