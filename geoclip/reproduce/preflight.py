"""What a folder of real data sets holds, before the first run: what is there, missing or damaged, and its cost."""

import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pandas as pd
import torch

from geoclip.datasets import benchmarks, features, folder, nus_wide, sources
from geoclip.image_encoder import ImageEncoder, Preprocessing
from geoclip.photos import PhotoError
from geoclip.reproduce import notebooks
from geoclip.reproduce.profiles import Profile

LOOK = 64  # images of each set that are opened
PAPER_DIM = 768  # of a ViT-L/14 feature, kept in two bytes each
PER_SECOND = 720  # views: one H200 and 16 decoding processes (data/measured/11_bench_gpu.csv)
PHOTO_MB = 0.18  # of 1024 × 768 pixels, as in the same measurement
RUN_HOURS = 342 / 3600  # of a training on features, ten epochs, in the same measurement
RUN_GB = 2 * 3 * 10_432_257 * 4 / 1e9  # two checkpoints, of the parameters and Adam's two moments


def check(data: Path, encoder: ImageEncoder | None = None, strict: bool = False) -> pd.DataFrame:
    """A row for each set, and for each tar shard that is cut off: set, rows, images, features, problems.

    rows: of those expected; images: opened of the first LOOK, and how fast `encoder` embeds them, if it is
    given; problems: what is damaged, or with `strict` incomplete. A set that is absent is no problem.
    """
    with mock.patch.dict(os.environ, {"GEOCLIP_DATA": str(data)}):
        rows = [_of_set(card, data, encoder, strict) for card in benchmarks.CARDS.values()]
    for tar in sorted(data.rglob("*.tar")):
        with tar.open("rb") as file:  # it ends with two empty blocks of 512 bytes, which a cut one lacks
            file.seek(max(0, tar.stat().st_size - 1024))
            if file.read() != bytes(1024):
                problem = f"{tar}: the tar is cut off; download it again"
                rows.append({"set": str(tar.relative_to(data)), "problems": problem})
    columns = ["set", "rows", "images", "features", "problems"]
    return pd.DataFrame(rows, columns=columns, dtype=object).fillna("")


def _of_set(card: benchmarks.Card, data: Path, encoder: ImageEncoder | None, strict: bool) -> dict[str, str]:
    problems: list[str] = []
    row = {"set": benchmarks.marked(card.title, data), "rows": "missing"}
    try:
        found = _read(card, data)
        row["rows"] = benchmarks.expected(card, found)
        if strict and card.n not in (None, len(found)):
            problems.append(f"incomplete: {row['rows']}")
        if found.images is not None:
            row["images"] = _open_first(found, encoder, problems)
    except FileNotFoundError:
        pass
    except (ValueError, OSError) as error:
        row["rows"] = "damaged"
        problems.append(str(error))
    if (data / card.name / "features").is_dir():
        try:
            made = features.FeatureData(data / card.name / "features")
            row["features"] = f"{len(made):,}, views {made.views}"
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return row | {"problems": "; ".join(problems)}


def _read(card: benchmarks.Card, data: Path) -> folder.Geotagged:
    if card.csv:
        return benchmarks.load(card.name, data)
    root, images = nus_wide.find(), data / "images" / card.name
    try:
        table = nus_wide.read(root).table.assign(author=None)
    except FileNotFoundError as error:  # of a set that is there in part
        raise ValueError(str(error)) from error
    return folder.Geotagged(card.title, table, images if images.is_dir() else None)


def _open_first(found: folder.Geotagged, encoder: ImageEncoder | None, problems: list[str]) -> str:
    """How many of the first images can be opened and, if there is an encoder, embedded; adds what is wrong."""
    tower = encoder.preprocess if encoder else Preprocessing()
    first, opened, failed = min(LOOK, len(found)), [], []
    for row in range(first):
        try:
            opened.append(tower(sources.decode(found[row], tower.pixels)))
        except PhotoError as error:
            failed.append(str(error))
    if failed:
        problems.append(f"{len(failed)} of the first {first} images cannot be used, such as {failed[0]}")
    if not encoder or not opened:
        return f"{len(opened)} of the first {first} opened"
    began = time.perf_counter()
    with torch.inference_mode():
        made = encoder.features(torch.stack(opened))
    if not made.isfinite().all():
        problems.append("the tower's features of the first images are not finite")
    rate = len(opened) / (time.perf_counter() - began)
    return f"{len(opened)} of the first {first} opened, embedded at {rate:,.0f} a second"


def uses(data: Path) -> Iterator[str]:
    """Lines that say what each notebook that takes real data finds in the folder, then how to make what is missing."""
    with mock.patch.dict(os.environ, {"GEOCLIP_DATA": str(data)}):
        profile, make = Profile.load("paper"), {}
        for path in map(notebooks.find, profile.notebooks):
            known = notebooks.declared(path)
            named = profile.samples(known | profile.whole(path, known))
            make |= {name: gone for name, (_, gone) in named.items() if gone}
            there = (f"{name}{' (missing)' * bool(gone)}" for name, (_, gone) in named.items())
            yield f"{path.stem}: {', '.join(there)}"
        state = (
            f"{name} ({benchmarks.on_disk(name)})" for name in ("im2gps3k", "yfcc26k", "gws15k", "yfcc4k")
        )
        yield f"07_benchmarks: {', '.join(state)}"
        yield f"16_nus_wide: NUS-WIDE{'' if (data / 'nus-wide').is_dir() else ' (missing)'}"
        yield from (f"{name}: {gone}" for name, gone in make.items())


def cost() -> pd.DataFrame:
    """For each step of the paper's profile with CLIP: samples, views, GB on disk, hours.

    The rates are PER_SECOND views, a network of 1 Gbit/s, and RUN_HOURS of training for each setting and seed.
    """
    profile = Profile.load("paper")
    made = {name: about for name, about in profile.data.items() if about["parameter"] != "TOWERS"}
    photos = max(about["samples"] for about in made.values())
    rows = [("shards", photos, None, photos * PHOTO_MB / 1e3, photos * PHOTO_MB * 8 / 1e3 / 3600)]
    for name, about in made.items():  # the towers' CLIP is among them, and others have another speed
        words = shlex.split(about["make"])
        views = int(words[words.index("--views") + 1]) if "--views" in words else 10  # ten crops
        n = about["samples"] * views
        row = (f"embed {name}", about["samples"], views, n * PAPER_DIM * 2 / 1e9, n / PER_SECOND / 3600)
        rows.append(row)
    for stem, own in profile.notebooks.items():
        if runs := len(own.get("grid", {}).get("SETTINGS", ())) * profile.seeds:
            rows.append((f"{stem}, {runs} runs", photos, None, runs * RUN_GB, runs * RUN_HOURS))
    return pd.DataFrame(rows, columns=["step", "samples", "views", "GB", "hours"])
