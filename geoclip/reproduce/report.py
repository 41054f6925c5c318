"""What a notebook leaves behind: figures, tables with their provenance, and their comparison with accepted ones."""

import contextlib
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
from PIL import Image, ImageChops

from geoclip import paths

VERSIONS_OF = ("torch", "torchvision", "open_clip_torch", "lightning", "numpy", "pandas", "scikit-learn")
# `accept` sets this to a folder: tables are then written there, to become the expected ones, and not compared.
ACCEPT_VARIABLE = "GEOCLIP_ACCEPT"
FLOAT_FORMAT = "%.6g"


def provenance(config: object = None, data_hash: str | None = None) -> dict:
    """Where a result comes from: commit, uncommitted changes, data hash, configuration, library versions."""
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
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS_OF},
    }


def save_figure(figure, name: str) -> None:
    """Write a matplotlib figure to figures/NAME.png (150 dpi) and NAME.pdf, without dates.

    If the notebook's parameters are not those of the accepted run, they go to data/results/figures instead. A
    picture that differs from the one there by a level of colour at most, as between processors, is not replaced.
    """
    folder = paths.RESULTS / "figures" if changed_parameters(name) else paths.FIGURES
    no_dates = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}}
    for kind, metadata in no_dates.items():
        path, made = folder / f"{name}.{kind}", io.BytesIO()
        figure.savefig(made, format=kind, dpi=150, bbox_inches="tight", metadata=metadata)
        if not (kind == "png" and _alike(made, path)):
            with paths.atomic(path) as temporary:
                temporary.write_bytes(made.getvalue())


def _alike(made: io.BytesIO, kept: Path) -> bool:
    with contextlib.suppress(OSError), Image.open(made) as one, Image.open(kept) as other:
        difference = ImageChops.difference(one.convert("RGB"), other.convert("RGB"))
        return one.size == other.size and max(high for _, high in difference.getextrema()) <= 1
    return False


def save_results(table: pd.DataFrame, name: str, provenance: Mapping) -> None:
    """`save_table` to data/results/NAME.csv."""
    save_table(table, paths.RESULTS / f"{_checked(name)}.csv", provenance)


def save_table(table: pd.DataFrame, path: Path | str, provenance: Mapping) -> None:
    """Write `table` to `path`, a CSV with six significant digits, and `provenance` to a .json beside it."""
    path = Path(path)
    if path.suffix != ".csv":
        raise ValueError(f"{path} must end in .csv, so that its provenance can be the .json beside it")
    if table.empty:
        raise ValueError(f"the table for {path.name} has no rows; nothing was saved")
    with paths.atomic(path) as temporary:
        temporary.write_text(_as_csv(table), encoding="utf-8")
    with paths.atomic(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(dict(provenance), indent=2, default=str) + "\n", encoding="utf-8")


def accepted_parameters(name: str) -> Path:
    """The file of the accepted parameters of the notebook that owns `name`: data/expected/NN_parameters.json."""
    return paths.EXPECTED / f"{_checked(name)[:2]}_parameters.json"


def changed_parameters(name: str, parameters: Mapping[str, object] | None = None) -> list[str]:
    """Names of the parameters that differ from those of the accepted run of the notebook that owns `name`.

    parameters: by default the variables of the running notebook. Empty outside one, while a run is being
    accepted, and if none has been.
    """
    file, shell = accepted_parameters(name), _notebook()
    if parameters is None and shell is not None:
        parameters = shell.user_ns
    if parameters is None or ACCEPT_VARIABLE in os.environ or not file.exists():
        return []
    accepted = json.loads(file.read_text(encoding="utf-8"))
    return [key for key, value in accepted.items() if as_json(parameters.get(key)) != value]


def as_json(value: object) -> object:
    """`value` as JSON gives it back: tuples as lists, keys as text."""
    return json.loads(json.dumps(value, default=str))


