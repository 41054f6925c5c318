"""What place embeddings know without images: how similarity falls with distance, and what places share."""

import itertools

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from sklearn.metrics import roc_auc_score
from torch import Tensor

from geoclip import earth
from geoclip.studies.probes import blocks

BOUNDS_KM = (0, 1, 5, 25, 200, 750, 2500, 10_000, 20_100)
QUERIES = 300  # places that are paired with all others


def similarity_by_distance(latlon: Float[Tensor, "n 2"], embeddings: Float[Tensor, "n d"]) -> pd.DataFrame:
    """Return quantiles of the cosine between places, by distance: from_km, to_km, pairs, p5, median, p95.

    The first QUERIES places are paired with all others, at distances in (from_km, to_km]. embeddings: unit norm.
    """
    distance_km = earth.haversine_km(latlon[:QUERIES, None], latlon[None])
    cosine = embeddings[:QUERIES] @ embeddings.T
    rows = []
    for low, high in itertools.pairwise(BOUNDS_KM):
        inside = cosine[(distance_km > low) & (distance_km <= high)].numpy()
        if inside.size:
            quantiles = zip(("p5", "median", "p95"), np.quantile(inside, [0.05, 0.5, 0.95]), strict=True)
            rows.append({"from_km": low, "to_km": high, "pairs": inside.size} | dict(quantiles))
    return pd.DataFrame(rows)


def ranking(
    score: Float[Tensor, " n"],
    relevant: Bool[Tensor, " n"],
    among: Bool[Tensor, " n"],
    latlon: Float[Tensor, "n 2"],
) -> dict[str, float]:
    """Return how well `score` ranks relevant places first: n, share (percent relevant), auc (0.5 is chance).

    auc is the probability that a relevant place scores higher than another one; auc_low and auc_high are its
    95 % interval by bootstrap over blocks of 10°. Only places in `among` count.
    """
    relevant, score = relevant[among].numpy(), score[among].numpy()
    if relevant.all() or not relevant.any():
        raise ValueError("a ranking needs both relevant and other places")
    block = np.unique(blocks(latlon[among]), return_inverse=True)[1]
    n, generator, resampled = block.max() + 1, np.random.default_rng(0), []
    while len(resampled) < 100:
        weight = np.bincount(generator.integers(n, size=n), minlength=n)[block]
        if weight[relevant].any() and weight[~relevant].any():  # else there is nothing to rank
            resampled.append(roc_auc_score(relevant, score, sample_weight=weight))
    low, high = np.percentile(resampled, [2.5, 97.5])
    auc = roc_auc_score(relevant, score)
    return {"n": len(relevant), "share": 100 * relevant.mean(), "auc": auc, "auc_low": low, "auc_high": high}
