import numpy as np
import pandas as pd
import pytest
from scipy import stats

from geoclip.studies.statistics import across, over_seeds, paired_differences, plus_minus, t_interval

COLUMNS = ("acc_25km",)


def table():
    """Two settings on two splits, three seeds; b is above a by 1, 2, 3 points although the seeds spread by 20."""
    rows = []
    for split, shift in (("random", 0.0), ("blocked", -5.0)):
        for seed, score in enumerate((30.0, 40.0, 50.0)):
            rows.append({"split": split, "setting": "a", "seed": seed, "acc_25km": score + shift})
            rows.append({"split": split, "setting": "b", "seed": seed, "acc_25km": score + shift + 1 + seed})
    return pd.DataFrame(rows)


def test_interval_is_scipys():
    values = [30.0, 31.5, 29.0, 33.0, 30.5]
    mean, low, high = t_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean == pytest.approx(np.mean(values))
    assert (low, high) == pytest.approx((expected.low, expected.high))


@pytest.mark.slow
def test_interval_covers_in_95_of_100():
    draws = np.random.default_rng(0).normal(7, 2, size=(4000, 3))
    ends = np.array([t_interval(row) for row in draws])
    covered = ((ends[:, 1] <= 7) & (7 <= ends[:, 2])).mean()
    assert 0.94 < covered < 0.96  # with 1.96 standard errors it would be 0.82


def test_one_seed_has_no_interval_and_no_seed_no_mean():
    mean, low, high = t_interval([3.0])
    assert mean == 3 and np.isnan(low) and np.isnan(high)
    assert plus_minus(mean, low, high) == "3.0"
    assert plus_minus(34.5, 33.25, 35.75) == "34.5 ± 1.2"
    assert plus_minus(3.2, 0.6, 7.4) == "3.2 (0.6 to 7.4)"  # half of it would seem to contain 0
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])
    with pytest.raises(ValueError, match="finite"):
        t_interval([1.0, float("nan")])


def test_differences_are_paired_by_seed():
    found = paired_differences(table(), "a", columns=COLUMNS)
    expected = stats.ttest_rel([31.0, 42.0, 53.0], [30.0, 40.0, 50.0]).confidence_interval(0.95)
    assert list(found["split"]) == ["random", "blocked"]
    for _, row in found.iterrows():
        assert row["seeds"] == 3
        assert row["acc_25km"] == pytest.approx(2)
        assert (row["acc_25km_low"], row["acc_25km_high"]) == pytest.approx((expected.low, expected.high))


def test_unmatched_seeds_do_not_count():
    runs = table()
    runs = runs[~((runs["setting"] == "b") & (runs["seed"] == 2))]
    found = paired_differences(runs, "a", columns=COLUMNS)
    assert list(found["seeds"]) == [2, 2] and found["acc_25km"].tolist() == pytest.approx([1.5, 1.5])


def test_over_seeds_keeps_the_order_of_the_runs():
    found = over_seeds(table(), ["split", "setting"], COLUMNS)
    assert found[["split", "setting"]].values.tolist() == [
        ["random", "a"], ["random", "b"], ["blocked", "a"], ["blocked", "b"],
    ]  # fmt: skip
    assert found["acc_25km"].tolist() == pytest.approx([40, 42, 35, 37])


def test_mistakes_are_named():
    runs = table()
    with pytest.raises(ValueError, match=r"'c'.*'a', 'b'"):
        paired_differences(runs, "c", columns=COLUMNS)
    with pytest.raises(ValueError, match="more than once"):
        over_seeds(pd.concat([runs, runs.head(1)]), ["split", "setting"], COLUMNS)
    with pytest.raises(KeyError, match="setting"):
        over_seeds(runs.drop(columns="setting"), ["split", "setting"], COLUMNS)


def test_across_lays_settings_down_and_splits_across():
    runs = pd.DataFrame(
        [
            {"split": split, "setting": setting, "seed": seed, "acc_25km": value + seed}
            for split, setting, value in [
                ("near", "b", 50),
                ("near", "a", 40),
                ("far", "b", 5),
                ("far", "a", 4),
            ]
            for seed in (0, 2)
        ]
    )
    table = across(over_seeds(runs, ["split", "setting"], ["acc_25km"]), "acc_25km")
    assert list(table.columns) == ["setting", "near", "far"] and table["setting"].tolist() == ["b", "a"]
    assert table["far"].tolist() == ["6.0 ± 12.7", "5.0 ± 12.7"]
