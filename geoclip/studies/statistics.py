"""What a few seeds say: means with t intervals, and differences paired by seed."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

ACCURACY = ("acc_1km", "acc_25km", "acc_200km", "acc_750km", "acc_2500km")


def t_interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and the two ends of its Student t interval over n seeds, in the values' unit.

    The interval speaks of the seeds (weights, order, noise), not of the choice of test places, which all
    runs share. It takes the seeds' scores as independent and about normal; with one seed it is NaN.
    Raises ValueError for no value, and for one that is not finite.
    """
    values = np.array(list(values), dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"an interval needs finite values, at least one; got {values.tolist()}")
    mean = values.mean()
    if values.size == 1:
        return float(mean), float("nan"), float("nan")
    half = stats.t.ppf(0.5 + level / 2, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size)
    return float(mean), float(mean - half), float(mean + half)


def _check(runs: pd.DataFrame, by: Sequence[str]) -> None:
    keys = [*by, "seed"]
    missing = [name for name in keys if name not in runs]
    if missing:
        raise ValueError(f"the table of runs has no column {', '.join(missing)}; it has {', '.join(runs)}")
    twice = runs[runs.duplicated(keys)]
    if len(twice):
        raise ValueError(f"the table of runs has {twice.iloc[0][keys].to_dict()} more than once")


def over_seeds(
    runs: pd.DataFrame, by: Sequence[str], columns: Sequence[str] = ACCURACY, level: float = 0.95
) -> pd.DataFrame:
    """A row a group: for each column its mean (`acc_1km`) and interval (`acc_1km_low`, `_high`); `seeds`.

    `runs` has one row a group and seed, with a column `seed`; groups keep the order they first come in.
    Raises ValueError where a column is missing or a group has one seed twice.
    """
    _check(runs, by)
    if runs.empty:
        return pd.DataFrame(
            columns=[*by, "seeds", *(name + end for name in columns for end in ("", "_low", "_high"))]
        )
    rows = []
    for key, group in runs.groupby(list(by), sort=False):
        row = dict(zip(by, key, strict=True)) | {"seeds": len(group)}
        for column in columns:
            row[column], row[f"{column}_low"], row[f"{column}_high"] = t_interval(group[column], level)
        rows.append(row)
    return pd.DataFrame(rows)


def paired_differences(
    runs: pd.DataFrame,
    reference: str,
    by: Sequence[str] = ("split",),
    name: str = "setting",
    columns: Sequence[str] = ACCURACY,
    level: float = 0.95,
    share: bool = False,
) -> pd.DataFrame:
    """Each setting minus `reference`, seed by seed within each group of `by`: mean, interval, `seeds`.

    share: instead of the difference, what percentage of the reference's score the setting has.

    Paired: a seed's order of the training data and its noise are the same in both runs, so that part of the
    spread leaves the difference. Seeds that one of the two lacks do not count. The intervals are not
    corrected for how many settings are compared. Empty where there is nothing to compare. Raises ValueError where
    no run has the reference, and for a share of nothing.
    """
    _check(runs, [*by, name])
    if reference not in set(runs[name]):
        raise ValueError(
            f"no run has {name} = {reference!r}; there are {', '.join(map(repr, runs[name].unique()))}"
        )
    base = runs[runs[name] == reference].drop(columns=name)
    pairs = runs[runs[name] != reference].merge(base, on=[*by, "seed"], suffixes=("", "_reference"))
    for column in columns:
        base_score = pairs[f"{column}_reference"]
        if share and (base_score == 0).any():
            raise ValueError(f"{column} of {reference!r} is 0 for a seed: there is no share of it")
        pairs[column] = 100 * pairs[column] / base_score if share else pairs[column] - base_score
    return over_seeds(pairs, [name, *by], columns, level)


def verdict(low: float, high: float) -> str:
    """ "higher", "lower", or "not told apart" where the interval of a paired difference holds 0 (or is NaN)."""
    return "higher" if low > 0 else "lower" if high < 0 else "not told apart"


def plus_minus(mean: float, low: float, high: float) -> str:
    """ "34.5 ± 1.2": a mean and half its interval, one decimal; the mean alone where there is one seed."""
    return f"{mean:.1f}" if np.isnan(low) else f"{mean:.1f} ± {(high - low) / 2:.1f}"


def readable(table: pd.DataFrame, keys: Sequence[str], columns: Sequence[str] = ACCURACY) -> pd.DataFrame:
    """A table of over_seeds or paired_differences for reading: keys, "mean ± half interval" each, seeds."""
    text = table[list(keys)].copy()
    for column in columns:
        ends = zip(table[column], table[f"{column}_low"], table[f"{column}_high"], strict=True)
        text[column] = [plus_minus(*row) for row in ends]
    return text.assign(seeds=table["seeds"])
