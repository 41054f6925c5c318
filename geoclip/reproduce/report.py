"""What a notebook leaves behind: figures, a table and its origin, and the check against the accepted one."""

import dataclasses
import fnmatch
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from geoclip import paths

# Two pictures look the same when in no square of 16 × 16 pixels they differ by more than 8 of 255 levels on
# average. Anti-aliasing and the last digits of a float stay far below; one changed digit is 20 to 40.
SAME_LEVELS = 8.0
SAME_SQUARE = 16
VERSIONS_OF = ("torch", "torchvision", "open_clip_torch", "lightning", "numpy", "pandas", "scikit-learn")
# `accept` sets this to a folder: tables are then put there to become the expected ones, and not compared.
ACCEPT_VARIABLE = "GEOCLIP_ACCEPT"
FLOAT_FORMAT = "%.6g"


def provenance(config: object = None, data_hash: str | None = None) -> dict:
    """Where a result comes from: commit, whether files differ from it, data hash, library versions, config.

    `config`: a dataclass, a mapping or None. `commit` and `dirty` are None outside a git checkout.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit,
        "dirty": None if changed is None else bool(changed),
        "data_hash": data_hash,
        "config": config,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONS_OF},
    }


def save_figure(figure, name: str) -> None:
    """Write a matplotlib figure to figures/NAME.png (150 dpi) and .pdf, without dates.

    A picture that looks the same as the one already there (see SAME_LEVELS) is left untouched, so that a
    rerun does not change a checkout. Raises ValueError where `name` does not start with a notebook's number.
    """
    png, pdf = (paths.FIGURES / f"{_checked(name)}.{kind}" for kind in ("png", "pdf"))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    same = png.exists() and looks_same(png.read_bytes(), drawn.getvalue())
    if not same:
        with paths.atomic(png) as temporary:
            temporary.write_bytes(drawn.getvalue())
    if not same or not pdf.exists():
        with paths.atomic(pdf) as temporary:
            no_dates = {"CreationDate": None, "Producer": None, "Creator": None}
            figure.savefig(temporary, format="pdf", dpi=150, bbox_inches="tight", metadata=no_dates)


def looks_same(one: bytes, other: bytes) -> bool:
    """Whether two encoded pictures have one size and in no 16 × 16 square differ by more than SAME_LEVELS."""
    from PIL import Image

    a, b = (
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float32) for data in (one, other)
    )
    if a.shape != b.shape:
        return False
    difference = np.abs(a - b).mean(axis=2)
    starts = [np.arange(0, size, SAME_SQUARE) for size in difference.shape]
    sums = np.add.reduceat(np.add.reduceat(difference, starts[0], axis=0), starts[1], axis=1)
    return bool(sums.max() / SAME_SQUARE**2 <= SAME_LEVELS)


def save_results(table: pd.DataFrame, name: str, provenance: Mapping) -> None:
    """`save_table` to data/results/NAME.csv; ValueError where `name` has no notebook's number in front."""
    save_table(table, paths.RESULTS / f"{_checked(name)}.csv", provenance)


def save_table(table: pd.DataFrame, path: Path | str, provenance: Mapping) -> None:
    """Write `table` to `path`, a CSV with six significant digits, and `provenance` beside it as .json.

    Raises ValueError where the table has no row or `path` does not end in .csv.
    """
    path = Path(path)
    if path.suffix != ".csv":
        raise ValueError(f"{path} does not end in .csv; its provenance would have no name of its own")
    if table.empty:
        raise ValueError(f"the table for {path.name} has no row; nothing was saved")
    with paths.atomic(path) as temporary:
        temporary.write_text(_as_csv(table), encoding="utf-8")
    with paths.atomic(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(dict(provenance), indent=2, default=str) + "\n", encoding="utf-8")


