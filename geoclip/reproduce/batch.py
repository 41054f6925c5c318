"""Run many notebooks in processes: all of them in order, or the jobs of a sweep."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from geoclip import paths
from geoclip.reproduce import notebooks, report
from geoclip.reproduce.profiles import Profile


@dataclass(frozen=True)
class Job:
    """One run of a notebook in a process of its own.

    variables: environment variables of the run. once: skip the run if `out` exists, and leave it to another
    process if that is at it.
    """

    notebook: Path
    label: str
    parameters: Mapping[str, object]
    out: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    cell_timeout_s: int | None = notebooks.CELL_TIMEOUT_S
    once: bool = False

    @property
    def failed(self) -> Path:
        """The notebook up to the cell that failed, if one did."""
        return self.out.with_suffix(".failed.ipynb")

    def __call__(self, wait: bool) -> tuple[str, float, str] | None:
        """Run it; returns state ("kept", "ran" or "failed"), seconds and reason, or None if another process does."""
        lock, began = FileLock(paths.make_folder(self.out.parent) / f"{self.out.stem}.lock"), time.monotonic()
        try:
            with lock.acquire(timeout=-1 if wait else 0), notebooks.variables(self.variables):
                if self.once and self.out.exists():
                    return "kept", 0.0, ""
                notebooks.run(self.notebook, self.parameters, self.out, self.cell_timeout_s)
        except Timeout:
            return None
        except Exception as error:  # whatever a notebook does, the others are run
            kind, said = getattr(error, "ename", type(error).__name__), str(getattr(error, "evalue", error))
            return "failed", time.monotonic() - began, f"{kind}: {said.strip()[:600]}"
        return "ran", time.monotonic() - began, ""


def run_jobs(
    jobs: Sequence[Job], workers: int = 1, devices: Sequence[str] = ()
) -> Iterator[tuple[Job, str, float, str]]:
    """Run notebooks in `workers` processes; yields (job, state, seconds, reason) as each ends.

    The cores are divided among the processes; with `devices`, each sees one of them (CUDA_VISIBLE_DEVICES).
    If this process ends early, even if it is killed, running kernels are shut down.
    """
    context = multiprocessing.get_context("spawn")
    slots = context.SimpleQueue()
    for number in range(workers):
        slots.put(devices[number % len(devices)] if devices else "")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (slots, workers))
    try:
        for wait in (False, True):  # first the jobs that no other process is at
            running = {pool.submit(job, wait): job for job in jobs}
            jobs = []
            for future in as_completed(running):
                if outcome := future.result():
                    yield running[future], *outcome
                else:
                    jobs.append(running[future])
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(slots, workers: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    if device := slots.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    logging.getLogger("asyncio").setLevel(
        logging.CRITICAL
    )  # says at length what an ended kernel left unanswered
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # as an exception, so that the kernel is shut down
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
    os._exit(143)


def reproduce(only: Sequence[str] = (), profile: Profile | None = None, folder: Path | None = None) -> int:
    """Run all numbered notebooks in order, a line each, and print their results; 0 if all went well, else 1.

    only: numbers of the notebooks to run. A notebook that fails, or whose data are missing, is listed, and
    the rest are run.
    """
    todo = [notebooks.find(number, folder) for number in only] or notebooks.numbered(folder)
    if not todo:
        raise ValueError(f"there is no notebook NN_name.ipynb in {folder or paths.NOTEBOOKS}")
    jobs, failures, began = [], {}, time.monotonic()
    for path in todo:
        known = notebooks.declared(path)
        parameters = profile.whole(path, known) if profile else {}
        if profile and (missing := profile.missing(known | parameters)):
            failures[path] = "; ".join(missing)
        else:
            jobs.append(Job(path, path.stem, parameters, paths.RESULTS / "runs" / path.name))
    ended = run_jobs(jobs)
    for count, job in enumerate(jobs, start=1):
        print(f"{count:>2} of {len(jobs)}  {job.label:<28}", end=" ", flush=True)
        *_, seconds, reason = next(ended)
        print(f"{seconds:6.0f} s" + ("  FAILED" if reason else ""), flush=True)
        if reason:
            failures[job.notebook] = f"{reason}\n  see {notebooks.short(job.failed)}"
    print(f"\n{len(todo) - len(failures)} of {len(todo)} notebooks ran, {time.monotonic() - began:.0f} s")
    print_results(todo)
    for path, reason in failures.items():
        print(f"\nFAILED {path.name}: {reason}")
    return 1 if failures else 0


def print_results(notebooks_run: Sequence[Path]) -> None:
    """Print the published accuracies, and those in the tables that these notebooks left in data/results."""
    found = [path for nb in notebooks_run for path in sorted(paths.RESULTS.glob(f"{nb.name[:2]}_*.csv"))]
    others = []
    for path in [paths.PAPER / "benchmarks.csv", *found]:
        table = pd.read_csv(path)
        if "acc_25km" in table.columns:
            print(f"\n{'Found here' if path in found else 'Published'} ({notebooks.short(path)})")
            _print_accuracies(table)
        else:
            others.append(notebooks.short(path))
    if others:
        print("\nMore tables: " + ", ".join(others))


def _print_accuracies(table: pd.DataFrame) -> None:
    wanted = ["data", "benchmark", "model", "protocol", "setting", "split", "seed"]
    wanted = [column for column in wanted if column in table.columns]
    numbers = [c for c in table.columns if c.startswith("acc_") or c in ("median_km", "geoscore", "n")]
    what = "data" if "data" in wanted else wanted[0]
    for value, part in table.groupby(what, sort=False):
        print(f"  {value}")
        shown = part[[c for c in (*wanted, *numbers) if c != what and part[c].notna().any()]]
        print("    " + report.readable(shown).to_string(index=False).replace("\n", "\n    "))
