"""Means over a few seeds with Student t intervals, differences paired by seed, and ceilings by gallery size."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from geoclip import evaluation

ACCURACY = tuple(evaluation.ACCURACY_COLUMNS)


def t_interval(values: Iterable[float], overlap: float = 0.0) -> tuple[float, float, float]:
    """Return the mean and both ends of its 95 % Student t interval over n seeds, in the unit of the values.

    It covers the seeds (weights, order, noise), not the choice of test places, which all runs share, and is NaN
    for one seed. overlap: n_test / n_train where each seed draws its own split of the same data: such scores are
    correlated, and the variance between seeds counts 1 / n + overlap times (Nadeau and Bengio, 2003).
    """
    values = pd.Series(values, dtype=float)
    if values.empty or not np.isfinite(values).all():
        raise ValueError(f"an interval needs at least one value, all of them finite; got {values.tolist()}")
    half = stats.t.ppf(0.975, len(values) - 1) * values.std() * np.sqrt(1 / len(values) + overlap)
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def over_seeds(runs: pd.DataFrame, by: Sequence[str], columns: Sequence[str] = ACCURACY) -> pd.DataFrame:
    """Average the seeds of each group: the mean of each column, and its interval in COLUMN_low, COLUMN_high.

    runs: one row for each group and seed, with a column `seed`. Groups keep their order; `seeds` counts them.
    """
    twice = runs[runs.duplicated([*by, "seed"])]
    if len(twice):
        raise ValueError(f"the table of runs has {twice.iloc[0][[*by, 'seed']].to_dict()} more than once")
    rows = []
    for key, group in runs.groupby(list(by), sort=False):
        rows.append([*key, len(group), *(end for column in columns for end in t_interval(group[column]))])
    ends = [column + end for column in columns for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=[*by, "seeds", *ends])


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
            scores.append(evaluation.bootstrap(error_km, authors, 200, np.random.default_rng(number)))
        ends = np.percentile(np.concatenate(scores), [2.5, 97.5], axis=0).T
        row = {"gallery_n": size, "n": len(truth), "galleries": len(errors)}
        for name, (low, high) in zip(ACCURACY, ends, strict=True):
            row |= {
                name: np.mean([error[name] for error in errors]),
                f"{name}_low": low,
                f"{name}_high": high,
            }
        rows.append(row)
    return pd.DataFrame(rows)
