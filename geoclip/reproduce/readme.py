"""The README's first-screen table: made of the accepted results of notebook 07, so that it cannot drift."""

from pathlib import Path

import pandas as pd

from geoclip import paths
from geoclip.datasets import blue_marble
from geoclip.evaluation import ACCURACY_COLUMNS

START = "<!-- results: written by `python -m geoclip readme` from data/expected/07_benchmarks.csv -->"
END = "<!-- end of results -->"
PAPER = "paper"
# Rows of the table, and what a reader has to know of them.
ROWS = {
    ("Im2GPS3k", "test"): "Im2GPS3k",
    ("YFCC26k", "test"): "YFCC26k",
    ("GWS15k", "test"): "GWS15k",
    ("YFCC4k", "test"): "YFCC4k",
    (blue_marble.LABEL, "random"): "Blue Marble tiles ¹, random split",
    (blue_marble.LABEL, "blocked"): "Blue Marble tiles ¹, blocked split",
}
NEEDS_PHOTOS, NEEDS_COORDINATES = "needs photos ²", "needs coordinates ²"
NOT_PUBLISHED, OTHERS = "not in the paper", "re-implementation in Lightning"  # a protocol of data/paper
# Columns: the model and the measure in notebook 07, and what a cell without a result says.
COLUMNS = {
    PAPER: (PAPER, "accuracy", NOT_PUBLISHED),
    "authors' weights": ("authors' weights", "accuracy", NEEDS_PHOTOS),
    "ours": ("ours", "accuracy", NEEDS_PHOTOS),
    "ceiling": ("gallery", "ceiling", NEEDS_COORDINATES),
    "floor": ("gallery", "random floor", NEEDS_COORDINATES),
}
NOTES = (
    "Ceiling: the gallery's nearest place; floor: a random place of the gallery; both follow from coordinates.\n\n"
    "¹ Overhead imagery, a stand-in for photos, on which the whole system trains in a few minutes; the paper has no "
    "such numbers. ² Unavailable without a benchmark's files, and CLIP's weights; notebook 07 fills them in from the "
    "folder that `GEOCLIP_DATA` names, the column *ours* with a model trained on MP-16. ³ Not the paper's: the README "
    "of the Lightning re-implementation `aninda-ghosh/geo-clip-paper-implementation`, trained on data of its choice."
)


def side_by_side(table: pd.DataFrame) -> pd.DataFrame:
    """The tidy table of notebook 07 in the ROWS and COLUMNS of the README: five accuracies, or why there are none.

    Other data in the table, such as a part of a benchmark or a rehearsal, follow under their own names.
    """
    published = pd.read_csv(paths.PAPER / "benchmarks.csv").query("protocol == @OTHERS")
    published = published.set_index("benchmark")
    cells = table.set_index(["data", "split", "model", "measure"])[ACCURACY_COLUMNS]
    if not cells.index.is_unique:
        raise ValueError("two rows of the table have one data, split, model and measure")
    rows = []
    others = {key: key[0] for key in zip(table["data"], table["split"], strict=True) if key not in ROWS}
    for (data, split), title in (ROWS | others).items():
        row = {"percent within 1 / 25 / 200 / 750 / 2500 km": title}
        for column, (model, measure, missing) in COLUMNS.items():
            row[column] = "–" if data == blue_marble.LABEL or (data, split) in others else missing
            if (data, split, model, measure) in cells.index:
                values = cells.loc[data, split, model, measure]
                row[column] = " / ".join(f"{value:.1f}" for value in values)
        if row[PAPER] == NOT_PUBLISHED and data in published.index:
            theirs = published.loc[data, ACCURACY_COLUMNS]
            row[PAPER] += f"; {' / '.join(f'{value:.2f}' for value in theirs)} ³"
        rows.append(row)
    return pd.DataFrame(rows)


def first_screen() -> str:
    """The Markdown between the README's two marks, with them."""
    expected = paths.EXPECTED / "07_benchmarks.csv"
    if not expected.is_file():
        raise FileNotFoundError("data/expected/07_benchmarks.csv is not there: `make accept NB=07` writes it")
    table = side_by_side(pd.read_csv(expected))
    return "\n\n".join([START, table.to_markdown(index=False), NOTES, END])


def replaced(readme: str) -> str:
    """The README's text with its table as the results are now; ValueError where the marks are missing."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"README.md has no table to replace: put these two lines into it\n{START}\n{END}")
    return before + first_screen() + after


def write(readme: Path = paths.ROOT / "README.md") -> bool:
    """Write the table into the README; returns whether anything changed."""
    text = readme.read_text(encoding="utf-8")
    new = replaced(text)
    if new != text:
        with paths.atomic(readme) as temporary:
            temporary.write_text(new, encoding="utf-8")
    return new != text
