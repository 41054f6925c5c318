"""The location encoder: (lat, lon) → Equal Earth → random Fourier features at several σ → MLPs → sum.

Paper, section 3.2, figure 2 (right).
"""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from geoclip import earth
from geoclip.config import LocationEncoderConfig


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
        widths = [inputs] + [config.width] * config.hidden_layers
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], config.dim))

    def _apply(self, fn, recurse=True):
        """As nn.Module._apply, but `.half()` and `.to(dtype)` leave the frequencies in float32."""
        exact = self.frequencies
        super()._apply(fn, recurse)
        if exact is not None and self.frequencies.dtype != exact.dtype:
            self.frequencies = exact.to(self.frequencies.device)
        return self

    def features(self, xy: Float[Tensor, "n c"]) -> Float[Tensor, "n f"]:
        """Fourier features, always in float32: a bfloat16 phase destroys the embedding."""
        if self.frequencies is None:
            return xy
        with torch.autocast(xy.device.type, enabled=False):
            phase = (2 * math.pi * xy) @ self.frequencies.T
            return torch.cat([phase.cos(), phase.sin()], -1)

    def forward(self, xy: Float[Tensor, "n c"]) -> Float[Tensor, "n d"]:
        features = self.features(xy)
        if self.frequencies is None:  # bfloat16 cannot distinguish coordinates closer than 0.7°
            first = self.mlp[0]
            with torch.autocast(xy.device.type, enabled=False):
                features = functional.linear(features, first.weight.float(), first.bias.float())
            return self.mlp[1:](features.to(first.weight.dtype))
        if not torch.is_autocast_enabled(xy.device.type):
            features = features.to(self.mlp[0].weight.dtype)
        return self.mlp(features)


class LocationEncoder(nn.Module):
    """Embeds (lat, lon) degrees: the sum over levels of Fourier features.

    generator: draws the frequencies and the initial weights.
    """

    def __init__(
        self,
        config: LocationEncoderConfig | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.config = config = config or LocationEncoderConfig()
        inputs = 3 if config.projection == "sphere" else 2
        self.levels = nn.ModuleList(
            FourierLevel(inputs, sigma, config, generator) for sigma in (config.sigmas or [None])
        )
        initialise(self, generator)

    def project(self, latlon: Float[Tensor, "n 2"]) -> Float[Tensor, "n c"]:
        """The projected coordinates, within ±1, in float32."""
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

    @classmethod
    def pretrained(cls) -> "LocationEncoder":
        """The authors' released location encoder, in evaluation mode; downloaded at first use.

        Raises OSError, which says what is missing, if the weights cannot be downloaded.
        """
        from geoclip import pretrained

        encoder = cls()
        encoder.load_state_dict(pretrained.location_encoder_state())
        return encoder.eval()


def initialise(module: nn.Module, generator: torch.Generator | None) -> None:
    """Draws PyTorch's default initialisation of linear and convolution layers from `generator`.

    Without a generator, the layers keep their initial weights.
    """
    if generator is None:
        return
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            fan_in = layer.weight[0].numel()
            bound = 1 / math.sqrt(fan_in)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
