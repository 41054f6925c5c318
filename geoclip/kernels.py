"""The kernel of a posterior, and utilities of a distance that are smoothed by it."""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from geoclip.earth import EARTH_RADIUS_KM

GEOSCORE_SCALE_KM = 1492.7  # geoscore = 5000 exp(−d / 1492.7 km)
LEAST = -43.0  # of an exponent: products of two such values are still normal numbers of float32
KNOTS, NODES = 4096, 96  # of a table of U: distances, and points of the quadrature at each

# h = 1 − cos d → (U, −dU / dh), in float32; False: without the second
Profile = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]


def log_kernel(h: Tensor, kernel_km: float) -> Tensor:
    """Log density of the kernel per km² where 1 − cos of the distance is h."""
    kappa = (EARTH_RADIUS_KM / kernel_km) ** 2
    return -kappa * h - math.log(-math.expm1(-2 * kappa) * 2 * math.pi * kernel_km**2)


def fast_exp(exponent: Tensor) -> Tensor:
    """exp in place, of float32; 0 below LEAST, because numbers that underflow take a hundred times as long."""
    return torch.threshold_(exponent.clamp_min_(LEAST).exp_(), 1.001 * math.exp(LEAST), 0.0)


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis, in float32."""
    weight = fast_exp((logits - logits.amax(-1, keepdim=True)).float())
    return weight.div_(weight.sum(-1, keepdim=True))


def density(kernel_km: float) -> Profile:
    """The kernel itself: its expectation is the density."""
    kappa = (EARTH_RADIUS_KM / kernel_km) ** 2
    top = float(log_kernel(torch.zeros(()), kernel_km))

    def profile(h, gradient=True):
        value = fast_exp(h.float().mul(-kappa).add_(top))
        return value, kappa * value if gradient else None

    return profile


@functools.lru_cache(maxsize=64)
def table(utility: str, km: float, kernel_km: float) -> Profile:
    """A utility of the distance d, smoothed by the kernel: tabulated over the chord, linear in h between knots.

    utility: "disc" (1 within `km`, else 0), "distance" (−d) or "geoscore".
    """
    from scipy.special import i0e

    kappa, radius = (EARTH_RADIUS_KM / kernel_km) ** 2, min(km / EARTH_RADIUS_KM, math.pi)
    reach = 9 * kernel_km / EARTH_RADIUS_KM
    varies = (max(0, radius - reach), min(math.pi, radius + reach)) if utility == "disc" else (0, math.pi)
    chord = 2 * np.linspace(math.sin(varies[0] / 2), math.sin(varies[1] / 2), KNOTS)
    delta = 2 * np.arcsin(np.clip(chord / 2, 0, 1))[:, None]
    # A kernel at the distance δ has at the distance θ, all around, the density
    # κ / (1 − e^(−2κ)) · exp(κ (cos(θ − δ) − 1)) · e^(−z) I₀(z) · sin θ, with z = κ sin θ sin δ.
    start, end = np.maximum(0, delta - reach), np.minimum(math.pi, delta + reach)
    if utility == "disc":
        end = np.clip(radius, start, end)
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    theta = start + (end - start) * (nodes + 1) / 2
    density = kappa / -math.expm1(-2 * kappa) * np.exp(-2 * kappa * np.sin((theta - delta) / 2) ** 2)
    density *= i0e(kappa * np.sin(theta) * np.sin(delta)) * np.sin(theta)
    d = theta * EARTH_RADIUS_KM
    worth = {"disc": np.ones_like(d), "distance": -d, "geoscore": 5000 * np.exp(-d / GEOSCORE_SCALE_KM)}[
        utility
    ]
    value = (density * worth * weights).sum(1) * (end - start)[:, 0] / 2
    knots_h = chord**2 / 2
    fall = -np.diff(value) / np.diff(knots_h)
    # from entry 1 on, U = base − fall · h after each knot; the first and the last entry are constant
    base = np.concatenate([value[:1], value[:-1] + fall * knots_h[:-1], value[-1:]])
    base, fall = (torch.from_numpy(column).float() for column in (base, np.pad(fall, 1)))
    per = (KNOTS - 1) / (chord[-1] - chord[0])

    def profile(h, gradient=True):
        h = h.clamp_min(0).float()
        entry = (2 * h).sqrt_().sub_(chord[0]).mul_(per).add_(1).clamp_(0, KNOTS).int()
        slope = fall[entry]
        return base[entry] - slope * h, slope

    return profile
