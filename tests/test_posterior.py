import math

import numpy as np
import pytest
import torch

from geoclip import earth, evaluation, kernels
from geoclip.posterior import Places, Posterior


def mixture(n=3, k=40, kernel_km=100.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latlon = earth.sample_sphere(k, generator).double()
    return latlon, torch.randn(n, k, generator=generator, dtype=torch.double), kernel_km


def slow_density(place, latlon, log_weight, kernel_km):
    """The density per km² at one place, kernel by kernel."""
    weight = np.exp(log_weight - max(log_weight))
    kappa, total = (earth.EARTH_RADIUS_KM / kernel_km) ** 2, 0.0
    for share, centre in zip(weight / weight.sum(), latlon, strict=True):
        angle = float(earth.haversine_km(torch.tensor(place), torch.tensor(centre))) / earth.EARTH_RADIUS_KM
        kernel = math.exp(-2 * kappa * math.sin(angle / 2) ** 2) / (-math.expm1(-2 * kappa))
        total += share * kernel * kappa / (2 * math.pi * earth.EARTH_RADIUS_KM**2)
    return total


def quadrature(around, reach_km, rings=400, angles=400):
    """Places within `reach_km` and the area of each in km²."""
    nodes, weights = np.polynomial.legendre.leggauss(rings)
    top = 1 - math.cos(reach_km / earth.EARTH_RADIUS_KM)
    h = torch.from_numpy((nodes + 1) / 2 * top)
    distance = earth.EARTH_RADIUS_KM * torch.acos(1 - h)
    angle = torch.arange(angles, dtype=torch.double) / angles * 2 * math.pi
    east, north = distance[:, None] * angle.sin(), distance[:, None] * angle.cos()
    area = torch.from_numpy(weights)[:, None] / 2 * top * 2 * math.pi / angles * earth.EARTH_RADIUS_KM**2
    places = earth.destination(torch.tensor(around, dtype=torch.double).expand(rings, angles, 2), east, north)
    return places.reshape(-1, 2), area.expand(rings, angles).flatten()


def rotation(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.double))[0]


def rotated(latlon, turn):
    return earth.from_unit_sphere(earth.unit_sphere(latlon.double()) @ turn)


def test_density_equals_the_sum_over_kernels():
    latlon, log_weight, km = mixture()
    places = earth.sample_sphere(3).double()
    fast = Posterior.at(latlon, log_weight, km).log_density(places)
    for row in range(3):
        slow = slow_density(places[row].tolist(), latlon.tolist(), log_weight[row].numpy(), km)
        assert fast[row].item() == pytest.approx(math.log(slow), abs=1e-6)


@pytest.mark.parametrize("km", [3.0, 300.0, 5000.0])
def test_mass_over_the_sphere_is_one(km):
    latlon, log_weight, _ = mixture(n=1, k=5)
    posterior = Posterior.at(latlon, log_weight, km)
    assert posterior.mass_within(torch.tensor([[10.0, 20.0]]), 30000).item() == pytest.approx(1, abs=1e-6)
    if km >= 300:
        places, area = quadrature((10.0, 20.0), math.pi * earth.EARTH_RADIUS_KM)
        total = (posterior.log_density(places[None])[0].exp() * area).sum()
        assert total.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("radius", [5.0, 100.0, 750.0])
def test_mass_within_equals_quadrature(radius):
    latlon = torch.tensor([[50.0, 10.0], [50.5, 10.5], [48.0, 12.0]])
    posterior = Posterior.at(latlon, torch.tensor([[0.0, 1.0, 2.0]]), 60.0)
    places, area = quadrature((50.0, 10.5), radius)
    slow = (posterior.log_density(places[None])[0].exp() * area).sum()
    assert posterior.mass_within(torch.tensor([[50.0, 10.5]]), radius).item() == pytest.approx(
        slow.item(), abs=1e-6
    )


