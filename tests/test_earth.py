"""Coordinates against PROJ, geographiclib's geodesics and the geometry of the sphere."""

import numpy as np
import pyproj
import pytest
import torch

from geoclip import earth

SPECIAL = torch.tensor(
    [[90.0, 0.0], [-90.0, 0.0], [0.0, -180.0], [0.0, 179.999], [0.0, 0.0], [45.0, -180.0]],
    dtype=torch.float64,
)


def places(n=2000, seed=0):
    return torch.cat([earth.sample_sphere(n, torch.Generator().manual_seed(seed)).double(), SPECIAL])


def test_equal_earth_is_proj_s():
    latlon = places()
    x, y = pyproj.Proj("+proj=eqearth +R=1")(latlon[:, 1].numpy(), latlon[:, 0].numpy())
    ours = earth.equal_earth(latlon) * 180 / earth.EQUAL_EARTH_SCALE
    assert np.abs(ours.numpy() - np.stack([x, y], 1)).max() < 1e-9


def test_equal_earth_golden_and_range():
    new_york, paris = earth.equal_earth(torch.tensor([[40.7128, -74.0060], [48.8566, 2.3522]]))
    assert torch.allclose(new_york, torch.tensor([-0.3627616, 0.2907912]), atol=1e-6)
    assert torch.allclose(paris, torch.tensor([0.0108786, 0.3411478]), atol=1e-6)
    xy = earth.equal_earth(places(20_000))
    assert 0.99 < xy[:, 0].abs().max() <= 1.0000001
    assert 0.486 < xy[:, 1].abs().max() < 0.488


def test_haversine_within_0_6_percent_of_the_geodesic():
    a, b = places(seed=1), places(seed=2)
    geodesic = pyproj.Geod(ellps="WGS84")
    km = geodesic.inv(*a.numpy().T[::-1], *b.numpy().T[::-1])[2] / 1000
    ours = earth.haversine_km(a, b).numpy()
    far = km > 1e-6
    assert np.abs(ours[far] / km[far] - 1).max() < 0.006
    assert ours[~far] == pytest.approx(0, abs=1e-6)


def test_haversine_of_near_and_opposite_places():
    one_metre = torch.tensor([[50.0, 10.0], [50.0 + 1 / 111_195, 10.0]], dtype=torch.float64)
    assert earth.haversine_km(*one_metre).item() == pytest.approx(0.001, rel=1e-4)
    half = earth.haversine_km(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -180.0])).item()
    assert half == pytest.approx(np.pi * earth.EARTH_RADIUS_KM)
    across = earth.haversine_km(*torch.tensor([[0, 179.9], [0, -179.9]], dtype=torch.float64)).item()
    assert across == pytest.approx(22.239, abs=0.001)


@pytest.mark.parametrize("lat", [0.0, 60.0, 89.0, 90.0, -90.0])
def test_noise_of_sigma_metres_has_that_sigma(lat):
    n, sigma_m = 40_000, 1000.0
    start = torch.tensor([[lat, 179.999]], dtype=torch.float64).expand(n, 2)
    noise = earth.draw_noise_km(len(start), sigma_m, torch.Generator().manual_seed(0))
    moved = earth.destination(start, *noise.unbind(-1))
    metres = earth.haversine_km(start, moved) * 1000
    # the distance is Rayleigh distributed: its mean square is 2 σ², here to ± 3 standard errors
    assert (metres.square().mean() / 2).sqrt().item() == pytest.approx(sigma_m, rel=3 / n**0.5)
    assert metres.mean().item() == pytest.approx(sigma_m * (np.pi / 2) ** 0.5, rel=0.01)
    assert earth.check_latlon(moved).shape == (n, 2)
    if abs(lat) < 90:  # north and east alike
        sphere = pyproj.Geod(a=6371008.8, b=6371008.8)
        azimuth = sphere.inv(*start.numpy().T[::-1], *moved.numpy().T[::-1])[0]
        assert (metres.numpy() * np.cos(np.radians(azimuth))).std() == pytest.approx(sigma_m, rel=0.02)


def test_unit_sphere_and_back():
    latlon = places()
    xyz = earth.unit_sphere(latlon)
    assert torch.allclose(xyz.norm(dim=-1), torch.ones(len(xyz), dtype=torch.float64))
    assert earth.haversine_km(earth.from_unit_sphere(xyz), latlon).max() < 1e-6
    assert xyz[len(xyz) - len(SPECIAL), 2] == 1  # the north pole is up


def test_sample_sphere_is_uniform_in_area():
    lat = earth.sample_sphere(100_000, torch.Generator().manual_seed(0))[:, 0].double()
    z = torch.sin(torch.deg2rad(lat))  # uniform on [-1, 1]: variance 1/3
    assert z.mean().abs() < 0.01
    assert z.var().item() == pytest.approx(1 / 3, rel=0.01)


@pytest.mark.parametrize(
    ("latlon", "message"),
    [
        ([[10.0, 20.0], [-91.0, 0.0]], r"photos\.csv, row 1: \(-91, 0\)"),
        ([[float("nan"), 0.0]], r"row 0: \(nan, 0\)"),
        ([[0.0, 200.0]], r"row 0: \(0, 200\)"),
        ([[139.7, 35.7]], "swapped"),
        ([1.0, 2.0, 3.0], "last axis"),
    ],
)
def test_bad_coordinates_name_row_and_value(latlon, message):
    with pytest.raises(ValueError, match=message):
        earth.check_latlon(torch.tensor(latlon), "photos.csv")


def test_180_east_is_180_west():
    assert earth.check_latlon([[0.0, 180.0]]).tolist() == [[0.0, -180.0]]
    assert earth.wrap_lon(torch.tensor([180.0, -180.0, 540.0, 359.0])).tolist() == [-180, -180, -180, -1]


def test_coordinates_may_be_reversed_or_read_only_arrays():
    places = np.array([[48.8, 2.3], [-33.9, 151.2]])
    places.flags.writeable = False  # as pandas hands out columns of a Parquet file
    for given in (places, places[::-1], places.T.copy().T):
        np.testing.assert_array_equal(earth.check_latlon(given), given)
