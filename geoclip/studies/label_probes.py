"""Labels of photos predicted from where they were taken: the protocol of geo-tagged NUS-WIDE."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from joblib import delayed
from sklearn.metrics import average_precision_score

from geoclip.datasets.nus_wide import NusWide
from geoclip.studies import probes


@dataclass(frozen=True)
class LabelProbeConfig(probes.HiddenLayerConfig):
    """The hidden layer of NUS-WIDE's protocol, and which photos are probed."""

    unlabelled: bool = True  # also photos without any of the concepts


def mean_average_precision(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Return mean average precision over concepts (map_macro, the usual mAP) and over all pairs (map_micro).

    labels: (n, q) of {0, 1}. scores: (n, q). Concepts without a positive image are left out; `concepts` is the
    number of the others, and `chance` what a random order would score: the share of positive labels.
    """
    seen = labels.any(0)
    if not seen.any():
        raise ValueError(f"none of the {labels.shape[1]} concepts has a positive image to score")
    labels, scores = labels[:, seen], scores[:, seen]
    macro, micro = (average_precision_score(labels, scores, average=how) for how in ("macro", "micro"))
    return {"chance": labels.mean(), "map_macro": macro, "map_micro": micro, "concepts": int(seen.sum())}


def probe_labels(
    data: NusWide,
    embedding: Callable,
    visual: np.ndarray | None = None,
    config: LabelProbeConfig = LabelProbeConfig(),
    seeds: int = 1,
) -> pd.DataFrame:
    """Probe NUS-WIDE from GPS alone and, with visual features (n, c), from those and from both side by side.

    One row for each input and seed, with mean_average_precision on the official test part.
    """
    inputs = {"GPS": probes.embed(embedding, data.latlon)}
    if visual is not None:
        if len(visual) != len(data.table):
            raise ValueError(f"{len(visual)} visual features for {len(data.table)} photos")
        probes.check_finite(visual, "the visual features")
        inputs |= {"visual": visual, "GPS + visual": np.concatenate([inputs["GPS"], visual], 1)}
    kept = config.unlabelled | data.labels.any(1)
    train, test = data.rows("train") & kept, data.rows("test") & kept

    def one(name: str, x: np.ndarray, seed: int) -> dict:
        fitted = probes.hidden_layer("labels", config, seed).fit(x[train], data.labels[train])
        row = {"input": name, "seed": seed, "d": x.shape[1], "n_train": train.sum(), "n_test": test.sum()}
        return row | mean_average_precision(data.labels[test], fitted.predict_proba(x[test]))

    with probes.expected_warnings():
        jobs = (delayed(one)(*named, seed) for named in inputs.items() for seed in range(seeds))
        return pd.DataFrame(probes.in_threads(jobs))
