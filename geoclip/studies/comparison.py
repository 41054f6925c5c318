"""GeoCLIP and the other ways to do it, trained alike and asked alike: one tidy row a model, split and seed."""

import hashlib
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from geoclip import baselines, earth, evaluation, paths
from geoclip.baselines import geocells
from geoclip.datasets import blue_marble
from geoclip.training import runs
from geoclip.training.config import RunConfig
from geoclip.training.data import training_places
from geoclip.training.module import TrainingModule

SPLITS = ("random", "blocked")
BLOCK = 256  # images asked about at a time
COST = ("seconds", "parameters")  # of training


def compare(
    settings: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], jobs: int = 2
) -> tuple[pd.DataFrame, dict[tuple[str, str, int], np.ndarray]]:
    """Train every setting with every seed and ask it about both test splits.

    settings: fields of the configuration, by name; a classifier over cells gives four answers, "NAME,
    coarse", "…, middle", "…, fine" and "…, hierarchical". jobs: processes, on a thread each. Runs are kept by
    their hash, answers beside them. Returns the tidy table (data, model, split, seed, accuracies, …, seconds
    of training, trained parameters) and each model's errors in km: (model, split, seed) → (n,).
    """
    wanted = []
    for name, fields in settings.items():
        for seed in seeds:
            config = baselines.as_config({**fields, "seed": seed})
            wanted.append((name, config, answers_file(config)))
    missing = [(config, file) for _, config, file in wanted if not file.is_file()]
    if missing and jobs == 1:
        for config, file in missing:
            train_and_ask(config, file)
    elif missing:
        in_processes(missing, jobs)
    rows, errors = [], {}
    for name, config, file in wanted:
        with np.load(file) as kept:
            found = dict(kept)
        cost = {column: found.pop(column).item() for column in COST}
        for key, error_km in found.items():
            answer, split = key.split("/")
            model = f"{name}, {answer}" if answer else name
            errors[model, split, config.seed] = error_km
            row = {"data": blue_marble.LABEL, "model": model, "split": split, "seed": config.seed}
            rows.append(row | evaluation.summarize(torch.from_numpy(error_km)) | cost)
    return pd.DataFrame(rows), errors


def in_processes(missing: Sequence[tuple[RunConfig, Path]], jobs: int) -> None:
    """`train_and_ask` of each, in `jobs` processes on a thread each."""
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a process starts
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
            list(pool.map(train_and_ask, *zip(*missing, strict=True)))
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads


def answers_file(config: RunConfig) -> Path:
    """Where a run's answers are kept; the name changes with the code that trains and asks."""
    folder = Path(__file__).parents[1]
    code = [folder / name for name in ("studies/comparison.py", "evaluation.py", "gallery.py", "earth.py")]
    asked = hashlib.sha256(b"".join(file.read_bytes() for file in code)).hexdigest()[:8]
    return paths.CACHE / "runs" / runs.run_key(config) / f"errors_{asked}.npz"


def train_and_ask(config: RunConfig, file: Path) -> None:
    """Train one model, unless it is there, and keep its errors in km on the test splits in `file`."""
    run = runs.train(config, kind=baselines.kind(config.model))
    module = run.load()
    found = {column: run.result[column] for column in COST}
    for split in SPLITS:
        images, latlon = module.test_tiles(split)
        for name, predicted in answers(module, images).items():
            found[f"{name}/{split}"] = earth.haversine_km(predicted, latlon).numpy()
    with paths.atomic(file) as temporary:
        np.savez(temporary, **found)


@torch.inference_mode()
def answers(module: TrainingModule, images: Tensor) -> dict[str, Tensor]:
    """A model's places (n, 2) of images, by the name of the answer; "" where it has one."""
    if not isinstance(module, geocells.GeocellsTraining):
        return {"": torch.cat([module.locate(part) for part in images.split(BLOCK)])}
    ways = {level: (level, False) for level in geocells.LEVELS} | {"hierarchical": ("fine", True)}
    found: dict[str, list[Tensor]] = {name: [] for name in ways}
    for part in images.split(BLOCK):
        logits = module.model(part)
        for name, way in ways.items():
            found[name].append(module.model.best(logits, 1, *way)[0][:, 0])
    return {name: torch.cat(parts) for name, parts in found.items()}


def ceilings(config: geocells.GeocellsConfig) -> pd.DataFrame:
    """What the nearest cell's place leaves to a classifier that never errs: a tidy row a level and split."""
    partitions = geocells.partitions(config, training_places(config))
    rows = []
    for level, cells in partitions.items():
        for split in SPLITS:
            truth = blue_marble.splits(config.splits)[split]
            row = {
                "data": blue_marble.LABEL,
                "model": f"ceiling of {len(cells):,} {level} cells",
                "split": split,
            }
            rows.append(row | evaluation.summarize(evaluation.ceiling(truth, torch.from_numpy(cells.latlon))))
    return pd.DataFrame(rows)


def best_on_map(
    errors: Mapping[str, np.ndarray],
    latlon: Tensor,
    pixels: np.ndarray,
    block_deg: float = 10,
    fewest: int = 10,
) -> np.ndarray:
    """Where each model wins: for each of `pixels` (m, 2) the number of the model whose median error is lowest.

    Compared block by block of the Earth, over the tests at `latlon` (n, 2) in the pixel's block and all
    seeds;
    errors: (seeds, n) km by model. −1 where a block holds fewer than `fewest` tests.
    """
    table = pd.DataFrame({name: np.median(np.atleast_2d(km), axis=0) for name, km in errors.items()})
    table["block"] = block_number(latlon.numpy(), block_deg)
    groups = table.groupby("block")
    median = groups.median()[groups.size() >= fewest]
    best = pd.Series(median.to_numpy().argmin(axis=1), index=median.index)
    return best.reindex(block_number(np.asarray(pixels), block_deg)).fillna(-1).to_numpy(int)


def block_number(latlon: np.ndarray, block_deg: float) -> np.ndarray:
    """A number for each block of `block_deg` × `block_deg` degrees, of places (n, 2)."""
    row, column = np.floor(latlon / block_deg).astype(int).T
    return row * 1000 + column
