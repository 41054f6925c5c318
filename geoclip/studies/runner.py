"""The paper's ablations: one setting changed at a time, the same seeds for each, on the image tower's features.

As in the paper the tower is frozen. For the embedded tiles it is the one that notebook 03 trained; for photos
it is CLIP's, which `python -m geoclip embed` has run before.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor

from geoclip import earth, evaluation, gallery, paths
from geoclip.datasets import blue_marble, features, folder, sources
from geoclip.image_encoder import ImageEncoder
from geoclip.training import runs
from geoclip.training.config import TrainConfig, as_config, plain
from geoclip.training.data import seeded
from geoclip.training.module import GeoCLIPTraining

QUERIES = 256  # images searched at once; bounds the memory of their similarities
Crops = Literal["one", "five", "ten"]
# One a distance: Okabe and Ito's colours, and shapes for those who see no colours.
COLOURS = ("#000000", "#0072B2", "#009E73", "#E69F00", "#CC79A7")
MARKERS = ("o", "s", "^", "D", "v")


@dataclass(frozen=True)
class Study:
    """What an ablation is run on.

    label: the name of the data in tables. reference: the paper's setting at this size, training on a folder of
    features. tests: split → features (n, v, c) of v views of each test image, and their (lat, lon). gallery: the
    places (m, 2) to answer from, in degrees.
    """

    label: str
    reference: TrainConfig
    tests: Mapping[str, tuple[Float[Tensor, "n v c"], Float[Tensor, "n 2"]]]
    gallery: Float[Tensor, "m 2"]

    def hash(self) -> str:
        """16 hex digits of test features, places and gallery, and of the code that scores them."""
        digest = hashlib.sha256()
        for module in ("studies/runner.py", "evaluation.py", "gallery.py"):
            digest.update((Path(__file__).parents[1] / module).read_bytes())
        for split, tensors in self.tests.items():
            digest.update(split.encode())
            for tensor in tensors:
                digest.update(tensor.numpy().tobytes())
        digest.update(self.gallery.numpy().tobytes())
        return digest.hexdigest()[:16]


def open_study(
    reference: Path | str,
    data: Path | str | None = None,
    tests: Mapping[str, Path | str] | None = None,
    gallery_csv: Path | str | None = None,
    tower: Path | str | None = None,
    views: int = 4,
) -> Study:
    """The study that a notebook's parameters name.

    reference: YAML file of the fields of TrainConfig. data: folder of the training images' features, tests:
    split → folder of features, gallery_csv: LAT, LON (default: the authors' 100 K gallery). Without `data`:
    Blue Marble tiles, in `views` disturbed views of each, through the tower that the YAML file `tower` trains.
    Raises FileNotFoundError for folders that are not there, ValueError for features of another tower.
    """
    config = as_config(Path(reference))
    if data is None:
        return tile_study(
            config, as_config(Path(tower or paths.NOTEBOOKS / "profiles/train_embedded.yaml")), views
        )
    if not tests:
        raise ValueError(
            "with a folder of training features, name folders of test features too (split → folder)"
        )
    config = dataclasses.replace(config, data=str(data))
    training_data = features.FeatureData(data, config.image)
    places = gallery.Gallery.official()
    if gallery_csv:
        places = gallery.Gallery(torch.from_numpy(folder.read_places(gallery_csv)), str(gallery_csv))
    return Study(
        label=training_data.info.source,
        reference=config,
        tests=folder_tests(tests, config),
        gallery=places.latlon,
    )


def folder_tests(
    tests: Mapping[str, Path | str], config: TrainConfig
) -> dict[str, tuple[Float[Tensor, "n v c"], Float[Tensor, "n 2"]]]:
    """Split → features and places of a folder of features, made by the tower of the training folder `config.data`.

    Raises FileNotFoundError where there is no such folder, ValueError for features of another tower.
    """
    trained_on = features.FeatureData(config.data, config.image).info.tower_hash
    opened = {split: features.FeatureData(folder, config.image) for split, folder in tests.items()}
    for split, test in opened.items():
        if test.info.tower_hash != trained_on:
            raise ValueError(
                f"{test.folder} ({split}) holds features of another tower than {config.data}: embed it again"
            )
    return {split: (test.tensor(), test.latlon) for split, test in opened.items()}


def gallery_of(study: Study, size: int) -> Float[Tensor, "m 2"]:
    """`size` places to answer from, of which the first are the study's own gallery or lie in it.

    For tiles, whose study takes part of the places that no test tile has; else the study's gallery, shuffled.
    Raises ValueError where there are fewer.
    """
    if study.label == blue_marble.LABEL:
        return blue_marble.splits(dataclasses.replace(study.reference.splits, gallery=size))["gallery"]
    places = study.gallery.unique(dim=0)
    if size > len(places):
        raise ValueError(f"a gallery of {size:,} is wanted, and there are {len(places):,} different places")
    return places[torch.randperm(len(places), generator=seeded("gallery"))][:size]


def tile_study(config: TrainConfig, tower: TrainConfig, views: int = 4) -> Study:
    """The embedded study: Blue Marble tiles through the tower of the run `tower`, trained where it is not kept."""
    checkpoint = runs.train(tower).checkpoint
    config = dataclasses.replace(config, image=dataclasses.replace(config.image, weights=str(checkpoint)))
    return Study(
        label=blue_marble.LABEL,
        reference=dataclasses.replace(config, data=str(tile_folder(config, views))),
        tests=tile_tests(config),
        gallery=blue_marble.splits(config.splits)["gallery"],
    )


def tile_folder(config: TrainConfig, views: int) -> Path:
    """The folder of the training tiles' features, `views` disturbed views of each, made where it is not kept.

    It lies in data/cache/features, named by the hash of what makes it. Raises ValueError where `config` asks
    for other training places than the tiles' standard ones.
    """
    encoder, source = ImageEncoder(config.image).eval(), sources.Tiles("train", config.tiles)
    if not torch.equal(blue_marble.splits(config.splits)["train"], source.latlon):
        raise ValueError(
            "tiles are embedded for the standard split: leave splits.train, .test and .seed as they are"
        )
    how = sources.Views(number=views)
    info = dataclasses.asdict(features.FeatureInfo.of(source, encoder, how))
    key = hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()[:16]
    folder = paths.make_folder(paths.CACHE / "features") / key
    with FileLock(folder.with_suffix(".lock")):
        # single precision wherever it is computed, so that machines with and without bf16 agree
        features.embed(source, encoder, folder, how, arithmetic="fp32")
    return folder


@torch.inference_mode()
def tile_tests(
    config: TrainConfig, crops: Crops = "one", splits: Sequence[str] = ("random", "blocked")
) -> dict[str, tuple[Float[Tensor, "n v c"], Float[Tensor, "n 2"]]]:
    """Split → tower features of its test tiles, disturbed as in every evaluation, and their places.

    crops: the whole tile; or, as prediction does with photos, the tile rendered at 256 / 224 of its pixels and
    cut at the four corners and the centre ("five"), and each of these mirrored too ("ten").
    """
    from torchvision.transforms import functional as transforms

    encoder, tiles, side = ImageEncoder(config.image).eval(), config.tiles, config.tiles.pixels
    if crops != "one":
        tiles = dataclasses.replace(tiles, pixels=side * 256 // 224)
    cut = {"one": lambda images, side: [images], "five": transforms.five_crop, "ten": transforms.ten_crop}[
        crops
    ]
    tests = {}
    for split in splits:
        images, latlon = blue_marble.test_tiles(split, tiles, config.splits)
        views = torch.stack(list(cut(images, side)), 1)
        made = torch.cat([encoder.features(part.flatten(0, 1)) for part in views.split(QUERIES)])
        tests[split] = (made.unflatten(0, views.shape[:2]).clone(), latlon)
    return tests


def changed(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """`config` with some fields changed, nested ones by nested mappings; ValueError names an unknown field."""
    return as_config(_merged(plain(dataclasses.asdict(config)), changes))


def _merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, change in changes.items():
        nested = isinstance(change, Mapping) and isinstance(values.get(name), dict)
        merged[name] = _merged(values[name], change) if nested else change
    return merged


def run(
    study: Study, settings: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], workers: int | None = None
) -> pd.DataFrame:
    """Train and score every setting with every seed: a row per setting, seed and split.

    settings: name → changes of study.reference ({} for the paper's setting). What was trained before, in this
    or another notebook, is not trained again. workers: processes, by default one a core with a thread each, on
    a GPU one. Columns: data, model, setting, split, seed, steps, samples, and those of evaluation.summarize.
    """
    configs = {
        (name, seed): changed(study.reference, {**changes, "seed": seed})
        for name, changes in settings.items()
        for seed in seeds
    }
    if workers is None:
        workers = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    workers = min(workers, len(configs))
    if workers == 1:
        scored = [_score(study, config) for config in configs.values()]
    else:
        # a fork server has not yet started threads, and imports torch once for all workers
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(study,)) as pool:
            scored = list(pool.map(_score_in_worker, configs.values()))
    rows = []
    for (name, seed), (result, errors) in zip(configs, scored, strict=True):
        for split, error_km in errors.items():
            about = {"data": study.label, "model": "GeoCLIP, frozen tower", "setting": name, "split": split}
            about |= {"seed": seed, "steps": result["steps"], "samples": result["samples"]}
            rows.append(about | evaluation.summarize(torch.from_numpy(error_km)))
    return pd.DataFrame(rows)


_study: Study | None = None  # of a worker, so that it is sent once and not with each job


def _start_worker(study: Study) -> None:
    global _study
    _study = study
    torch.set_num_threads(1)


def _score_in_worker(config: TrainConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return _score(_study, config)


def _score(study: Study, config: TrainConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the training run says of itself, and the error in km of each test image; both kept with the run."""
    trained = runs.train(config)
    kept = trained.directory / f"errors-{study.hash()}.npz"
    if not kept.is_file():
        errors = errors_km(load(trained), study)
        with paths.atomic(kept) as temporary:
            np.savez(temporary, **errors)
    with np.load(kept) as errors:
        return trained.result, dict(errors)


def load(trained: runs.Run) -> GeoCLIPTraining:
    """The trained module in evaluation mode, without the tower: queries come as features."""
    module = runs.load(trained.checkpoint, with_tower=False)
    return module.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def errors_km(module: GeoCLIPTraining, study: Study) -> dict[str, np.ndarray]:
    """Split → error in km of each test image; over several views the mean of their similarities counts."""
    model = module.model
    device = model.logit_scale.device
    places = gallery.embed(model.location_encoder, study.gallery)
    found = {}
    for split, (tests, latlon) in study.tests.items():
        best = []
        for part in tests.split(QUERIES):
            views = model.encode_features(part.flatten(0, 1).float().to(device))
            query = views.unflatten(0, part.shape[:2]).mean(1)
            best.append(gallery.search(query, places, 1)[1][:, 0].cpu())
        found[split] = earth.haversine_km(study.gallery[torch.cat(best)], latlon).numpy()
    return found


def draw_settings(summary: pd.DataFrame):
    """Figure: accuracy at the five distances of each setting, with intervals; a panel a split.

    summary: of seeds.over_seeds, with columns data, split and setting.
    """
    import matplotlib.pyplot as plt

    splits = list(summary["split"].unique())
    names = list(summary["setting"].unique())[::-1]
    with plt.rc_context(_style()):
        size = (4.2 * len(splits) + 1, 0.34 * len(names) + 1.3)
        figure, axes = plt.subplots(1, len(splits), figsize=size, sharey=True, squeeze=False)
        for axis, split in zip(axes[0], splits, strict=True):
            part = summary[summary["split"] == split].set_index("setting").loc[names]
            for number, (column, km) in enumerate(evaluation.named_thresholds()):
                middle = part[column].to_numpy()
                ends = np.abs(part[[f"{column}_low", f"{column}_high"]].to_numpy().T - middle)
                axis.errorbar(
                    middle, np.arange(len(names)), xerr=np.nan_to_num(ends), fmt=MARKERS[number], markersize=4,
                    linestyle="none", color=COLOURS[number], capsize=2, label=f"{km:,} km",
                )  # fmt: skip
            axis.set(title=f"{split} test split", xlabel="found within the distance, %", xlim=(-2, 102))
            axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
            axis.set_yticks(range(len(names)), names)
        figure.suptitle(_about(summary), fontsize=8, color="#555555")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def draw_curves(summary: pd.DataFrame, x: str, label: str, panels: Sequence[str] = ("split",)):
    """Figure: accuracy at the five distances against the column `x`, intervals as bands; a panel per `panels`."""
    import matplotlib.pyplot as plt

    groups = list(summary.groupby(list(panels), sort=False))
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    with plt.rc_context(_style()):
        size = (3.7 * columns, 2.6 * rows + 0.5)
        figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
        for axis, (key, part) in zip(axes.flat, groups, strict=False):
            part = part.sort_values(x)
            values = part[x].to_numpy(float)
            for number, (column, km) in enumerate(evaluation.named_thresholds()):
                style = {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 4}
                axis.plot(values, part[column], label=f"{km:,} km", **style)
                low, high = part[f"{column}_low"].to_numpy(float), part[f"{column}_high"].to_numpy(float)
                axis.fill_between(values, low, high, color=COLOURS[number], alpha=0.25, linewidth=0)
            positive = values[values > 0]
            axis.set_xscale("symlog" if (values == 0).any() else "log", **_threshold(values, positive))
            axis.set_xticks(values, [f"{value:,g}" for value in values])
            axis.minorticks_off()
            axis.set(title=", ".join(map(str, key)), xlabel=label, ylim=(-2, 102))
            axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        for axis in axes[:, 0]:
            axis.set_ylabel("found within the distance, %")
        figure.suptitle(_about(summary), fontsize=8, color="#555555")
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _threshold(values: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """Where a logarithmic axis that holds 0 turns linear: below the smallest value that is not 0."""
    return {"linthresh": float(positive.min()), "linscale": 0.6} if (values == 0).any() else {}


def _about(summary: pd.DataFrame) -> str:
    """What a figure says of its data: their names, and over how many seeds its intervals are."""
    return (
        f"{', '.join(summary['data'].unique())}; means and 95 % intervals over {summary['seeds'].max()} seeds"
    )


def _style() -> dict[str, Any]:
    from geoclip.maps import STYLE

    return STYLE
