"""Photos that are known by address: a list of addresses becomes webdataset tar shards, downloaded by img2dataset.

img2dataset runs in an environment of its own, since its requirements are many; Spark and Ray stand behind it for
more than one machine. What can no longer be had is listed with the reason and counted.
"""

import hashlib
import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from filelock import FileLock

from geoclip import paths

IMG2DATASET = "img2dataset==1.47.0"
LIST, CLAIM, UNAVAILABLE = "list.jsonl", "list.sha256", "unavailable.csv"
ID_COLUMNS = ("id", "image_id", "img_id", "img_file")

# Runs in img2dataset's environment, which reads its parquet files.
FAILED = """
import glob, sys
import pandas as pd
parts = [pd.read_parquet(path) for path in sorted(glob.glob(sys.argv[1] + "/*.parquet"))]
table = pd.concat(parts, ignore_index=True).sort_values("key")
bad = table[table["status"] != "success"]
bad[["id", "url", "error_message"]].rename(columns={"error_message": "reason"}).to_csv(sys.argv[2], index=False)
"""


@dataclass(frozen=True)
class Downloaded:
    """What became of a list: addresses in it, photos in the shards, and how many failed for which reason."""

    listed: int
    photos: int
    failed: dict[str, int]
    shards: int
    folder: Path

    @property
    def pattern(self) -> str:
        """The shards as `python -m geoclip embed` takes them."""
        return f"{self.folder}/{{{0:05d}..{self.shards - 1:05d}}}.tar"


def read_urls(path: Path | str) -> pd.DataFrame:
    """Columns id and url of an address list: a CSV of `image id, url`, with a header or without (MP-16's has none).

    Raises ValueError that names file, line and value for a row without an http address or an id that comes twice.
    """
    try:
        table = pd.read_csv(
            path, header=None, dtype=str, keep_default_na=False, skipinitialspace=True, skip_blank_lines=False
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{path} is no list of addresses: {str(error).strip()}") from error
    first = [name.strip().lower() for name in table.iloc[0]]
    headed = "url" in first
    if headed:
        identity = next((first.index(name) for name in ID_COLUMNS if name in first), None)
        if identity is None:
            raise ValueError(
                f"{path}: the header {','.join(first)} names no image; it needs one of {', '.join(ID_COLUMNS)}"
            )
        table = table.iloc[1:, [identity, first.index("url")]]
    elif table.shape[1] != 2:
        raise ValueError(
            f"{path}: {table.shape[1]} columns and no header; an address list has image id and url"
        )
    table = table.set_axis(["id", "url"], axis=1)
    if table.empty:
        raise ValueError(f"{path} lists no address")
    for wrong, what in (
        (~table["url"].str.match(r"https?://\S+$"), "is no http address"),
        (table["id"].str.strip() == "", "has no image id"),
        (table["id"].duplicated(), "names an image a second time"),
    ):
        if wrong.any():
            row = wrong.idxmax()
            raise ValueError(f"{path}, line {row + 1}: {','.join(table.loc[row])!r} {what}")
    return table.reset_index(drop=True)


def join_places(urls: pd.DataFrame, places: pd.DataFrame) -> pd.DataFrame:
    """id, url, LAT, LON of the addresses whose image `places` (columns file, lat, lon) knows, in the list's order.

    Raises ValueError where it knows none, or one of them twice.
    """
    known = places.rename(columns={"file": "id", "lat": "LAT", "lon": "LON"})[["id", "LAT", "LON"]]
    known = known[known["id"].isin(urls["id"])]
    if twice := known.loc[known["id"].duplicated(), "id"].tolist():
        raise ValueError(f"the places name {twice[0]} twice")
    if known.empty:
        raise ValueError(
            f"not one of the {len(urls):,} addresses has a place: the list has ids such as {urls['id'].iloc[0]!r}, "
            f"the places {places['file'].iloc[0]!r}"
        )
    return urls.merge(known, on="id")


def environment() -> Path:
    """The Python of img2dataset's own environment in the cache, made at first use.

    Raises OSError that says what to do where it cannot be installed.
    """
    folder = paths.make_folder(paths.CACHE) / "img2dataset"
    python = folder / "bin" / "python"
    with FileLock(folder.with_suffix(".lock")):
        if (folder / "ready").is_file():
            return python
        print(f"geoclip: installing {IMG2DATASET} into {folder} (once)", file=sys.stderr)
        pip = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            IMG2DATASET,
            "setuptools<81",
        ]
        try:
            venv.create(folder, clear=True, with_pip=True)
            subprocess.run(pip, capture_output=True, text=True, check=True)
        except subprocess.CalledProcessError as error:
            said = (error.stderr or error.stdout or str(error)).strip()
            said = said.decode(errors="replace") if isinstance(said, bytes) else said
            raise OSError(
                f"{IMG2DATASET} could not be installed ({said.splitlines()[-1]}). Install it where there is a network, "
                f"and name the Python that has it with --python"
            ) from error
        (folder / "ready").touch()
    return python


