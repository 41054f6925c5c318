"""Maps in one style: the world in Equal Earth, regions in an equal-area projection.

Outlines come from data/natural_earth. Colours are safe for colour-blind readers and ordered by lightness.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import cartopy.crs as ccrs
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pyproj
import shapely
import torch
from cartopy.mpl.geoaxes import GeoAxes
from matplotlib.collections import LineCollection
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from geoclip import earth, paths

STYLE = matplotlib.rc_params_from_file(Path(__file__).with_suffix(".mplstyle"), use_default_template=False)
LAND, SEA, LINE = "#e6e6e6", "#ffffff", "#9a9a9a"
# White lines with a dark rim are visible on both ends of the colour scale.
RIM = withStroke(linewidth=1.0, foreground="black", alpha=0.4)
OVER_HEAT = {"facecolor": "none", "edgecolor": "white", "linewidth": 0.4, "zorder": 3, "path_effects": [RIM]}
TRUTH = "#D55E00"
# Okabe and Ito's colours; the first five run from light to dark and stay apart in grey.
CATEGORIES = ("#F0E442", "#56B4E9", "#D55E00", "#0072B2", "#000000", "#E69F00", "#CC79A7", "#009E73")
ERROR_BOUNDS_KM = (200.0, 750.0, 2500.0)
ERROR_COLOURS = ("#5ec962", "#21918c", "#3b528b", "#440154")
PLATE = ccrs.PlateCarree()
SPHERE = pyproj.Geod(ellps="sphere")
KM = 1000.0  # the projections' metres


@dataclasses.dataclass(frozen=True)
class Grid:
    """Sample points of a map's pixels, `samples` × `samples` each."""

    latlon: np.ndarray  # (n, 2) degrees, of the points on the Earth
    inside: np.ndarray  # (rows, columns), which of all points these are
    extent: tuple[float, float, float, float]
    samples: int = 1

    @property
    def width_km(self) -> float:  # of a pixel
        return (self.extent[1] - self.extent[0]) / (self.inside.shape[1] // self.samples) / KM

    def image(self, values: np.ndarray) -> np.ma.MaskedArray:
        """`values` (n,) of the points as an image (rows, columns): each pixel's mean, masked where it has none."""
        values = np.asarray(values)
        if values.shape != (len(self.latlon),):
            raise ValueError(f"expected {len(self.latlon)} values, one per point; got shape {values.shape}")
        # zeros, because matplotlib also computes under the mask and would warn of uninitialised values
        picture = np.ma.masked_array(np.zeros(self.inside.shape), mask=~self.inside)
        picture[self.inside] = values
        rows, columns = (size // self.samples for size in picture.shape)
        return picture.reshape(rows, self.samples, columns, self.samples).mean(axis=(1, 3))


def figure(width_in: float = 7.0, height_in: float = 3.6, data: str | None = None) -> Figure:
    """A new figure in this package's style, with `data`, what it shows, in small type below it."""
    plt.rcParams.update(STYLE)
    made = plt.figure(figsize=(width_in, height_in))
    if data:
        made.supxlabel(data, fontsize=6.5, color="#555555", x=0.01, ha="left")
    return made


def earth_axes(
    figure: Figure, position: tuple[int, int, int] = (1, 1, 1), title: str = "", filled: bool = True
) -> GeoAxes:
    """The whole Earth in Equal Earth with country outlines: filled below the data, or as lines above it."""
    axes = figure.add_subplot(*position, projection=ccrs.EqualEarth())
    axes.set_global()
    look = {"facecolor": LAND, "edgecolor": LINE, "linewidth": 0.25, "zorder": 0} if filled else OVER_HEAT
    axes.add_geometries(_outlines("countries_110m"), PLATE, **look)
    return _framed(axes, title)


def region_axes(
    figure: Figure,
    centre: Sequence[float],
    span_km: float,
    position: tuple[int, int, int] = (1, 1, 1),
    title: str = "",
    filled: bool = True,
) -> GeoAxes:
    """A square of `span_km` around `centre` (lat, lon), in Lambert's azimuthal equal-area projection.

    Below 100 km it has no coastline, for which the outlines at 1:50 million are too coarse.
    """
    lat, lon = (float(degrees) for degrees in centre)
    if not 0 < span_km <= 12_000:
        raise ValueError(f"a region may span up to 12,000 km, not {span_km:g}; use earth_axes")
    axes = figure.add_subplot(*position, projection=ccrs.LambertAzimuthalEqualArea(lon, lat))
    half = span_km * KM / 2
    axes.set_xlim(-half, half)
    axes.set_ylim(-half, half)
    look = {"facecolor": LAND, "edgecolor": LINE, "linewidth": 0.4, "zorder": 0} if filled else OVER_HEAT
    if span_km >= 100:
        axes.add_geometries(_near("land_50m", lat, lon, span_km), PLATE, **look)
        axes.add_geometries(_near("borders_50m", lat, lon, span_km), PLATE, **(look | {"facecolor": "none"}))
    return _framed(axes, title)


def grid(axes: GeoAxes, columns: int = 360, samples: int = 1, land: bool = False) -> Grid:
    """Points of the map's pixels, `columns` pixels per row, for a heat map that is drawn without resampling.

    samples: points across a pixel, whose mean is drawn. More than one keeps a pattern finer than a pixel from
    appearing as a coarser one. land: only the points on land.
    """
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    rows = max(1, round(columns * (top - bottom) / (right - left))) * samples
    columns *= samples
    x = left + (np.arange(columns) + 0.5) * (right - left) / columns
    y = top - (np.arange(rows) + 0.5) * (top - bottom) / rows
    xs, ys = np.meshgrid(x, y)
    lonlat = PLATE.transform_points(axes.projection, xs, ys)[..., :2]
    inside = np.isfinite(lonlat).all(-1)
    # Outside the Earth the inverse projection still returns a place, but one that projects to another pixel.
    back = axes.projection.transform_points(PLATE, lonlat[..., 0], lonlat[..., 1])
    inside &= np.hypot(back[..., 0] - xs, back[..., 1] - ys) < 10 * KM
    if land:
        countries = shapely.union_all(_outlines("countries_110m"))
        inside &= shapely.contains_xy(countries, *np.moveaxis(lonlat, -1, 0))
    lon, lat = lonlat[inside].T
    latlon = np.stack([np.clip(lat, -90, 90), (lon + 180) % 360 - 180], 1)
    return Grid(latlon, inside, (left, right, bottom, top), samples)


def density(axes: GeoAxes, latlon, label: str = "places") -> None:
    """Number of places in hexagons of equal area, 120 from west to east, on a log scale."""
    lat, lon = _array(latlon).T
    (left, right), (bottom, top) = axes.projection.x_limits, axes.projection.y_limits
    rows = round(120 * (top - bottom) / (right - left) / np.sqrt(3))
    cells = {"gridsize": (120, rows), "extent": (left, right, bottom, top), "bins": "log", "mincnt": 1}
    drawn = axes.hexbin(lon, lat, transform=PLATE, cmap="cividis_r", linewidths=0.1, zorder=2, **cells)
    axes.set_global()
    _bar(axes, drawn, f"{label} per hexagon {(right - left) / 120 / KM:.0f} km wide")


def errors(axes: GeoAxes, truth, predicted, limit: int = 400) -> None:
    """A great-circle arc from each true place (dot) to the predicted one, coloured by the error in km.

    Draws the first `limit` pairs. The legend's percentages count all; a missing prediction (NaN) as furthest.
    """
    truth, predicted = _array(truth), _array(predicted)
    if truth.shape != predicted.shape:
        raise ValueError(f"{len(truth)} true places and {len(predicted)} predicted ones cannot be paired")
    error_km = earth.haversine_km(torch.from_numpy(truth), torch.from_numpy(predicted)).numpy()
    classes = np.digitize(error_km, ERROR_BOUNDS_KM, right=True)
    names = ["≤ 200 km", "≤ 750 km", "≤ 2,500 km", "further"]
    handles = list(axes.get_legend_handles_labels()[0])
    for kind, (colour, name) in enumerate(zip(ERROR_COLOURS, names, strict=True)):
        chosen = np.flatnonzero((classes[:limit] == kind) & np.isfinite(error_km[:limit]))
        lines = [piece for i in chosen for piece in _on_map(axes, great_circle(truth[i], predicted[i]))]
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=0.6, alpha=0.7, zorder=2))
        lat, lon = truth[chosen].T
        axes.scatter(lon, lat, s=4, color=colour, transform=PLATE, zorder=3, linewidths=0)
        share = 100 * (classes == kind).sum() / max(1, len(classes))
        handles.append(Line2D([], [], color=colour, marker="o", markersize=3, label=f"{name}: {share:.0f} %"))
    drawn = f", {limit} drawn" if limit < len(truth) else ""
    _legend(axes, handles, f"error (dot: true place), % of {len(truth)} images{drawn}")


