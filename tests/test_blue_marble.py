"""The embedded data: geometry of tiles, splits, determinism."""

import numpy as np
import pytest
import torch

from geoclip import earth, evaluation
from geoclip.datasets import blue_marble
from geoclip.datasets.blue_marble import SplitConfig, TileConfig


@pytest.fixture(scope="module")
def splits():
    return blue_marble.splits(SplitConfig())


def drawn(n, seed=0):
    return blue_marble.augmentation(n, torch.Generator().manual_seed(seed))


def test_the_raster_is_the_earth():
    assert blue_marble.raster().shape == (3, 2700, 5400)
    sahara, pacific, amazon = blue_marble.render(
        torch.tensor([[23.0, 10.0], [-10.0, -140.0], [-5.0, -63.0]]), TileConfig(pixels=16)
    ).mean((2, 3))
    assert sahara[0] > 0.3 and sahara[0] > sahara[2]  # bright and reddish
    assert pacific.max() < -0.4 and pacific[2] > pacific[0]  # dark and blue
    assert amazon[1] == amazon.max()  # green


def test_pixel_centres_of_an_undisturbed_tile():
    config = TileConfig(pixels=4, span_deg=2.0)
    grid = blue_marble.tile_grid(torch.tensor([[60.0, 10.0]]), config, None)[0]
    assert grid[:, 0, 0].tolist() == pytest.approx([60.75, 60.25, 59.75, 59.25])  # north on top
    assert (grid[0, :, 1] - 10).tolist() == pytest.approx([-1.5, -0.5, 0.5, 1.5], abs=1e-4)  # 1 / cos 60° = 2
    square = earth.haversine_km(grid[0, 0], grid[0, 3]), earth.haversine_km(grid[0, 0], grid[3, 0])
    assert square[0].item() == pytest.approx(square[1].item(), rel=0.03)


def test_disturbances_stay_in_their_ranges():
    config, latlon = TileConfig(pixels=2), torch.tensor([[0.0, 0.0]]).expand(5000, 2)
    grid = blue_marble.tile_grid(latlon, config, drawn(5000)).double()
    centre = grid.mean((1, 2))
    side = (grid[:, 0, 1] - grid[:, 0, 0]) * config.pixels  # from pixel centre to pixel centre, times pixels
    span = side.norm(dim=-1)
    assert 0.8 * 3 - 1e-3 < span.min() < 0.81 * 3 and 1.24 * 3 < span.max() < 1.25 * 3 + 1e-3
    angle = torch.rad2deg(torch.atan2(side[:, 0], side[:, 1])).abs()
    assert 19.5 < angle.max() < 20.001
    shift = centre.norm(dim=-1) / span
    assert 0.12 < shift.max() < 0.1251 and shift.mean().item() == pytest.approx(0.125 / 2, rel=0.03)
    assert centre.mean(0).abs().max() < 0.01  # no direction is preferred


def test_sampling_is_bilinear_and_wraps():
    layer = torch.arange(8.0)[None, None].repeat(1, 4, 1)  # 8 columns of 45°; value = column
    centre_of = lambda column: -180 + 45 * (column + 0.5)  # noqa: E731
    lon = torch.tensor([centre_of(0), centre_of(3), centre_of(3.5), centre_of(7), -180.0, 179.9999])
    values = blue_marble.sample(layer, torch.stack([torch.zeros(6), lon], -1)[None, None])[0, 0, 0]
    assert values.tolist() == pytest.approx([0, 3, 3.5, 7, 3.5, 3.5], abs=1e-3)  # between columns 7 and 0


def test_the_date_line_leaves_no_seam():
    west, east = blue_marble.render(torch.tensor([[66.0, -179.999], [66.0, 179.999]]))
    assert (west - east).abs().max() < 0.02


def test_poles_are_finite():
    tiles = blue_marble.render(torch.tensor([[90.0, 0.0], [-90.0, 33.0]]), draws=drawn(2))
    assert torch.isfinite(tiles).all()
    with pytest.raises(ValueError, match="tiles, row 1"):
        blue_marble.render(torch.tensor([[0.0, 0.0], [95.0, 0.0]]))


def test_splits_have_their_sizes_and_share_no_place(splits):
    sizes = {name: len(latlon) for name, latlon in splits.items()}
    assert sizes == {"train": 20_000, "val": 1_000, "random": 2_500, "blocked": 2_500, "gallery": 50_000}
    # places nearer than float32 can tell apart are one place
    tests = torch.cat([splits["random"], splits["blocked"]])
    assert not evaluation.leaked(tests, splits["gallery"]).any()
    rows = torch.cat([splits[name] for name in ("train", "val", "random", "blocked")])
    assert len(np.unique(rows.numpy(), axis=0)) == 26_000


def test_blocked_is_far_from_training(splits):
    for name in ("train", "val", "random"):
        assert evaluation.ceiling(splits["blocked"], splits[name]).min() > 300
    blocks = torch.unique((splits["blocked"] / 10).floor(), dim=0)
    assert len(blocks) >= 10  # not one corner of the Earth
    assert evaluation.summarize(evaluation.ceiling(splits["blocked"], splits["gallery"]))["acc_25km"] > 90


@pytest.mark.slow
def test_a_seed_fixes_splits_and_tiles(splits):
    blue_marble.splits.cache_clear()
    again = blue_marble.splits(SplitConfig())
    assert all(torch.equal(again[name], splits[name]) for name in splits)
    other = blue_marble.splits(SplitConfig(seed=1))
    assert not torch.equal(other["train"], splits["train"])
    images, latlon = blue_marble.test_tiles("random")
    assert torch.equal(images, blue_marble.test_tiles("random")[0])
    assert torch.equal(latlon, splits["random"]) and images.shape == (2500, 3, 32, 32)


def test_what_cannot_be_had():
    with pytest.raises(ValueError, match="ask for less"):
        blue_marble.splits(SplitConfig(train=90_000))
    with pytest.raises(ValueError, match="no split 'tests'"):
        blue_marble.test_tiles("tests")
