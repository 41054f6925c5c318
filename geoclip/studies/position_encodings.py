"""Embeddings of places to compare: parts of a location encoder, and classical position codes that nobody trained.

Each is a callable (lat, lon) degrees (n, 2) → (n, d), which is all that `geoclip.studies.probes` asks of an embedding.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geoclip import earth

Embedding = Callable[[Tensor], Tensor]


def raw_degrees(latlon: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
    """(lat, lon) in degrees as they are: the embedding that knows nothing but where its two axes point."""
    return latlon


def sphere_c_plus(
    latlon: Float[Tensor, "n 2"], scales: int = 64, shortest_deg: float = 0.5
) -> Float[Tensor, "n d"]:
    """Sines and cosines of latitude and longitude at many scales, d = 7 · scales (after Sphere2Vec's SphereC+).

    At each of `scales` divisors r, geometric from 1 to `shortest_deg` in radians, with φ = lat / r and
    λ = lon / r: the unit vector of (φ, λ) (three numbers), then sin and cos of φ and of λ.
    """
    smallest = np.deg2rad(shortest_deg)
    radius = torch.from_numpy(np.geomspace(1.0, smallest, scales)).to(latlon.device)
    lat, lon = (torch.deg2rad(latlon.double())[..., None] / radius).unbind(1)
    vector = (lat.sin(), lat.cos() * lon.cos(), lat.cos() * lon.sin())
    return torch.cat([*vector, lat.sin(), lat.cos(), lon.sin(), lon.cos()], -1).float()


def spherical_harmonics(latlon: Float[Tensor, "n 2"], degree: int = 22) -> Float[Tensor, "n d"]:
    """The real spherical harmonics up to `degree`, d = (degree + 1)², orthonormal over the sphere.

    Degree 22 resolves about 180 / 22 = 8 degrees and gives 529 numbers, as many as the location encoder (512).
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
    """A location encoder that keeps the levels (s, n, d) of the places it has seen, for the embeddings below.

    A run that probes the sum, each level and their combinations on the same places then encodes them once.
    """

    def __init__(self, encoder):
        self.encoder = encoder
        self._seen: dict[bytes, Tensor] = {}

    def by_level(self, latlon: Float[Tensor, "n 2"]) -> Float[Tensor, "s n d"]:
        key = latlon.cpu().numpy().tobytes()
        if key not in self._seen:
            self._seen[key] = self.encoder.by_level(latlon)
        return self._seen[key]

    def __call__(self, latlon: Float[Tensor, "n 2"]) -> Float[Tensor, "n d"]:
        return self.by_level(latlon).sum(0)


def level(encoder, index: int) -> Embedding:
    """One σ level of a location encoder alone; `index` counts from the smallest σ."""
    return lambda latlon: encoder.by_level(latlon)[index]


def weighted_sum(encoder, weights: Sequence[float], unit_norm: bool = False) -> Embedding:
    """The levels times `weights`, added; `unit_norm` brings each to length 1 first. The paper's weights are 1."""

    def embed(latlon):
        levels = encoder.by_level(latlon)
        if unit_norm:
            levels = torch.nn.functional.normalize(levels, dim=-1)
        return torch.einsum("snd,s->nd", levels, torch.tensor(weights, dtype=levels.dtype))

    return embed


def concatenated(encoder) -> Embedding:
    """The levels of a location encoder side by side, where the paper adds them: d = levels × 512."""
    return lambda latlon: encoder.by_level(latlon).movedim(0, 1).flatten(1)


def unit_norm(encoder) -> Embedding:
    """The embedding brought to length 1, as the similarity with images sees it."""
    return lambda latlon: torch.nn.functional.normalize(encoder(latlon), dim=-1)


CONTROLS: dict[str, Embedding] = {
    "raw (lat, lon)": raw_degrees,
    "unit sphere": earth.unit_sphere,
    "sinusoids, 64 scales": sphere_c_plus,
    "spherical harmonics": spherical_harmonics,
}
