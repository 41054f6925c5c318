"""Evaluation: accuracy at five distances, geoscore, ceilings, floors, intervals and leakage.

An error is a great-circle distance in km (earth.haversine_km), one per image. It is NaN or inf for a miss: an
image that could not be read or answered stays in the denominator.
"""

import functools

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.spatial import KDTree
from torch import Tensor

from geoclip import earth
from geoclip.kernels import GEOSCORE_SCALE_KM

# Street, city, region, country, continent (paper, section 4.1).
THRESHOLDS_KM = (1, 25, 200, 750, 2500)
ACCURACY_COLUMNS = [f"acc_{km}km" for km in THRESHOLDS_KM]
FLOOR_DRAWS = 300_000  # pairs of image and place for the random floor's median, mean and geoscore


def summarize(error_km: Float[Tensor, " n"]) -> dict[str, float]:
    """Percent within each threshold (≤), median and mean km of the answered images, mean geoscore, and n.

    A miss is beyond every threshold, has a geoscore of 0, and does not enter the median and mean.
    """
    error_km = torch.as_tensor(error_km).double()
    if error_km.numel() == 0:
        raise ValueError("there are no errors to summarise: the set is empty")
    answered = error_km[error_km.isfinite()]
    geoscore = 5000 * torch.exp(-answered / GEOSCORE_SCALE_KM)
    row = {name: 100 * float((error_km <= km).double().mean()) for name, km in named_thresholds()}
    # numpy's median averages the two middle errors; torch's takes the lower
    row["median_km"] = float(np.median(answered)) if len(answered) else float("nan")
    row["mean_km"] = float(answered.mean()) if len(answered) else float("nan")
    return row | {"geoscore": float(geoscore.sum() / len(error_km)), "n": len(error_km)}


def named_thresholds():
    """(column name, km) for each threshold."""
    return zip(ACCURACY_COLUMNS, THRESHOLDS_KM, strict=True)


def ceiling(truth: Float[Tensor, "n 2"], places: Float[Tensor, "m 2"]) -> Float[Tensor, " n"]:
    """Error in km of the nearest place of the gallery, which a perfect matcher would reach."""
    return earth.haversine_km(truth, places[nearest(truth, places)])


def nearest(truth: Float[Tensor, "n 2"], places: Float[Tensor, "m 2"]) -> Tensor:
    """Index of the place nearest to each of `truth`, on the sphere."""
    return torch.from_numpy(_tree(places).query(earth.unit_sphere(truth.double()))[1])


def _tree(places: Float[Tensor, "m 2"]) -> KDTree:
    """The places on the unit sphere, where the nearest by chord is the nearest by great circle."""
    return KDTree(earth.unit_sphere(places.double()))


def _chord(km):
    """Length of the chord of the unit sphere below a great-circle distance."""
    return 2 * np.sin(np.asarray(km) / earth.EARTH_RADIUS_KM / 2)


