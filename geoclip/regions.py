"""Highest-density regions of a posterior as polygons, for maps and GeoJSON."""

import math
from collections.abc import Callable

import numpy as np
import shapely
import torch

from geoclip import earth
from geoclip.kernels import log_kernel
from geoclip.posterior import HEAVIEST, Posterior, heaviest

PIXELS_ACROSS = 64  # pixels on the side of a square as large as the region
REACH = 7  # standard deviations of a kernel
TILE = 64  # pixels on the side of the squares that are contoured one by one


def outline(posterior: Posterior, level: float) -> tuple[shapely.MultiPolygon, float]:
    """The smallest region of probability `level` of one image, and the width in km of the pixels it is drawn with.

    The polygons are in (lon, lat) degrees, as in GeoJSON (RFC 7946): counterclockwise, and cut at ±180°. Kernels
    narrower than a pixel are widened to one. Otherwise the region of a vague posterior would be thousands of
    islands; its outline is therefore larger than the region's area. Raises ValueError for more than one image.
    """
    if len(posterior) != 1:
        raise ValueError(f"the outline of one posterior, not of {len(posterior)}")
    least, area = (value.item() for value in posterior.region(level))
    pixel_km = math.sqrt(area) / PIXELS_ACROSS
    if any(layer.kernel_km < pixel_km for layer in posterior.layers):
        posterior = widened(posterior, pixel_km)
        least = posterior.region(level)[0].item()
    return _contour(posterior, least, pixel_km), pixel_km


def widened(posterior: Posterior, km: float) -> Posterior:
    """The posterior with kernels of at least `km`, which pixels of that width show."""
    return Posterior([layer._replace(kernel_km=max(layer.kernel_km, km)) for layer in posterior.layers])


def _contour(posterior: Posterior, least: float, pixel_km: float) -> shapely.MultiPolygon:
    """The places where the log density is at least `least`, found from its draws and heaviest kernels outwards."""
    seeds = torch.cat([heaviest(layer, HEAVIEST).xyz[0] for layer in posterior.layers])
    seeds = torch.cat([earth.from_unit_sphere(seeds), posterior.drawn[0][0]]).numpy()
    log_density = _near(posterior)
    seeds = seeds[log_density(seeds) >= least]
    degrees = math.degrees(pixel_km / earth.EARTH_RADIUS_KM)
    rows = max(8, math.ceil(180 / degrees))
    columns = max(16, math.ceil(360 / degrees * max(np.cos(np.deg2rad(seeds[:, 0])).mean(), 0.01)))
    step = np.array([180 / rows, 360 / columns])
    around = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), -1).reshape(-1, 2)
    near, nodes = ((seeds + np.array([90, 180])) / step).round().astype(int), np.empty((0, 2), int)
    values = np.empty(0)
    while True:
        near = (near[:, None] + around).reshape(-1, 2)
        near = near[(near[:, 0] >= 0) & (near[:, 0] <= rows)] % [rows + 1, columns]
        near = np.unique(near[~np.isin(near @ [columns, 1], nodes @ [columns, 1])], axis=0)
        if not len(near):
            break
        found = log_density(near * step - [90, 180])
        nodes, values = np.concatenate([nodes, near]), np.concatenate([values, found])
        near = near[found >= least]
    west = nodes[:, 1] == 0  # +180° is −180°
    nodes = np.concatenate([nodes, nodes[west] + [0, columns]])
    return _polygons(nodes, np.concatenate([values, values[west]]), least, step)


def _near(posterior: Posterior) -> Callable[[np.ndarray], np.ndarray]:
    """Posterior.log_density of one image, for many places (q, 2), without kernels further than REACH from a place."""
    from scipy.spatial import KDTree

    trees = [KDTree(layer.xyz[0]) for layer in posterior.layers]

    def log_density(latlon):
        places, density = KDTree(earth.unit_sphere(torch.from_numpy(latlon))), np.full(len(latlon), 1e-300)
        for tree, (_, weight, km) in zip(trees, posterior.layers, strict=True):
            chord = 2 * math.sin(min(REACH * km / earth.EARTH_RADIUS_KM, math.pi) / 2)
            pairs = places.sparse_distance_matrix(tree, chord, output_type="ndarray")
            kernel = log_kernel(torch.from_numpy(pairs["v"] ** 2 / 2), km).exp() * weight[0][pairs["j"]]
            density += np.bincount(pairs["i"], kernel, len(latlon))
        return np.log(density)

    return log_density


def _polygons(nodes: np.ndarray, values: np.ndarray, least: float, step: np.ndarray) -> shapely.MultiPolygon:
    """The polygons above `least` on a grid of which only some nodes (n, 2), row and column, are known."""
    import contourpy

    polygons = []
    for tile in np.unique(nodes // TILE, axis=0):
        start = tile * TILE
        here = ((nodes >= start) & (nodes <= start + TILE)).all(1)
        if (values[here] < least).all():
            continue
        grid = np.full((TILE + 1, TILE + 1), least - 1)  # a node that is not known has no neighbour inside
        grid[tuple((nodes[here] - start).T)] = values[here]
        lat, lon = ((start[axis] + np.arange(TILE + 1)) * step[axis] for axis in (0, 1))
        contours = contourpy.contour_generator(lon - 180, lat - 90, grid, fill_type="OuterOffset")
        for points, offsets in zip(*contours.filled(least, math.inf), strict=True):
            rings = np.split(points, offsets[1:-1])
            polygons.append(shapely.make_valid(shapely.Polygon(rings[0], rings[1:])))
    merged = shapely.intersection(shapely.union_all(polygons), shapely.box(-180, -90, 180, 90))
    merged = shapely.set_precision(merged, 1e-4)
    parts = [part for part in shapely.get_parts(merged) if part.geom_type == "Polygon"]
    return shapely.orient_polygons(shapely.MultiPolygon(parts))
