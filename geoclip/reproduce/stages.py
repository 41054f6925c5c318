"""The paper's path over a rehearsal's world, from the first address to the last table: each step, and what it drops."""

import contextlib
import functools
import itertools
import multiprocessing
import os
import re
import runpy
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from string import Template
from typing import Any
from unittest import mock

import pandas as pd
import yaml

from geoclip import paths
from geoclip.datasets import benchmarks, features, folder, shards
from geoclip.reproduce import rehearsal
from geoclip.studies.processes import end_with_parent
from geoclip.studies.runner import merged
from geoclip.training.config import read_yaml

PLAN = Path(__file__).with_name("rehearsal.yaml")
LOG, PROFILE = "rehearsal_log.csv", "rehearsal.yaml"
# What commands do first, next, …: those of one phase do not read what another of it makes, and run side by side.
PHASES = (("shards",), ("embed", "cells"), ("train",), ("evaluate",), ("reproduce",))
FAILED = "FAILED"  # what the reason of a failed step starts with
# Imported once, by the process that all steps are forked from.
IMPORTS = ["geoclip.studies.runner", "geoclip.datasets.shards", "open_clip", "papermill"]
LEFT_OUT = "not rehearsed: notebooks 00, 02, 11, 15 and 17, which read no photos"


@dataclass(frozen=True)
class Step:
    """A command of `python -m geoclip`.

    reads: a list, or a folder of features, to count the images. drops: the list of unusable ones, with the
    column `reason`, which explains exit status 1, some items failed, unless it is empty.
    """

    name: str
    command: Sequence[str]
    reads: Path
    drops: Path | None = None


