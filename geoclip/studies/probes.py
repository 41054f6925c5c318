"""Probes: what an embedding of places knows, measured by predicting properties of a place from it alone.

The protocol is RANGE's: columns are scaled to [0, 1], and ridge regression (or classification with targets ±1)
chooses its penalty by inner cross-validation. Held-out places are drawn at random, or in whole blocks.
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
from scipy import linalg
from sklearn.compose import TransformedTargetRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import GroupShuffleSplit, KFold, ShuffleSplit, StratifiedKFold
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from threadpoolctl import threadpool_limits

from geoclip import earth
from geoclip.datasets.geography import Task
from geoclip.studies.statistics import t_interval

Measure = Literal["accuracy", "r2"]
SCORES = {"accuracy": accuracy_score, "r2": r2_score}
SPLITS = ("random", "blocked")
JOBS = 2  # splits at a time; each holds its own scaled copy of the training rows
# RANGE's: ridge penalties to choose from, and the inner folds that choose one
ALPHAS = (0.1, 1.0, 10.0)
CLASS_FOLDS, NUMBER_FOLDS = 10, 3
TEST_FRACTION = 0.2  # of the places, or of the blocks, in each outer split


@dataclass(frozen=True)
class ProbeConfig:
    """The outer splits that probes are scored on."""

    seeds: int = 5  # number of splits
    block_deg: float = 10.0  # side of a block, in degrees of a great circle; a task may have its own


@dataclass(frozen=True)
class HiddenLayerConfig:
    """One hidden layer; 512 units, learning rate 0.001 and batches of 32 are those of NUS-WIDE's protocol."""

    hidden: int = 512
    learning_rate: float = 1e-3
    batch: int = 32
    epochs: int = 10
    optimizer: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.0
    standardize: bool = True  # each column of the input


def embed(embedding: Callable, latlon) -> np.ndarray:
    """Return the embedding (n, d), float32, of n places in degrees; `embedding` maps (n, 2) → (n, d)."""
    latlon = earth.check_latlon(latlon).float().reshape(-1, 2)
    parts = []
    with torch.inference_mode():
        for places in latlon.split(8192):
            part = torch.as_tensor(embedding(places)).float().cpu()
            if part.ndim != 2 or len(part) != len(places):
                raise ValueError(f"the embedding of {len(places)} places has the shape {tuple(part.shape)}")
            parts.append(part)
    found = torch.cat(parts).numpy()
    check_finite(found, "the embedding")
    return found


def blocks(latlon, degrees: float = 10.0, seed: int | None = None) -> np.ndarray:
    """Return the block (n,) of each place: bands of latitude, cut into cells about as wide as they are high.

    degrees: side of a block. seed: shifts the borders at random, so that no place is always at a border.
    """
    shift = np.zeros(2) if seed is None else np.random.default_rng(seed).uniform(0, degrees, 2)
    lat, lon = np.asarray(latlon, dtype=np.float64).T
    band = np.floor((lat + 90 + shift[0]) / degrees).astype(np.int64)
    middle = np.clip((band + 0.5) * degrees - 90 - shift[0], -90, 90)
    cells = np.maximum(1, np.round(360 * np.cos(np.deg2rad(middle)) / degrees)).astype(np.int64)
    return band * 100_000 + ((lon + 180 + shift[1]) % 360 / 360 * cells).astype(np.int64)


