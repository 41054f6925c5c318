import math

import numpy as np
import pytest
import shapely
import torch

from geoclip import earth, regions
from geoclip.posterior import Places, Posterior


def at(latlon, log_weight, kernel_km):
    return Posterior.at(torch.tensor(latlon), torch.tensor([log_weight]), kernel_km)


def area_km2(shape):
    """Area on the sphere: x = longitude, y = sin(latitude) keeps areas."""
    shape = shapely.segmentize(shape, 0.05)
    flat = shapely.transform(
        shape, lambda lonlat: np.stack([np.deg2rad(lonlat[:, 0]), np.sin(np.deg2rad(lonlat[:, 1]))], 1)
    )
    return flat.area * earth.EARTH_RADIUS_KM**2


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_the_outline_of_one_kernel_is_a_circle(level):
    shape, pixel_km = regions.outline(at([[48.0, 2.0]], [0.0], 10.0), level)
    rim = torch.from_numpy(shapely.get_coordinates(shape)[:, ::-1].copy())
    radius = 10 * math.sqrt(-2 * math.log(1 - level))
    distance = earth.haversine_km(torch.tensor([[48.0, 2.0]]), rim)
    assert (distance - radius).abs().max() < 0.03 * radius and pixel_km < radius / 10
    assert len(shape.geoms) == 1 and shape.geoms[0].exterior.is_ccw


@pytest.mark.parametrize(
    ("latlon", "parts"),
    [
        ([[48.0, 2.0], [-40.0, -74.0]], 2),
        ([[-17.0, 179.9], [-17.5, -179.5]], 2),  # one region, cut at ±180°
        ([[90.0, 0.0], [89.0, 90.0]], 1),
        ([[-90.0, 12.0]], 1),
        ([[0.0, 90.0], [0.0, -90.0], [60.0, 180.0], [-60.0, 0.0]], 5),
    ],
)
def test_outlines_hold_the_draws_and_the_area_of_the_region(latlon, parts):
    posterior = at(latlon, [0.0] * len(latlon), 60.0)
    shape, _ = regions.outline(posterior, 0.9)
    assert shape.is_valid and shape.geom_type == "MultiPolygon" and len(shape.geoms) == parts
    assert area_km2(shape) == pytest.approx(posterior.region(0.9)[1].item(), rel=0.05)
    drawn = posterior.drawn[0][0].numpy()
    assert shapely.contains_xy(shape, drawn[:, 1], drawn[:, 0]).mean() == pytest.approx(0.9, abs=0.02)
    west, south, east, north = shape.bounds
    assert -180 <= west and east <= 180 and -90 <= south and north <= 90
    assert (
        shapely.distance(shape, shapely.points([lon for _, lon in latlon], [lat for lat, _ in latlon])).max()
        < 1e-6
    )


def test_a_hole_stays_a_hole():
    ring = [[20 * math.sin(t), 20 * math.cos(t)] for t in torch.arange(0, 2 * math.pi, 0.2).tolist()]
    shape, _ = regions.outline(at(ring, [0.0] * len(ring), 300.0), 0.9)
    assert not shapely.contains_xy(shape, 0, 0) and shapely.contains_xy(shape, 20, 0)
    assert len(shape.geoms) == 1 and len(shape.geoms[0].interiors) == 1


def test_narrow_kernels_of_a_vague_posterior_are_widened():
    generator = torch.Generator().manual_seed(0)
    places = Places(earth.sample_sphere(300, generator), keep=256)
    posterior = places.posterior(torch.randn(1, 300, generator=generator), 4.0)
    shape, pixel_km = regions.outline(posterior, 0.5)
    drawn = posterior.drawn[0][0].numpy()
    assert regions.widened(posterior, 5.0).layers[0].kernel_km == 5 and pixel_km < 5
    assert 50 < len(shape.geoms) < 300
    assert shapely.contains_xy(shape, drawn[:, 1], drawn[:, 0]).mean() > 0.45


def test_kernels_far_away_are_all_that_is_left_out():
    generator = torch.Generator().manual_seed(0)
    posterior = Posterior.at(
        earth.sample_sphere(50, generator), torch.randn(1, 50, generator=generator), 300.0
    )
    latlon = earth.sample_sphere(40, generator).double()
    exact, near = posterior.log_density(latlon[None])[0].numpy(), regions._near(posterior)(latlon.numpy())
    dense = exact > exact.max() - 15
    assert dense.sum() > 5
    np.testing.assert_allclose(near[dense], exact[dense], rtol=1e-5)


def test_one_outline_at_a_time():
    with pytest.raises(ValueError, match="not of 2"):
        regions.outline(Posterior.at(torch.zeros(2, 2), torch.zeros(2, 2), 10.0), 0.5)
