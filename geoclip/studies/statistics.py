"""Means over a few seeds with Student t intervals, differences paired by seed, and ceilings by gallery size."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from geoclip import evaluation

ACCURACY = ("acc_1km", "acc_25km", "acc_200km", "acc_750km", "acc_2500km")


def t_interval(values: Iterable[float], overlap: float = 0.0) -> tuple[float, float, float]:
    """Return the mean and both ends of its 95 % Student t interval over n seeds, in the unit of the values.

    It covers the seeds (weights, order, noise), not the choice of test places, which all runs share, and is NaN
    for one seed. overlap: n_test / n_train where each seed draws its own split of the same data: such scores are
    correlated, and the variance between seeds counts 1 / n + overlap times (Nadeau and Bengio, 2003).
    """
    values = np.array(list(values), dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"an interval needs at least one value, all of them finite; got {values.tolist()}")
    mean = values.mean()
    if values.size == 1:
        return float(mean), float("nan"), float("nan")
    deviation = values.std(ddof=1) * np.sqrt(1 / values.size + overlap)
    half = stats.t.ppf(0.975, values.size - 1) * deviation
    return float(mean), float(mean - half), float(mean + half)


def over_seeds(runs: pd.DataFrame, by: Sequence[str], columns: Sequence[str] = ACCURACY) -> pd.DataFrame:
    """Average the seeds of each group: the mean of each column, and its interval in COLUMN_low, COLUMN_high.

    runs: one row for each group and seed, with a column `seed`. Groups keep their order; `seeds` counts them.
    """
    _check(runs, by)
    if runs.empty:
        ends = [name + end for name in columns for end in ("", "_low", "_high")]
        return pd.DataFrame(columns=[*by, "seeds", *ends])
    rows = []
    for key, group in runs.groupby(list(by), sort=False):
        row = dict(zip(by, key, strict=True)) | {"seeds": len(group)}
        for column in columns:
            row[column], row[f"{column}_low"], row[f"{column}_high"] = t_interval(group[column])
        rows.append(row)
    return pd.DataFrame(rows)


def paired_differences(
    runs: pd.DataFrame,
    reference: str,
    by: Sequence[str] = ("split",),
    name: str = "setting",
    columns: Sequence[str] = ACCURACY,
    share: bool = False,
) -> pd.DataFrame:
    """Return each setting minus `reference`, seed by seed within each group of `by`: mean, interval, `seeds`.

    Seeds that only one of the two has are left out. The intervals are not corrected for multiple comparisons.
    name: the column of the settings. share: return percent of the reference's score, not the difference.
    """
    _check(runs, [*by, name])
    if reference not in set(runs[name]):
        known = ", ".join(map(repr, runs[name].unique()))
        raise ValueError(f"no run has {name} = {reference!r}; there are {known}")
    base = runs[runs[name] == reference].drop(columns=name)
    pairs = runs[runs[name] != reference].merge(base, on=[*by, "seed"], suffixes=("", "_reference"))
    for column in columns:
        base_score = pairs[f"{column}_reference"]
        if share and (base_score == 0).any():
            raise ValueError(f"{column} of {reference!r} is 0 for a seed: there is no share of it")
        pairs[column] = 100 * pairs[column] / base_score if share else pairs[column] - base_score
    return over_seeds(pairs, [name, *by], columns)


def _check(runs: pd.DataFrame, by: Sequence[str]) -> None:
    keys = [*by, "seed"]
    twice = runs[runs.duplicated(keys)]
    if len(twice):
        raise ValueError(f"the table of runs has {twice.iloc[0][keys].to_dict()} more than once")


def plus_minus(mean: float, low: float, high: float) -> str:
    """Return a mean and its interval as text: "34.5 ± 1.2", "34.5 (31.0 to 35.1)" if skewed, or the mean alone."""
    if np.isnan(low):
        return f"{mean:.1f}"
    if abs(high + low - 2 * mean) > 0.1 * (high - low):
        return f"{mean:.1f} ({low:.1f} to {high:.1f})"
    return f"{mean:.1f} ± {(high - low) / 2:.1f}"


def readable(table: pd.DataFrame, keys: Sequence[str], columns: Sequence[str] = ACCURACY) -> pd.DataFrame:
    """Lay out a table of over_seeds or paired_differences for reading: each column as plus_minus."""
    text = table[list(keys)].copy()
    for column in columns:
        ends = zip(table[column], table[f"{column}_low"], table[f"{column}_high"], strict=True)
        text[column] = [plus_minus(*row) for row in ends]
    return text.assign(seeds=table["seeds"])


def across(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Lay out one column of over_seeds or paired_differences as plus_minus: settings down, splits across."""
    text = readable(table, ["setting", "split"], [column])
    wide = text.pivot(index="setting", columns="split", values=column)
    return wide.loc[text["setting"].unique(), text["split"].unique()].reset_index().rename_axis(None, axis=1)


def ceiling_by_size(
    truth: Float[Tensor, "n 2"],
    places: Float[Tensor, "m 2"],
    sizes: Sequence[int],
    authors=None,
    galleries: int = 5,
    draws: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """The ceiling of galleries drawn from the distinct `places`: a tidy table, a row per size.

    Values are means over `galleries` draws; `*_low` and `*_high` are 95 % intervals over draws of galleries
    and bootstraps over photographers together.
    """
    unique = torch.unique(places, dim=0)
    rows = []
    for size in sizes:
        if not 1 <= size <= len(unique):
            raise ValueError(f"a gallery of {size:,} was requested; there are {len(unique):,} places")
        errors, scores = [], []
        for number in range(seed, seed + (galleries if size < len(unique) else 1)):
            order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(number))
            error_km = evaluation.ceiling(truth, unique[order[:size]])
            errors.append(evaluation.summarize(error_km))
            scores.append(evaluation.bootstrap(error_km, authors, draws, np.random.default_rng(number)))
        low, high = np.percentile(np.concatenate(scores), [2.5, 97.5], axis=0)
        row: dict[str, float] = {"gallery_n": size, "n": len(truth), "galleries": len(errors)}
        for i, name in enumerate(evaluation.ACCURACY_COLUMNS):
            row[name] = float(np.mean([error[name] for error in errors]))
            row |= {f"{name}_low": float(low[i]), f"{name}_high": float(high[i])}
        rows.append(row)
    return pd.DataFrame(rows)