def random_floor(truth: Float[Tensor, "n 2"], places: Float[Tensor, "m 2"], seed: int = 0) -> dict:
    """Expected `summarize` of answering each image with a random place of the gallery.

    The accuracies are exact: they count all n × m pairs. The others are those of 300,000 random pairs.
    """
    repeated = truth.repeat(max(1, FLOOR_DRAWS // len(truth)), 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = places[torch.randint(len(places), (len(repeated),), generator=generator)]
    row = summarize(earth.haversine_km(repeated, drawn))
    pairs = _tree(truth).count_neighbors(_tree(places), _chord(THRESHOLDS_KM))
    exact = 100 * pairs / (len(truth) * len(places))
    return row | dict(zip(ACCURACY_COLUMNS, exact.tolist(), strict=True)) | {"n": len(truth)}


def constant_floor(truth: Float[Tensor, "n 2"], candidates: Float[Tensor, "m 2"]) -> Float[Tensor, " n"]:
    """Error in km of the best constant answer: the candidate with the most other candidates within 25 km.

    The constant is chosen by the candidates, which are training places, and never by the truth.
    """
    most = _most_crowded(candidates.double().numpy().tobytes())
    return earth.haversine_km(truth, candidates[most].expand_as(truth))


@functools.lru_cache(maxsize=1)  # by value: one gallery is asked about for each benchmark and split
def _most_crowded(places: bytes) -> int:
    tree = _tree(torch.from_numpy(np.frombuffer(places).reshape(-1, 2).copy()))
    return int(np.argmax(tree.query_ball_point(tree.data, _chord(25), return_length=True)))


def pixel_floor(
    images: Float[Tensor, "n 3 h w"],
    truth: Float[Tensor, "n 2"],
    known_images: Float[Tensor, "m 3 h w"],
    known: Float[Tensor, "m 2"],
) -> Float[Tensor, " n"]:
    """Error in km of the training image that is nearest in pixels, a baseline without learning."""
    from sklearn.metrics import pairwise_distances_argmin  # takes a second to import

    index = pairwise_distances_argmin(images.flatten(1), known_images.flatten(1))
    return earth.haversine_km(truth, known[torch.from_numpy(index)])


def leaked(truth: Float[Tensor, "n 2"], places: Float[Tensor, "m 2"]) -> Bool[Tensor, " n"]:
    """Whether the gallery holds the place itself, to 1 m: a leak from training into test."""
    return ceiling(truth.double(), places.double()) * 1000 <= 1


def bootstrap(
    error_km: Float[Tensor, " n"],
    clusters=None,
    draws: int = 1000,
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """Accuracies (draws, 5) of images resampled with replacement.

    clusters: a label per image, such as its photographer; images with one label are drawn together.
    """
    generator = generator or np.random.default_rng(0)
    error_km = np.asarray(error_km, float)
    hits = np.stack([error_km <= km for km in THRESHOLDS_KM], 1).astype(float)
    labels = np.arange(len(hits))
    if clusters is not None:
        labels = np.unique(np.asarray(clusters), return_inverse=True)[1]
    groups = labels.max() + 1
    total = np.stack([np.bincount(labels, hits[:, i], groups) for i in range(hits.shape[1])], 1)
    size = np.bincount(labels, minlength=groups)
    weights = generator.multinomial(groups, np.full(groups, 1 / groups), draws)
    return 100 * (weights @ total) / (weights @ size)[:, None]


def bootstrap_interval(error_km: Float[Tensor, " n"], clusters=None, generator=None) -> dict[str, tuple]:
    """95 % percentile interval of each accuracy; arguments as in `bootstrap`."""
    low, high = np.percentile(bootstrap(error_km, clusters, 1000, generator), [2.5, 97.5], axis=0)
    return {name: (low[i], high[i]) for i, name in enumerate(ACCURACY_COLUMNS)}


def benchmark(
    truth: Float[Tensor, "n 2"],
    places: Float[Tensor, "m 2"],
    predicted: Float[Tensor, "p 2"] | None = None,
    authors=None,
    about: dict[str, object] | None = None,
    from_places: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """The result of one benchmark: a tidy table, a row per `measure`, with the columns of `summarize` and counts.

    truth, predicted: (lat, lon) degrees; NaN in `predicted` is a miss; without `predicted`, only what follows
    from coordinates. places: the gallery, in double precision so that leaks can be found to 1 m. authors: a
    photographer per image, or None. about: columns to put first (data, model, split, …). from_places: whether
    the answers are places of the gallery, so that it sets a ceiling.

    Measures: "accuracy"; "low" and "high", its 95 % interval by bootstrap over photographers (or images);
    "not leaked", the accuracy on images whose place the gallery does not hold; "ceiling"; "random floor";
    "constant floor".
    """
    truth = earth.check_latlon(truth, "truth").double()
    places = earth.check_latlon(places, "gallery").double()
    leak = leaked(truth, places)
    rows, readable = {}, None
    if predicted is not None:
        if len(predicted) != len(truth):
            raise ValueError(f"{len(predicted):,} answers for {len(truth):,} images")
        answered = ~predicted.isnan().any(-1)
        earth.check_latlon(predicted[answered], "answers")
        readable = int(answered.sum())
        error_km = earth.haversine_km(predicted, truth)
        rows["accuracy"] = summarize(error_km)
        interval = bootstrap_interval(error_km, authors, np.random.default_rng(seed))
        for side, name in enumerate(("low", "high")):
            rows[name] = {column: ends[side] for column, ends in interval.items()} | {"n": len(truth)}
        if not leak.all():
            rows["not leaked"] = summarize(error_km[~leak])
    if from_places:
        rows["ceiling"] = summarize(ceiling(truth, places))
    rows["random floor"] = random_floor(truth, places, seed)
    rows["constant floor"] = summarize(constant_floor(truth, places))
    rests_on = {
        "n_expected": len(truth),
        "n_readable": readable,
        "n_leaked": int(leak.sum()),
        "authors": None if authors is None else len(set(authors)),
        "interval_over": "images" if authors is None else "photographers",
        "gallery_n": len(places),
        "gallery_unique": len(torch.unique(places, dim=0)),
    }
    return pd.DataFrame([(about or {}) | {"measure": name} | row | rests_on for name, row in rows.items()])
