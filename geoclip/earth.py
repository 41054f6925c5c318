"""The Earth: coordinate checks, the Equal Earth projection, distances, noise in metres.

Coordinates are (lat, lon) in degrees on WGS84, on the last axis, with longitude in [-180, 180).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

EARTH_RADIUS_KM = 6371.0088

# Coefficients of the Equal Earth projection (Šavrič, Patterson, Jenny 2018).
A1, A2, A3, A4 = 1.340264, -0.081106, 0.000893, 0.003796
# 180 / (projected x of 180° E on the unit sphere): scales x to [-1, 1] after the division by 180.
EQUAL_EARTH_SCALE = 66.50336


def check_latlon(latlon, source: str = "coordinates") -> Float[Tensor, "*n 2"]:
    """The coordinates as a float tensor (..., 2) with longitude in [-180, 180); 180° becomes -180°.

    Raises ValueError, with `source`, row and value, for another shape, NaN, `|lat| > 90` or `|lon| > 180`.
    """
    if isinstance(latlon, np.ndarray):  # torch takes no negative strides and no read-only memory
        latlon = np.require(latlon, requirements=["C", "W"])
    latlon = torch.as_tensor(latlon)
    latlon = latlon if latlon.is_floating_point() else latlon.float()
    if latlon.ndim == 0 or latlon.shape[-1] != 2:
        raise ValueError(f"{source}: expected (lat, lon) on the last axis, got shape {tuple(latlon.shape)}")
    limits = torch.tensor([90.0, 180.0], dtype=latlon.dtype, device=latlon.device)
    bad = ~(latlon.abs() <= limits)  # negated, so NaN is bad too
    if bad.any():
        flat, rows = latlon.reshape(-1, 2), bad.reshape(-1, 2).any(-1).nonzero()[:, 0]
        row = int(rows[0])
        lat, lon = flat[row].tolist()
        hint = " (are lat and lon swapped?)" if abs(lat) > 90 and abs(lon) <= 90 else ""
        raise ValueError(
            f"{source}, row {row}: ({lat:g}, {lon:g}) is not (lat, lon) in degrees, latitude within ±90 and "
            f"longitude within ±180{hint}; {len(rows)} of {len(flat)} rows are wrong"
        )
    lat, lon = latlon.unbind(-1)
    return torch.stack([lat, torch.where(lon == 180, -lon, lon)], -1)


def wrap_lon(lon: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Longitude in degrees, wrapped to [-180, 180)."""
    return (lon + 180) % 360 - 180


def equal_earth(latlon: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 2"]:
    """Equal Earth projection of (lat, lon) degrees, scaled to x in [-1, 1], y in [-0.487, 0.487].

    The spherical form (paper, section 3.2): PROJ's `+proj=eqearth +R=1` times EQUAL_EARTH_SCALE / 180. Keeps
    the dtype. The released weights were trained in float32, and the highest frequencies resolve its rounding,
    so the order of operations is part of the model.
    """
    numbers: Sequence[float | Tensor] = [math.pi / 180, math.sqrt(3) / 2, 2 * math.sqrt(3), EQUAL_EARTH_SCALE]
    numbers = [*numbers, A1, A2, A3, A4, 3 * A2, 7 * A3, 9 * A4]
    if latlon.dtype == torch.float64:  # torch.onnx would round them to float32, unless they are tensors
        numbers = latlon.new_tensor(numbers).unbind()
    radian, half_root, two_roots, scale, a1, a2, a3, a4, b2, b3, b4 = numbers
    lat, lon = (latlon * radian).unbind(-1)
    sine = half_root * torch.sin(lat)
    if latlon.dtype == torch.float64:  # ONNX Runtime has no asin in float64, so a step of Newton's method
        theta = torch.asin(sine.float()).double()
        theta = theta + (sine - torch.sin(theta)) / torch.cos(theta)
    else:
        theta = torch.asin(sine)
    slope = 3 * (b4 * theta**8 + b3 * theta**6 + b2 * theta**2 + a1)
    x = two_roots * lon * torch.cos(theta) / slope
    y = a4 * theta**9 + a3 * theta**7 + a2 * theta**3 + a1 * theta
    return torch.stack([x, y], -1) * scale / 180


def unit_sphere(latlon: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 3"]:
    """(lat, lon) degrees as points (x, y, z) of the unit sphere; z points north and x to (0, 0)."""
    lat, lon = torch.deg2rad(latlon).unbind(-1)
    return torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], -1)


def from_unit_sphere(xyz: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 2"]:
    """Vectors (x, y, z) of any length as (lat, lon) degrees, longitude in [-180, 180)."""
    x, y, z = xyz.unbind(-1)
    lat = torch.atan2(z, torch.hypot(x, y))
    return torch.stack([torch.rad2deg(lat), wrap_lon(torch.rad2deg(torch.atan2(y, x)))], -1)


def haversine_km(a: Float[Tensor, "*#n 2"], b: Float[Tensor, "*#n 2"]) -> Float[Tensor, "*n"]:
    """Great-circle distance in km between (lat, lon) degrees, on a sphere of R = 6371.0088 km.

    Computed in float64; `a` and `b` broadcast. Within 0.6 % of the WGS84 geodesic, which changes benchmark
    accuracies by at most 0.03 points.
    """
    lat_a, lon_a = torch.deg2rad(a.double()).unbind(-1)
    lat_b, lon_b = torch.deg2rad(b.double()).unbind(-1)
    h = torch.sin((lat_b - lat_a) / 2) ** 2
    h = h + lat_a.cos() * lat_b.cos() * torch.sin((lon_b - lon_a) / 2) ** 2
    return 2 * EARTH_RADIUS_KM * torch.asin(h.clamp(0, 1).sqrt())


def destination(
    latlon: Float[Tensor, "*n 2"], east_km: Float[Tensor, "*n"], north_km: Float[Tensor, "*n"]
) -> Float[Tensor, "*n 2"]:
    """The place (east_km, north_km) away from `latlon`, along the great circle that starts in that direction.

    Exact on the sphere, including at the poles and across ±180°. Keeps the dtype of `latlon`.
    """
    lat, lon = torch.deg2rad(latlon.double()).unbind(-1)
    east_km, north_km = east_km.double(), north_km.double()
    angle = torch.hypot(east_km, north_km) / EARTH_RADIUS_KM
    bearing = torch.atan2(east_km, north_km)
    up = unit_sphere(latlon.double())
    north = torch.stack([-lat.sin() * lon.cos(), -lat.sin() * lon.sin(), lat.cos()], -1)
    east = torch.stack([-lon.sin(), lon.cos(), torch.zeros_like(lon)], -1)
    ahead = bearing.cos()[..., None] * north + bearing.sin()[..., None] * east
    there = angle.cos()[..., None] * up + angle.sin()[..., None] * ahead
    return from_unit_sphere(there).to(latlon.dtype)


def draw_noise_km(n: int, sigma_m: float, generator: torch.Generator | None = None) -> Float[Tensor, "n 2"]:
    """Gaussian noise of `sigma_m` metres, (east, north) in km, drawn on the CPU (paper, section 3.3)."""
    return torch.randn(n, 2, generator=generator, dtype=torch.float64) * sigma_m / 1000


def sample_sphere(n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n 2"]:
    """`n` places, uniform on the sphere and not in latitude and longitude, in degrees."""
    u = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    lat = torch.rad2deg(torch.asin(2 * u[:, 0] - 1))
    return torch.stack([lat, u[:, 1] * 360 - 180], -1).float()