def hold_to_expected(
    table: pd.DataFrame,
    name: str,
    keys: Sequence[str],
    tolerance: Mapping[str, float | None] | None = None,
    optional: bool | Mapping[str, Sequence[object]] = False,
) -> None:
    """Compare `table` with data/expected/NAME.csv row by row and print one line.

    Nothing is compared if a parameter of the notebook differs from the accepted run (changed_parameters).

    keys: columns that together identify a row. tolerance: column, or a pattern such as "acc_*" → largest accepted
    absolute difference in the column's unit; None: the column is not compared. The first matching pattern counts;
    columns without a pattern must agree in the six digits that are stored. optional: rows that may be missing on
    either side, because they need data of the user: True for all, or column → list of values.

    Raises AssertionError that names row, column and both values.
    """
    path = paths.EXPECTED / f"{_checked(name)}.csv"
    keys = list(keys)
    found = pd.read_csv(io.StringIO(_as_csv(table)))  # both sides of a comparison are rounded alike
    if (twice := found.duplicated(keys)).any():
        raise ValueError(f"{name}: two rows have the keys {_row(found[twice].iloc[0], keys)}; add a key")
    if changed := changed_parameters(name):
        verb = "differs" if len(changed) == 1 else "differ"
        print(f"{name}: not compared: {', '.join(changed)} {verb} from the accepted run")
        return
    if folder := os.environ.get(ACCEPT_VARIABLE):
        _offer(found, path, Path(folder) / path.name, keys, optional)
    elif not path.exists():
        raise FileNotFoundError(f"no results of {name} have been accepted: no data/expected/{path.name}")
    elif problems := _differences(found, pd.read_csv(path), keys, dict(tolerance or {}), optional):
        more = f"\n… and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise AssertionError(
            f"{name} differs from data/expected/{path.name}:\n" + "\n".join(problems[:10]) + more + "\n"
            "The parameters are those of the accepted run, so code, data or a library must have changed."
        )
    print(f"{name}: as expected")  # no count: optional rows must not change what is printed


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`table` as text for reading: percentages and short distances to 0.1, other numbers to four digits."""
    columns = {name: [_readable(value, str(name)) for value in table[name]] for name in table}
    return pd.DataFrame({heading(str(name)): column for name, column in columns.items()})


def heading(column: str) -> str:
    """Heading of a column: "≤ 2,500 km" for acc_2500km, and any other name as it is."""
    return re.sub(r"^acc_(\d+)km$", lambda match: f"≤ {int(match[1]):,} km", column)


def show(table: pd.DataFrame, compared_as: str | None = None) -> None:
    """Display `table`, rounded by `readable`: as HTML in a notebook, elsewhere as text.

    compared_as: name of the result whose comparison with data/expected covers these numbers; nbval leaves the
    digits to that comparison (tests/nbval.cfg), because they vary between machines.
    """
    rounded = readable(table)
    text, html = rounded.to_string(index=False), rounded.to_html(index=False, border=0)
    if compared_as:
        caption = f"Last digits vary between machines; they are compared as {_checked(compared_as)}."
        text, html = f"{text}\n{caption}", f"{html}\n<small>{caption}</small>"
    if _notebook() is None:
        print(text)
        return
    from IPython.display import display

    # DataFrame.style would give each table random ids, which nbval could not compare.
    display({"text/plain": text, "text/html": html}, raw=True)


def _notebook():
    """The IPython shell that runs this code, or None."""
    return sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None


def _checked(name: str) -> str:
    if not re.fullmatch(r"\d\d_[a-z0-9_]+", name):
        raise ValueError(f"{name!r} is not of the form NN_name, where NN is the number of a notebook")
    return name


def _git(*arguments: str) -> str | None:
    if not paths.CHECKOUT:
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _as_csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, float_format=FLOAT_FORMAT)


def _row(row: pd.Series, keys: list[str]) -> str:
    return ", ".join(f"{key}={row[key]}" for key in keys)


def _by_key(table: pd.DataFrame, keys: list[str]) -> dict[tuple[str, ...], pd.Series]:
    # Keys are text without ".0", because pandas reads a column of integers with a gap as floats.
    return {tuple(str(row[key]).removesuffix(".0") for key in keys): row for _, row in table.iterrows()}


def _only_in(one: dict, other: dict, optional) -> list[pd.Series]:
    """The rows of `one` without a row of the same key in `other`, but for optional ones."""
    return [row for key, row in one.items() if key not in other and not _is_optional(row, optional)]


def _is_optional(row: pd.Series, optional: bool | Mapping[str, Sequence[object]]) -> bool:
    if isinstance(optional, bool):
        return optional
    return any(row.get(column) in values for column, values in optional.items())


def _differences(found, expected, keys, tolerance, optional) -> list[str]:
    here, there = _by_key(found, keys), _by_key(expected, keys)
    problems = [f"  column {c!r} is expected and missing" for c in expected.columns if c not in found.columns]
    problems += [f"  column {c!r} is new" for c in found.columns if c not in expected.columns]
    missing, new = _only_in(there, here, optional), _only_in(here, there, optional)
    problems += [f"  row {_row(row, keys)} is expected and missing" for row in missing]
    problems += [f"  row {_row(row, keys)} is new" for row in new]
    if here and there and not here.keys() & there.keys():
        problems.append("  no row is in both: are the keys the right ones?")
    for column in [c for c in found.columns if c in expected.columns and c not in keys]:
        matching = (limit for pattern, limit in tolerance.items() if fnmatch.fnmatchcase(column, pattern))
        allowed = next(matching, 0.0)
        for key in [key for key in here if key in there]:
            if problem := _difference(here[key][column], there[key][column], allowed):
                problems.append(f"  row {_row(here[key], keys)}, column {column}: {problem}")
    return problems


def _difference(found: object, expected: object, allowed: float | None) -> str | None:
    if allowed is None or (pd.isna(found) and pd.isna(expected)):
        return None
    numbers = all(isinstance(value, (int, float, np.number)) for value in (found, expected))
    if not numbers:
        return None if str(found) == str(expected) else f"found {found!s}, expected {expected!s}"
    if found == expected or abs(found - expected) <= allowed + 1e-12:
        return None
    return f"found {found:g}, expected {expected:g} (± {allowed:g})"


def _offer(found, path: Path, target: Path, keys: list[str], optional) -> None:
    """Write the table to be accepted; optional rows that cannot be made here keep their accepted values."""
    if path.exists():
        kept = {k: row for k, row in _by_key(pd.read_csv(path), keys).items() if _is_optional(row, optional)}
        if old := _only_in(kept, _by_key(found, keys), False):
            found = pd.concat([found, pd.DataFrame(old)[list(found.columns)]], ignore_index=True)
    with paths.atomic(target) as temporary:
        temporary.write_text(_as_csv(found), encoding="utf-8")


def _readable(value: object, column: str) -> str:
    if pd.isna(value):
        return ""
    if not isinstance(value, (float, np.floating)):
        return str(value)
    if column.startswith("acc_"):
        return f"{value:.1f}"
    if column.endswith("_km"):
        return f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:.4g}"