def splits(latlon, split: str, config: ProbeConfig) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (seed, training rows, test rows) of each outer split: "random", or "blocked" by whole blocks."""
    groups, splitter = None, {"random": ShuffleSplit, "blocked": GroupShuffleSplit}[split]
    for seed in range(config.seeds):
        if split == "blocked":
            groups = blocks(latlon, config.block_deg, seed)
            if len(np.unique(groups)) < 2:
                raise ValueError(f"all {len(latlon)} places lie in one block of {config.block_deg:g}°")
        outer = splitter(1, test_size=TEST_FRACTION, random_state=seed)
        yield seed, *next(outer.split(latlon, groups=groups))


class RidgeProbe:
    """Columns scaled to [0, 1], then ridge with a penalty chosen by inner cross-validation, in float64.

    Same answers as scikit-learn's MinMaxScaler → RidgeClassifierCV(cv=10) or RidgeCV(cv=3), about twenty times
    faster: the normal equations of a fold's training rows are those of all rows minus those of the fold.
    """

    def __init__(self, measure: Measure):
        self.measure = measure

    def fit(self, x: np.ndarray, y: np.ndarray) -> "RidgeProbe":
        """Fit features x (n, d) and classes or numbers y (n,); the penalty that was chosen is `alpha_`."""
        self._scaler = MinMaxScaler().fit(x)
        self._centre = self._scaler.transform(x).mean(0, dtype=np.float64)
        if self.measure == "accuracy":
            self.classes_, members = np.unique(y, return_counts=True)
            targets = np.where(y[:, None] == self.classes_, 1.0, -1.0)
            # scikit-learn requires a class with a member in each fold
            folds = StratifiedKFold(max(2, min(CLASS_FOLDS, members.max())))
        else:
            targets, folds = np.asarray(y, dtype=np.float64)[:, None], KFold(NUMBER_FOLDS)
        x = self._columns(x)
        held_out = [rows for _, rows in folds.split(x, y)]
        parts = [(x[rows].T @ x[rows], x[rows].T @ targets[rows]) for rows in held_out]
        xx, xy = (sum(of_folds) for of_folds in zip(*parts, strict=True))
        scores = np.empty((len(parts), len(ALPHAS)))
        for row, rows, (own_xx, own_xy) in zip(scores, held_out, parts, strict=True):
            for column, alpha in enumerate(ALPHAS):
                answer = self._decide(x[rows] @ _solve(xx - own_xx, xy - own_xy, alpha))
                row[column] = SCORES[self.measure](y[rows], answer)
        self.alpha_ = ALPHAS[int(scores.mean(0).argmax())]
        self._weights = _solve(xx, xy, self.alpha_)
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return the predicted classes or numbers (n,)."""
        return self._decide(self._columns(x) @ self._weights)

    def _columns(self, x: np.ndarray) -> np.ndarray:
        """The scaled and centred columns, and one of ones, whose weight is the intercept: (n, d + 1)."""
        return np.column_stack([self._scaler.transform(x) - self._centre, np.ones(len(x))])

    def _decide(self, answer: np.ndarray) -> np.ndarray:
        return self.classes_[answer.argmax(1)] if self.measure == "accuracy" else answer[:, 0]


def _solve(xx: np.ndarray, xy: np.ndarray, alpha: float) -> np.ndarray:
    """Weights (d + 1, k) of ridge for XᵀX and XᵀY; the penalty `alpha` is on all but the last, the intercept."""
    penalty = np.append(np.full(len(xx) - 1, alpha), 0.0)
    return linalg.solve(xx + np.diag(penalty), xy, assume_a="pos")


def hidden_layer(measure: Measure | Literal["labels"], config: HiddenLayerConfig, seed: int):
    """Return an estimator with one hidden layer; "labels" predicts several labels of {0, 1} at once."""
    options = dict(hidden_layer_sizes=(config.hidden,), batch_size=config.batch, max_iter=config.epochs)
    options |= dict(learning_rate_init=config.learning_rate, alpha=config.weight_decay, random_state=seed)
    options["solver"] = config.optimizer
    if measure == "r2":
        network = TransformedTargetRegressor(MLPRegressor(**options), transformer=StandardScaler())
    else:
        network = MLPClassifier(**options)
    return make_pipeline(StandardScaler() if config.standardize else "passthrough", network)


