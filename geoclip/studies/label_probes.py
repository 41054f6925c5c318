"""Labels of photos predicted from where they were taken: the protocol of geo-tagged NUS-WIDE.

One hidden layer of 512 units predicts all concepts at once, from the embedding of the place, visual features,
or both.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

from geoclip import paths
from geoclip.datasets import nus_wide
from geoclip.datasets.nus_wide import NusWide
from geoclip.studies import probes

PROTOCOL = probes.HiddenLayerConfig()


def mean_average_precision(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Return mean average precision over concepts (map_macro, the usual mAP) and over all pairs (map_micro).

    labels: (n, q) of {0, 1}. scores: (n, q). Concepts without a positive image have no average precision and
    are left out; `concepts` is the number of the others.
    """
    seen = labels.any(0)
    if not seen.any():
        raise ValueError(f"none of the {labels.shape[1]} concepts has a positive image to score")
    found = {
        f"map_{how}": average_precision_score(labels[:, seen], scores[:, seen], average=how)
        for how in ("macro", "micro")
    }
    return {name: float(value) for name, value in found.items()} | {"concepts": int(seen.sum())}


def probe_labels(
    data: NusWide,
    embedding: Callable,
    visual: np.ndarray | None = None,
    config: probes.HiddenLayerConfig = PROTOCOL,
    seed: int = 0,
) -> pd.DataFrame:
    """Probe NUS-WIDE from GPS alone and, with visual features (n, c), from those and from both side by side.

    One row for each input: input, d, n_train, n_test, and mean_average_precision on the official test part.
    Choices that the paper leaves open: embeddings are not normalised but standardised by column, photos
    without any concept are kept, and the labels are independent (sigmoid, cross-entropy).
    """
    inputs = {"GPS": probes.embed(embedding, data.latlon)}
    if visual is not None:
        if len(visual) != len(data.table):
            raise ValueError(f"{len(visual)} visual features for {len(data.table)} photos")
        probes.check_finite(visual, "the visual features")
        inputs |= {"visual": visual, "GPS + visual": np.concatenate([inputs["GPS"], visual], 1)}
    train, test = data.rows("train"), data.rows("test")
    rows = []
    for name, x in inputs.items():
        with probes.expected_warnings():
            fitted = probes.hidden_layer("labels", config, seed).fit(x[train], data.labels[train])
            scores = fitted.predict_proba(x[test])
        row = {"input": name, "d": x.shape[1], "n_train": int(train.sum()), "n_test": int(test.sum())}
        rows.append(row | mean_average_precision(data.labels[test], scores))
    return pd.DataFrame(rows)


def nus_wide_table(
    embedding: Callable, config: probes.HiddenLayerConfig = PROTOCOL, seed: int = 0
) -> pd.DataFrame:
    """Return the published mAP on geo-tagged NUS-WIDE with ours beside it, as far as the data are present.

    Columns: input, published_map, map_macro, map_micro, n_train, n_test, status. Without the data ours are
    NaN, and the status says what is missing. Visual features are read from the folder `features` inside that
    of NUS-WIDE.
    """
    ours_columns = ["map_macro", "map_micro", "n_train", "n_test"]
    table = pd.read_csv(paths.PAPER / "nus_wide.csv").rename(columns={"map": "published_map"})
    table = table.set_index("input")[["published_map"]]
    try:
        root = nus_wide.find()
    except FileNotFoundError as error:
        return table.assign(**dict.fromkeys(ours_columns, np.nan), status=str(error)).reset_index()
    data = nus_wide.read(root)
    features = root / "features"
    visual = nus_wide.visual_features(data, features) if features.is_dir() else None
    table = table.join(probe_labels(data, embedding, visual, config, seed).set_index("input")[ours_columns])
    missing = f"needs visual features: `python -m geoclip embed` to {features}"
    notes = "; ".join(data.notes) or "the published subset"
    return table.assign(status=np.where(table["map_macro"].isna(), missing, notes)).reset_index()