def test_expected_distance_and_geoscore_equal_quadrature():
    latlon, log_weight, _ = mixture(n=1, k=4)
    posterior = Posterior.at(latlon, log_weight, 500.0)
    answer = torch.tensor([[-30.0, 170.0]])
    places, area = quadrature((-30.0, 170.0), math.pi * earth.EARTH_RADIUS_KM)
    mass, d = posterior.log_density(places[None])[0].exp() * area, earth.haversine_km(answer, places)
    assert posterior.expected_km(answer).item() == pytest.approx((mass * d).sum().item(), rel=1e-5)
    slow = (mass * 5000 * torch.exp(-d / evaluation.GEOSCORE_SCALE_KM)).sum().item()
    assert posterior.expected_geoscore(answer).item() == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize(
    ("decision", "worth"),
    [
        ("mode", lambda p, x: p.log_density(x)),
        ("disc:300", lambda p, x: p.mass_within(x, 300)),
        ("median", lambda p, x: -p.expected_km(x)),
        ("geoscore", lambda p, x: p.expected_geoscore(x)),
    ],
)
def test_no_place_of_a_grid_is_a_better_answer(decision, worth):
    latlon, log_weight, _ = mixture(n=4, k=60)
    posterior = Posterior.at(latlon, log_weight, 250.0)
    found = posterior.answer(decision)
    grid = earth.sample_sphere(20_000, torch.Generator().manual_seed(2)).double()
    best = worth(posterior, grid.expand(4, -1, -1)).amax(1)
    assert (worth(posterior, found) >= best - 1e-3 * best.abs()).all()


def test_rotating_the_earth_rotates_the_answers():
    latlon, log_weight, km = mixture()
    turn = rotation()
    one, other = Posterior.at(latlon, log_weight, km), Posterior.at(rotated(latlon, turn), log_weight, km)
    for decision in ("mode", "median", "geoscore"):
        there = rotated(one.answer(decision), turn)
        assert earth.haversine_km(there, other.answer(decision)).max() < 0.05
    there = rotated(one.answer("disc:200"), turn)
    torch.testing.assert_close(other.mass_within(there, 200), one.mass_within(one.answer("disc:200"), 200))
    torch.testing.assert_close(one.region(0.5)[1], other.region(0.5)[1], rtol=0.1, atol=0)


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(0)
    places = Places(earth.sample_sphere(3001, generator), keep=256, pooled_km=1000)
    logits = 8 * torch.randn(20, 3001, generator=generator)
    together = places.posterior(logits, 50.0)
    for row in (0, 19):
        alone = places.posterior(logits[row : row + 1], 50.0)
        for decision in ("mode", "median", "disc:100"):
            assert earth.haversine_km(together.answer(decision)[row], alone.answer(decision)[0]) < 1e-3
        torch.testing.assert_close(together.region(0.9)[1][row], alone.region(0.9)[1][0])


def test_places_left_out_keep_their_mass():
    generator = torch.Generator().manual_seed(0)
    latlon = earth.sample_sphere(20_000, generator)
    logits = 2 * torch.randn(4, 20_000, generator=generator)
    whole, short = (Places(latlon, keep=keep).posterior(logits, 50.0) for keep in (20_000, 500))
    assert len(short.layers) == 2
    heaviest = logits.softmax(1).topk(500)
    torch.testing.assert_close(short.layers[0].weight, heaviest.values.double())
    torch.testing.assert_close(short.layers[0].xyz, earth.unit_sphere(latlon.double())[heaviest.indices])
    total = sum(layer.weight.sum(1) for layer in short.layers)
    torch.testing.assert_close(total, torch.ones(4, dtype=torch.double), rtol=0, atol=1e-9)
    places = earth.sample_sphere(4, generator)
    torch.testing.assert_close(whole.expected_km(places), short.expected_km(places), rtol=1e-3, atol=0)
    torch.testing.assert_close(
        whole.mass_within(places, 2500), short.mass_within(places, 2500), rtol=0, atol=0.005
    )


