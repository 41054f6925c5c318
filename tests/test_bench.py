"""The benchmark script: limits follow from the work, and its features are a folder that training reads."""

import importlib.util

import numpy as np
import pytest
import torch

from geoclip import paths
from geoclip.config import LocationEncoderConfig
from geoclip.datasets.features import FeatureData

spec = importlib.util.spec_from_file_location("bench", paths.ROOT / "bench.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


@pytest.mark.slow
def test_limits_are_those_of_the_work():
    measured = bench.Bench("cpu", quick=True)
    bench.limits(measured)
    bench.embedding(measured)
    bench.search(measured)
    bench.decision(measured)
    table = measured.table().set_index("task")
    one_place = 2 * 3 * (512 * 1024 + 2 * 1024**2 + 1024 * 512)  # three levels, multiply and add
    assert bench.place_flop(LocationEncoderConfig()) == one_place
    encoded = table.loc["encode a gallery"]
    assert encoded["rate"] == pytest.approx(1000 / encoded["median_s"])
    assert table.loc["embed_places", "limit_s"] > 0 and table.loc["embed_places", "size"] == 2000
    assert 0 < table.loc["embed_places, peak memory beside the result", "rate"] < 1000
    searched = table.loc["search, 1 query"]
    assert searched["limit_s"] >= searched["size"] * 512 * 4 / measured.bandwidth * 0.999
    assert {"decision, 1 query", "decision, 16 queries"} <= set(table.index)
    assert np.isclose(searched["share_of_limit"], searched["limit_s"] / searched["median_s"])


def test_operations_of_a_layer_are_counted():
    layer = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    assert bench.flop_of(layer, torch.zeros(2, 3, 2, 2)) == 2 * 2 * 12 * 5


def test_random_features_can_be_trained_on(tmp_path):
    data = FeatureData(bench.random_features(tmp_path / "features", 100))
    assert (len(data), data.views, data.dim) == (100, 1, 768)
