"""Many runs of one notebook: a grid of settings and seeds from a profile, and the paper's table of their results."""

import hashlib
import itertools
import json
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from geoclip import paths
from geoclip.datasets import features
from geoclip.reproduce import notebooks
from geoclip.reproduce.notebooks import Job
from geoclip.reproduce.profiles import Profile
from geoclip.studies import runner, statistics
from geoclip.training import runs

KEYS = ["data", "split", "setting", "seed"]


def plan(
    notebook: Path, profile: Profile, seeds: int | None = None, changes: Mapping[str, Any] | None = None
) -> list[Job]:
    """The notebook's grid as jobs in a fixed order: every value of every grid parameter, times every seed.

    A grid parameter that is a list gets one element in each run; one that is a mapping gets one item, so that
    `SETTINGS: {a: …, b: …}` gives SETTINGS = {a: …}, then {b: …}. An empty grid stands for the notebook's own
    SETTINGS. A parameter SEEDS that is a list gets [0], then [1], … `changes` override the profile.

    Each run has a folder named after the hash of all that it depends on, and is not repeated once it is there.
    """
    known, changes = notebooks.declared(notebook), dict(changes or {})
    given = profile.given(notebook, known) | changes
    grid = profile.notebooks.get(notebook.stem, {}).get("grid")
    if grid == {} and "SETTINGS" in known:
        grid = {"SETTINGS": known["SETTINGS"]}
    axes = []  # of (label, parameter, value)
    for name, values in (grid or {}).items():
        if not isinstance(values, dict | list):
            raise ValueError(f"the grid's {name} is {values!r}; give a list or a mapping of values")
        if name in changes:
            continue
        if isinstance(values, dict):
            axes.append([(str(key), name, {key: value}) for key, value in values.items()])
        else:
            axes.append([(f"{name} {value}", name, value) for value in values])
    if isinstance(known.get("SEEDS"), list):
        count = profile.seeds if seeds is None else seeds
        if count < 1:
            raise ValueError(f"a sweep needs at least one seed, not {count}")
        axes.append([(f"seed {seed}", "SEEDS", [seed]) for seed in range(count)])
    jobs, runs_folder = [], paths.RESULTS / "runs" / notebook.stem
    for point in itertools.product(*axes):
        label = " · ".join(text for text, _, _ in point) or "defaults"
        parameters = given | {name: value for _, name, value in point}
        slug = re.sub(r"[^\w.,-]+", "_", label).strip("_")[:60]
        out = runs_folder / f"{slug}-{run_hash(notebook, known | parameters)}" / notebook.name
        jobs.append(Job(notebook, label, parameters, out, of_sweep=True))
    return jobs


def run_hash(notebook: Path, parameters: Mapping[str, Any]) -> str:
    """16 hex digits of what a run depends on: code cells, parameters, RECIPE numbers, files named by parameters."""
    code = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    recipes = [module.RECIPE for module in (runs, features, runner)]
    texts = re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(parameters, ensure_ascii=False))
    whole = json.dumps([code, parameters, recipes, [_fingerprint(text) for text in texts]], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _fingerprint(text: str) -> list | str:
    """The text of a profile of this name; names, sizes and times of the files at this path; or nothing."""
    if (profile := paths.NOTEBOOKS / "profiles" / f"{text}.yaml").is_file():
        return profile.read_text(encoding="utf-8")
    files = [Path(text), *sorted(Path(text).rglob("*"))] if "/" in text else []
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


def describe(notebook: Path, profile: Profile, jobs: Sequence[Job]) -> list[str]:
    """Lines that say what a sweep of these jobs would run, on how many samples, and what is missing."""
    kept = sum(job.out.exists() for job in jobs)
    lines = [f"{notebook.stem}: {len(jobs)} runs, {kept} kept, {len(jobs) - kept} to run"]
    for name in sorted({name for job in jobs for name in job.parameters}):
        values = list(dict.fromkeys(json.dumps(job.parameters[name], ensure_ascii=False) for job in jobs))
        lines.append(f"    {name} = {values[0]}" + (f" … {len(values)} values" if len(values) > 1 else ""))
    settings = [changes for job in jobs for changes in (job.parameters.get("SETTINGS") or {}).values()]
    fractions = sorted({changes.get("fraction", 1) for changes in settings if changes}, reverse=True) or [1]
    given = notebooks.declared(notebook) | (jobs[0].parameters if jobs else {})
    for name, (samples, gone) in profile.samples(given, fractions).items():
        lines += [f"    {name}: {samples}", *([f"    {gone}"] if gone else [])]
    return lines


def shard(jobs: Sequence[Job], part: str) -> list[Job]:
    """Part `3/16` of the jobs, the third of sixteen: parts share no job, and differ by one in number at most."""
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"a shard is written 3/16 (the third of sixteen, from 1), not {part!r}")
    return list(jobs[int(match[1]) - 1 :: int(match[2])])


