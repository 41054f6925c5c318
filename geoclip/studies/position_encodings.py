"""Embeddings of places to compare: parts of a location encoder, and classical encodings without training.

Each is a callable (lat, lon) degrees (n, 2) → (n, d), which is all that geoclip.studies.probes requires.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from geoclip import earth

Embedding = Callable[[Tensor], Tensor]


def sphere_c_plus(latlon: Float[Tensor, "n 2"], scales: int = 64) -> Float[Tensor, "n d"]:
    """Return sines and cosines of latitude and longitude at many scales, d = 7 · scales (SphereC+).

    The scales are divisors r, spaced geometrically from 1 to 0.5° in radians. With φ = lat / r and λ = lon / r,
    each gives the unit vector of (φ, λ), and sin and cos of φ and of λ.
    """
    radius = torch.from_numpy(np.geomspace(1.0, np.deg2rad(0.5), scales)).to(latlon.device)
    lat, lon = (torch.deg2rad(latlon.double())[..., None] / radius).unbind(1)
    vector = (lat.sin(), lat.cos() * lon.cos(), lat.cos() * lon.sin())
    return torch.cat([*vector, lat.sin(), lat.cos(), lon.sin(), lon.cos()], -1).float()


def spherical_harmonics(latlon: Float[Tensor, "n 2"], degree: int = 22) -> Float[Tensor, "n d"]:
    """Return the real spherical harmonics up to `degree`, orthonormal on the sphere, d = (degree + 1)².

    Degree 22 resolves about 180 / 22 = 8 degrees; its 529 columns are about as many as the encoder's 512.
    """
    from scipy.special import sph_harm_y_all

    lat, lon = np.deg2rad(latlon.double().cpu().numpy()).T
    values = sph_harm_y_all(degree, degree, np.pi / 2 - lat, lon % (2 * np.pi))
    columns = []
    for n in range(degree + 1):
        positive = values[n, 1 : n + 1] * np.sqrt(2)
        columns += [values[n, 0].real[None], positive.real, positive.imag]
    return torch.from_numpy(np.concatenate(columns).T).float().to(latlon.device)


class Remembered:
    """A location encoder that caches the levels (s, n, d) of the places that it has encoded."""

    def __init__(self, encoder):
        self.encoder = encoder
        self._seen: dict[bytes, Tensor] = {}

    def by_level(self, latlon: Float[Tensor, "n 2"]) -> Float[Tensor, "s n d"]:
        """Return the embedding of each σ level."""
        key = latlon.cpu().numpy().tobytes()
        if key not in self._seen:
            self._seen[key] = self.encoder.by_level(latlon)
        return self._seen[key]

    def __call__(self, latlon: Float[Tensor, "n 2"]) -> Float[Tensor, "n d"]:
        return self.by_level(latlon).sum(0)


def level(encoder, index: int) -> Embedding:
    """Return one σ level of a location encoder; `index` counts from the smallest σ."""
    return lambda latlon: encoder.by_level(latlon)[index]


def weighted_sum(encoder, weights: Sequence[float], unit_norm: bool = False) -> Embedding:
    """Return the weighted sum of the levels, normalised first if `unit_norm`. The paper's weights are 1."""

    def embed(latlon):
        levels = encoder.by_level(latlon)
        levels = functional.normalize(levels, dim=-1) if unit_norm else levels
        return torch.einsum("snd,s->nd", levels, torch.tensor(weights, dtype=levels.dtype))

    return embed


def concatenated(encoder) -> Embedding:
    """Return the levels side by side instead of their sum, d = levels × 512."""
    return lambda latlon: encoder.by_level(latlon).movedim(0, 1).flatten(1)


def unit_norm(encoder) -> Embedding:
    """Return the embedding with unit norm, as the similarity with images uses it."""
    return lambda latlon: functional.normalize(encoder(latlon), dim=-1)


CONTROLS: dict[str, Embedding] = {
    "raw (lat, lon)": lambda latlon: latlon,
    "unit sphere": earth.unit_sphere,
    "sinusoids, 64 scales": sphere_c_plus,
    "spherical harmonics": spherical_harmonics,
}
