"""Figures of the studies: accuracy of settings with its intervals, and which model is best where."""

import contextlib
import itertools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from geoclip import evaluation
from geoclip.maps import STYLE
from geoclip.studies.probes import blocks

# One colour and one marker for each distance; the colours are Okabe and Ito's, safe for colour-blind readers.
COLOURS = ("#000000", "#0072B2", "#009E73", "#E69F00", "#CC79A7")
DISTANCES = list(zip(evaluation.named_thresholds(), COLOURS, "os^Dv", strict=True))
FEWEST = 10  # tests of a block for best_model
BARS = {"markersize": 4, "capsize": 2}


def draw_differences(summary: pd.DataFrame, splits: Sequence[str]) -> Figure:
    """Draw a table of statistics.paired_differences: settings beside the reference (0), a panel for each split."""
    names = list(summary["setting"].unique())[::-1]
    size = (3.4 * len(splits) + 1.4, 0.4 * len(names) + 1.3)
    with _panels(summary, 1, len(splits), size) as (figure, axes):
        for axis, split in zip(axes[0], splits, strict=True):
            part = summary[summary["split"] == split].set_index("setting").loc[names]
            for number, ((column, km), colour, marker) in enumerate(DISTANCES):
                style = {"marker": marker, "linestyle": "none", "color": colour} | BARS
                rows = np.arange(len(names)) + 0.13 * (2 - number)  # the nearest distance on top
                axis.errorbar(part[column], rows, xerr=_ends(part, column), label=f"≤ {km:,} km", **style)
            axis.axvline(0, color="#999999", linewidth=0.8)
            axis.set(title=split, xlabel="points below (left) or above the reference")
            axis.set_yticks(range(len(names)), names)
    return figure


def draw_by_split(summary: pd.DataFrame, settings: Sequence[str], columns: Sequence[str]) -> Figure:
    """Draw the accuracy of `settings` over the test splits, in their order, in one panel for each column.

    summary: of statistics.over_seeds, with the columns data, split and setting.
    """
    splits, kilometres = list(summary["split"].unique()), dict(evaluation.named_thresholds())
    with _panels(summary, 1, len(columns), (3.7 * len(columns), 3.4)) as (figure, axes):
        lines = itertools.cycle(zip(COLOURS, "os^Dv", ("-", "--", "-.", ":", (0, (5, 1))), strict=True))
        there = [setting for setting in settings if setting in set(summary["setting"])]
        for setting, (colour, marker, line) in zip(there, lines, strict=False):
            part = summary[summary["setting"] == setting].set_index("split").loc[splits]
            style = {"marker": marker, "linestyle": line, "color": colour} | BARS
            for axis, column in zip(axes[0], columns, strict=True):
                axis.errorbar(range(len(splits)), part[column], _ends(part, column), label=setting, **style)
        names = [split.replace(" km", "").replace("beyond", ">") for split in splits]
        for axis, column in zip(axes[0], columns, strict=True):
            axis.set_xticks(range(len(splits)), names, fontsize=7)
            axis.set(title=f"≤ {kilometres[column]:,} km", ylim=(-2, 102))
            axis.set_xlabel("test split; km from the nearest training place")
        axes[0, 0].set_ylabel("found within the distance, %")
    return figure


def draw_curves(summary: pd.DataFrame, x: str, label: str, panels: Sequence[str] = ("split",)) -> Figure:
    """Draw the accuracy at the five distances against the column `x`, with intervals as bands.

    summary: as in draw_by_split. panels: columns; each combination of their values has its own panel.
    """
    groups = list(summary.groupby(list(panels), sort=False))
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    size = (3.7 * columns, 2.6 * rows + 0.5)
    with _panels(summary, rows, columns, size, sharex=True) as (figure, axes):
        for axis, (key, part) in zip(axes.flat, groups, strict=False):
            part = part.sort_values(x)
            values = part[x].to_numpy(float)
            for (column, km), colour, marker in DISTANCES:
                axis.plot(values, part[column], marker, ls="-", ms=4, color=colour, label=f"≤ {km:,} km")
                ends = part[f"{column}_low"], part[f"{column}_high"]
                axis.fill_between(values, *ends, color=colour, alpha=0.25, linewidth=0)
            if (values == 0).any():  # linear below the smallest value that is not 0
                axis.set_xscale("symlog", linthresh=float(values[values > 0].min()), linscale=0.6)
            else:
                axis.set_xscale("log")
            axis.set_xticks(values, [f"{value:,g}" for value in values])
            axis.minorticks_off()
            axis.tick_params(labelbottom=True)  # in each row
            axis.set(title=", ".join(map(str, key)), xlabel=label, ylim=(-2, 102))
        for axis in axes[:, 0]:
            axis.set_ylabel("found within the distance, %")
    return figure


def _ends(part: pd.DataFrame, column: str) -> np.ndarray:
    """Lengths (2, n) of the bars below and above the means of a column; 0 where one seed has no interval."""
    ends = part[[f"{column}_low", f"{column}_high"]].to_numpy().T
    return np.nan_to_num(np.abs(ends - part[column].to_numpy()))


@contextlib.contextmanager
def _panels(summary: pd.DataFrame, rows: int, columns: int, size: tuple[float, float], sharex: bool = False):
    """A figure and its axes (rows, columns) to draw on; then a grid, a legend, and what the data are."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, sharex=sharex, sharey=True, squeeze=False)
        yield figure, axes
        for axis in axes.flat:
            axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        data, seeds = ", ".join(summary["data"].unique()), summary["seeds"].max()
        about = f"{data}; means and 95 % intervals over {seeds} seeds"
        figure.suptitle(about, fontsize=8, color="#555555")
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)


def best_model(
    errors: Mapping[str, Float[np.ndarray, "s n"]],
    latlon: Float[Tensor, "n 2"],
    pixels: Float[np.ndarray, "m 2"],
) -> np.ndarray:
    """Return for each pixel (m,) the number of the model with the lowest median error in the pixel's block.

    errors: km of n tests with s seeds, by model. latlon: places of the tests. A block (probes.blocks) with
    fewer than FEWEST tests has no best model: −1.
    """
    table = pd.DataFrame({name: np.median(np.atleast_2d(km), axis=0) for name, km in errors.items()})
    groups = table.groupby(blocks(latlon))
    median = groups.median()[groups.size() >= FEWEST]
    best = pd.Series(median.to_numpy().argmin(axis=1), index=median.index)
    return best.reindex(blocks(pixels)).fillna(-1).to_numpy(int)