def collect(jobs: Sequence[Job]) -> pd.DataFrame:
    """The finished jobs' results: a row for each data set, split, setting and seed; accuracies in percent, and n.

    Warns if runs differ in a setting and seed that several of them have.
    """
    tables = [job.out.with_name(f"{job.notebook.stem}_runs.csv") for job in jobs if job.out.exists()]
    if missing := [table for table in tables if not table.exists()]:
        raise ValueError(f"the run in {missing[0].parent} wrote no {missing[0].name}, which a sweep collects")
    results = pd.concat(map(pd.read_csv, tables), ignore_index=True)
    repeated = results.groupby(KEYS)[_accuracies(results)]
    spread = (repeated.max() - repeated.min()).max(axis=1)
    # every run trains the paper's setting, on machines without a common cache separately
    if spread.max() > 0:
        where = dict(zip(KEYS, spread.idxmax(), strict=True))
        said = f"runs of one setting differ by up to {spread.max():.2f} points ({where}); the first is kept"
        warnings.warn(said, stacklevel=2)
    return results.drop_duplicates(KEYS).sort_values(["data", "split"], kind="stable", ignore_index=True)


def write_tables(results: pd.DataFrame, stem: str) -> list[Path]:
    """Write STEM_sweep.csv (tidy) and the paper's table as STEM_table.csv, .md and .tex; returns the paths."""
    by, accuracies = ["data", "split", "setting"], _accuracies(results)
    tidy = results.melt([*KEYS, "n"], accuracies, "threshold_km", "accuracy")
    tidy["threshold_km"] = tidy["threshold_km"].str.extract(r"(\d+)", expand=False)
    table = statistics.readable(statistics.over_seeds(results, by, accuracies), by, accuracies)
    table = table.rename(columns={name: f"{int(name[4:-2]):,} km" for name in accuracies})
    texts = {
        paths.RESULTS / f"{stem}_sweep.csv": tidy.to_csv(index=False),
        paths.RESULTS / f"{stem}_table.csv": table.to_csv(index=False),
        paths.RESULTS / f"{stem}_table.md": table.to_markdown(index=False) + "\n",
        paths.RESULTS / f"{stem}_table.tex": _latex(table, stem),
    }
    for path, text in texts.items():
        with paths.atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return list(texts)


def _accuracies(table: pd.DataFrame) -> list[str]:
    return [name for name in table if re.fullmatch(r"acc_\d+km", name)]


def _latex(table: pd.DataFrame, stem: str) -> str:
    caption = "Percent of images within each distance: mean and half the 95\\,\\% interval over seeds."
    text = table.to_latex(index=False, escape=True, label=f"tab:{stem}", caption=caption)
    text = re.sub("[⁰¹²³⁴-⁹]+", lambda raised: f"$^{{{unicodedata.normalize('NFKC', raised[0])}}}$", text)
    return text.replace("±", r"$\pm$").replace("σ", r"$\sigma$").replace("×", r"$\times$")
