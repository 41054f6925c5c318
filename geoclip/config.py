"""Configurations of the encoders and of the embedded data, checked when they are made.

Without torch, so that the command line can explain them at once.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Image tower and head; the defaults are the paper's.

    Args:
        tower: Name of an open_clip model, "timm/NAME", or "conv", the small tower for 32 px tiles. CLIP's
            OpenAI weights need the QuickGELU variant: "ViT-L-14" without it gives other features.
        weights: An open_clip tag ("openai"), the path of a local CLIP file, or None for random weights; for
            "conv", the checkpoint of a training run whose tower is used.
        frozen: Whether the tower stays untrained, as in the paper; "conv" without weights must be trained.
        hidden: Hidden units of the head.
        dim: Dimension d of the embedding.
    """

    tower: str = "ViT-L-14-quickgelu"
    weights: str | None = "openai"
    frozen: bool = True
    hidden: int = 768
    dim: int = 512

    def __post_init__(self):
        require(self, "image.", 1, "hidden", "dim")


@dataclass(frozen=True)
class LocationEncoderConfig:
    """Shape of the location encoder; the defaults are the paper's (9,447,936 trainable parameters).

    Args:
        sigmas: One level per σ of the random Fourier features, in cycles per unit of the projected plane,
            which is 2 units wide; () uses no Fourier features but one MLP on the projected coordinates.
        frequencies: Frequencies f drawn per level; each gives a cosine and a sine.
        width: Hidden units of each level's MLP.
        hidden_layers: Hidden layers of each level's MLP.
        dim: Dimension d of the embedding.
        projection: Input of the levels: "equal_earth" (x, y), "degrees" (lat, lon) / 180, or "sphere" (xyz).
    """

    sigmas: tuple[float, ...] = (2.0**0, 2.0**4, 2.0**8)
    frequencies: int = 256
    width: int = 1024
    hidden_layers: int = 3
    dim: int = 512
    projection: Literal["equal_earth", "degrees", "sphere"] = "equal_earth"

    def __post_init__(self):
        require(self, "location.", 1, "frequencies", "width", "dim")
        require(self, "location.", 0, "hidden_layers", "sigmas")


@dataclass(frozen=True)
class TileConfig:
    """How a tile is cut and augmented.

    Args:
        pixels: Side of the tile in pixels.
        span_deg: Side of the tile on the ground, in degrees of latitude.
        rotate_deg: Largest rotation in either direction, degrees.
        scale: Range of the factor on the span.
        shift: Largest shift in any direction, as a part of the span; the place to find is not shifted.
        recolour: Largest change of brightness, of each channel's gain and of the offset, in either direction.
    """

    pixels: int = 32
    span_deg: float = 3.0
    rotate_deg: float = 20.0
    scale: tuple[float, float] = (0.8, 1.25)
    shift: float = 0.125
    recolour: float = 0.2

    def __post_init__(self):
        require(self, "tiles.", 1, "pixels")
        require(self, "tiles.", 0, "span_deg", "rotate_deg", "scale", "shift", "recolour")


@dataclass(frozen=True)
class SplitConfig:
    """Sizes of the splits and how they are drawn.

    Args:
        train: Training places.
        val: Validation places.
        test: Test places, of the random split and of the blocked one each.
        gallery: Places of the gallery.
        block_deg: Side of the blocks that the blocked split keeps out of training, degrees.
        gap_km: Least distance of training and validation places from the test places of the blocks; half a
            tile's diagonal is at most 295 km.
        seed: Seed of the draws.
    """

    train: int = 20_000
    val: int = 1_000
    test: int = 2_500
    gallery: int = 50_000
    block_deg: float = 10.0
    gap_km: float = 300.0
    seed: int = 0

    def __post_init__(self):
        require(self, "splits.", 1, "train", "val", "test", "gallery", "block_deg")
        require(self, "splits.", 0, "gap_km", "seed")


def require(config: Any, prefix: str, least: int, *names: str) -> None:
    """Raise ValueError unless these fields, or all their values, are finite and at least `least`."""
    for name in names:
        value = getattr(config, name)
        parts = value if isinstance(value, tuple | list) else [value]
        if not all(least <= part < math.inf for part in parts):
            raise ValueError(f"{prefix}{name} must be at least {least} and finite, got {value}")
