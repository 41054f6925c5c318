"""Run many notebooks in processes: all of them in order, or the runs of a sweep."""

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pandas as pd
from filelock import FileLock, Timeout

from geoclip import paths
from geoclip.reproduce import notebooks, report
from geoclip.reproduce.profiles import Profile
from geoclip.studies.processes import end_with_parent

SHOWN = "^(data|benchmark|model|protocol|setting|split|seed|acc_.*|median_km|geoscore|n)$"  # columns


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
                limit_s = None if self.of_sweep else notebooks.CELL_TIMEOUT_S
                notebooks.run(self.notebook, self.parameters, self.out, limit_s)
        except Timeout:
            return None
        except SystemExit:  # by SIGTERM; the pool would keep it as a result and start the next run
            os._exit(143)
        except Exception as error:  # whatever a notebook does, the others are run
            kind, said = getattr(error, "ename", type(error).__name__), str(getattr(error, "evalue", error))
            failed = notebooks.short(self.out.with_suffix(".failed.ipynb"))
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
                print(
                    f"[{done} of {len(jobs)}] {job.label} · {said} · about {minutes:.0f} min left", flush=True
                )
                if reason:
                    failed.append((job, reason))
                    print(f"    {reason}", flush=True)
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
    """Run all numbered notebooks, or `only` some, in order and print their results; 0 if all went well, else 1."""
    todo, jobs, failed = [notebooks.find(number) for number in only] or notebooks.numbered(), [], []
    if not todo:
        raise ValueError(f"there is no notebook NN_name.ipynb in {paths.NOTEBOOKS}")
    for path in todo:
        known = notebooks.declared(path)
        parameters = profile.whole(path, known)
        job = Job(path, path.stem, parameters, paths.RESULTS / "runs" / path.name)
        if missing := profile.missing(known | parameters):
            failed.append((job, "; ".join(missing)))
        else:
            jobs.append(job)
    failed += run_jobs(jobs)
    print(f"\n{len(todo) - len(failed)} of {len(todo)} notebooks ran")
    print_results(todo)
    for job, reason in failed:
        print(f"\nFAILED {job.notebook.name}: {reason}")
    return 1 if failed else 0


def print_results(notebooks_run: Sequence[Path]) -> None:
    """Print the published accuracies, and those in the tables that these notebooks left in data/results."""
    found = [path for nb in notebooks_run for path in sorted(paths.RESULTS.glob(f"{nb.name[:2]}_*.csv"))]
    for path in [paths.PAPER / "benchmarks.csv", *found]:
        table = pd.read_csv(path).dropna(axis=1, how="all")
        print(f"\n{'Found here' if path in found else 'Published'} ({notebooks.short(path)})")
        if "acc_25km" in table:
            report.show(table.filter(regex=SHOWN))
