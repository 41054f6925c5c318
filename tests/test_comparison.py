"""The comparison of models: answers kept once, tables tidy, winners counted block by block."""

import numpy as np
import pandas as pd
import torch

from geoclip import baselines, earth
from geoclip.baselines import geocells
from geoclip.studies import comparison
from geoclip.training import runs
from geoclip.training.data import training_places

SMALL = {
    "image": {"tower": "conv", "weights": None, "frozen": False, "hidden": 32, "dim": 16},
    "splits": {"train": 300, "val": 20, "test": 60, "gallery": 500},
    "batch_size": 64,
    "epochs": 1,
}
CELLS = SMALL | {"model": "geocells", "img_min": 3, "img_max": [60, 30, 15]}
GEOCLIP = SMALL | {"location": {"frequencies": 8, "width": 16, "dim": 16}, "queue": 64}


def test_a_row_for_each_answer_split_and_seed_and_nothing_is_trained_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("geoclip.paths.CACHE", tmp_path)
    table, errors = comparison.compare({"cells": CELLS}, [0, 1], jobs=1)
    answers = [f"cells, {way}" for way in (*geocells.LEVELS, "hierarchical")]
    assert table["model"].unique().tolist() == answers and len(table) == len(answers) * 2 * 2
    assert not table.duplicated(["model", "split", "seed"]).any() and (table["n"] == 60).all()
    # what is told as hierarchical is what the trained model itself answers
    run = runs.train(baselines.as_config(CELLS | {"seed": 1}), kind=geocells.GeocellsTraining)
    assert np.allclose(errors["cells, hierarchical", "blocked", 1], runs.tile_errors(run.load(), "blocked"))
    assert not np.allclose(errors["cells, fine", "random", 0], errors["cells, fine", "random", 1])
    one, _ = comparison.compare({"GeoCLIP": GEOCLIP}, [0], jobs=1)
    assert one["model"].tolist() == ["GeoCLIP"] * 2 and one["split"].tolist() == ["random", "blocked"]
    monkeypatch.setattr(runs, "fit", None)  # a second training would call it
    again, _ = comparison.compare({"cells": CELLS, "GeoCLIP": GEOCLIP}, [0], jobs=1)
    both = [table[table["seed"] == 0], one]
    assert again.equals(pd.concat(both, ignore_index=True))


def test_ceilings_are_those_of_the_nearest_mean():
    config = baselines.as_config(CELLS)
    table = comparison.ceilings(config)
    cells = geocells.partitions(config, training_places(config))["fine"]
    truth = comparison.blue_marble.splits(config.splits)["random"].double()
    nearest = earth.haversine_km(truth[:, None], torch.from_numpy(cells.latlon)[None]).amin(1)
    row = table[
        (table["model"] == f"ceiling of {len(cells):,} fine cells") & (table["split"] == "random")
    ].iloc[0]
    assert np.isclose(row["acc_200km"], 100 * (nearest <= 200).double().mean())
    assert len(table) == 6


def test_the_best_model_of_a_block_has_the_lowest_median_over_tests_and_seeds():
    latlon = torch.tensor([[5.0, 5.0], [6, 6], [7, 7], [-5, -175], [-6, -176]])
    errors = {
        "a": np.array([[1.0, 100, 2, 9, 9], [1, 100, 2, 9, 9]]),
        "b": np.array([[3.0, 3, 3, 1, 1], [50, 50, 50, 1, 1]]),
    }
    pixels = np.array([[0.1, 9.9], [-0.1, -170.1], [-9.9, -179.9], [50.0, 50.0]])
    assert comparison.best_on_map(errors, latlon, pixels, fewest=2).tolist() == [0, 1, 1, -1]
    assert comparison.best_on_map(errors, latlon, pixels, fewest=3).tolist() == [0, -1, -1, -1]