def hold_to_expected(
    table: pd.DataFrame,
    name: str,
    keys: Sequence[str],
    tolerance: Mapping[str, float | None] | None = None,
    optional: bool | Mapping[str, object] = False,
    profile: str = "embedded",
) -> None:
    """Compare `table` with data/expected/NAME.csv, row by row on the columns `keys`; prints one line.

    `tolerance`: column, or a pattern such as "acc_*" → the largest absolute difference accepted, in the
    column's own unit; None = the column is not compared (seconds). The first pattern that fits counts; a
    column without one must agree to the six digits that are stored. NaN agrees with NaN.
    `optional`: True, or column → value (or list of values), marks rows that may be absent here or there
    (those that need data of the user's); of these the rows present in both are compared.
    `profile`: in any but "embedded" nothing is compared, for there is nothing accepted.

    Raises AssertionError that names row, column and both values; FileNotFoundError that says how to accept a
    first table; ValueError where `keys` do not tell the rows apart.
    """
    _checked(name)
    keys = list(keys)
    found = _read_back(table)
    for column in keys:
        if column not in found.columns:
            raise ValueError(
                f"{name}: no column {column!r} to tell rows apart; there are {list(found.columns)}"
            )
    if (twice := found.duplicated(keys)).any():
        raise ValueError(f"{name}: two rows have the keys {_row(found[twice].iloc[0], keys)}; name more keys")
    if profile != "embedded":
        print(f"{name}: profile {profile!r}, {len(found)} rows saved and not compared")
        return
    path = paths.EXPECTED / f"{name}.csv"
    if folder := os.environ.get(ACCEPT_VARIABLE):
        _put_up(found, path, Path(folder) / path.name, keys, optional)
        print(_agreement(name, len(found)))
        return
    if not path.exists():
        raise FileNotFoundError(
            f"data/expected/{path.name} does not exist, so nothing says what to expect: look at "
            f"data/results/{path.name} and, if it is right, `make accept NB={name.split('_')[0]}`"
        )
    expected = pd.read_csv(path)
    problems = _differences(found, expected, keys, dict(tolerance or {}), optional)
    if problems:
        more = f"\n… and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise AssertionError(
            f"{name} differs from data/expected/{path.name}:\n"
            + "\n".join(problems[:10])
            + more
            + f"\nIf the new values are right: `make accept NB={name[:2]}`, and review the CSV's diff."
        )
    print(_agreement(name, len(found)))


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`table` as text, rounded for reading: percents and short distances to 0.1, else four digits."""
    return pd.DataFrame({column: _readable(table[column], str(column)) for column in table.columns})


def show(table: pd.DataFrame) -> None:
    """Display `table` in a notebook as HTML (as text elsewhere), rounded by `readable`."""
    rounded = readable(table)
    text = rounded.to_string(index=False)
    if "ipykernel" not in sys.modules:
        print(text)
        return
    from IPython.display import display

    # DataFrame.style would give each table random ids, which nbval could not compare.
    display({"text/plain": text, "text/html": rounded.to_html(index=False, border=0)}, raw=True)


def _checked(name: str) -> str:
    if not re.fullmatch(r"\d\d_[a-z0-9_]+", name):
        raise ValueError(
            f"{name!r} is not of the form NN_name, NN being the number of the notebook that owns it"
        )
    return name


def _git(*arguments: str) -> str | None:
    if not paths.CHECKOUT:
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _as_csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, float_format=FLOAT_FORMAT)


def _read_back(table: pd.DataFrame) -> pd.DataFrame:
    """The table as a reader of its CSV sees it: both sides of a comparison are rounded alike."""
    return pd.read_csv(io.StringIO(_as_csv(table))) if len(table.columns) else table


def _agreement(name: str, rows: int) -> str:
    return f"{name}: {rows} rows, as expected"


def _row(row: pd.Series, keys: list[str]) -> str:
    return ", ".join(f"{key}={row[key]}" for key in keys)


def _is_optional(row: pd.Series, optional: bool | Mapping[str, object]) -> bool:
    if isinstance(optional, bool):
        return optional
    return any(row.get(column) in _as_list(values) for column, values in optional.items())


def _as_list(values: object) -> list:
    return list(values) if isinstance(values, (list, tuple, set)) else [values]


def _by_key(table: pd.DataFrame, keys: list[str]) -> dict[tuple, pd.Series]:
    # As text: a column of numbers in which one side has a gap is read as floats there and as integers here.
    return {tuple(_key(row[key]) for key in keys): row for _, row in table.iterrows()}


def _key(value: object) -> str:
    whole = isinstance(value, (float, np.floating)) and math.isfinite(value) and value == int(value)
    return str(int(value)) if whole else str(value)


def _differences(found, expected, keys, tolerance, optional) -> list[str]:
    problems = [f"  column {c!r} is expected and missing" for c in expected.columns if c not in found.columns]
    problems += [f"  column {c!r} is new" for c in found.columns if c not in expected.columns]
    here, there = _by_key(found, keys), _by_key(expected, keys)
    for key, row in there.items():
        if key not in here and not _is_optional(row, optional):
            problems.append(f"  row {_row(row, keys)} is expected and missing")
    for key, row in here.items():
        if key not in there:
            if not _is_optional(row, optional):
                problems.append(f"  row {_row(row, keys)} is new")
            continue
        for column in found.columns:
            if column in keys or column not in expected.columns:
                continue
            problem = _difference(row[column], there[key][column], _allowed(column, tolerance))
            if problem:
                problems.append(f"  row {_row(row, keys)}, column {column}: {problem}")
    if len(found) and len(expected) and not here.keys() & there.keys():
        problems.append("  no row is in both: are the keys the right ones?")
    return problems


def _allowed(column: str, tolerance: dict[str, float | None]) -> float | None:
    for pattern, points in tolerance.items():
        if fnmatch.fnmatchcase(column, pattern):
            return points
    return 0.0


def _difference(found: object, expected: object, allowed: float | None) -> str | None:
    if allowed is None or (pd.isna(found) and pd.isna(expected)):
        return None
    numbers = all(isinstance(value, (int, float, np.number)) for value in (found, expected))
    if not numbers:
        return None if str(found) == str(expected) else f"found {found!s}, expected {expected!s}"
    if found == expected or abs(found - expected) <= allowed + 1e-12:
        return None
    return f"found {found:g}, expected {expected:g} (± {allowed:g})"


def _put_up(found, path: Path, target: Path, keys: list[str], optional) -> None:
    """Write the table to be accepted; optional rows that could not be made here are kept as they were."""
    kept = found
    if path.exists() and optional:
        expected = pd.read_csv(path)
        here = _by_key(found, keys)
        old = [
            row
            for key, row in _by_key(expected, keys).items()
            if key not in here and _is_optional(row, optional)
        ]
        if old:
            kept = pd.concat([found, pd.DataFrame(old)[list(found.columns)]], ignore_index=True)
    with paths.atomic(target) as temporary:
        temporary.write_text(_as_csv(kept), encoding="utf-8")


def _readable(column: pd.Series, name: str) -> pd.Series:
    if not pd.api.types.is_float_dtype(column):
        return column.map(lambda value: "" if pd.isna(value) else str(value))
    return column.map(lambda value: _readable_number(value, name))


def _readable_number(value: float, name: str) -> str:
    if math.isnan(value):
        return ""
    if name.startswith("acc_"):
        return f"{value:.1f}"
    if name.endswith("_km"):
        return f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:.4g}"
