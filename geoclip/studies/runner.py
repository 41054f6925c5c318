"""Grids of settings and seeds: each combination is trained and scored once, in processes, into one table.

The ablations train on features of a frozen tower, as the paper does: for photos CLIP's, for Blue Marble tiles
that of a model trained as in notebook 03. Notebook 12 trains each model whole, on tiles or photos.
"""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor

from geoclip import baselines, earth, evaluation, gallery, paths, predictor
from geoclip.datasets import benchmarks, blue_marble, embedding, features, folder, sources
from geoclip.datasets.folder import Geotagged
from geoclip.image_encoder import ImageEncoder
from geoclip.studies.processes import end_with_parent
from geoclip.training import runs
from geoclip.training.config import RunConfig, TrainConfig, plain
from geoclip.training.data import seeded
from geoclip.training.module import GeoCLIPTraining, TrainingModule

RECIPE = 1  # raise it when a change of the code changes the errors of a model that is trained already
BATCH = 256  # images scored at once
SPLITS = ("random", "blocked")  # of the tiles
# Bands in km of a blocked tile's distance from the nearest training place: one test split each in the ablations.
BANDS_KM = (0, 50, 100, 200, math.inf)
# Largest accepted differences between two processors, whose arithmetic differs in the last digits, which training
# multiplies, in the frozen tower too. Between two of them the means moved by up to 6 points, and within 25 km by 1 on
# the random split and by 6 (differences: 12) elsewhere. Ends of intervals rest on few seeds and are not compared.
TOLERANCE = {"*_low": None, "*_high": None, "acc_1km": 1.5, "acc_25km": 12.0, "acc_*": 8.0}
RESULTS = ("steps", "samples", "seconds", "parameters")  # columns from a run's result.json

Tests = Mapping[str, tuple[Float[Tensor, "n v c"], Float[Tensor, "n 2"]]]
Errors = dict[tuple[str, str, int], np.ndarray]


@dataclass(frozen=True)
class Study:
    """What a grid of settings is trained from and scored on.

    label: name of the data in tables. reference: the configuration that each setting changes. tests: split →
    features of the test images and their places; None scores each model on the tiles of its own test splits.
    gallery: places (m, 2) to answer from, in degrees; required with `tests`. photos: split → photos to answer
    instead, by each model from the places that it has learnt.
    """

    label: str
    reference: RunConfig
    tests: Tests | None = None
    gallery: Float[Tensor, "m 2"] | None = None
    photos: Mapping[str, Geotagged] | None = None

    def key(self) -> str:
        """Return a hash of the test data and RECIPE: scores of a run with the same key are the same."""
        digest = hashlib.sha256(str(RECIPE).encode())
        for split, tensors in (self.tests or {}).items():
            digest.update(split.encode())
            for tensor in (*tensors, self.gallery):
                digest.update(tensor.numpy().tobytes())
        for split, photos in (self.photos or {}).items():
            rows = photos.table[["file", "lat", "lon"]].to_csv()
            digest.update(repr((split, rows, photos.missing())).encode())
        return digest.hexdigest()[:16]

    def __str__(self) -> str:
        """Return what a notebook prints of an ablation: data, size and splits."""
        used, places = self.reference, len(self.gallery)
        size = f"batch {used.batch_size}, queue {used.queue}, {used.epochs} epochs, gallery of {places:,}"
        images = [f"{split}: {len(tests):,} test images" for split, (tests, _) in self.tests.items()]
        return "\n".join([f"data: {self.label}", size, *images])

    @property
    def drawn(self) -> list[str]:
        """The splits that figures show: two of the tiles', all of others."""
        return [split for split in self.tests if split in ("random", "50 to 100 km")] or list(self.tests)

    @property
    def data_hash(self) -> str | None:
        """The hash of the embedded tiles, if the study is of tiles."""
        return blue_marble.data_hash() if self.label == blue_marble.LABEL else None


