"""Probes: the fast ridge against scikit-learn's, splits that keep blocks apart, planted signals, bad input."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import sph_harm_y
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

from geoclip import earth
from geoclip.datasets.geography import Task
from geoclip.location_encoder import LocationEncoder, LocationEncoderConfig
from geoclip.studies import position_encodings, probes


@pytest.fixture(scope="module")
def places() -> torch.Tensor:
    return earth.sample_sphere(1500, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def harmonics(places) -> np.ndarray:
    return probes.embed(lambda latlon: position_encodings.spherical_harmonics(latlon, degree=5), places)


@pytest.fixture(scope="module")
def quarters(places) -> np.ndarray:
    """Eight classes: octants of the sphere, with labels that are no 0 … 7."""
    lat, lon = places.numpy().T
    names = np.array(["a", "b", "c", "d", "e", "f", "g", "h"])
    return names[(lat > 0) * 4 + np.floor((lon + 180) / 90).astype(int)]


def sklearns(measure):
    alphas = (0.1, 1.0, 10.0)
    probe = RidgeClassifierCV(alphas, cv=10) if measure == "accuracy" else RidgeCV(alphas, cv=3)
    return make_pipeline(MinMaxScaler(), probe)


def test_ridge_equals_scikit_learn_for_classes(harmonics, quarters):
    x = harmonics.astype(np.float64)
    slow = sklearns("accuracy").fit(x[:1000], quarters[:1000])
    fast = probes.RidgeProbe("accuracy").fit(x[:1000], quarters[:1000])
    assert fast.alpha_ == slow[-1].alpha_
    np.testing.assert_allclose(fast._weights[:-1], slow[-1].coef_.T, rtol=1e-6, atol=1e-8)
    assert (fast.predict(x[1000:]) == slow.predict(x[1000:])).all()


@pytest.mark.filterwarnings("ignore:The least populated class")
def test_ridge_equals_scikit_learn_for_rare_and_for_two_classes(harmonics):
    x = harmonics.astype(np.float64)[:300]
    rare = np.repeat([0, 1, 2, 3], [200, 90, 7, 3])  # fewer members than folds
    slow = sklearns("accuracy").fit(x, rare)
    assert (probes.RidgeProbe("accuracy").fit(x, rare).predict(x) == slow.predict(x)).all()
    two = np.where(x[:, 1] > 0, "north", "south")
    slow = sklearns("accuracy").fit(x, two)
    assert (probes.RidgeProbe("accuracy").fit(x, two).predict(x) == slow.predict(x)).all()


@pytest.mark.parametrize("noise, alpha", [(0.0, 0.1), (300.0, 10.0)])
def test_ridge_equals_scikit_learn_for_numbers(harmonics, places, noise, alpha):
    x = harmonics.astype(np.float64)
    y = places[:, 0].double().numpy() ** 2 + noise * np.random.default_rng(0).standard_normal(len(x)) * 10
    slow = sklearns("r2").fit(x[:1000], y[:1000])
    fast = probes.RidgeProbe("r2").fit(x[:1000], y[:1000])
    assert fast.alpha_ == slow[-1].alpha_ == alpha
    np.testing.assert_allclose(fast.predict(x[1000:]), slow.predict(x[1000:]), rtol=1e-6)


def test_the_split_by_blocks_keeps_blocks_apart_and_the_random_one_does_not(places):
    config = probes.ProbeConfig(seeds=3, block_deg=30)
    for split, shared in (("blocked", False), ("random", True)):
        seen = list(probes.splits(places, split, config))
        assert len(seen) == 3
        for seed, train, test in seen:
            assert not set(train) & set(test) and len(train) + len(test) == len(places)
            assert 0.1 < len(test) / len(places) < 0.3
            block = probes.blocks(places, 30, seed)
            assert bool(set(block[train]) & set(block[test])) == shared
        again = [test for _, _, test in probes.splits(places, split, config)]
        assert all((a[2] == b).all() for a, b in zip(seen, again, strict=True))
        assert set(again[0]) != set(again[1])


def test_blocks_are_about_square_at_every_latitude():
    fine = earth.sample_sphere(200_000, torch.Generator().manual_seed(1))
    block = pd.Series(probes.blocks(fine, 10.0))
    assert 380 < block.nunique() < 460  # 41,253 square degrees in blocks of 100
    size = block.value_counts()
    assert size.quantile(0.9) < 2 * size.quantile(0.1)


def test_one_block_is_refused(places):
    near = torch.tensor([[10.0, 10.0]]) + torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="all 50 places lie in one block of 10°"):
        next(probes.splits(near, "blocked", probes.ProbeConfig(block_deg=10)))


def test_a_planted_class_is_found_and_a_shuffled_one_is_not(places, harmonics, quarters):
    config = probes.ProbeConfig(seeds=2, block_deg=20)
    found = probes.probe(harmonics, quarters, places, "accuracy", "random", config)
    assert (found.score > 80).all() and (found.reachable == 100).all()
    assert (probes.probe(harmonics, quarters, places, "accuracy", "blocked", config).score > 65).all()
    shuffled = np.random.default_rng(0).permutation(quarters)
    assert (probes.probe(harmonics, shuffled, places, "accuracy", "random", config).score < 25).all()


def test_any_callable_of_latlon_is_probed(places):
    x = probes.embed(lambda latlon: latlon.sin() + latlon[:, :1], places)
    assert x.shape == (1500, 2) and x.dtype == np.float32
    north = places[:, 0].numpy()
    rows = probes.probe(
        probes.embed(earth.unit_sphere, places),
        np.sin(np.deg2rad(north)),
        places,
        "r2",
        config=probes.ProbeConfig(seeds=2),
    )
    assert (rows.score > 0.999).all() and list(rows.seed) == [0, 1]


def test_hidden_layer_probe_learns_what_a_line_cannot(places):
    x = probes.embed(earth.unit_sphere, places)
    inside = (np.abs(x[:, 0] * x[:, 1]) > 0.2).astype(int)
    config = probes.ProbeConfig(seeds=1)
    layer = probes.HiddenLayerConfig(hidden=64, learning_rate=1e-2, epochs=30)
    curved = probes.probe(
        x,
        inside,
        places,
        "accuracy",
        config=config,
        model=lambda seed: probes.hidden_layer("accuracy", layer, seed),
    )
    line = probes.probe(x, inside, places, "accuracy", config=config)
    assert curved.score[0] > 90 > line.score[0] + 15


def test_interval_is_wider_than_the_naive_one_and_holds_the_mean():
    rows = pd.DataFrame(
        {"task": "t", "score": [70.0, 72, 71, 69, 73], "n_train": 800, "n_test": 200, "reachable": 100.0}
    )
    (row,) = probes.summarize(rows, ["task"]).itertuples()
    assert row.score == 71 and row.seeds == 5
    naive = 2.7764 * np.std(rows.score, ddof=1) / np.sqrt(5)
    assert np.isclose(row.high - row.score, naive * np.sqrt(1 + 5 * 0.25), rtol=1e-4)
    assert np.isnan(probes.summarize(rows[:1], ["task"]).low[0])


@pytest.mark.filterwarnings("error")
def test_more_training_places_help_and_the_last_size_is_the_probe(places, harmonics, quarters):
    config = probes.ProbeConfig(seeds=2)
    curve = probes.probe(harmonics, quarters, places, "accuracy", config=config, sizes=[30, 200, 1200])
    mean = curve.groupby("n_train").score.mean()
    assert mean[30] + 10 < mean[200] < mean[1200]
    whole = probes.probe(harmonics, quarters, places, "accuracy", config=config)
    assert (
        np.abs(curve[curve.n_train == 1200].score.to_numpy() - whole.score).max() < 0.7
    )  # other inner folds
    with pytest.raises(ValueError, match="1201 training places were asked for; split 0 has 1200"):
        probes.probe(harmonics, quarters, places, "accuracy", config=config, sizes=[1201])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The least populated class")
def test_held_out_prediction_sees_no_place_of_the_block():
    """Places and answers coincide, so a model that saw a place's block would give its class back exactly."""
    at = earth.sample_sphere(800, torch.Generator().manual_seed(2))
    block = probes.blocks(at)
    x = (block[:, None] == np.unique(block)).astype(np.float32)  # the embedding names the block, nothing else
    label = np.unique(block, return_inverse=True)[1]
    honest = probes.held_out_prediction(x, label, at, x, at, "accuracy")
    assert not (honest == label).any()
    assert (probes.RidgeProbe("accuracy").fit(x, label).predict(x) == label).all()