def similarity(
    axes: GeoAxes,
    pixels: Grid,
    values,
    top_k=None,
    truth=None,
    label: str = "cosine similarity",
    limits: tuple[float, float] | None = None,
    bar: bool = True,
    regions: dict[str, shapely.Geometry] | None = None,
) -> None:
    """Heat map of `values` (n,), one per point of `grid(axes)`; the best places are numbered, the truth is ringed.

    top_k: (k, 2), best first; truth: (2,); both (lat, lon) in degrees. limits: range of the colours, by
    default that of the values. regions: polygons in (lon, lat) to outline, by their label.
    """
    picture = pixels.image(_array(values))
    low, high = limits or (picture.min(), picture.max())
    drawn = _show(axes, pixels, picture, cmap="cividis", vmin=low, vmax=high)
    handles = [] if truth is None else [_ring(axes, truth)]
    if top_k is not None:
        handles.append(_numbered(axes, top_k))
    rim = [withStroke(linewidth=2.2, foreground="white")]
    for style, (name, shape) in zip(("-", (0, (2, 1))), (regions or {}).items(), strict=False):
        look = {"edgecolor": "black", "linewidth": 0.9, "linestyle": style, "path_effects": rim}
        axes.add_geometries([shape], PLATE, facecolor="none", zorder=3.5, **look)
        handles.append(Line2D([], [], color="black", lw=0.9, ls=style, label=name))
    if handles:
        _legend(axes, handles)
    if bar:
        _bar(axes, drawn, label)


