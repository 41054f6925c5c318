"""Many runs of one notebook: a grid from a YAML profile, each run in its own process and kept by its hash."""

import ast
import hashlib
import itertools
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from geoclip.paths import NOTEBOOKS, RESULTS, ROOT, atomic, make_folder

if TYPE_CHECKING:  # a run's process does without, and starts sooner
    import pandas as pd

PROFILES = NOTEBOOKS / "profiles"
BUSY = 75  # exit status of a worker whose run another sweep holds (EX_TEMPFAIL)
SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
LOWERED = str.maketrans(SUPERSCRIPTS, "0123456789")
KEYS = ("data", "setting", "split", "seed")


@dataclass(frozen=True)
class Profile:
    """A file of notebooks/profiles.

    parameters: given to every notebook whose parameters cell names them. notebooks: stem → its own
    `parameters`, and its `grid`. seeds: how many, where the command line does not say. data: what the
    notebooks read: name → `parameter` that names it (and `key`, where that is a mapping, `outer/inner` in nested ones; no parameter: it
    is always there), `samples` and their `source`, and `make`, the command that makes it.
    """

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    notebooks: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: int = 3
    data: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run of one notebook: its parameters, and the folder that keeps what it makes."""

    notebook: Path
    label: str
    parameters: dict[str, Any]
    folder: Path

    @property
    def output(self) -> Path:
        """The executed notebook; it exists when, and only when, the run came to its end."""
        return self.folder / self.notebook.name

    @property
    def failed(self) -> Path:
        """The executed notebook of a run that failed, up to the cell that did."""
        return self.folder / f"{self.notebook.stem}.failed.ipynb"

    @property
    def log(self) -> Path:
        """What the run's process printed."""
        return self.folder / "log.txt"

    @property
    def runs(self) -> Path:
        """The run's tidy table, written by the notebook: columns data, setting, split, seed, acc_…."""
        return self.folder / f"{self.notebook.stem}_runs.csv"

    @property
    def lock(self) -> FileLock:
        """Held by the process that runs this job, until it ends, however it ends."""
        return FileLock(self.folder / "lock")


def load_profile(name: str | Path) -> Profile:
    """The profile of this name (notebooks/profiles/NAME.yaml) or path; `$NAME` stands for the environment's.

    Raises FileNotFoundError, and ValueError for YAML or keys that a profile cannot have.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise FileNotFoundError(f"there is no profile {path}; notebooks/profiles has {known or 'none'}")
    try:
        content = yaml.safe_load(os.path.expandvars(path.read_text(encoding="utf-8"))) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    unknown = set(content) - {"parameters", "notebooks", "seeds", "data"}
    if unknown:
        raise ValueError(
            f"{path}: a profile has parameters, notebooks, seeds and data, not {sorted(unknown)}"
        )
    return Profile(name=path.stem, **content)


def find_notebook(name: str | Path) -> Path:
    """The notebook of this path, file name, stem or number (`04`). Raises FileNotFoundError or ValueError."""
    if Path(name).is_file():
        return Path(name).resolve()
    stem = Path(name).name.removesuffix(".ipynb")
    found = sorted(NOTEBOOKS.glob(f"{stem}*.ipynb"))
    if len(found) > 1:
        raise ValueError(f"{name} may be {', '.join(path.name for path in found)}; say which")
    if not found:
        raise FileNotFoundError(
            f"there is no notebook {name}; give a path or a number of notebooks/, such as 04"
        )
    return found[0]


def default_parameters(notebook: Path) -> dict[str, Any]:
    """Names and values of the notebook's cell tagged `parameters`; ValueError where one is no literal."""
    cells = [cell for cell in _cells(notebook) if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"{notebook} has {len(cells)} cells tagged parameters; a sweep needs one")
    values = {}
    for statement in ast.parse("".join(cells[0]["source"])).body:
        try:
            target = statement.targets[0].id if isinstance(statement, ast.Assign) else statement.target.id
            values[target] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"{notebook}: {ast.unparse(statement)!r} does not set a name to a literal"
            ) from error
    return values