def run(
    study: Study,
    settings: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    workers: int | None = None,
    return_errors: bool = False,
) -> pd.DataFrame | tuple[pd.DataFrame, Errors]:
    """Train and score every setting with every seed: one row for each setting, split and seed.

    Runs and scores are kept in the cache, so nothing is trained or scored twice, in this notebook or another.

    settings: name → the fields of study.reference that change; {} is the reference itself. `model` may name a
    baseline. A classifier over cells has four settings in the table: "NAME, coarse", "NAME, middle", "NAME,
    fine" and "NAME, hierarchical". workers: processes, with one thread each; by default as many as cores, and
    one on a GPU. return_errors: also return (setting, split, seed) → error in km of each test image, (n,).

    Returns the columns data, setting, split, seed, RESULTS and those of evaluation.summarize.
    """
    jobs, tests = [], study.key()
    for (name, changes), seed in itertools.product(settings.items(), seeds):
        config = changed(study.reference, {**changes, "seed": seed})
        jobs.append((name, config, runs.run_folder(config) / f"errors-{tests}.npz"))
    missing = {file: config for _, config, file in jobs if not file.is_file()}
    workers = min(workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1), len(missing))
    if workers > 1:
        context = multiprocessing.get_context("forkserver")  # a server without threads imports torch once
        context.set_forkserver_preload([__name__])
        with ProcessPoolExecutor(workers, context, _start_worker, (study,)) as pool:
            list(pool.map(_train_and_score, missing, missing.values()))
    else:
        for file, config in missing.items():
            _train_and_score(file, config, study)
    rows, errors = [], {}
    for name, config, file in jobs:
        result = runs.Run(file.parent, config).result
        about = {column: result[column] for column in RESULTS}
        with np.load(file) as scored:
            for answer_and_split, error_km in scored.items():
                answer, split = answer_and_split.split("/", 1)
                key = {
                    "setting": f"{name}, {answer}" if answer else name,
                    "split": split,
                    "seed": config.seed,
                }
                errors[*key.values()] = error_km
                score = evaluation.summarize(torch.from_numpy(error_km))
                rows.append({"data": study.label} | key | about | score)
    table = pd.DataFrame(rows)
    return (table, errors) if return_errors else table


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return `config` with some fields changed, nested ones by nested mappings.

    If `model` changes, the fields that the two models share are kept.
    """
    config_class = baselines.config_class(changes.get("model", config.model))
    shared = {field.name for field in fields(config_class)} - {"model"}
    values = {name: value for name, value in plain(config).items() if name in shared}
    return baselines.as_config(merged({"model": config.model} | values, changes))


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with some of them changed or added, nested ones by nested mappings."""
    found = dict(values)
    for name, change in changes.items():
        nested = isinstance(change, Mapping) and isinstance(values.get(name), Mapping)
        found[name] = merged(values[name], change) if nested else change
    return found


_study: Study | None = None  # of a worker process: sent once, not with every job


def _start_worker(study: Study) -> None:
    global _study
    _study = study
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # a fifth less time with a long queue, and the same weights
    end_with_parent()


def _train_and_score(file: Path, config: RunConfig, study: Study | None = None) -> None:
    """Train a model, unless it is kept, and write the errors of its answers as "ANSWER/SPLIT" to `file`."""
    study = study or _study
    trained = runs.train(config, kind=baselines.kind(config.model))
    found = errors_km(trained.load(with_tower=study.tests is None), study)
    with paths.atomic(file) as temporary:
        np.savez(temporary, **{"/".join(key): error_km for key, error_km in found.items()})


@torch.inference_mode()
def errors_km(module: TrainingModule, study: Study) -> dict[tuple[str, str], np.ndarray]:
    """Return (answer, split) → error in km (n,) of each test image; a model with one answer calls it ""."""
    found = {}
    for split in study.tests or study.photos or SPLITS:
        if study.photos is not None:
            latlon = torch.from_numpy(study.photos[split].latlon)
            answers = answer_photos(module, study.photos[split])
        elif study.tests is None:
            images, latlon = module.test_tiles(split)
            parts = [module.answers(part) for part in images.split(BATCH)]
            answers = {name: torch.cat([part[name] for part in parts]) for name in module.ways}
        else:
            views, latlon = study.tests[split]
            answers = {"": answer_features(module, views, study.gallery)}
        for name, places in answers.items():
            found[name, split] = earth.haversine_km(places, latlon).numpy()
    return found


