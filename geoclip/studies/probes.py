"""What an embedding of places knows: probes that predict something about a place from its embedding alone.

Two protocols. RANGE's: every column brought to [0, 1], then ridge (regression, or classification on ±1 targets)
with α chosen among three by inner cross-validation. That of the geo-tagged NUS-WIDE: one hidden layer of 512.
Both are scored on held-out places, drawn at random (neighbours of training places: interpolation) and in whole
blocks of the Earth (no neighbour seen: extrapolation).
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from scipy import linalg, sparse, stats
from sklearn.compose import TransformedTargetRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score, r2_score
from sklearn.model_selection import GroupShuffleSplit, KFold, ShuffleSplit, StratifiedKFold
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from threadpoolctl import threadpool_limits

from geoclip import earth, paths
from geoclip.datasets import nus_wide
from geoclip.datasets.geography import Task
from geoclip.datasets.nus_wide import NusWide

Measure = Literal["accuracy", "r2"]
JOBS = 2  # seeds at a time; each holds its own scaled copy of the training rows


@dataclass(frozen=True)
class ProbeConfig:
    """How probes are fitted and scored.

    alphas, class_folds, number_folds: the ridge penalties tried and the inner folds that choose among them, for
        classes and for numbers (RANGE's).
    seeds: outer splits; test_fraction: the share of places (or of blocks) held out in each (RANGE's is 0.2).
    block_deg: side of the blocks of the spatially blocked split, degrees of a great circle.
    """

    alphas: tuple[float, ...] = (0.1, 1.0, 10.0)
    class_folds: int = 10
    number_folds: int = 3
    seeds: int = 5
    test_fraction: float = 0.2
    block_deg: float = 10.0


@dataclass(frozen=True)
class HiddenLayerConfig:
    """The hidden-layer probe: the paper's comparison on NUS-WIDE has 512 units, lr 0.001, batch 32.

    What the papers leave open is chosen here: epochs (passes over the training set), Adam, no weight decay, and
    columns standardised.
    """

    hidden: int = 512
    learning_rate: float = 1e-3
    batch: int = 32
    epochs: int = 10


def embed(embedding: Callable, latlon, batch: int = 8192) -> np.ndarray:
    """The embedding (n, d), float32, of n places: `embedding` is any callable (n, 2) → (n, d).

    Raises ValueError for coordinates that are none, for another shape, and for NaN or infinity, naming the row.
    """
    latlon = earth.check_latlon(latlon).float().reshape(-1, 2)
    with torch.inference_mode():
        parts = [torch.as_tensor(embedding(part)).float().cpu() for part in latlon.split(batch)]
    for part, places in zip(parts, latlon.split(batch), strict=True):
        if part.ndim != 2 or len(part) != len(places):
            raise ValueError(
                f"the embedding answered {len(places)} places with the shape {tuple(part.shape)}, not (n, d)"
            )
    found = torch.cat(parts).numpy()
    _check_finite(found, "the embedding")
    return found


def blocks(latlon, degrees: float = 10.0, seed: int | None = None) -> np.ndarray:
    """The block (n,) of each place: bands of latitude cut into cells about as wide as high, `degrees` a side.

    `seed` shifts the borders at random, so that no place is always at the edge of its block.
    """
    shift = np.zeros(2) if seed is None else np.random.default_rng(seed).uniform(0, degrees, 2)
    lat, lon = np.asarray(latlon, dtype=np.float64).T
    band = np.floor((lat + 90 + shift[0]) / degrees).astype(np.int64)
    middle = np.clip((band + 0.5) * degrees - 90 - shift[0], -90, 90)
    cells = np.maximum(1, np.round(360 * np.cos(np.deg2rad(middle)) / degrees)).astype(np.int64)
    return band * 100_000 + ((lon + 180 + shift[1]) % 360 / 360 * cells).astype(np.int64)


def splits(
    latlon, split: str, config: ProbeConfig | None = None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(seed, training rows, test rows) of each outer split, "random" or "blocked" (no block is on both sides)."""
    config = config or ProbeConfig()
    for seed in range(config.seeds):
        options = {"n_splits": 1, "test_size": config.test_fraction, "random_state": seed}
        if split == "random":
            rows = ShuffleSplit(**options).split(latlon)
        elif split == "blocked":
            groups = blocks(latlon, config.block_deg, seed)
            if len(np.unique(groups)) < 2:
                raise ValueError(
                    f"all {len(latlon)} places lie in one block of {config.block_deg:g}°; take a smaller block_deg"
                )
            rows = GroupShuffleSplit(**options).split(latlon, groups=groups)
        else:
            raise ValueError(f"split is {split!r}, not 'random' or 'blocked'")
        train, test = next(rows)
        yield seed, train, test


class RidgeProbe:
    """Columns to [0, 1], then ridge with α chosen by inner cross-validation (RANGE's protocol), in float64.

    The answers are those of scikit-learn's MinMaxScaler → RidgeClassifierCV(cv=10) or RidgeCV(cv=3), found some
    twenty times faster: a fold's normal equations are those of all rows less the fold's own, so that the rows
    are multiplied once and not once per fold and α.
    """

    def __init__(self, measure: Measure, config: ProbeConfig | None = None):
        self.measure, self.config = measure, config or ProbeConfig()

    def fit(self, x: np.ndarray, y: np.ndarray) -> "RidgeProbe":
        """x: (n, d) features; y: (n,) classes (any labels) or numbers. Sets `alpha_`."""
        self._scaler = MinMaxScaler().fit(x)
        x = self._scaler.transform(x)
        self._centre = x.mean(0, dtype=np.float64)
        if self.measure == "accuracy":
            self.classes_, index = np.unique(y, return_inverse=True)
            largest = int(np.bincount(index).max())  # scikit-learn wants one class with a member a fold
            folds, names = StratifiedKFold(max(2, min(self.config.class_folds, largest))), index
            precision = np.float32  # of the inner folds' answers only, of which the largest counts
        else:
            folds, names = KFold(self.config.number_folds), np.asarray(y, dtype=np.float64)
            precision = np.float64
        held_out = [rows for _, rows in folds.split(x, names)]
        parts = [_Sums.of(x[rows] - self._centre, self._targets(names[rows])) for rows in held_out]
        total = _Sums.add(parts)
        scores = np.zeros((len(parts), len(self.config.alphas)))
        for part, rows, row in zip(parts, held_out, scores, strict=True):
            system = total.less(part).centred()
            features = (x[rows] - self._centre).astype(precision)
            for column, alpha in enumerate(self.config.alphas):
                weights, bias = system.solve(alpha)
                row[column] = self._score(features @ weights.astype(precision) + bias, names[rows])
        self.alpha_ = self.config.alphas[int(scores.mean(0).argmax())]
        self._weights, self._bias = total.centred().solve(self.alpha_)
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(n,) predicted classes or numbers."""
        answer = (self._scaler.transform(x) - self._centre) @ self._weights + self._bias
        return self.classes_[answer.argmax(1)] if self.measure == "accuracy" else answer[:, 0]

    def _targets(self, names):
        """Classes as ±1 columns, kept sparse as (0, 1) columns; numbers as one column."""
        if self.measure == "r2":
            return names[:, None]
        ones = np.ones(len(names))
        return sparse.csr_array((ones, (np.arange(len(names)), names)), (len(names), len(self.classes_)))

    def _score(self, answer, names) -> float:
        if self.measure == "accuracy":
            return float((answer.argmax(1) == names).mean())
        return float(r2_score(names, answer[:, 0]))


@dataclass(frozen=True)
class _Sums:
    """What ridge needs to know of some rows: their number, sums, XᵀX and XᵀY. Sums add, so folds subtract."""

    n: int
    x: np.ndarray  # (d,)
    y: np.ndarray  # (k,)
    xx: np.ndarray  # (d, d)
    xy: np.ndarray  # (d, k)

    @classmethod
    def of(cls, x: np.ndarray, y) -> "_Sums":
        if sparse.issparse(y):  # (0, 1) columns stand for ±1: y = 2·ones − 1
            totals, products = 2 * y.sum(0) - len(x), 2 * (y.T @ x).T - x.sum(0)[:, None]
        else:
            totals, products = y.sum(0), x.T @ y
        return cls(len(x), x.sum(0), totals, x.T @ x, products)

    @classmethod
    def add(cls, parts: list["_Sums"]) -> "_Sums":
        return cls(*(sum(getattr(part, name) for part in parts) for name in ("n", "x", "y", "xx", "xy")))

    def less(self, part: "_Sums") -> "_Sums":
        return _Sums(self.n - part.n, self.x - part.x, self.y - part.y, self.xx - part.xx, self.xy - part.xy)

    def centred(self) -> "_Sums":
        """The same about the means, which stay in `x` and `y`: ridge does not penalise the intercept."""
        x, y = self.x / self.n, self.y / self.n
        return _Sums(self.n, x, y, self.xx - self.n * np.outer(x, x), self.xy - self.n * np.outer(x, y))

    def solve(self, alpha: float) -> tuple[np.ndarray, np.ndarray]:
        """Weights (d, k) and intercepts (k,) of ridge with penalty `alpha`; needs centred sums."""
        matrix = self.xx.copy()
        matrix[np.diag_indices_from(matrix)] += alpha
        factor = linalg.cho_factor(matrix, lower=True, overwrite_a=True, check_finite=False)
        weights = linalg.cho_solve(factor, self.xy, check_finite=False)
        return weights, self.y - self.x @ weights


def hidden_layer(
    measure: Measure | Literal["labels"], config: HiddenLayerConfig | None = None, seed: int = 0
):
    """A probe with one hidden layer of ReLU, to fit and to predict with; "labels": several of {0, 1} at once."""
    config = config or HiddenLayerConfig()
    options = {
        "hidden_layer_sizes": (config.hidden,),
        "learning_rate_init": config.learning_rate,
        "batch_size": config.batch,
        "max_iter": config.epochs,
        "alpha": 0.0,
        "random_state": seed,
    }
    if measure == "r2":
        network = TransformedTargetRegressor(MLPRegressor(**options), transformer=StandardScaler())
    else:
        network = MLPClassifier(**options)
    return make_pipeline(StandardScaler(), network)


def score(model, x: np.ndarray, y: np.ndarray, train, test, measure: Measure) -> dict:
    """`model` fitted on rows `train`, scored on rows `test`: score, n_train, n_test, reachable, alpha.

    score: accuracy in percent, or R². reachable: percent of the test places whose class occurs in training (a
    class that lies in one block cannot be predicted where that block is held out); 100 for numbers.
    """
    answer = model.fit(x[train], y[train]).predict(x[test])
    if measure == "accuracy":
        value, reachable = 100 * np.mean(answer == y[test]), 100 * np.isin(y[test], y[train]).mean()
    else:
        value, reachable = r2_score(y[test], answer), 100.0
    row = {"score": float(value), "n_train": len(train), "n_test": len(test), "reachable": float(reachable)}
    return row | {"alpha": getattr(model, "alpha_", np.nan)}


def probe(
    embedding: np.ndarray,
    target,
    latlon,
    measure: Measure,
    split: str = "random",
    config: ProbeConfig | None = None,
    model: Callable[[int], object] | None = None,
) -> pd.DataFrame:
    """One row per seed: seed and what `score` says. Summarise them with `summarize`.

    embedding: (n, d) of n places; target: (n,) classes or numbers; latlon: (n, 2) degrees, for the blocks.
    model: seed → an estimator with fit and predict; ridge (RANGE's protocol) where it is not given.
    Raises ValueError for rows that do not match, NaN, or a class with one member (which no split can score).
    """
    config = config or ProbeConfig()
    target = np.asarray(target)
    check_rows(embedding, target, measure)
    if len(latlon) != len(target):
        raise ValueError(f"{len(latlon)} places but {len(target)} target values; they must be the same rows")

    def one(seed, train, test):
        fitted = model(seed) if model else RidgeProbe(measure, config)
        return {"seed": seed} | score(fitted, embedding, target, train, test, measure)

    # Matrices this small gain little from threads of their own; two seeds at a time gain nearly twice.
    with expected_warnings(), threadpool_limits(1):
        run = Parallel(n_jobs=min(JOBS, os.cpu_count() or 1), prefer="threads")
        return pd.DataFrame(run(delayed(one)(*rows) for rows in splits(latlon, split, config)))


def check_rows(embedding: np.ndarray, target: np.ndarray, measure: Measure) -> None:
    """Raise ValueError, naming row and value, where embedding and target cannot be probed together."""
    if embedding.ndim != 2:
        raise ValueError(f"the embedding has the shape {embedding.shape}, not (n, d)")
    if len(embedding) != len(target):
        raise ValueError(
            f"{len(embedding)} embeddings but {len(target)} target values; they must be the same places"
        )
    _check_finite(embedding, "the embedding")
    if measure == "r2":
        _check_finite(np.asarray(target, dtype=np.float64)[:, None], "the target")
        return
    classes, first, members = np.unique(target, return_index=True, return_counts=True)
    if (members == 1).any():
        one = int((members == 1).argmax())
        raise ValueError(
            f"class {classes[one]!s} has one member (row {first[one]}); a class needs two to be learnt and "
            f"scored: leave it out, with {int((members == 1).sum()) - 1} others like it"
        )


def compare(
    tasks: Mapping[str, Task],
    embeddings: Mapping[str, Callable],
    splits: tuple[str, ...] = ("random", "blocked"),
    config: ProbeConfig | None = None,
    hidden: HiddenLayerConfig | None = None,
) -> pd.DataFrame:
    """Every task × embedding × split: `probe`'s rows, with task, embedding, d, split, probe and measure before them.

    hidden: probe with one hidden layer instead of ridge. Places that tasks share are embedded once. The blocks are
    as wide as each task says.
    """
    config = config or ProbeConfig()
    found = []
    for places in dict.fromkeys(task.places for task in tasks.values()):
        group = [task for task in tasks.values() if task.places == places]
        union, rows = np.unique(np.concatenate([task.latlon for task in group]), axis=0, return_inverse=True)
        rows = np.split(rows.ravel(), np.cumsum([len(task) for task in group])[:-1])
        for name, embedding in embeddings.items():
            x = embed(embedding, union)
            for task, own in zip(group, rows, strict=True):
                model = partial(hidden_layer, task.measure, hidden) if hidden else None
                for split in splits:
                    blocked = replace(config, block_deg=task.block_deg)
                    table = probe(x[own], task.target, task.latlon, task.measure, split, blocked, model)
                    keys = {"task": task.name, "embedding": name, "d": x.shape[1], "split": split}
                    keys |= {"probe": "hidden layer" if hidden else "ridge", "measure": task.measure}
                    found.append(table.assign(**keys)[[*keys, *table.columns]])
    return pd.concat(found, ignore_index=True)


def summarize(rows: pd.DataFrame, by: list[str], level: float = 0.95) -> pd.DataFrame:
    """Mean score of each group with its interval: score, low, high, seeds, reachable, n_train, n_test.

    The splits overlap, so the usual interval of a mean would be too narrow; Nadeau and Bengio's (2003) correction
    counts the variance between seeds 1/seeds + n_test/n_train times. NaN for a single seed.
    """

    def one(group: pd.DataFrame) -> pd.Series:
        seeds, overlap = len(group), group.n_test.sum() / group.n_train.sum()
        half = np.nan
        if seeds > 1:
            deviation = group.score.std(ddof=1) * np.sqrt(1 / seeds + overlap)
            half = stats.t.ppf((1 + level) / 2, seeds - 1) * deviation
        mean = group.score.mean()
        return pd.Series(
            {
                "score": mean,
                "low": mean - half,
                "high": mean + half,
                "seeds": seeds,
                "reachable": group.reachable.mean(),
                "n_train": round(group.n_train.mean()),
                "n_test": round(group.n_test.mean()),
            }
        )

    table = rows.groupby(by, sort=False)[["score", "n_train", "n_test", "reachable"]].apply(one).reset_index()
    return table.astype({"seeds": int, "n_train": int, "n_test": int})


def difference(rows: pd.DataFrame, one: str, other: str, by: list[str]) -> pd.DataFrame:
    """How much more embedding `one` scores than `other` on the same splits: `summarize` of the paired differences.

    An interval that leaves out 0 says that one is better on such splits.
    """
    keys = [*by, "seed"]
    a, b = (rows[rows.embedding == name].set_index(keys) for name in (one, other))
    both = a.join(b[["score"]].rename(columns={"score": "other"}), how="inner").reset_index()
    return summarize(both.assign(score=both.score - both.other), by)


def readable(summary: pd.DataFrame, rows: list[str], columns: list[str]) -> pd.DataFrame:
    """A summary laid out for reading: "84.6 (82.0–87.1)", accuracy in percent to 0.1, R² to 0.01."""
    text = [
        f"{s:.1f} ({low:.1f} to {high:.1f})"
        if measure == "accuracy"
        else f"{s:.2f} ({low:.2f} to {high:.2f})"
        for measure, s, low, high in summary[["measure", "score", "low", "high"]].itertuples(index=False)
    ]
    text = [line.split(" (nan")[0] for line in text]
    wide = summary.assign(text=text).pivot(index=rows, columns=columns, values="text")
    order = summary[rows].drop_duplicates()
    wide = wide.loc[[tuple(row) if len(rows) > 1 else row[0] for row in order.itertuples(index=False)]]
    names = summary[columns].drop_duplicates()
    wide = wide[[tuple(row) if len(columns) > 1 else row[0] for row in names.itertuples(index=False)]]
    wide.columns = [" · ".join(name) if len(columns) > 1 else name for name in wide.columns]
    return wide.reset_index().fillna("")


def learning_curve(
    embedding: np.ndarray,
    target,
    latlon,
    measure: Measure,
    sizes: Iterable[int],
    split: str = "random",
    config: ProbeConfig | None = None,
) -> pd.DataFrame:
    """`probe`'s rows for the first `sizes` training places of each split, scored on the whole of its test places.

    Raises ValueError where a size is larger than the training part.
    """
    target = np.asarray(target)
    check_rows(embedding, target, measure)
    rows = []
    with expected_warnings(), threadpool_limits(1):
        for seed, train, test in splits(latlon, split, config):
            order = np.random.default_rng(seed).permutation(train)
            for size in sizes:
                if size > len(train):
                    raise ValueError(f"{size} training places are wanted; split {seed} has {len(train)}")
                model = RidgeProbe(measure, config)
                rows.append({"seed": seed} | score(model, embedding, target, order[:size], test, measure))
    return pd.DataFrame(rows)


def held_out_prediction(
    embedding: np.ndarray,
    target,
    latlon,
    places: np.ndarray,
    at,
    measure: Measure,
    folds: int = 5,
    block_deg: float = 10.0,
) -> np.ndarray:
    """Predictions for new places, each by a ridge that saw no training place of the new place's block.

    embedding, target, latlon: the training places; places (m, d) and at (m, 2): the new ones. The blocks are
    dealt at random into `folds`; a fold's model is fitted on the training places of the other folds.
    """
    own, new = blocks(latlon, block_deg), blocks(at, block_deg)
    names = np.unique(np.concatenate([own, new]))
    fold_of = np.random.default_rng(0).permutation(len(names)) % folds
    own, new = (fold_of[np.searchsorted(names, block)] for block in (own, new))
    target = np.asarray(target)
    answer = np.empty(len(places), dtype=target.dtype)
    with expected_warnings(), threadpool_limits(1):
        for fold in range(folds):
            model = RidgeProbe(measure).fit(embedding[own != fold], target[own != fold])
            answer[new == fold] = model.predict(places[new == fold])
    return answer


def mean_average_precision(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """macro: mean over concepts of average precision (the usual mAP); micro: over all (image, concept) pairs.

    labels: (n, q) of {0, 1}; scores: (n, q). A concept without a positive among the n has no average precision
    and is left out of both; `concepts` says how many count.
    """
    seen = labels.any(0)
    if not seen.any():
        raise ValueError(
            f"none of the {labels.shape[1]} concepts has a positive image; nothing can be scored"
        )
    labels, scores = labels[:, seen], scores[:, seen]
    return {
        "map_macro": float(average_precision_score(labels, scores, average="macro")),
        "map_micro": float(average_precision_score(labels, scores, average="micro")),
        "concepts": int(seen.sum()),
    }


def label_probe(
    x_train: np.ndarray,
    labels_train: np.ndarray,
    x_test: np.ndarray,
    config: HiddenLayerConfig | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Probability (n_test, q) of each of q labels from one hidden layer (the protocol of geo-tagged NUS-WIDE)."""
    for name, x in (("training embeddings", x_train), ("test embeddings", x_test)):
        _check_finite(x, name)
    if len(x_train) != len(labels_train):
        raise ValueError(f"{len(x_train)} training embeddings but {len(labels_train)} rows of labels")
    model = hidden_layer("labels", config, seed)
    with expected_warnings():
        return model.fit(x_train, labels_train).predict_proba(x_test)


def probe_labels(
    data: NusWide,
    embedding: Callable,
    visual: np.ndarray | None = None,
    config: HiddenLayerConfig | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """The NUS-WIDE probe from GPS alone and, with visual features (n, c), from these and from both side by side.

    Fitted on the official training part, scored on the test part; one row an input: input, d, n_train, n_test, and
    what `mean_average_precision` says. What the paper leaves open: embeddings go in unnormalised and are
    standardised by column; photos without any concept stay in; the labels are independent (sigmoid, cross-entropy).
    """
    inputs = {"GPS": embed(embedding, data.latlon)}
    if visual is not None:
        if len(visual) != len(data.table):
            raise ValueError(
                f"{len(visual)} visual features but {len(data.table)} photos; they must be the same"
            )
        inputs |= {"visual": visual, "GPS + visual": np.concatenate([inputs["GPS"], visual], 1)}
    train, test = data.rows("train"), data.rows("test")
    rows = []
    for name, x in inputs.items():
        scores = label_probe(x[train], data.labels[train], x[test], config, seed)
        row = {"input": name, "d": x.shape[1], "n_train": int(train.sum()), "n_test": int(test.sum())}
        rows.append(row | mean_average_precision(data.labels[test], scores))
    return pd.DataFrame(rows)


def nus_wide_table(
    embedding: Callable, config: HiddenLayerConfig | None = None, seed: int = 0
) -> pd.DataFrame:
    """The published mAP on geo-tagged NUS-WIDE and ours beside, as far as the user has brought the data.

    Columns input, published_map, map_macro, map_micro, n_train, n_test, status; without the data, ours are NaN and
    the status says what to bring. Visual features are read from the folder `features` of the NUS-WIDE folder.
    """
    published = pd.read_csv(paths.PAPER / "nus_wide.csv").rename(columns={"map": "published_map"})
    table = published.set_index("input")[["published_map"]]
    try:
        root = nus_wide.find()
    except FileNotFoundError as error:
        nothing = {"map_macro": np.nan, "map_micro": np.nan, "n_train": np.nan, "n_test": np.nan}
        return table.assign(**nothing, status=str(error)).reset_index()
    data = nus_wide.read(root)
    features = root / "features"
    visual = nus_wide.visual_features(data, features) if features.is_dir() else None
    ours = probe_labels(data, embedding, visual, config, seed).set_index("input")
    table = table.join(ours[["map_macro", "map_micro", "n_train", "n_test"]])
    missing = f"needs visual features: `python -m geoclip embed` to {features}"
    table["status"] = np.where(
        table["map_macro"].isna(), missing, "; ".join(data.notes) or "the published subset"
    )
    return table.reset_index()


@contextlib.contextmanager
def expected_warnings():
    """Silences what the protocols bring about: rare classes, absent from some inner folds, and a fixed number of
    epochs, which is no failure to converge. Around threads, never in one: the filters are the process's.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        yield


def _check_finite(values: np.ndarray, name: str) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name}, row {row}, column {column}: {values[row, column]} is no number; "
            f"{int(bad.any(1).sum())} of {len(values)} rows have such values"
        )