def _cells(notebook: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{notebook} is not a Jupyter notebook") from error


def plan(
    notebook: Path,
    profile: Profile,
    seeds: int | None = None,
    changes: dict[str, Any] | None = None,
    results: Path = RESULTS,
) -> list[Job]:
    """The notebook's grid as jobs, in a fixed order: every value of every grid parameter, times every seed.

    A grid parameter that is a list is given one element a run; one that is a mapping, one item (so that
    `SETTINGS: {a: …, b: …}` gives SETTINGS = {a: …}, then {b: …}); an empty grid is the notebook's own SETTINGS.
    SEEDS, where the notebook has such a list, is given [0], [1], …. `changes` go over the profile's parameters.
    The folder's name ends in the hash of the notebook's code, the parameters, the package's code and the data:
    a job of another hash is another run.

    Raises ValueError for a parameter that the notebook does not have, and for fewer than one seed.
    """
    known = default_parameters(notebook)
    own = profile.notebooks.get(notebook.stem, {})
    unknown = set(own) - {"parameters", "grid"}
    if unknown:
        raise ValueError(
            f"profile {profile.name}, {notebook.stem}: has parameters and grid, not {sorted(unknown)}"
        )
    shared = {name: value for name, value in profile.parameters.items() if name in known}
    given = {**shared, **own.get("parameters", {}), **(changes or {})}
    axes = own.get("grid", {})
    if "grid" in own and not axes and "SETTINGS" in known:
        axes = {"SETTINGS": known["SETTINGS"]}
    axes = {name: values for name, values in axes.items() if name not in (changes or {})}
    if wrong := sorted((set(given) | set(axes)) - set(known)):
        raise ValueError(f"{notebook.name} has no parameter {', '.join(wrong)}; it has {', '.join(known)}")
    points = [_axis(name, values) for name, values in axes.items()]
    if isinstance(known.get("SEEDS"), list):  # a notebook whose SEEDS is a number repeats by itself
        count = profile.seeds if seeds is None else seeds
        if count < 1:
            raise ValueError(f"a sweep needs at least one seed, not {count}")
        points.append([(f"seed {seed}", "SEEDS", [seed]) for seed in range(count)])
    jobs = []
    for point in itertools.product(*points):
        label = " · ".join(text for text, _, _ in point) or "defaults"
        parameters = given | {name: value for _, name, value in point}
        slug = re.sub(r"[^\w.,-]+", "_", label).strip("_")[:60]
        key = run_hash(notebook, known | parameters)
        jobs.append(Job(notebook, label, parameters, results / "runs" / notebook.stem / f"{slug}-{key}"))
    return jobs


def _axis(name: str, values: Any) -> list[tuple[str, str, Any]]:
    if isinstance(values, dict):
        return [(str(key), name, {key: value}) for key, value in values.items()]
    if isinstance(values, list):
        return [(f"{name} {value}", name, value) for value in values]
    raise ValueError(f"the grid's {name} is {values!r}; give a list or a mapping of values")


def describe(notebook: Path, profile: Profile, jobs: Sequence[Job]) -> list[str]:
    """Lines that say what a sweep of these jobs would run, on how many samples, and what is missing."""
    kept = sum(job.output.exists() for job in jobs)
    lines = [f"{notebook.stem}: {len(jobs)} runs, {kept} kept, {len(jobs) - kept} to run"]
    known = default_parameters(notebook)
    given = known | (jobs[0].parameters if jobs else {})
    for name in sorted(jobs[0].parameters if jobs else {}):
        values = {json.dumps(job.parameters[name], ensure_ascii=False): None for job in jobs}
        more = f" … {len(values)} values" if len(values) > 1 else ""
        lines.append(f"    {name} = {next(iter(values))}{more}")
    settings = [changes for job in jobs for changes in (job.parameters.get("SETTINGS") or {}).values()]
    fractions = sorted({changes.get("fraction", 1) for changes in settings if changes}, reverse=True) or [1]
    for name, about in profile.data.items():
        parameter, key = about.get("parameter"), about.get("key")
        if parameter is not None and parameter not in known:
            continue
        place = None if parameter is None else given[parameter]
        for part in () if key is None else key.split("/") if isinstance(key, str) else (key,):
            place = (place or {}).get(part)
        lines.append(
            f"    {name}: " + "; ".join(_about_data(place, about, fractions if key is None else [1]))
        )
    return lines


def _about_data(place: str | None, about: dict[str, Any], fractions: Sequence[float]) -> list[str]:
    """How many samples, where from, and what is missing."""
    samples, missing = about["samples"], None
    said = f" ({about['source']})" if "source" in about else ""
    if "parameter" in about:
        if place is None or not Path(place).exists():
            missing = f"MISSING: {place or about['parameter'] + ' is not set'}"
        elif (Path(place) / "features.json").is_file():
            from geoclip.datasets.features import FeatureData

            try:
                samples, said = len(FeatureData(place)), f" in {place}"
            except ValueError as error:
                missing = f"MISSING: {error}"
    counts = ", ".join(f"{round(samples * fraction):,}" for fraction in fractions)
    words = [f"{counts} samples{said}"]
    if missing:
        words += [missing] + ([f"make it with: {about['make']}"] if "make" in about else [])
    return words


def run_hash(notebook: Path, parameters: dict[str, Any]) -> str:
    """16 hex digits of everything a run's outcome depends on: notebook code, parameters, package, data.

    Of data that a parameter names (a folder or a file), the files' names, sizes and times of change count.
    """
    code = [cell["source"] for cell in _cells(notebook) if cell["cell_type"] == "code"]
    package = [
        (str(path.relative_to(ROOT)), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted((ROOT / "geoclip").rglob("*.py"))
    ]
    data = [_fingerprint(value) for value in _strings(parameters)]
    whole = json.dumps([["".join(lines) for lines in code], parameters, package, data], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def _fingerprint(text: str) -> list[tuple[str, int, int]]:
    path = Path(text)
    if "/" not in text or not path.exists():
        return []
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def shard(jobs: Sequence[Job], part: str) -> list[Job]:
    """Part `3/16` of the jobs: the third of sixteen, each job in one part, no two parts differing by more
    than one job. Every machine finds its part by itself. Raises ValueError for another form."""
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"a shard is written 3/16 (the third of sixteen, from 1), not {part!r}")
    return list(jobs[int(match[1]) - 1 :: int(match[2])])


@dataclass(frozen=True)
class Outcome:
    """How a job ended: "kept" (it had been run before), "ran" or "failed"; seconds; the last line of a failure."""

    job: Job
    state: str
    seconds: float = 0.0
    reason: str = ""


def sweep(
    jobs: Sequence[Job], workers: int = 1, devices: Sequence[str] = (), say: Callable[[str], None] = print
) -> list[Outcome]:
    """Run what has not been run, `workers` at a time; a failed run is told and the rest goes on.

    Each run is a process of its own that holds the job's lock, so that two sweeps share the work and never
    run one job twice at once; a killed sweep leaves whole runs only, and the next one goes on from there.
    With `devices`, each worker sees one of them (CUDA_VISIBLE_DEVICES). The processor's cores are divided.
    """
    if workers < 1:
        raise ValueError(f"a sweep needs at least one job at a time, not {workers}")
    return _Sweep(jobs, workers, devices, say).run()


class _Sweep:
    def __init__(self, jobs: Sequence[Job], workers: int, devices: Sequence[str], say: Callable[[str], None]):
        self.jobs, self.workers, self.say = jobs, workers, say
        self.waiting = deque(jobs)
        self.outcomes: dict[Path, Outcome] = {}
        self.state = threading.Lock()
        self.stop = threading.Event()
        self.free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for number in range(workers):
            self.free.put(devices[number % len(devices)] if devices else "")
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.started = time.monotonic()

    def run(self) -> list[Outcome]:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            self.stop.set()
            for process in list(self.processes):
                process.terminate()
            raise
        return [self.outcomes[job.folder] for job in self.jobs]

    def _work(self) -> None:
        while not self.stop.is_set():
            with self.state:
                if not self.waiting:
                    return
                job = self.waiting.popleft()
            outcome = Outcome(job, "kept") if job.output.exists() else self._start(job)
            if outcome is None:  # another sweep is at it: come back when the others are done
                with self.state:
                    self.waiting.append(job)
                self.stop.wait(0.5)
            else:
                self._tell(outcome)

    def _start(self, job: Job) -> Outcome | None:
        make_folder(job.folder)
        try:
            job.lock.acquire(
                timeout=0
            ).lock.release()  # spares the start of a process that would find it held
        except Timeout:
            return None
        device, began = self.free.get(), time.monotonic()
        environment = os.environ | {
            "GEOCLIP_RESULTS": str(job.folder),
            "GEOCLIP_FIGURES": str(job.folder),
            "OMP_NUM_THREADS": os.environ.get(
                "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.workers))
            ),
        }
        if device:
            environment["CUDA_VISIBLE_DEVICES"] = device
        text = json.dumps(
            {
                "notebook": str(job.notebook),
                "parameters": job.parameters,
                "folder": str(job.folder),
                "label": job.label,
            }
        )
        # What it prints goes to a file, not to a pipe: it must outlive this process where that is killed.
        try:
            with job.log.open("wb") as log:
                command = [sys.executable, "-m", "geoclip.reproduce.sweep"]
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
                )
            self.processes.add(process)
            process.communicate(text.encode())
            self.processes.discard(process)
        finally:
            self.free.put(device)
        if process.returncode == BUSY:
            return None
        seconds = time.monotonic() - began
        if process.returncode == 0:
            return Outcome(job, "ran", seconds)
        if process.returncode < 0:
            return Outcome(job, "failed", seconds, f"killed by signal {-process.returncode}")
        lines = job.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return Outcome(
            job, "failed", seconds, next((line for line in reversed(lines) if line.strip()), "no word")
        )

    def _tell(self, outcome: Outcome) -> None:
        with self.state:
            self.outcomes[outcome.job.folder] = outcome
            done = len(self.outcomes)
            ran = sum(one.state != "kept" for one in self.outcomes.values())
            rest = len(self.jobs) - done
            left = ""
            if rest and ran:
                seconds = rest * (time.monotonic() - self.started) / ran
                left = (
                    f" · about {seconds / 60:.0f} min left"
                    if seconds > 90
                    else f" · about {seconds:.0f} s left"
                )
            what = "kept" if outcome.state == "kept" else f"{outcome.state}, {outcome.seconds:.0f} s"
            line = (
                f"[{done:>{len(str(len(self.jobs)))}} of {len(self.jobs)}] {outcome.job.label} · {what}{left}"
            )
            self.say(line + (f"\n    {outcome.reason}" if outcome.reason else ""))


def main() -> int:
    """One job, as JSON on the standard input, in this process; BUSY where another process holds it."""
    from geoclip.reproduce import notebooks

    given = json.loads(sys.stdin.read())
    job = Job(Path(given["notebook"]), given["label"], given["parameters"], Path(given["folder"]))
    try:
        with job.lock.acquire(timeout=0):
            if not job.output.exists():
                # a training run at the paper's size is one cell and takes hours
                notebooks.run(job.notebook, job.parameters, job.output, cell_timeout_s=None)
    except Timeout:
        return BUSY
    return 0


def collect(jobs: Sequence[Job]) -> "pd.DataFrame":
    """What the finished jobs found, tidy: data, setting, split, seed, threshold_km, accuracy (percent), n.

    Warns where runs differ on a setting and seed that several of them have. Raises ValueError where a finished
    run has no table.
    """
    import pandas as pd

    tables = []
    for job in jobs:
        if job.output.exists():
            if not job.runs.exists():
                raise ValueError(
                    f"{job.output} was run, but wrote no {job.runs.name}; a sweep collects that table"
                )
            tables.append(pd.read_csv(job.runs))
    if not tables:
        return pd.DataFrame(columns=[*KEYS, "threshold_km", "accuracy", "n"])
    whole = pd.concat(tables, ignore_index=True)
    accuracies = [name for name in whole if re.fullmatch(r"acc_\d+km", name)]
    repeated = whole.groupby(list(KEYS), sort=False)[accuracies].agg(lambda found: found.max() - found.min())
    if (apart := repeated.max(axis=None)) > 0:
        # every run trains the paper's setting too; machines that share no cache do so each for itself
        where = dict(zip(KEYS, repeated.max(axis=1).idxmax(), strict=True))
        warnings.warn(
            f"runs of one setting differ by up to {apart:.2f} points ({where}); the first is kept",
            stacklevel=2,
        )
    whole = whole.drop_duplicates(list(KEYS), ignore_index=True)
    tidy = whole.melt([*KEYS, "n"], accuracies, var_name="threshold_km", value_name="accuracy")
    tidy["threshold_km"] = tidy["threshold_km"].str.extract(r"(\d+)", expand=False).astype(int)
    rank = {name: number for number, name in enumerate(whole["setting"].unique())}
    tidy = tidy.sort_values(
        ["data", "setting", "split", "seed", "threshold_km"],
        key=lambda column: column.map(rank) if column.name == "setting" else column,
        ignore_index=True,
    )
    return tidy[[*KEYS, "threshold_km", "accuracy", "n"]]


def paper_table(tidy: "pd.DataFrame") -> "pd.DataFrame":
    """The paper's table: a row per data, split and setting, a column per threshold, "mean ± half interval"."""
    from geoclip.studies.statistics import plus_minus, t_interval

    cells = tidy.groupby(["data", "split", "setting", "threshold_km"], sort=False)["accuracy"]
    text = cells.agg(lambda values: plus_minus(*t_interval(values))).unstack("threshold_km", sort=False)
    text.columns = [f"{threshold:,} km" for threshold in text.columns]
    seeds = tidy.groupby(["data", "split", "setting"], sort=False)["seed"].nunique()
    return text.assign(seeds=seeds).reset_index()


def write_tables(tidy: "pd.DataFrame", stem: str, results: Path = RESULTS) -> list[Path]:
    """STEM_sweep.csv (tidy) and STEM_table.csv, .md and .tex (booktabs); returns the paths."""
    table = paper_table(tidy)
    written = {
        f"{stem}_sweep.csv": tidy.to_csv(index=False),
        f"{stem}_table.csv": table.to_csv(index=False),
        f"{stem}_table.md": table.to_markdown(index=False) + "\n",
        f"{stem}_table.tex": _latex(table, stem),
    }
    for name, text in written.items():
        with atomic(results / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [results / name for name in written]


def _latex(table: "pd.DataFrame", stem: str) -> str:
    texts = list(table.select_dtypes(exclude="number"))
    escaped = table.rename(columns=lambda name: name.replace("_", r"\_"))
    styler = escaped.style.hide(axis="index").format(escape="latex")
    text = styler.to_latex(
        hrules=True,
        label=f"tab:{stem}",
        caption="Percent of places found within each distance; mean and half the 95\\,\\% interval over seeds.",
        column_format="".join("l" if name in texts[:3] else "r" for name in table),
        position_float="centering",
    )
    text = re.sub(f"[{SUPERSCRIPTS}]+", lambda raised: f"$^{{{raised[0].translate(LOWERED)}}}$", text)
    return text.replace("±", r"$\pm$").replace("σ", r"$\sigma$").replace("×", r"$\times$")


if __name__ == "__main__":
    sys.exit(main())
