"""What a folder of real data sets holds, before the first run: what is there, missing or damaged, and what it will cost."""

import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch

from geoclip.datasets import benchmarks, features, folder, nus_wide, sources
from geoclip.image_encoder import ImageEncoder, Preprocessing
from geoclip.photos import PhotoError
from geoclip.reproduce import notebooks
from geoclip.reproduce.profiles import Profile

LOOK = 64  # images of each set that are opened
PAPER_DIM = 768  # of a ViT-L/14 feature, kept in two bytes each
PER_SECOND = 720  # images: one H200 and 16 decoding processes (data/measured/11_bench_gpu.csv)


def check(data: Path, encoder: ImageEncoder | None = None, strict: bool = False) -> pd.DataFrame:
    """A row for each set, and for each tar shard that is cut off: set, rows, images, features, problems.

    rows: of those expected; images: opened of the first LOOK, and how fast `encoder` embeds them, if it is
    given; problems: what is damaged, or with `strict` incomplete. A set that is absent is no problem.
    """
    with notebooks.variables({"GEOCLIP_DATA": str(data)}):
        rows = [_of_set(card, data, encoder, strict) for card in benchmarks.CARDS.values()]
    for tar in sorted(data.rglob("*.tar")):
        if problem := tar_problem(tar):
            rows.append({"set": str(tar.relative_to(data)), "problems": problem})
    return pd.DataFrame(rows, columns=["set", "rows", "images", "features", "problems"]).fillna("")


def _of_set(card: benchmarks.Card, data: Path, encoder: ImageEncoder | None, strict: bool) -> dict[str, str]:
    problems: list[str] = []
    rehearsal = " rehearsal" if (data / benchmarks.REHEARSAL).is_file() else ""
    row = {"set": f"{card.title}{rehearsal}", "rows": "missing", "images": "", "features": ""}

    def tried(read: Callable, absent: str):
        """What `read` returns, None for an absent file; other errors are problems."""
        try:
            return read()
        except FileNotFoundError:
            return absent
        except (ValueError, OSError) as error:
            problems.append(str(error))
            return "damaged"

    found = tried(lambda: _read(card, data), "missing")
    if isinstance(found, str):
        row["rows"] = found
    else:
        row["rows"] = benchmarks.expected(card, found)
        if strict and card.n not in (None, len(found)):
            problems.append(f"incomplete: {row['rows']}")
        if found.images is not None:
            row["images"] = _open_first(found, encoder, problems)
    made = tried(lambda: features.FeatureData(data / card.name / "features"), "")
    row["features"] = made if isinstance(made, str) else f"{len(made):,}, views {made.views}"
    return row | {"problems": "; ".join(problems)}


def _read(card: benchmarks.Card, data: Path):
    if card.csv:
        return benchmarks.load(card.name, data)
    table = nus_wide.read(nus_wide.find()).table.assign(author=None)
    images = data / "images" / card.name
    return folder.Geotagged(card.title, table, images if images.is_dir() else None)


def _open_first(found, encoder: ImageEncoder | None, problems: list[str]) -> str:
    """Open the first images, and embed them; says how many could be, and adds the reason of the first that could not."""
    tower = encoder.preprocess if encoder else Preprocessing()
    opened, first = [], min(LOOK, len(found))
    failed = []
    for row in range(first):
        try:
            opened.append(tower(sources.decode(found.path(row), found.table["file"].iloc[row], tower.pixels)))
        except PhotoError as error:
            failed.append(str(error))
    if failed:
        problems.append(f"{len(failed)} of the first {first} images cannot be used, such as {failed[0]}")
    said = f"{len(opened)} of the first {first} opened"
    if encoder and opened:
        began = time.perf_counter()
        with torch.inference_mode():
            made = encoder.features(torch.stack(opened))
        if not made.isfinite().all():
            problems.append("the tower's features of them are not finite")
        said += f", embedded at {len(opened) / (time.perf_counter() - began):,.0f} a second"
    return said


def tar_problem(tar: Path) -> str:
    """Why a tar cannot be whole ("" if it can): it ends with two empty blocks of 512 bytes, which a cut one lacks."""
    size = tar.stat().st_size
    if size >= 1024:
        with tar.open("rb") as file:
            file.seek(size - 1024)
            if file.read() == bytes(1024):
                return ""
    return f"{tar}: the tar is cut off; download it again"


def uses(data: Path) -> Iterator[str]:
    """Lines that say what each notebook that takes real data finds in the folder, then how to make what is missing."""
    with notebooks.variables({"GEOCLIP_DATA": str(data)}):
        profile, make = Profile.load("paper"), {}
        for path in map(notebooks.find, profile.notebooks):
            known = notebooks.declared(path)
            named = profile.samples(known | profile.whole(path, known))
            make |= {name: gone for name, (_, gone) in named.items() if gone}
            yield f"{path.stem}: " + ", ".join(
                f"{name}{' (missing)' * bool(gone)}" for name, (_, gone) in named.items()
            )
        state = {name: benchmarks.on_disk(name) for name in ("im2gps3k", "yfcc26k", "gws15k", "yfcc4k")}
        yield "07_benchmarks: " + ", ".join(f"{name} ({found})" for name, found in state.items())
        yield f"10_gps_embedding_probes: NUS-WIDE{'' if (data / 'nus-wide').is_dir() else ' (missing)'}"
        yield from (f"{name}: {gone}" for name, gone in make.items())


def cost(per_second: float = PER_SECOND) -> pd.DataFrame:
    """For each folder of features of the paper's profile: samples, views, GB on disk, hours to embed at one rate."""
    rows = []
    for name, about in Profile.load("paper").data.items():
        words = shlex.split(about["make"])
        views = int(words[words.index("--views") + 1]) if "--views" in words else 10  # ten crops
        images = about["samples"] * views
        size, hours = images * PAPER_DIM * 2 / 1e9, images / per_second / 3600
        rows.append(
            {"features": name, "samples": about["samples"], "views": views, "GB": size, "hours": hours}
        )
    return pd.DataFrame(rows)


def room(data: Path, needed_gb: float) -> str:
    """Whether the disk has room for what `cost` adds up to."""
    free = shutil.disk_usage(data).free / 1e9
    return f"{needed_gb:,.1f} GB are needed, {free:,.0f} GB are free" + (
        "" if free > needed_gb else ": NOT ENOUGH"
    )
