"""Run numbered notebooks: one with parameters, one to accept its results, all in order, or the runs of a sweep."""

import ast
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pandas as pd
from filelock import FileLock, Timeout

from geoclip import paths
from geoclip.reproduce import report
from geoclip.reproduce.profiles import Profile
from geoclip.studies.processes import end_with_parent

CELL_TIMEOUT_S = 1200
KERNEL_TIMEOUT_S = 180
SHOWN = (
    "^(data|benchmark|model|protocol|setting|split|seed|acc_.*|median_km|geoscore|n)$"  # columns of results
)


def environment() -> dict[str, str]:
    """Environment variables that make a notebook's outputs independent of the machine; creates their folders."""
    paths.make_variables_absolute()  # a notebook runs in a folder of its own
    paths.geoclip_data()
    folders = {
        "JUPYTER_CONFIG_DIR": "jupyter/config",
        "JUPYTER_DATA_DIR": "jupyter/data",
        "JUPYTER_RUNTIME_DIR": "jupyter/runtime",
        "IPYTHONDIR": "ipython",
        "MPLCONFIGDIR": "matplotlib",
    }
    return {name: str(paths.make_folder(paths.CACHE / folder)) for name, folder in folders.items()} | {
        "JUPYTER_PATH": "",
        "JUPYTER_PREFER_ENV_PATH": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONHASHSEED": "0",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def run(
    path: Path,
    parameters: Mapping[str, object] | None = None,
    out: Path | None = None,
    cell_timeout_s: int | None = CELL_TIMEOUT_S,
) -> Path:
    """Execute the notebook `path` in its own folder, write it with its outputs and return where.

    parameters: override those of the cell tagged `parameters`. out: by default data/results/runs/NAME.ipynb.
    If a cell fails or takes longer than `cell_timeout_s` (None: no limit), `out` is left as it was,
    NAME.failed.ipynb beside it holds the notebook up to the failure, and papermill's error is raised.
    """
    import nbformat
    import papermill

    path = Path(path).resolve()
    out = Path(out) if out else paths.RESULTS / "runs" / path.name
    known = declared(path)
    if unknown := sorted(set(parameters or {}) - set(known)):
        raise ValueError(f"{path.name} has no parameter {', '.join(unknown)}; it has {', '.join(known)}")
    failed = out.with_suffix(".failed.ipynb")
    how = {"kernel_name": "python3", "language": "python", "cwd": path.parent}
    how |= {"start_timeout": KERNEL_TIMEOUT_S, "execution_timeout": cell_timeout_s}
    how |= {"progress_bar": False, "extra_arguments": ["--log-level=CRITICAL"]}
    with paths.atomic(out) as temporary, mock.patch.dict(os.environ, environment()):
        try:
            papermill.execute_notebook(path, temporary, dict(parameters or {}), **how)
        except Exception:
            shutil.copyfile(temporary, failed)
            raise
        notebook = nbformat.read(temporary, as_version=4)
        nbformat.write(without_stamps(notebook), temporary)
    failed.unlink(missing_ok=True)
    return out


def declared(path: Path) -> dict[str, object]:
    """Names and default values of the parameters in the notebook's cell tagged `parameters`."""
    import papermill

    values = {}
    for name, about in papermill.inspect_notebook(str(path)).items():
        try:
            values[name] = ast.literal_eval(about["default"])
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{path.name}: parameter {name} is not a literal: {about['default']}") from error
    return values


