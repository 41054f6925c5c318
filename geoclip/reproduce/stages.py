"""The paper's path over a rehearsal's world, from the first address to the last table: each step, and what it drops."""

import contextlib
import itertools
import multiprocessing
import os
import re
import runpy
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
FAILED = "FAILED"  # what the reason of a failed step starts with
# Imported once, by the process that all steps are forked from.
IMPORTS = ["geoclip.studies.runner", "geoclip.datasets.shards", "open_clip", "papermill"]
LEFT_OUT = "not rehearsed: notebooks 00, 02, 11, 15 and 17, which read no photos"


@dataclass(frozen=True)
class Step:
    """A command of `python -m geoclip`.

    reads: a list, or a folder of features, to count the images. drops: the list of unusable ones, with the
    column `reason`, which makes exit status 1, some items failed, the expected one.
    """

    name: str
    command: Sequence[str]
    reads: Path
    drops: Path | None = None


def run(world: Path, only: Sequence[str] | None = None) -> pd.DataFrame:
    """Run every step, and keep what it printed in logs/ and the table of all steps in LOG, which is returned.

    only: numbers of the notebooks to run; None runs all of the plan. A rerun resumes, because every command
    does. A step that fails is listed with why it did, and the others go on.
    """
    write_profile(world)
    results = str(world / "results")
    places = {"GEOCLIP_DATA": str(world), "GEOCLIP_RESULTS": results, "GEOCLIP_FIGURES": results}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    rows = []
    with rehearsal.addresses(world), mock.patch.dict(os.environ, places):
        for number, step in enumerate(steps(world, only), start=1):
            log = paths.make_folder(world / "logs") / f"{number:02d}.txt"
            log.write_text("")  # in case the step ends before it can write
            began = time.monotonic()
            process = context.Process(target=_run_step, args=(list(step.command), log))
            process.start()
            try:
                process.join()
            except BaseException:
                process.terminate()
                raise
            seconds, images, dropped = time.monotonic() - began, 0, {}
            with contextlib.suppress(OSError, ValueError):  # what a failed step did not find or make
                images = count(step.reads)
            if step.drops and step.drops.is_file():  # without what differs from file to file, in brackets
                why = pd.read_csv(step.drops)["reason"].str.replace(r" \(.*", "", regex=True)
                dropped = why.value_counts().to_dict()
            said = "; ".join(f"{number} {reason}" for reason, number in dropped.items())
            if process.exitcode not in (0, int(step.drops is not None)):
                last = " ".join(log.read_text(errors="replace").splitlines()[-4:])
                said = f"{FAILED} with exit status {process.exitcode}: {last} (whole: {log})"
            row = {"step": step.name, "images": images, "seconds": round(seconds, 1)}
            rows.append(row | {"dropped": sum(dropped.values()), "why": said})
            print(f"rehearsal: {step.name}: {images:,} images, {seconds:.0f} s. {said}", flush=True)
            with paths.atomic(world / LOG) as temporary:
                pd.DataFrame(rows).to_csv(temporary, index=False)
    return pd.DataFrame(rows)


def _run_step(command: list[str], log: Path) -> None:
    """Run a command in this process, which ends with its exit status, or with the rehearsal if that is killed."""
    end_with_parent()
    with log.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    multiprocessing.set_start_method(None, force=True)  # else the command's own processes would be served too
    sys.argv = ["geoclip", *command]
    runpy.run_module("geoclip", run_name="__main__", alter_sys=True)


def plan(world: Path) -> dict[str, Any]:
    """The content of PLAN for a rehearsal in the folder `world`."""
    tars = -(-len(shards.read_urls(world / rehearsal.ADDRESSES)) // 100)  # addresses of a shard
    names = {"WORLD": str(world), "TARS": f"{world}/rehearsal_shards/{{00000..{tars - 1:05d}}}.tar"}
    names["OURS"] = f"--checkpoint {world}/runs/rehearsal/last.ckpt --gallery official"
    names["SCORES"] = f"{world}/results/evaluate"
    return yaml.safe_load(Template(PLAN.read_text(encoding="utf-8")).substitute(names))


def steps(world: Path, only: Sequence[str] | None = None) -> list[Step]:
    """Shards, the features that the profile names, the other steps of the plan, and the notebooks `only`."""
    planned = plan(world)
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


def write_profile(world: Path) -> None:
    """Write the paper's profile and training configurations to the world, changed as the plan says."""
    planned = plan(world)
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