def download(
    listed: pd.DataFrame,
    out: Path | str,
    photos_a_shard: int = 10_000,
    processes: int = 1,
    threads: int = 64,
    timeout: int = 10,
    retries: int = 2,
    python: Path | str | None = None,
) -> Downloaded:
    """Download id, url, LAT, LON (join_places) into OUT/00000.tar …, going on at the first shard that is not whole.

    The photos are kept byte for byte, never re-encoded: a photo that arrives broken is found when it is embedded,
    not turned into a valid one that is half grey. What has no answer after `retries` more tries is listed with its
    reason in OUT/unavailable.csv. Raises ValueError where OUT holds the shards of another list or cut, OSError
    where img2dataset ends in an error.
    """
    out = paths.make_folder(Path(out).resolve())
    python = Path(python) if python else environment()
    with FileLock(out / ".lock"):  # two on one list would write the same shards
        claim(out, listed, photos_a_shard)
        for path in out.glob("*_stats.json"):  # a shard is whole when its statistics are
            if statistics(path) is None:
                path.unlink()
        settings = {
            "url_list": out / LIST, "input_format": "jsonl", "output_folder": out, "output_format": "webdataset",
            "save_additional_columns": json.dumps(["id", "LAT", "LON"]), "disable_all_reencoding": True,
            "extract_exif": False, "number_sample_per_shard": photos_a_shard, "processes_count": processes,
            "thread_count": threads, "timeout": timeout, "retries": retries, "incremental_mode": "incremental",
        }  # fmt: skip
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        with (out / "log.txt").open("a") as log:
            done = subprocess.run(
                [python, "-m", "img2dataset.main", *arguments], stdout=log, stderr=subprocess.STDOUT, check=False,
                env=os.environ | {"WANDB_MODE": "disabled", "NO_ALBUMENTATIONS_UPDATE": "1"},
            )  # fmt: skip
        shards = -(-len(listed) // photos_a_shard)
        counts = [count for path in out.glob("*_stats.json") if (count := statistics(path)) is not None]
        with paths.atomic(out / UNAVAILABLE) as temporary:
            told = subprocess.run([python, "-c", FAILED, out, temporary], capture_output=True, check=False)
            if done.returncode or told.returncode or len(counts) < shards:
                raise OSError(
                    f"img2dataset ended with {len(counts)} of {shards} shards (see {out / 'log.txt'}); give the same "
                    f"command again to go on"
                )
    reasons = pd.read_csv(out / UNAVAILABLE)["reason"].value_counts().sort_index()
    reasons = reasons.sort_values(ascending=False, kind="stable")
    return Downloaded(
        len(listed), sum(count["successes"] for count in counts), reasons.to_dict(), shards, out
    )


def claim(out: Path, listed: pd.DataFrame, photos_a_shard: int) -> None:
    """Say in `out` what is downloaded there. ValueError where something else is, or was cut otherwise."""
    text = json.dumps({"photos_a_shard": photos_a_shard}) + "\n"
    text += listed.to_json(orient="records", lines=True, force_ascii=False, double_precision=15)
    kept = out / CLAIM
    other = any(out.glob("*.tar")) or any(out.glob("*_stats.json"))
    if kept.is_file() or other:
        if not kept.is_file() or kept.read_text() != hashlib.sha256(text.encode()).hexdigest():
            raise ValueError(f"{out} holds the shards of another list, or cut otherwise; name another folder")
    with paths.atomic(out / LIST) as temporary:
        temporary.write_text(text.partition("\n")[2])
    with paths.atomic(kept) as temporary:
        temporary.write_text(hashlib.sha256(text.encode()).hexdigest())


def statistics(path: Path) -> dict | None:
    """What img2dataset says of a shard; None for half a file."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None