@dataclass
class _AllAnswers:
    """A predictor.Model whose places of a photo are all answers of a module, in the order of its `ways`."""

    module: TrainingModule

    def views(self, photo, ten_crop: bool = False) -> Tensor:
        return self.module.views(photo, ten_crop)

    def locate(self, query: Float[Tensor, "n 1 c h w"], k: int = 1) -> tuple[Tensor, Tensor]:
        answers = self.module.answers(query[:, 0].to(self.module.device))
        latlon = torch.stack([places.cpu().double() for places in answers.values()], 1)
        return latlon, torch.full(latlon.shape[:2], torch.nan)


@torch.inference_mode()
def answer_photos(module: TrainingModule, photos: Geotagged) -> dict[str, Float[Tensor, "n 2"]]:
    """Return the best place of each photo by the name of the answer; NaN for photos that cannot be read."""
    on_gpu = torch.cuda.is_available()
    model = _AllAnswers(module.to("cuda" if on_gpu else "cpu"))
    workers = (os.cpu_count() or 1) if on_gpu else 0  # on a CPU the tower needs the cores itself
    found = predictor.answer(model, photos, len(module.ways), workers=workers)
    return dict(zip(module.ways, found.latlon.unbind(1), strict=True))


@torch.inference_mode()
def answer_features(
    module: GeoCLIPTraining, features: Float[Tensor, "n v c"], latlon: Float[Tensor, "m 2"]
) -> Float[Tensor, "n 2"]:
    """Return the place in the gallery `latlon` with the highest mean similarity to an image's v views."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = module.to(device).model
    places = gallery.embed(model.location_encoder, latlon)
    best = []
    for part in features.split(BATCH):
        views = model.encode_features(part.flatten(0, 1).float().to(device))
        query = views.unflatten(0, part.shape[:2]).mean(1)
        best.append(gallery.search(query, places, 1)[1][:, 0].cpu())
    return latlon[torch.cat(best)]


def open_study(
    reference: Path | str, data: Path | str | None = None, tests: Mapping[str, Path | str] | None = None
) -> Study:
    """Open the study that a notebook's parameters name.

    reference: profile or YAML file of the fields of TrainConfig. data: folder of the training photos' features,
    scored on the authors' 100 K gallery; None: Blue Marble tiles, four augmented views of each, through a tower
    trained as in notebook 03. tests: split → folder of features; required with `data`.
    """
    config = baselines.as_config(paths.profile(reference))
    if data is None:
        tower = baselines.as_config(paths.profile("train_embedded"))
        trained = runs.train(replace(tower, splits=replace(config.splits, gallery=tower.splits.gallery)))
        config = replace(config, image=replace(config.image, weights=str(trained.checkpoint)))
        config = replace(config, data=str(tile_folder(config, views=4)))
        places = blue_marble.splits(config.splits)["gallery"]
        return Study(blue_marble.LABEL, config, tile_tests(config), places)
    if not tests:
        raise ValueError("a folder of training features needs folders of test features too (split → folder)")
    config = replace(config, data=str(data))
    trained_on = features.FeatureData(data, config.image)
    label, folder = trained_on.info.source, trained_on.folder.absolute().parent
    if card := benchmarks.CARDS.get(folder.name):  # of mp16/features: "MP-16, 4,123,456 of 4,723,695"
        label = benchmarks.called(benchmarks.marked(card.title, folder.parent), trained_on)
    return Study(label, config, folder_tests(tests, config), gallery.Gallery.official().latlon)


def open_photos(reference: RunConfig, names: Sequence[str]) -> Study:
    """Open the study of models that are trained whole on the photos of the CSV `reference.data`.

    names: cards of the benchmarks to answer; those without photos in GEOCLIP_DATA are left out, and named.
    """
    if absent := [name for name in names if benchmarks.on_disk(name) != "photos"]:
        print(f"left out, because GEOCLIP_DATA has no photos of it: {', '.join(absent)}")
    there = [benchmarks.load(name) for name in names if name not in absent]
    if not there:
        raise FileNotFoundError(f"GEOCLIP_DATA has the photos of none of {', '.join(names)}")
    csv = Path(reference.data)
    titles = {Path(card.csv).name: card.title for card in benchmarks.CARDS.values() if card.csv}
    used = range(round(reference.fraction * len(folder.read_places(csv))))
    title = benchmarks.marked(titles.get(csv.name, csv.stem), benchmarks.data_folder())
    label = benchmarks.called(title, used)
    return Study(label, reference, photos={photos.name: photos for photos in there})


def folder_tests(tests: Mapping[str, Path | str], config: TrainConfig) -> Tests:
    """Return split → features and places of folders made by the tower of `config.data`; a part is called a part.

    Folders that are missing are left out, and named.
    """
    if absent := [split for split, folder in tests.items() if not Path(folder).is_dir()]:
        print(f"left out, because their features are missing: {', '.join(absent)}")
    if len(absent) == len(tests):
        raise FileNotFoundError(f"no features to test on: {', '.join(map(str, tests.values()))}")
    tower, found = features.FeatureData(config.data, config.image).info.tower_hash, {}
    for split in [split for split in tests if split not in absent]:
        test = features.FeatureData(tests[split], config.image)
        if test.info.tower_hash != tower:
            raise ValueError(f"{test.folder} ({split}) holds features of another tower: embed it again")
        found[benchmarks.called(split, test)] = (test.tensor(), test.latlon)
    return found


def gallery_of(study: Study, size: int) -> Float[Tensor, "m 2"]:
    """Return `size` places to answer from, so that a larger gallery contains the smaller ones.

    For tiles they are drawn from all places without a test tile, of which the study's gallery is the first
    part; otherwise from the study's gallery.
    """
    if study.label == blue_marble.LABEL:
        return blue_marble.splits(replace(study.reference.splits, gallery=size))["gallery"]
    places = study.gallery.unique(dim=0)
    if size > len(places):
        raise ValueError(f"a gallery of {size:,} places was asked for; there are {len(places):,}")
    return places[torch.randperm(len(places), generator=seeded("gallery"))][:size]


def tile_folder(config: TrainConfig, views: int) -> Path:
    """Return the folder of the training tiles' features, `views` augmented views of each; make it if needed."""
    encoder = ImageEncoder(config.image).eval()
    source, how = sources.Tiles("train", config.tiles, sizes=config.splits), sources.Views(number=views)
    info = asdict(features.FeatureInfo.of(source, encoder, how))
    key = hashlib.sha256(json.dumps(info, sort_keys=True).encode()).hexdigest()[:16]
    folder = paths.make_folder(paths.CACHE / "features") / key
    with FileLock(folder.with_suffix(".lock")):
        # in single precision everywhere, so that machines with and without bf16 agree
        embedding.embed(source, encoder, folder, how, arithmetic="fp32")
    return folder