def probe(
    embedding: np.ndarray,
    target,
    latlon,
    measure: Measure,
    split: str = "random",
    config: ProbeConfig = ProbeConfig(),
    model: Callable[[int], object] | None = None,
    sizes: Iterable[int] | None = None,
) -> pd.DataFrame:
    """Probe an embedding (n, d) for a target (n,): one row for each seed.

    Columns: seed; score, accuracy in percent or R²; n_train; n_test; reachable, percent of test places whose
    class occurs in training, 100 for numbers; alpha of ridge.

    target: classes or numbers. latlon: (n, 2) degrees, for the blocks. model: seed → estimator; by default
    RidgeProbe. sizes: learning curve, one row for each seed and number of training places, nested.
    """
    target = np.asarray(target)
    check_rows(embedding, target, latlon, measure)

    def one(seed, train, test):
        fitted = (model(seed) if model else RidgeProbe(measure)).fit(embedding[train], target[train])
        row = scored(fitted.predict(embedding[test]), target, train, test, measure)
        return {"seed": seed} | row | {"alpha": getattr(fitted, "alpha_", np.nan)}

    jobs = []
    for seed, train, test in splits(latlon, split, config):
        if sizes is not None and max(sizes) > len(train):
            raise ValueError(f"{max(sizes)} training places were asked for; split {seed} has {len(train)}")
        order = np.random.default_rng(seed).permutation(train)
        parts = [train] if sizes is None else [order[:size] for size in sizes]
        jobs += [delayed(one)(seed, part, test) for part in parts]
    with expected_warnings():
        return pd.DataFrame(in_threads(jobs))


def scored(answer: np.ndarray, target: np.ndarray, train, test, measure: Measure) -> dict[str, float]:
    """Return score, n_train, n_test and reachable, as `probe` does, of the answers for the test rows."""
    score, reachable = SCORES[measure](target[test], answer), 100.0
    if measure == "accuracy":
        score, reachable = 100 * score, 100 * np.isin(target[test], target[train]).mean()
    return {"score": score, "n_train": len(train), "n_test": len(test), "reachable": reachable}


def in_threads(jobs: Iterable) -> list:
    """Return the results of joblib's delayed calls, JOBS at a time, each on one thread of the linear algebra."""
    with threadpool_limits(1):
        return Parallel(n_jobs=min(JOBS, os.cpu_count() or 1), prefer="threads")(jobs)


def compare(
    tasks: Mapping[str, Task],
    embeddings: Mapping[str, Callable],
    config: ProbeConfig,
    hidden: HiddenLayerConfig | None = None,
) -> pd.DataFrame:
    """Probe every embedding for every task in both kinds of split: the rows of `probe`, with what they belong to.

    hidden: probe with one hidden layer instead of ridge. Places that tasks share are embedded once.
    """
    found = []
    for places in dict.fromkeys(task.places for task in tasks.values()):
        group = [task for task in tasks.values() if task.places == places]
        union, rows = np.unique(np.concatenate([task.latlon for task in group]), axis=0, return_inverse=True)
        rows = np.split(rows.ravel(), np.cumsum([len(task) for task in group])[:-1])
        for name, embedding in embeddings.items():
            x = embed(embedding, union)
            for task, own in zip(group, rows, strict=True):
                model = partial(hidden_layer, task.measure, hidden) if hidden else None
                outer = replace(config, block_deg=task.block_deg or config.block_deg)
                for split in SPLITS:
                    table = probe(x[own], task.target, task.latlon, task.measure, split, outer, model)
                    keys = {"task": task.name, "embedding": name, "d": x.shape[1], "split": split}
                    keys |= {"probe": "hidden layer" if hidden else "ridge", "measure": task.measure}
                    found.append(table.assign(**keys)[[*keys, *table.columns]])
    return pd.concat(found, ignore_index=True)