def test_bad_input_names_row_and_value(places, harmonics, quarters):
    broken = harmonics.copy()
    broken[17, 3] = np.nan
    with pytest.raises(ValueError, match=r"embedding, row 17, column 3: nan .* 1 of 1500 rows"):
        probes.probe(broken, quarters, places, "accuracy")
    with pytest.raises(ValueError, match="1499 embeddings but 1500 target values"):
        probes.probe(harmonics[:-1], quarters, places, "accuracy")
    with pytest.raises(ValueError, match="1499 places but 1500"):
        probes.probe(harmonics, quarters, places[:-1], "accuracy")
    lonely = quarters.copy()
    lonely[5] = "z"
    with pytest.raises(ValueError, match=r"class z has one member \(row 5\)"):
        probes.probe(harmonics, lonely, places, "accuracy")
    numbers = places[:, 0].double().numpy().copy()
    numbers[9] = np.inf
    with pytest.raises(ValueError, match="target, row 9, column 0: inf"):
        probes.probe(harmonics, numbers, places, "r2")
    with pytest.raises(ValueError, match=r"row 0: \(120, 10\).*swapped"):
        probes.embed(earth.unit_sphere, torch.tensor([[120.0, 10.0]]))
    with pytest.raises(ValueError, match=r"embedding of 1500 places has the shape \(1500,\)"):
        probes.embed(lambda latlon: latlon[:, 0], places)
    with pytest.raises(ValueError, match="embedding, row 0, column 0: nan"):
        probes.embed(lambda latlon: latlon * np.nan, places)
    with pytest.raises(KeyError, match="spatial"):
        probes.probe(harmonics, quarters, places, "accuracy", "spatial")


