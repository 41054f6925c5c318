"""Scores against their definitions in plain Python."""

import math
import statistics

import numpy as np
import pytest
import torch

from geoclip import earth, evaluation

ERRORS = [0.0, 1.0, 1.0000001, 24.0, 25.0, 199.0, 750.0, 751.0, 2500.0, 9000.0, math.nan, math.inf]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_summary_by_hand():
    row = evaluation.summarize(torch.tensor(ERRORS, dtype=torch.float64))
    answered = ERRORS[:10]
    for km in (1, 25, 200, 750, 2500):
        within = sum(error <= km for error in answered)
        assert row[f"acc_{km}km"] == pytest.approx(100 * within / 12)  # misses stay in the denominator
    assert row["median_km"] == pytest.approx(statistics.median(answered))
    assert row["mean_km"] == pytest.approx(statistics.mean(answered))
    score = sum(5000 * math.exp(-error / 1492.7) for error in answered) / 12
    assert row["geoscore"] == pytest.approx(score)
    assert row["n"] == 12


def test_nothing_but_misses_and_nothing_at_all():
    row = evaluation.summarize(torch.full((3,), math.nan))
    assert row["acc_2500km"] == 0 and row["geoscore"] == 0 and math.isnan(row["median_km"])
    with pytest.raises(ValueError, match="empty"):
        evaluation.summarize(torch.empty(0))


def test_ceiling_is_the_brute_force_minimum():
    truth, places = earth.sample_sphere(60, seeded(1)), earth.sample_sphere(400, seeded(2))
    every = earth.haversine_km(truth[:, None], places[None])
    assert torch.allclose(evaluation.ceiling(truth, places), every.min(1).values, atol=1e-6)


def test_ceiling_crosses_the_date_line_and_the_pole():
    truth = torch.tensor([[0.0, 179.99], [89.9, 0.0]])
    places = torch.tensor([[0.0, -179.99], [89.9, -180.0], [0.0, 170.0]])
    assert evaluation.ceiling(truth, places).tolist() == pytest.approx([2.2239, 22.239], rel=1e-3)


def test_floors():
    city = torch.tensor([[48.85, 2.35]]) + 0.01 * torch.randn(50, 2, generator=seeded())
    training = torch.cat([city, earth.sample_sphere(50, seeded(3))])
    truth = torch.tensor([[48.85, 2.35], [-33.0, 151.0]])
    constant = evaluation.constant_floor(truth, training)
    assert constant[0] < 10 and constant[1] > 15_000


def test_the_random_floor_is_the_mean_over_all_pairs():
    truth, places = earth.sample_sphere(40, seeded(1)).double(), earth.sample_sphere(500, seeded(2)).double()
    expected = evaluation.summarize(earth.haversine_km(truth[:, None], places[None]).flatten())
    floor = evaluation.random_floor(truth, places)
    for name in evaluation.ACCURACY_COLUMNS:
        assert floor[name] == pytest.approx(expected[name], abs=1e-9)
    assert floor["n"] == 40
    for name in ("median_km", "mean_km", "geoscore"):
        assert floor[name] == pytest.approx(expected[name], rel=0.01)


def test_pixel_floor_is_brute_force():
    images, known = torch.rand(7, 3, 4, 4, generator=seeded(1)), torch.rand(30, 3, 4, 4, generator=seeded(2))
    truth, places = earth.sample_sphere(7, seeded(3)), earth.sample_sphere(30, seeded(4))
    best = [min(range(30), key=lambda j: float((image - known[j]).square().sum())) for image in images]
    expected = earth.haversine_km(truth, places[best])
    assert torch.allclose(evaluation.pixel_floor(images, truth, known, places), expected)


def test_leaks_are_found_to_a_metre():
    places = torch.tensor([[10.0, 20.0], [50.0, 5.0]], dtype=torch.float64)
    near, far = 0.9 / 111_195, 1.1 / 111_195
    truth = torch.tensor([[10.0 + near, 20.0], [50.0 + far, 5.0], [0.0, 0.0]], dtype=torch.float64)
    assert evaluation.leaked(truth, places).tolist() == [True, False, False]


def test_clustered_interval_is_wider_where_photographers_repeat_themselves():
    generator = np.random.default_rng(0)
    hit_rate = generator.random(40).repeat(25)  # each of 40 photographers hits at a rate of their own
    error_km = torch.from_numpy(np.where(generator.random(1000) < hit_rate, 0.5, 5000.0))
    single = evaluation.bootstrap_interval(error_km)
    clustered = evaluation.bootstrap_interval(error_km, np.arange(40).repeat(25))
    rate = 100 * (error_km <= 1).double().mean().item()
    for interval in (single, clustered):
        low, high = interval["acc_1km"]
        assert low < rate < high
    width = {name: i["acc_1km"][1] - i["acc_1km"][0] for name, i in [("one", single), ("all", clustered)]}
    assert width["all"] > 2 * width["one"]
    # the unclustered one is the binomial's: ± 1.96 standard errors
    standard_error = (rate * (100 - rate) / 1000) ** 0.5
    assert width["one"] == pytest.approx(2 * 1.96 * standard_error, rel=0.1)
