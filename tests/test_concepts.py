"""Similarity by distance against a plain loop, and rankings with a known result."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from geoclip import earth
from geoclip.studies import concepts
from geoclip.studies.concepts import ranking, similarity_by_distance


def test_similarity_by_distance_is_what_a_plain_loop_gives(monkeypatch):
    monkeypatch.setattr(concepts, "QUERIES", 7)
    monkeypatch.setattr(concepts, "BOUNDS_KM", (0, 3000, 20_100))
    generator = torch.Generator().manual_seed(0)
    latlon = torch.cat([earth.sample_sphere(40, generator), torch.zeros(2, 2)])  # two places are one
    embeddings = functional.normalize(torch.randn(42, 5, generator=generator), dim=1)
    table = similarity_by_distance(latlon, embeddings)
    for row in table.itertuples():
        cosines = []
        for i in range(7):
            for j in range(42):
                distance = earth.haversine_km(latlon[i], latlon[j]).item()
                if row.from_km < distance <= row.to_km:
                    cosines.append(float(embeddings[i] @ embeddings[j]))
        assert row.pairs == len(cosines)
        quantiles = np.quantile(cosines, [0.05, 0.5, 0.95])
        assert (row.p5, row.median, row.p95) == pytest.approx(tuple(quantiles), abs=1e-6)
    assert table["pairs"].sum() == 7 * 41  # all but each with itself


def test_a_class_of_distances_without_pairs_is_left_out():
    latlon = torch.tensor([[0.0, 0.0], [0.0, 90.0]])
    table = similarity_by_distance(latlon, torch.eye(2))
    assert table["from_km"].tolist() == [10_000] and table["median"].tolist() == [0.0]


def test_ranking():
    score = torch.tensor([4.0, 3.0, 2.0, 1.0, 99.0])
    relevant = torch.tensor([True, False, True, False, False])
    among = torch.tensor([True, True, True, True, False])
    latlon = torch.tensor([[0.0, 20.0 * i] for i in range(5)])
    found = ranking(score, relevant, among, latlon)
    # of the four pairs (relevant, other) three are in the right order; the last place does not count
    assert (found["n"], found["share"], found["auc"]) == (4, 50.0, 0.75)
    with pytest.raises(ValueError, match="both"):
        ranking(score, torch.zeros(5, dtype=torch.bool), among, latlon)


def test_the_interval_of_a_ranking_grows_if_places_of_a_block_stand_together():
    generator = torch.Generator().manual_seed(0)
    spread = earth.sample_sphere(400, generator)
    clustered = spread[:20].repeat_interleave(20, 0)
    relevant, among = torch.arange(400) % 40 < 20, torch.ones(400, dtype=torch.bool)
    score = relevant.float() + 2 * torch.randn(20, generator=generator).repeat_interleave(20)
    width = {}
    for name, latlon in {"spread": spread, "clustered": clustered}.items():
        found = ranking(score, relevant, among, latlon)
        assert found["auc_low"] <= found["auc"] <= found["auc_high"]
        width[name] = found["auc_high"] - found["auc_low"]
    assert width["clustered"] > 2 * width["spread"]