def categories(axes: GeoAxes, pixels: Grid, labels, names: Sequence[str]) -> None:
    """Categorical map: `labels` (n,) are indices of `names`, or -1 for nothing; a legend for at most 8 names.

    With more than 8, such as countries, the colours repeat and only the borders carry meaning.
    """
    labels = _array(labels).astype(int)
    if labels.size and not -1 <= labels.min() <= labels.max() < len(names):
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}; there are {len(names)} names")
    picture = np.ma.masked_less(pixels.image(labels), 0)
    colours = ListedColormap(CATEGORIES[: len(names)])
    norm = BoundaryNorm(np.arange(colours.N + 1) - 0.5, colours.N)
    _show(axes, pixels, picture % colours.N, cmap=colours, norm=norm)
    if len(names) <= len(CATEGORIES):
        present = np.unique(labels[labels >= 0])
        _legend(axes, [Patch(color=CATEGORIES[i], label=names[i]) for i in present])


def points(axes: GeoAxes, latlon, label: str, colour: str = "#0072B2", size: float = 6.0) -> None:
    """Places as dots; the caller draws the legend with `axes.legend`."""
    lat, lon = _array(latlon).T
    axes.scatter(lon, lat, s=size, color=colour, label=label, transform=PLATE, zorder=4, linewidths=0)


def plain(text: str) -> str:
    """Text, such as a file's name, that matplotlib draws literally: no mathematics, no undecodable bytes."""
    return text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def great_circle(start, end) -> np.ndarray:
    """Points (lat, lon) on the shortest way from `start` to `end`, inclusive, at most 1° apart."""
    (lat, lon), (to_lat, to_lon) = _array(start), _array(end)
    count = max(2, math.ceil(SPHERE.inv(lon, lat, to_lon, to_lat)[2] / 111 / KM) + 1)
    # with both ends: initial_idx and terminus_idx are 0
    way = SPHERE.inv_intermediate(lon, lat, to_lon, to_lat, count, 0, 0, 0, return_back_azimuth=False)
    return np.stack([way.lats, way.lons], axis=1)


@functools.cache
def _outlines(name: str) -> list:
    path = paths.NATURAL_EARTH / f"{name}.geojson"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; `git checkout data/natural_earth` restores it")
    features = json.loads(path.read_text(encoding="utf-8"))["features"]
    return [shapely.from_geojson(json.dumps(feature["geometry"])) for feature in features]