def test_one_place():
    posterior = Posterior.at(torch.tensor([[48.0, 2.0]]), torch.zeros(1, 1), 10.0)
    for answer in (posterior.answer("mode"), posterior.answer("disc:25"), posterior.answer("median")):
        assert earth.haversine_km(answer, torch.tensor([[48.0, 2.0]])).item() < 1e-3
    # a two-dimensional Gaussian: P(d ≤ r) = 1 − exp(−r² / 2σ²); area of the region: −2πσ² ln(1 − level)
    mass = posterior.mass_within(torch.tensor([[48.0, 2.0]]), 25).item()
    assert mass == pytest.approx(1 - math.exp(-(25**2) / 200), abs=1e-5)
    for level in (0.5, 0.9):
        area = -2 * math.pi * 100 * math.log(1 - level)
        assert posterior.region(level)[1].item() == pytest.approx(area, rel=0.02)
    assert posterior.entropy.item() == pytest.approx(1 + math.log(2 * math.pi * 100), abs=0.02)
    assert posterior.answers("mode", 3).isnan().all(-1).tolist() == [[False, True, True]]


def test_all_mass_at_one_of_many_places():
    log_weight = torch.full((1, 30), -math.inf)
    log_weight[0, 4] = 0
    latlon = mixture(k=30)[0]
    answer = Posterior.at(latlon, log_weight, 5.0).answer("mode")
    assert earth.haversine_km(answer, latlon[4:5]).item() < 1e-3


def test_two_antipodal_places_have_an_answer():
    latlon = torch.tensor([[10.0, 30.0], [-10.0, -150.0]])
    posterior = Posterior.at(latlon, torch.zeros(1, 2), 50.0)
    assert earth.haversine_km(posterior.answer("mode"), latlon).min().item() < 1e-3
    assert posterior.mass_within(posterior.answer("disc:200"), 200).item() == pytest.approx(0.5, abs=0.001)
    half = math.pi * earth.EARTH_RADIUS_KM / 2
    assert posterior.expected_km(posterior.answer("median")).item() == pytest.approx(half, rel=0.005)
    modes = posterior.answers("mode", 3)[0]
    assert sorted(modes[:2, 0].round().tolist()) == [-10, 10]
    assert modes[2].isnan().all()


@pytest.mark.parametrize(
    "latlon",
    [[[90.0, 0.0], [89.9, 90.0], [89.9, -90.0]], [[0.0, 179.9], [0.0, -179.9]], [[-90.0, 12.0]]],
)
def test_poles_and_the_date_line_are_ordinary_places(latlon):
    latlon = torch.tensor(latlon)
    posterior = Posterior.at(latlon, torch.zeros(1, len(latlon)), 30.0)
    centre = earth.from_unit_sphere(earth.unit_sphere(latlon.double()).sum(0, keepdim=True))
    for answer in (posterior.answer("mode"), posterior.answer("median")):
        assert earth.haversine_km(answer, centre).item() < 0.5
        assert posterior.mass_within(answer, 200).item() > 0.999


def test_modes_are_apart_and_in_order():
    latlon = torch.tensor([[0.0, 0.0], [0.0, 0.1], [0.0, 5.0], [40.0, 5.0]])
    posterior = Posterior.at(latlon, torch.tensor([[0.6, 0.5, 0.9, 0.0]]), 10.0)
    modes = posterior.answers("mode", 3)[0]
    expected = torch.tensor([[0.0, 0.048], [0.0, 5.0], [40.0, 5.0]])
    assert earth.haversine_km(modes, expected).max() < 1


def test_a_level_holds_its_share_of_the_draws():
    latlon, log_weight, km = mixture(n=1)
    posterior = Posterior.at(latlon, log_weight, km)
    places, density = posterior.drawn
    least, _ = posterior.region(0.9)
    assert (density >= least[:, None]).double().mean().item() == pytest.approx(0.9, abs=0.01)
    inside = density[0].argsort()[-100]
    assert posterior.level(places[:, inside]).item() == pytest.approx(100 / density.shape[1], abs=0.01)