@torch.inference_mode()
def tile_tests(config: TrainConfig, crops: Literal["one", "five", "ten"] = "one") -> Tests:
    """Return split → tower features of its test tiles, augmented as in every evaluation, and their places.

    The blocked tiles are divided by their distance from the nearest training place: "0 to 50 km" and so on.
    crops: "one" takes whole tiles; "five" renders them at 256 / 224 of their pixels and cuts out the corners and
    the centre, as prediction does with photos; "ten" adds the mirror image of each.
    """
    from torchvision.transforms import functional as transforms

    encoder, tiles, side = ImageEncoder(config.image).eval(), config.tiles, config.tiles.pixels
    if crops != "one":
        tiles = replace(tiles, pixels=side * 256 // 224)
    cuts = {"one": lambda images, side: [images], "five": transforms.five_crop, "ten": transforms.ten_crop}
    tests = {}
    for split in SPLITS:
        images, latlon = blue_marble.test_tiles(split, tiles, config.splits)
        views = torch.stack(list(cuts[crops](images, side)), 1)
        found = torch.cat([encoder.features(part.flatten(0, 1)) for part in views.split(BATCH)])
        tests[split] = (found.unflatten(0, views.shape[:2]).clone(), latlon)
    found, latlon = tests.pop("blocked")
    away_km = evaluation.ceiling(latlon, blue_marble.splits(config.splits)["train"])
    for low, high in itertools.pairwise(BANDS_KM):
        inside = (away_km >= low) & (away_km < high)
        if inside.any():
            name = f"{low} to {high} km" if high < math.inf else f"beyond {low} km"
            tests[name] = (found[inside], latlon[inside])
    return tests