def _near(name: str, lat: float, lon: float, span_km: float) -> list:
    """The part of the outlines that a region shows; projecting all of them would take seconds."""
    [shape] = _outlines(name)
    reach = span_km / 111.0  # degrees; 0.75 of it would be enough
    bottom, top = max(-90.0, lat - reach), min(90.0, lat + reach)
    widest = max(abs(bottom), abs(top))
    wide = 180.0 if widest > 80 else min(180.0, reach / np.cos(np.deg2rad(widest)))
    windows = [shapely.box(lon - wide + turn, bottom, lon + wide + turn, top) for turn in (-360, 0, 360)]
    window = shapely.intersection(shapely.union_all(windows), shapely.box(-180, -90, 180, 90))
    cut = [shapely.intersection(part, window) for part in shapely.get_parts(shape) if part.intersects(window)]
    pieces = shapely.get_parts(cut)  # a coast that only touches the window leaves points and lines
    return list(pieces[shapely.get_dimensions(pieces) == shapely.get_dimensions(shape)])


def _framed(axes: GeoAxes, title: str) -> GeoAxes:
    axes.spines["geo"].set(edgecolor=LINE, linewidth=0.6)
    axes.set_facecolor(SEA)
    axes.set_title(title)
    return axes


def _show(axes: GeoAxes, pixels: Grid, picture: np.ndarray, **colours):
    """Draws a picture of the map's pixels; imshow would change the limits of the axes."""
    where = {"extent": pixels.extent, "origin": "upper", "transform": axes.projection}
    drawn = axes.imshow(picture, interpolation="nearest", zorder=1, **where, **colours)
    drawn.set_rasterized(True)
    axes.set_xlim(pixels.extent[:2])
    axes.set_ylim(pixels.extent[2:])
    return drawn


def _on_map(axes: GeoAxes, way: np.ndarray) -> list[np.ndarray]:
    """A way (lat, lon) as projected lines, cut where it leaves the map and enters at the other edge."""
    xy = axes.projection.transform_points(PLATE, way[:, 1], way[:, 0])[:, :2]
    wide = axes.projection.x_limits[1] - axes.projection.x_limits[0]
    cuts = np.flatnonzero(np.abs(np.diff(xy[:, 0])) > wide / 4) + 1
    return [piece for piece in np.split(xy, cuts) if len(piece) > 1]


def _ring(axes: GeoAxes, truth) -> Line2D:
    lat, lon = _array(truth).reshape(2)
    for colour, width in (("white", 3.2), (TRUTH, 1.6)):
        axes.plot(lon, lat, "o", ms=12, mfc="none", mec=colour, mew=width, transform=PLATE, zorder=4.5)
    return Line2D([], [], marker="o", ls="", ms=8, mfc="none", mec=TRUTH, mew=1.6, label="truth")


def _numbered(axes: GeoAxes, top_k) -> Line2D:
    top_k = _array(top_k).reshape(-1, 2)
    places = axes.projection.transform_points(PLATE, top_k[:, 1], top_k[:, 0])
    for rank, (x, y, _) in reversed(list(enumerate(places, start=1))):
        axes.plot(x, y, "o", ms=7, mfc="white", mec="black", mew=0.7, zorder=5 - rank / 100)
        how = {"ha": "center", "va": "center_baseline", "fontsize": 5.5, "annotation_clip": True}
        axes.annotate(str(rank), (x, y), **how, zorder=5.005 - rank / 100)
    label = f"best {len(top_k)}" if len(top_k) > 1 else "best"
    return Line2D([], [], marker="o", ls="", ms=6, mfc="white", mec="black", mew=0.7, label=label)


def _legend(axes: GeoAxes, handles: list, title: str | None = None) -> None:
    columns = {"ncols": len(handles) if len(handles) <= 5 else 4, "handletextpad": 0.3, "columnspacing": 1.2}
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0)}
    axes.legend(handles=handles, title=title, title_fontsize=6.5, **below, **columns)


def _bar(axes: GeoAxes, drawn, label: str) -> None:
    bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.7, aspect=22, pad=0.02)
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=6.5)
    bar.outline.set_linewidth(0.4)


def _array(values) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