def summarize(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Average the seeds of each group: score, its interval (low, high), seeds, reachable, n_train, n_test.

    The splits overlap, so that the usual interval would be too narrow: see statistics.t_interval, `overlap`.
    """
    table = []
    for key, group in rows.groupby(by, sort=False):
        overlap = group["n_test"].sum() / group["n_train"].sum()
        mean, low, high = t_interval(group["score"], overlap)
        row = dict(zip(by, key, strict=True)) | {"score": mean, "low": low, "high": high, "seeds": len(group)}
        row["reachable"] = group["reachable"].mean()
        table.append(row | {name: round(group[name].mean()) for name in ("n_train", "n_test")})
    return pd.DataFrame(table)


def difference(rows: pd.DataFrame, one: str, other: str, by: list[str]) -> pd.DataFrame:
    """Return `summarize` of how much more the embedding `one` scores than `other`, paired by split."""
    keys = [*by, "seed"]
    a, b = (rows[rows["embedding"] == name].set_index(keys) for name in (one, other))
    both = a.join(b[["score"]].rename(columns={"score": "other"}), how="inner").reset_index()
    return summarize(both.assign(score=both["score"] - both["other"]), by)


def readable(summary: pd.DataFrame, rows: list[str], columns: list[str]) -> pd.DataFrame:
    """Lay out a summary for reading: "84.6 (82.0 to 87.1)", accuracy in percent to 0.1 and R² to 0.01."""
    text = []
    for measure, *numbers in summary[["measure", "score", "low", "high"]].itertuples(index=False):
        mean, low, high = (f"{number:.{1 if measure == 'accuracy' else 2}f}" for number in numbers)
        text.append(mean if low == "nan" else f"{mean} ({low} to {high})")
    column = summary[columns].astype(str).agg(" · ".join, axis=1)
    named = summary.assign(text=text, column=column).set_index([*rows, "column"])["text"]
    wide = named.unstack("column", sort=False)[column.unique()]
    return wide.reset_index().rename_axis(columns=None).fillna("")


def held_out_prediction(
    embedding: np.ndarray, target: np.ndarray, latlon, places: np.ndarray, at, measure: Measure
) -> np.ndarray:
    """Predict new places (m,), each with a ridge probe that saw no training place of the new place's block.

    embedding, target, latlon: training places. places (m, d), at (m, 2): embedding and coordinates of the new
    ones. Blocks are assigned to folds at random; a fold's model is fitted on the places of the others.
    """
    names, block = np.unique(np.concatenate([blocks(latlon), blocks(at)]), return_inverse=True)
    fold = (np.random.default_rng(0).permutation(len(names)) % 5)[block]
    own, new = np.split(fold, [len(target)])
    answer = np.empty(len(places), dtype=target.dtype)
    with expected_warnings(), threadpool_limits(1):
        for fold in range(5):
            model = RidgeProbe(measure).fit(embedding[own != fold], target[own != fold])
            answer[new == fold] = model.predict(places[new == fold])
    return answer


@contextlib.contextmanager
def expected_warnings():
    """Silence what the protocols cause: classes absent from some inner folds, and a fixed number of epochs.

    Use it around threads, never inside one, because warning filters belong to the process.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        yield


def check_rows(embedding: np.ndarray, target: np.ndarray, latlon, measure: Measure) -> None:
    """Raise ValueError for rows that do not match, values that are not finite, and classes of one member."""
    for name, rows in (("places", len(latlon)), ("embeddings", len(embedding))):
        if rows != len(target):
            raise ValueError(f"{rows} {name} but {len(target)} target values; they must be the same rows")
    if embedding.ndim != 2:
        raise ValueError(f"the embedding has the shape {embedding.shape}, not (n, d)")
    check_finite(embedding, "the embedding")
    if measure == "r2":
        check_finite(np.asarray(target, dtype=np.float64)[:, None], "the target")
        return
    classes, first, members = np.unique(target, return_index=True, return_counts=True)
    if (members == 1).any():
        one = int((members == 1).argmax())
        raise ValueError(f"class {classes[one]!s} has one member (row {first[one]}): leave out such classes")


def check_finite(values: np.ndarray, name: str) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name}, row {row}, column {column}: {values[row, column]} is not a finite number; "
            f"{int(bad.any(1).sum())} of {len(values)} rows have such values"
        )