def run(world: Path, only: Sequence[str] | None = None, jobs: int = 1, devices: int = 1) -> pd.DataFrame:
    """Run every step, and keep what it printed in logs/ and the table of all steps in LOG, which is returned.

    only: numbers of the notebooks to run; None runs all of the plan. jobs: steps at a time, which share the
    cores. devices: ranks that embed and train. A rerun resumes, because every command does. A step that fails is
    listed with why it did, and the others go on.
    """
    write_profile(world, devices)
    results = str(world / "results")
    places = {"GEOCLIP_DATA": str(world), "GEOCLIP_RESULTS": results, "GEOCLIP_FIGURES": results}
    if jobs > 1:
        places["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    planned, rows, lock = list(enumerate(steps(world, only, devices), start=1)), [], threading.Lock()
    with rehearsal.addresses(world), mock.patch.dict(os.environ, places), ThreadPoolExecutor(jobs) as pool:
        try:
            for commands in PHASES:
                phase = [numbered for numbered in planned if numbered[1].command[0] in commands]
                for row in pool.map(functools.partial(_row, world, context, lock), phase):
                    rows.append(row)
                    about = f"{row['images']:,} images, {row['seconds']:.0f} s. {row['why']}"
                    print(f"rehearsal: {row['step']}: {about}", flush=True)
                    with paths.atomic(world / LOG) as temporary:
                        pd.DataFrame(rows).to_csv(temporary, index=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return pd.DataFrame(rows)


def _row(world: Path, context, lock: threading.Lock, numbered: tuple[int, Step]) -> dict[str, Any]:
    """Run a step in a process of its own, and return its row of the table.

    lock: held while a process starts or its exit status is read; both look at the processes of all threads.
    """
    number, step = numbered
    log = paths.make_folder(world / "logs") / f"{number:02d}.txt"
    log.write_text("")  # in case the step ends before it can write
    began = time.monotonic()
    process = context.Process(target=_run_step, args=(list(step.command), log))
    with lock:
        process.start()
    connection.wait([process.sentinel])
    with lock:
        process.join()
    row = {"step": step.name, "images": 0, "seconds": round(time.monotonic() - began, 1)}
    with contextlib.suppress(OSError, ValueError):  # what a failed step did not find or make
        row["images"] = count(step.reads)
    dropped = {}
    if step.drops and step.drops.is_file():  # without what differs from file to file, in brackets
        why = pd.read_csv(step.drops)["reason"].str.replace(r" \(.*", "", regex=True)
        dropped = why.value_counts().to_dict()
    said = "; ".join(f"{count} {reason}" for reason, count in dropped.items())
    if process.exitcode not in (0, int(bool(dropped))):
        last = " ".join(log.read_text(errors="replace").splitlines()[-4:])
        said = f"{FAILED} with exit status {process.exitcode}: {last} (whole: {log})"
    return row | {"dropped": sum(dropped.values()), "why": said}


def _run_step(command: list[str], log: Path) -> None:
    """Run a command in this process, which ends with its exit status, or with the rehearsal if that is killed."""
    end_with_parent()
    with log.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    multiprocessing.set_start_method(None, force=True)  # else the command's own processes would be served too
    sys.argv = ["geoclip", *command]
    runpy.run_module("geoclip", run_name="__main__", alter_sys=True)


def plan(world: Path, devices: int = 1) -> dict[str, Any]:
    """The content of PLAN for a rehearsal in the folder `world`, with shards and batches that fit its size."""
    addresses = len(shards.read_urls(world / rehearsal.ADDRESSES))
    shard_size = min(10_000, max(100, addresses // 40))
    tars, batch = -(-addresses // shard_size), min(512, max(2, addresses // 64 * 2))
    names = {"WORLD": world, "TARS": f"{world}/rehearsal_shards/{{00000..{tars - 1:05d}}}.tar"}
    names["OURS"] = f"--checkpoint {world}/runs/rehearsal/last.ckpt --gallery official"
    names["SCORES"] = f"{world}/results/evaluate"
    names |= {"SHARD_SIZE": shard_size, "BATCH": batch, "DEVICES": devices}
    names |= {"PHOTO_BATCH": max(16, batch), "QUEUE": max(64, 8 * batch)}
    return yaml.safe_load(Template(PLAN.read_text(encoding="utf-8")).substitute(names))


def steps(world: Path, only: Sequence[str] | None = None, devices: int = 1) -> list[Step]:
    """Shards, the features that the profile names, the other steps of the plan, and the notebooks `only`."""
    planned = plan(world, devices)
    towers = {folder: shlex.split(words) for folder, words in planned["towers"].items()}
    profile = read_yaml(world / PROFILE)
    commands = {name: shlex.split(words) for name, words in planned["first"].items()}
    for about in profile["data"].values():
        words = shlex.split(about["make"].replace("$GEOCLIP_DATA", str(world)))[3:]
        name = Path(words[words.index("--out") + 1]).relative_to(world)
        commands[f"embed {name}"] = [planned["tars"] if word == "mp16" else word for word in words]
    commands |= {name: shlex.split(words) for name, words in planned["steps"].items()}
    found = []
    for name, words in commands.items():
        if words[0] == "embed":  # the last of two options counts
            words += towers.get(name.removeprefix("embed ").partition("/")[0], towers["others"])
        found.append(_step(name, words, world))
    for number, reads in planned["notebooks"].items():
        if only is None or number in only:
            command = ["reproduce", "--only", number, "--profile", str(world / PROFILE)]
            found.append(Step(f"notebook {number}", command, world / reads))
    return found


def _step(name: str, words: list[str], world: Path) -> Step:
    """The step of a command, with what it reads and what it lists as unusable."""
    given, reads, drops = dict(itertools.pairwise(words)), Path(words[1]), None
    out = Path(given["--out"])
    match words[0]:
        case "shards":
            drops = out / shards.UNAVAILABLE
        case "embed":
            reads, drops = out, out / features.UNREADABLE
        case "evaluate":
            reads = benchmarks.find_csv(benchmarks.card(given["--benchmark"]), world)
            drops = out.with_name(f"{out.stem}_unreadable.csv")
        case "train":
            reads = Path(given.get("--data") or read_yaml(given["--config"])["data"])
    return Step(name, words, reads, drops)


def write_profile(world: Path, devices: int = 1) -> None:
    """Write the paper's profile and training configurations to the world, changed as the plan says."""
    planned = plan(world, devices)
    text = paths.profile("paper").read_text(encoding="utf-8")
    paper = yaml.safe_load(re.sub(r"\b(Im2GPS3k|YFCC26k)\b", r"\1 rehearsal", text))
    for tower in planned["not rehearsed"]:
        del paper["notebooks"]["18_towers"]["parameters"]["TOWERS"][tower]
        paper["data"] = {name: of for name, of in paper["data"].items() if not name.startswith(f"{tower},")}
    contents = {PROFILE: merged(paper, planned["profile"])}
    for name, changes in planned["configurations"].items():
        contents[f"{name}.yaml"] = merged(read_yaml(paths.profile(name)), changes)
    for name, content in contents.items():
        text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
        with paths.atomic(world / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def count(source: Path) -> int:
    """Images in a folder of features, or rows of a list of addresses or photos."""
    if source.is_dir():
        return len(features.FeatureData(source))
    if source.name == rehearsal.ADDRESSES:
        return len(shards.read_urls(source))
    return len(folder.read_places(source))
