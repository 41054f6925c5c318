"""Many tasks at once: the answers of scikit-learn task by task, ranks by hand, and facts of known places."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from geoclip import earth
from geoclip.datasets import geography, place_facts
from geoclip.datasets.geography import Task
from geoclip.studies import many_tasks, position_encodings, probes

CONFIG = probes.ProbeConfig(seeds=2)
AT = earth.sample_sphere(400, torch.Generator().manual_seed(0)).double().numpy()
OCTANT = np.array(list("abcdefgh"))[(AT[:, 0] > 0) * 4 + np.floor((AT[:, 1] + 180) / 90).astype(int)]
HEIGHT = 50 + 10 * np.sin(np.deg2rad(AT[:, 0])) + np.random.default_rng(0).standard_normal(400)
SMALLER = 300  # a task of other places


def task(name, target, measure, rows=slice(None)):
    return Task(name, AT[rows], target[rows], measure, "made", "made", "made", block_deg=20.0)


def harmonics(latlon):
    return position_encodings.spherical_harmonics(latlon, degree=6)


@pytest.fixture(scope="module")
def rows():
    tasks = {
        "octant": task("octant", OCTANT, "accuracy"),
        "height": task("height", HEIGHT, "r2"),
        "part": task("part", HEIGHT, "r2", slice(0, SMALLER)),
    }
    noise = torch.Generator().manual_seed(1)
    embeddings = {
        "harmonics": harmonics,
        "noise": lambda latlon: torch.randn(len(latlon), 5, generator=noise),
    }
    return many_tasks.compare(tasks, embeddings, CONFIG, neighbours=3)


def test_both_predictors_answer_as_scikit_learn_does_task_by_task(rows):
    assert (
        len(rows) == 3 * 2 * 2 * 2 * 2
        and not rows.duplicated(["task", "embedding", "split", "probe", "seed"]).any()
    )
    found = rows[rows.embedding == "harmonics"].set_index(["task", "probe", "split", "seed"])
    x = probes.embed(harmonics, AT)
    for split in ("random", "blocked"):
        for seed, train, test in probes.splits(AT, split, probes.ProbeConfig(2, 20.0)):
            near = KNeighborsRegressor(3).fit(x[train], HEIGHT[train])
            at = ("height", "neighbours", split, seed)
            assert found.score[at] == pytest.approx(near.score(x[test], HEIGHT[test]), abs=1e-3)
            vote = KNeighborsClassifier(3).fit(x[train], OCTANT[train])
            at = ("octant", "neighbours", split, seed)
            assert found.score[at] == pytest.approx(100 * vote.score(x[test], OCTANT[test]), abs=1e-9)
            ridge = make_pipeline(StandardScaler(), RidgeCV(many_tasks.ALPHAS)).fit(x[train], HEIGHT[train])
            at = ("height", "ridge", split, seed)
            assert found.score[at] == pytest.approx(ridge.score(x[test], HEIGHT[test]), abs=1e-3)
            assert (found.n_train[at], found.n_test[at]) == (len(train), len(test))


def test_an_embedding_without_information_scores_and_ranks_last(rows):
    noise = rows[rows.embedding == "noise"]
    assert (noise[noise.measure == "r2"].score < 0.1).all()
    assert (noise[noise.measure == "accuracy"].score < 35).all()
    ranks = many_tasks.mean_ranks(rows).set_index(["embedding", "split", "probe"])
    assert (ranks.score["harmonics"] == 1).all() and (ranks.score["noise"] == 2).all()
    assert len(ranks) == 8 and (ranks.seeds == 2).all()


def test_a_task_without_blocks_of_its_own_takes_those_of_the_study():
    config = probes.ProbeConfig(1, 45.0)
    tasks = {"octant": replace(task("octant", OCTANT, "accuracy"), block_deg=None)}
    rows = many_tasks.compare(tasks, {"harmonics": harmonics}, config, 3)
    ((_, train, _),) = probes.splits(AT, "blocked", config)
    assert rows.n_train[rows.split == "blocked"].eq(len(train)).all()


def test_mean_ranks_by_hand():
    scores = {"x": [(9, 8), (9, 8)], "y": [(0.1, 0.2), (0.3, 0.2)], "z": [(5, 1), (5, 1)]}  # (a, b) by seed
    table = pd.DataFrame(
        [
            {"task": name, "seed": seed, "embedding": embedding, "score": score}
            for name, seeds in scores.items()
            for seed, both in enumerate(seeds)
            for embedding, score in zip("ab", both, strict=True)
        ]
    ).assign(split="random", probe="ridge", d=2, reachable=100.0, n_train=8, n_test=2)
    ranks = many_tasks.mean_ranks(table).set_index("embedding")
    assert ranks.score["a"] == pytest.approx((4 / 3 + 1) / 2) and ranks.score["b"] == pytest.approx(
        (5 / 3 + 2) / 2
    )
    assert ranks.low["a"] < ranks.score["a"] < ranks.high["a"]


def test_what_cannot_be_scored_is_named():
    lonely = OCTANT.copy()
    lonely[5] = "z"
    with pytest.raises(ValueError, match=r"class z has one member \(row 5\)"):
        many_tasks.compare({"t": task("t", lonely, "accuracy")}, {"h": harmonics}, CONFIG, 3)


def test_distances_to_the_coast_are_great_circles_and_leave_out_the_edges_of_the_map():
    coast = place_facts._coast()
    assert np.abs(coast[:, 1]).max() < 180 and coast[:, 0].min() > -90
    inland = np.array(
        [[46.28, 86.67], [-90.0, 0.0], [48.39, -4.49]]
    )  # the middle of Asia; ice shelves are no land; Brest
    km = np.expm1(place_facts._log_km(torch.from_numpy(inland), torch.from_numpy(coast)))
    assert 2300 < km[0] < 2750 and 400 < km[1] < 700 and km[2] < 15
    slow = earth.haversine_km(torch.from_numpy(inland)[:, None], torch.from_numpy(coast)[None]).amin(1)
    np.testing.assert_allclose(km, slow.numpy(), rtol=1e-6)


@pytest.mark.slow
def test_facts_of_known_places_and_tasks_of_the_same_places(monkeypatch):
    # Reading the mask of land and sea takes seconds; test_geography does.
    monkeypatch.setattr(geography, "surface", lambda latlon: np.where(latlon[:, 0] > 0, "land", "sea"))
    known = np.array(
        [[48.86, 2.35], [-3.1, -60.0], [23.0, 10.0], [28.6, 77.2]]
    )  # Paris, Manaus, Sahara, Delhi
    found = place_facts.facts(known)
    assert list(found) == list(place_facts.SOURCES)
    assert found["time zone"].tolist() == ["Europe/Paris", "America/Manaus", "Africa/Algiers", "Asia/Kolkata"]
    assert found["currency"].tolist() == ["EUR", "BRL", "DZD", "INR"]
    assert found["language"].tolist() == ["fr", "pt", "ar", "en"]
    assert found["brightness"].idxmax() == 2 and found["greenness"].idxmin() == 2
    assert found["remoteness"].idxmax() == 2 and (found["haze"].between(2, 5)).all()
    assert found["coast"].idxmin() == 0
    tasks, _ = place_facts.tasks(600, seed=1)
    assert len(tasks) >= 12 and {"land or sea", "population"} <= set(tasks)
    for name in place_facts.SOURCES:
        assert (tasks[name].latlon == tasks["country"].latlon).all()
        if tasks[name].measure == "accuracy":
            assert np.unique(tasks[name].target, return_counts=True)[1].min() >= 5
        else:
            assert np.isfinite(tasks[name].target).all() and tasks[name].target.std() > 0