def test_spherical_harmonics_are_scipys_and_orthonormal():
    at = earth.sample_sphere(100_000, torch.Generator().manual_seed(3))
    y = position_encodings.spherical_harmonics(at, degree=4).double()
    assert y.shape == (100_000, 25)
    gram = y.T @ y / len(y) * 4 * np.pi
    assert (gram - torch.eye(25)).abs().max() < 0.03
    lat, lon = np.deg2rad(at[:5].double().numpy()).T
    one = np.sqrt(2) * sph_harm_y(3, 2, np.pi / 2 - lat, lon).real  # degree 3 starts at 9: 0, then cos 1 2 3
    np.testing.assert_allclose(y[:5, 9 + 2], one, atol=1e-5)


def test_sinusoids_have_the_stated_scales():
    x = position_encodings.sphere_c_plus(torch.tensor([[30.0, 60.0]]), scales=3)
    assert x.shape == (1, 21)
    sine = x.reshape(7, 3)[3]  # sin(lat / r) at r = 1, …, 0.5° in radians
    assert np.isclose(sine[0], 0.5, atol=1e-6) and np.isclose(sine[2], np.sin(60.0), atol=1e-4)


def test_levels_concatenation_and_norm(places):
    config = LocationEncoderConfig(frequencies=8, width=16, dim=4)
    encoder = LocationEncoder(config, torch.Generator().manual_seed(0))
    whole = probes.embed(encoder, places)
    parts = [probes.embed(position_encodings.level(encoder, i), places) for i in range(3)]
    np.testing.assert_allclose(sum(parts), whole, atol=1e-5)
    np.testing.assert_allclose(
        probes.embed(position_encodings.concatenated(encoder), places), np.concatenate(parts, 1), atol=1e-6
    )
    np.testing.assert_allclose(
        probes.embed(position_encodings.weighted_sum(encoder, [1, 0, -2]), places),
        parts[0] - 2 * parts[2],
        atol=1e-5,
    )
    one = probes.embed(position_encodings.weighted_sum(encoder, [0, 1, 0], unit_norm=True), places)
    np.testing.assert_allclose(one, parts[1] / np.linalg.norm(parts[1], axis=1, keepdims=True), atol=1e-5)
    length = np.linalg.norm(probes.embed(position_encodings.unit_norm(encoder), places), axis=1)
    np.testing.assert_allclose(length, 1, atol=1e-5)