def without_stamps(notebook):
    """The notebook without what changes in each run: times, versions, names of kernels."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        tags = [tag for tag in cell.metadata.get("tags", []) if tag != "papermill-error-cell-tag"]
        cell.metadata = {"tags": tags} if tags else {}
        for output in cell.get("outputs", []):
            output.get("metadata", {}).pop("papermill", None)
    return notebook


def numbered() -> list[Path]:
    """The notebooks notebooks/NN_name.ipynb, in the order of their numbers."""
    return sorted(p for p in paths.NOTEBOOKS.glob("*.ipynb") if re.fullmatch(r"\d\d_\w+\.ipynb", p.name))


def find(name: str | Path) -> Path:
    """The notebook of this path, stem or number ("3" and "03" are the same); raises ValueError if there is none."""
    if Path(name).is_file():
        return Path(name).resolve()
    stem = f"{Path(name).name.removesuffix('.ipynb'):0>2}"
    found = [path for path in numbered() if path.stem == stem or path.name.startswith(f"{stem}_")]
    if len(found) != 1:
        there = ", ".join(path.stem for path in numbered())
        raise ValueError(f"there is no notebook {str(name)!r}; give a path or a number of {there}")
    return found[0]


def accept(number: str) -> list[Path]:
    """Run notebook `number` and make its results the expected ones; returns the files written.

    Its tables and parameters go to data/expected, and the executed notebook replaces the one in notebooks/.
    Nothing changes if a cell fails. Tables in data/expected that the notebook no longer makes are removed.
    """
    path, accepting = find(number), report.ACCEPT_VARIABLE
    with tempfile.TemporaryDirectory() as offered, mock.patch.dict(os.environ, {accepting: offered}):
        executed = run(path)
        sources = {paths.EXPECTED / table.name: table for table in sorted(Path(offered).glob("*.csv"))}
        if sources:
            parameters = Path(offered) / report.accepted_parameters(path.stem).name
            values = report.as_json(declared(path))
            parameters.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
            sources[paths.EXPECTED / parameters.name] = parameters
        sources[path] = executed
        for target, source in sources.items():
            with paths.atomic(target) as temporary:
                shutil.copyfile(source, temporary)
    for old in set(paths.EXPECTED.glob(f"{path.name[:2]}_*.csv")) - set(sources):
        old.unlink()
        print(f"removed {short(old)}: the notebook no longer makes it")
    return list(sources)


def short(path: Path) -> str:
    """`path` relative to the repository, if it lies there."""
    return os.path.relpath(path, paths.ROOT) if path.is_relative_to(paths.ROOT) else str(path)


@dataclass(frozen=True)
class Job:
    """One run of a notebook in a process of its own."""

    notebook: Path
    label: str
    parameters: Mapping[str, object]
    out: Path
    of_sweep: bool = False  # results go beside `out`, without a time limit, and only if `out` does not exist

    def __call__(self, wait: bool) -> tuple[str, str] | None:
        """Run it and return what became of it and why it failed, if it did.

        If another process is running it: wait for that, or return None.
        """
        folder, began = str(paths.make_folder(self.out.parent)), time.monotonic()
        own = {"GEOCLIP_RESULTS": folder, "GEOCLIP_FIGURES": folder} if self.of_sweep else {}
        lock = FileLock(self.out.with_suffix(".lock"), timeout=-1 if wait else 0)
        try:
            with lock, mock.patch.dict(os.environ, own):
                if self.of_sweep and self.out.exists():
                    return "kept", ""
                limit_s = None if self.of_sweep else CELL_TIMEOUT_S
                run(self.notebook, self.parameters, self.out, limit_s)
        except Timeout:
            return None
        except SystemExit:  # by SIGTERM; the pool would keep it as a result and start the next run
            os._exit(143)
        except Exception as error:  # whatever a notebook does, the others are run
            kind, said = getattr(error, "ename", type(error).__name__), str(getattr(error, "evalue", error))
            failed = short(self.out.with_suffix(".failed.ipynb"))
            reason = f"{kind}: {said.strip()[:600]}\n  see {failed}"
            return f"failed, {time.monotonic() - began:.0f} s", reason
        return f"ran, {time.monotonic() - began:.0f} s", ""


def run_jobs(jobs: Sequence[Job], workers: int = 1, devices: Sequence[str] = ()) -> list[tuple[Job, str]]:
    """Run notebooks in `workers` processes and print a line as each ends; returns the failed ones and why.

    The cores are divided among the processes; with `devices`, each sees one of them (CUDA_VISIBLE_DEVICES).
    If this process ends early, even if it is killed, running kernels are shut down.
    """
    context = multiprocessing.get_context("spawn")
    slots = context.SimpleQueue()
    for number in range(workers):
        slots.put(devices[number % len(devices)] if devices else "")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (slots, workers))
    left, failed, began = list(jobs), [], time.monotonic()
    try:
        for wait in (False, True):  # first the jobs that no other process is running
            running = {pool.submit(job, wait): job for job in left}
            for future in as_completed(running):
                if (outcome := future.result()) is None:
                    continue
                job, (said, reason) = running[future], outcome
                left.remove(job)
                done = len(jobs) - len(left)
                minutes = len(left) * (time.monotonic() - began) / done / 60
                print(f"[{done} of {len(jobs)}] {job.label} · {said} · about {minutes:.0f} min left")
                if reason:
                    failed.append((job, reason))
                    print(f"    {reason}")
                sys.stdout.flush()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def _start_worker(slots, workers: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    if device := slots.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # else it lists what an ended kernel left open
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the kernel is shut down
    end_with_parent(30)


def reproduce(only: Sequence[str], profile: Profile) -> int:
    """Run all numbered notebooks, or `only` some, in order, and print the published accuracies and their results.

    Returns 0 if all went well, else 1.
    """
    todo, jobs, failed = [find(number) for number in only] or numbered(), [], []
    if not todo:
        raise ValueError(f"there is no notebook NN_name.ipynb in {paths.NOTEBOOKS}")
    for path in todo:
        known = declared(path)
        parameters = profile.whole(path, known)
        job = Job(path, path.stem, parameters, paths.RESULTS / "runs" / path.name)
        if missing := profile.missing(known | parameters):
            failed.append((job, "; ".join(missing)))
        else:
            jobs.append(job)
            for line in profile.left_out(known | parameters):
                print(f"{path.stem}: {line}", flush=True)
    failed += run_jobs(jobs)
    print(f"\n{len(todo) - len(failed)} of {len(todo)} notebooks ran")
    found = [path for nb in todo for path in sorted(paths.RESULTS.glob(f"{nb.name[:2]}_*.csv"))]
    for path in [paths.PAPER / "benchmarks.csv", *found]:
        table = pd.read_csv(path).dropna(axis=1, how="all")
        print(f"\n{'Found here' if path in found else 'Published'} ({short(path)})")
        if "acc_25km" in table:
            report.show(table.filter(regex=SHOWN))
    for job, reason in failed:
        print(f"\nFAILED {job.notebook.name}: {reason}")
    return 1 if failed else 0