def test_exponents_that_underflow_are_zero_and_cost_no_accuracy():
    x = torch.linspace(-120, 0, 2001)
    found = kernels.fast_exp(x.clone())
    torch.testing.assert_close(found, torch.where(x > kernels.LEAST, x.exp(), 0.0), atol=1e-18, rtol=1e-6)
    assert found[found > 0].min() ** 2 > torch.finfo(torch.float32).tiny  # products of two do not underflow
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).double() * 30
    torch.testing.assert_close(kernels.softmax(logits).double(), logits.softmax(1), atol=1e-7, rtol=1e-5)
    h = x.abs() / 120
    kernels.density(100.0)(h)
    assert torch.equal(h, x.abs() / 120)  # it is used again for other kernels


def test_mass_by_region():
    latlon = torch.tensor([[40.0, 5.0], [-40.0, 5.0]])
    posterior = Posterior.at(latlon, torch.tensor([[math.log(3.0), 0.0]]), 100.0)
    [mass] = posterior.mass_by(lambda places: np.where(places[:, 0] > 0, "north", "south"))
    assert list(mass) == ["north", "south"]
    assert mass["south"] == pytest.approx(0.25, abs=0.005)
    assert posterior.mass_by(lambda places: np.full(len(places), None)) == [{}]


def test_a_very_wide_kernel_is_uniform():
    posterior = Posterior.at(torch.tensor([[20.0, 30.0]]), torch.zeros(1, 1), 1e7)
    uniform = -math.log(4 * math.pi * earth.EARTH_RADIUS_KM**2)
    assert posterior.log_density(torch.tensor([[-60.0, 5.0]])).item() == pytest.approx(uniform, abs=1e-4)


def test_the_background_is_the_gallerys_own_density():
    latlon = torch.tensor([[0.0, 0.0]] * 3 + [[0.0, 90.0]])
    posterior = Places(latlon).posterior(torch.tensor([[9.0, 0.0, 0.0, -90.0]]), 50.0, background=0.4)
    mass = posterior.mass_within(torch.tensor([[0.0, 90.0]]), 1000).item()
    assert mass == pytest.approx(0.4 / 4, abs=1e-6)


def test_a_divided_prior_counts_land_and_not_places():
    crowd = [[0.0, 0.001 * i] for i in range(9)]
    places, logits = Places(torch.tensor([*crowd, [0.0, 90.0]])), torch.zeros(1, 10)
    assert places.crowd.tolist() == [9] * 9 + [1]
    for prior, share in (("gallery", 0.1), ("divided", 0.5)):
        posterior = places.posterior(logits, 5.0, background=0.2, prior=prior)
        mass = posterior.mass_within(torch.tensor([[0.0, 90.0]]), 2000).item()
        assert mass == pytest.approx(share, abs=1e-6)
    with pytest.raises(ValueError, match="'even' is not gallery or divided"):
        places.posterior(logits, 5.0, prior="even")


def test_what_is_refused():
    places = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="NaN or infinite"):
        Posterior.at(places, torch.tensor([[0.0, math.nan]]), 10.0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        Posterior.at(places, torch.full((1, 2), -math.inf), 10.0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        Places(places).posterior(torch.tensor([[math.inf, 0.0]]), 10.0)
    with pytest.raises(ValueError, match="kernel_km must be positive"):
        Posterior.at(places, torch.zeros(1, 2), 0.0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        Places(places).posterior(torch.zeros(1, 2), 10.0, temperature=0.0)
    with pytest.raises(ValueError, match="3 scores for 2 places"):
        Places(places).posterior(torch.zeros(1, 3), 10.0)
    with pytest.raises(ValueError, match="lat, lon"):
        Posterior.at(torch.tensor([[95.0, 0.0]]), torch.zeros(1, 1), 10.0)
    with pytest.raises(ValueError, match="'disc:x' is not mode, disc:KM"):
        Posterior.at(places, torch.zeros(1, 2), 10.0).answer("disc:x")
    with pytest.raises(ValueError, match="level of a region"):
        Posterior.at(places, torch.zeros(1, 2), 10.0).region(1.0)