def test_a_remembered_encoder_encodes_places_once(places):
    config = LocationEncoderConfig(frequencies=8, width=16, dim=4)
    encoder = LocationEncoder(config, torch.Generator().manual_seed(0))
    calls, by_level = [], encoder.by_level
    encoder.by_level = lambda latlon: calls.append(len(latlon)) or by_level(latlon)
    kept = position_encodings.Remembered(encoder)
    for embedding in (kept, position_encodings.level(kept, 1), position_encodings.concatenated(kept)):
        probes.embed(embedding, places)
    assert calls == [1500]
    probes.embed(kept, places.flip(0))
    assert calls == [1500, 1500]
    np.testing.assert_allclose(probes.embed(kept, places), probes.embed(encoder, places), atol=1e-5)


@pytest.mark.slow
def test_compare_embeds_shared_places_once_and_answers_as_probe_does(places, quarters):
    at = places.double().numpy()

    def task(name, rows, target, measure, where):
        return Task(name, at[rows], target, measure, where, "made", "made", block_deg=20.0)

    tasks = {
        "octant": task("octant", slice(0, 1200), quarters[:1200], "accuracy", "sphere"),
        "height": task("height", slice(300, 1500), np.sin(np.deg2rad(at[300:, 0])), "r2", "sphere"),
    }
    calls = []

    def counted(latlon):
        calls.append(len(latlon))
        return earth.unit_sphere(latlon)

    config = probes.ProbeConfig(seeds=2)
    rows = probes.compare(
        tasks, {"xyz": counted, "raw": position_encodings.CONTROLS["raw (lat, lon)"]}, config=config
    )
    assert calls == [1500] and len(rows) == 2 * 2 * 2 * 2
    assert list(rows.columns[:7]) == ["task", "embedding", "d", "split", "probe", "measure", "seed"]
    one = rows[(rows.task == "octant") & (rows.embedding == "xyz") & (rows.split == "blocked")]
    alone = probes.probe(
        probes.embed(earth.unit_sphere, at[:1200]),
        quarters[:1200],
        at[:1200],
        "accuracy",
        "blocked",
        probes.ProbeConfig(seeds=2, block_deg=20),
    )
    np.testing.assert_allclose(one.score, alone.score)
    table = probes.summarize(rows, ["task", "embedding", "split"])
    assert len(table) == 8 and (table.low < table.score).all()
    better = probes.difference(rows, "xyz", "raw", ["task", "split", "measure"])
    height = better[(better.task == "height") & (better.split == "random")].iloc[0]
    mean = rows[(rows.task == "height") & (rows.split == "random")].groupby("embedding").score.mean()
    assert np.isclose(height.score, mean["xyz"] - mean["raw"]) and height.score > 0
    text = probes.readable(
        probes.summarize(rows, ["task", "embedding", "split", "measure"]), ["embedding"], ["task", "split"]
    )
    assert list(text.embedding) == ["xyz", "raw"] and list(text.columns[1:3]) == [
        "octant · random",
        "octant · blocked",
    ]
    score = rows[(rows.task == "octant") & (rows.split == "random") & (rows.embedding == "raw")].score.mean()
    assert text["octant · random"][1].startswith(f"{score:.1f} (")


def test_compare_can_probe_with_a_hidden_layer(places, quarters):
    task = Task("octant", places.double().numpy(), quarters, "accuracy", "sphere", "made", "made", 20.0)
    layer = probes.HiddenLayerConfig(hidden=32, epochs=20)
    config = probes.ProbeConfig(seeds=1)
    hidden, ridge = (
        probes.compare({"octant": task}, {"xyz": earth.unit_sphere}, config, hidden)
        for hidden in (layer, None)
    )
    assert hidden.probe[0] == "hidden layer" and ridge.probe[0] == "ridge" and np.isnan(hidden.alpha[0])
    assert hidden.score[0] > ridge.score[0] + 1
