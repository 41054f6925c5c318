"""The paper's path over a rehearsal's world, from the first address to the last table: each step, and what it drops."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from geoclip import paths
from geoclip.datasets import benchmarks, features, shards
from geoclip.pretrained import TINY_CLIP
from geoclip.reproduce import rehearsal

TOWER = ("--tower", TINY_CLIP, "--weights", "null")  # in place of ViT-L/14
LOG, PROFILE, TRAIN = "rehearsal_log.csv", "rehearsal.yaml", "train_rehearsal.yaml"
SHARDS, RUN, FEATURES = "rehearsal_shards", "runs/rehearsal", "mp16/features"
SHARD_SIZE = 100  # addresses
NOTEBOOKS = ("04", "05", "06", "09", "07", "16")  # those that read features, photos or NUS-WIDE
LEFT_OUT = (
    "not rehearsed: notebooks 00 to 03, 10 to 15 and 17, which read no photos of a benchmark, and 08, whose words "
    "and photos need CLIP ViT-L/14 itself"
)
# What is smaller than in the paper: fields of TrainConfig.
SMALL = {
    "image": {"tower": TINY_CLIP, "weights": None, "frozen": True, "hidden": 64, "dim": 64},
    "location": {"frequencies": 16, "width": 32, "hidden_layers": 1, "dim": 64},
    "queue": 64,
    "batch_size": 2,
    "epochs": 1,
    "learning_rate": 1e-3,
}
FEWER_PROBES = {"SEEDS": 1, "EPOCHS": 1, "PHOTOS": 400, "CHOICES": {}, "EMBEDDINGS": []}


@dataclass(frozen=True)
class Step:
    """A command of `python -m geoclip`.

    reads: what it reads, a list or a folder of features, to count the images. drops: the list of unusable
    ones, with the column `reason`. partial: whether exit status 1, some items failed, is expected.
    """

    name: str
    command: Sequence[str]
    reads: Path
    drops: Path | None = None
    partial: bool = False


def run(world: Path, only: Sequence[str] = NOTEBOOKS) -> pd.DataFrame:
    """Run every step, and keep what it printed in logs/ and the table of all steps in LOG, which is returned.

    only: numbers of the notebooks to run. A rerun resumes, because every command does. Raises RuntimeError,
    with the last lines that were printed, when a step fails.
    """
    write_profile(world)
    results = str(world / "results")
    environment = os.environ | {
        "GEOCLIP_DATA": str(world),
        "GEOCLIP_RESULTS": results,
        "GEOCLIP_FIGURES": results,
    }
    rows: list[dict] = []
    with rehearsal.addresses(world):
        for number, step in enumerate(steps(world, only), start=1):
            log = paths.make_folder(world / "logs") / f"{number:02d}.txt"
            began = time.monotonic()
            with log.open("w") as file:
                command = [sys.executable, "-m", "geoclip", *step.command]
                status = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment
                ).returncode
            seconds = time.monotonic() - began
            if status > step.partial:
                last = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
                raise RuntimeError(f"{step.name} failed with exit status {status}; {log} ends with\n{last}")
            dropped = reasons(step.drops)
            said = "; ".join(f"{count} {reason}" for reason, count in dropped.items())
            row = {"step": step.name, "images": count(step.reads), "seconds": round(seconds, 1)}
            rows.append(row | {"dropped": sum(dropped.values()), "why": said})
            print(f"rehearsal: {step.name}: {row['images']:,} images, {seconds:.0f} s", flush=True)
            with paths.atomic(world / LOG) as temporary:
                pd.DataFrame(rows).to_csv(temporary, index=False)
    return pd.DataFrame(rows)


def steps(world: Path, only: Sequence[str] = NOTEBOOKS) -> list[Step]:
    """Shards, the features that the profile names, training, the benchmarks, and the notebooks `only`."""
    urls, places, trained_on = (
        world / rehearsal.ADDRESSES,
        world / benchmarks.card("mp16").csv,
        world / FEATURES,
    )
    photos = -(-len(shards.read_urls(urls)) // SHARD_SIZE)
    tars = f"{world / SHARDS}/{{00000..{photos - 1:05d}}}.tar"
    download = ["shards", str(urls), "--places", str(places), "--out", str(world / SHARDS), "--allow-private"]
    download += ["--shard-size", str(SHARD_SIZE), "--timeout", "5", "--retries", "0", "--threads", "16"]
    found = [Step("shards", download, urls, world / SHARDS / shards.UNAVAILABLE, True)]

    profile = yaml.safe_load((world / PROFILE).read_text(encoding="utf-8"))
    makes = [
        shlex.split(about["make"].replace("$GEOCLIP_DATA", str(world)))[3:]
        for about in profile["data"].values()
    ]
    nus = ["embed", str(world / rehearsal.NUS_WIDE_CSV), "--images", str(world / "images/nus-wide")]
    for words in [*makes, [*nus, "--views", "1", "--out", str(world / "nus-wide/features")]]:
        out = Path(words[words.index("--out") + 1])
        source = [tars if word == "mp16" else word for word in words]
        name = f"embed {out.relative_to(world)}"
        found.append(Step(name, [*source, *TOWER], out, out / features.UNREADABLE, True))

    checkpoint, scores = str(world / RUN / "last.ckpt"), world / "results/evaluate"
    train = ["train", "--config", str(world / TRAIN), "--data", str(trained_on), "--out", str(world / RUN)]
    found.append(Step("train", train, trained_on))
    for name in rehearsal.BENCHMARKS:
        command = ["evaluate", "--benchmark", name, "--checkpoint", checkpoint, "--gallery", "official"]
        out, csv = scores / f"rehearsal_{name}.csv", world / benchmarks.card(name).csv
        drops = scores / f"rehearsal_{name}_unreadable.csv"
        found.append(Step(f"evaluate {name}", [*command, "--out", str(out)], csv, drops, True))
    reads = {"07": world / benchmarks.card("im2gps3k").csv, "16": world / rehearsal.NUS_WIDE_CSV}
    for number in only:
        command = ["reproduce", "--only", number, "--profile", str(world / PROFILE)]
        found.append(Step(f"notebook {number}", command, reads.get(number, trained_on)))
    return found


def write_profile(world: Path) -> None:
    """Write the paper's profile and training configuration to the world, small and under a rehearsal's names."""
    text = paths.profile("paper").read_text(encoding="utf-8")
    profile = yaml.safe_load(re.sub(r"\b(Im2GPS3k|YFCC26k)\b", r"\1 rehearsal", text))
    profile["seeds"] = 1
    profile["parameters"]["REFERENCE"] = str(world / TRAIN)
    for changes in profile["notebooks"]["06_limited_data"]["grid"]["SETTINGS"].values():
        if "epochs" in changes:  # ten epochs of the paper are one here
            changes["epochs"] //= 10
    own = {"CHECKPOINT": str(world / RUN / "last.ckpt"), "AUTHORS": False}
    profile["notebooks"]["07_benchmarks"] = {"parameters": own}
    profile["notebooks"]["16_nus_wide"] = {"parameters": FEWER_PROBES}
    config = yaml.safe_load(paths.profile("train_paper").read_text(encoding="utf-8"))
    config = config | SMALL | {"location": config["location"] | SMALL["location"]}
    for name, content in ((PROFILE, profile), (TRAIN, config)):
        with paths.atomic(world / name) as temporary:
            temporary.write_text(
                yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding="utf-8"
            )


def count(source: Path) -> int:
    """Images in a folder of features, or rows of a list of addresses or photos."""
    if source.is_dir():
        return len(features.FeatureData(source))
    return len(
        shards.read_urls(source) if source.name == rehearsal.ADDRESSES else benchmarks.read_csv(source).table
    )


def reasons(listed: Path | None) -> dict[str, int]:
    """How many images a list of unusable ones names, by reason, without what differs from file to file."""
    if listed is None or not listed.is_file():
        return {}
    return pd.read_csv(listed)["reason"].str.replace(r" \(.*", "", regex=True).value_counts().to_dict()
