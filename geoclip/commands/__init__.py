"""The commands of `python -m geoclip`: one module each, with `parser()` and `run(options)`."""

import dataclasses
import sys
from pathlib import Path


def add_model_options(parser, precision: str) -> None:
    """Add the options that `load_model` and `decide` read, and --ten-crop."""
    from jsonargparse.typing import restricted_string_type

    add = parser.add_argument
    add("--checkpoint", help="a model trained with `train`; default: the authors' released weights with CLIP")
    add("--clip-weights", help="a local file of CLIP's weights, for machines that cannot download them")
    add("--ten-crop", action="store_true", help="average the logits over ten crops: slower, more accurate")
    add(
        "--precision",
        choices=["auto", "fp32", "bf16", "int8"],
        default=precision,
        help="arithmetic of the image tower; auto: bf16 if that is faster; int8: fastest on a CPU",
    )
    rule = restricted_string_type("decision", r"^(argmax|mode|median|geoscore|disc:\d+(\.\d+)?)$")
    add(
        "--decision",
        type=rule,
        help="rule of the answer: argmax (the place with the largest cosine), or on the posterior mode, disc:KM "
        "(the most probability within KM), median (least expected distance) or geoscore; default: mode for a "
        "checkpoint that `calibrate` has calibrated, else argmax",
    )
    add(
        "--neighbours",
        help="features of the training images (`embed`), as given to `calibrate --neighbours`: they enter the "
        "posterior, and tell photos that are unlike all of them",
    )
    parser.add_argument(
        "--seg-images",
        help="folder of the photos' segmentation maps (`segment`), for geo-cells that see them",
    )
    parser.add_argument(
        "--s2-cells",
        choices=["coarse", "middle", "fine", "hierarchical"],
        help="geo-cells that answer: of one level, or the product of all (default: as trained)",
    )


def decide(model, options, describe=None):
    """The model, or a Decider that answers by --decision. Raises ValueError for a model without a gallery.

    A calibration holds for the checkpoint's own, whole gallery; with another one nothing is calibrated.
    """
    from geoclip.calibration import Calibration, beside
    from geoclip.decider import Decider

    found = Calibration()
    if options.checkpoint and options.gallery in (None, "own"):
        found = Calibration.load(options.checkpoint, bool(options.neighbours))
        if getattr(options, "gallery_size", None) and found.fitted_on:
            print("geoclip: not calibrated: the calibration is of the whole gallery", file=sys.stderr)
            found = Calibration()
    if options.decision is None:
        options.decision = "mode" if found.fitted_on and model.gallery is not None else "argmax"
    if options.neighbours and (options.decision == "argmax" or found.neighbours is None):
        raise ValueError(
            "--neighbours: fit them first, with `calibrate --neighbours`, for the checkpoint's own whole gallery, "
            f"and answer by a decision on the posterior ({beside(options.checkpoint or 'last.ckpt', True).name})"
        )
    if options.decision == "argmax":
        return model
    if model.gallery is None:
        raise ValueError(f"--decision: {options.checkpoint} is a baseline, which has no posterior")
    neighbours = None
    if found.neighbours is not None:
        photographers = getattr(options, "photographer_disjoint", None)
        neighbours, name = read_neighbours(options.neighbours, model, photographers)
        if name != found.neighbours.features:
            other = f"features of {name}, but `calibrate` was given {found.neighbours.features}"
            raise ValueError(f"--neighbours: {options.neighbours} holds {other}")
    return Decider(model, options.decision, found, describe, neighbours)


def read_neighbours(folder: str, model, photographers: str | None = None):
    """The Neighbours of a feature folder, by its first views, and the folder's name and hash.

    photographers: the CSV of the images, or a benchmark's name, for the photographer of each.
    """
    from geoclip.datasets import benchmarks
    from geoclip.datasets.features import FeatureData
    from geoclip.datasets.sources import printable
    from geoclip.image_encoder import tower_hash
    from geoclip.neighbours import Neighbours

    encoder = model.image_encoder
    data = FeatureData(folder, encoder.config)
    if encoder.tower is not None and data.info.tower_hash != tower_hash(encoder.tower):
        raise ValueError(f"{folder} holds features of another tower than the checkpoint's; embed again")
    authors = None
    if photographers:
        named = photographers in benchmarks.CARDS
        table = (benchmarks.load(photographers) if named else benchmarks.read_csv(Path(photographers))).table
        by = dict(zip(map(printable, table["file"]), table["author"], strict=True))
        authors = [by.get(name) for name in data.ids()]
        if lacking := [name for name, author in zip(data.ids(), authors, strict=True) if not author]:
            raise ValueError(
                f"--photographer-disjoint: {photographers} names no photographer of {len(lacking):,} of the images in "
                f"{folder}, the first is {lacking[0]}; give the CSV that the features were made of"
            )
    neighbours = Neighbours(data.tensor()[:, 0].float(), data.latlon, authors)
    return neighbours, f"{data.info.source}, {data.info.data}"


def load_tiles_model(options):
    """The module of a checkpoint trained on the embedded tiles, and what answers for it, see load_model."""
    import torch

    from geoclip import baselines

    note_unfinished(options.checkpoint)
    module = baselines.load(options.checkpoint)
    if module.config.data != "blue_marble":
        raise ValueError(f"{options.checkpoint} was not trained on tiles; give --benchmark or --csv")
    module = choose_cells(module, options).to("cuda" if torch.cuda.is_available() else "cpu")
    if not hasattr(module.model, "scores"):  # a baseline
        return module, module
    module.model.image_encoder.use_precision(options.precision)
    return module, module.model


def note_unfinished(checkpoint: str) -> None:
    """Say on stderr if the training run of a checkpoint has not finished."""
    last = Path(checkpoint).resolve()
    if last.name == "last.ckpt" and not last.with_name("result.json").is_file():
        print(f"geoclip: the training run in {last.parent} has not finished", file=sys.stderr)


def load_model(options):
    """The model that --checkpoint names, or the authors' released one, on a GPU if there is one.

    Returns GeoCLIP, or the module of a baseline; both are a predictor.Model.
    """
    import torch

    from geoclip.model import GeoCLIP
    from geoclip.training import checkpoints

    path = options.checkpoint
    if not path:
        choose_cells(None, options)
        return GeoCLIP.pretrained(options.clip_weights, options.precision)
    note_unfinished(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = checkpoints.read_checkpoint(path)
    if checkpoint["geoclip_config"].get("model", "geoclip") == "geoclip":
        try:
            loaded = checkpoints.from_checkpoint(checkpoint, clip_weights=options.clip_weights)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        loaded.to(device).image_encoder.use_precision(options.precision)
        return choose_cells(loaded, options)
    from geoclip import baselines  # imports Lightning, which GeoCLIP does without

    return choose_cells(baselines.load(path), options).to(device)


def choose_cells(module, options):
    """The model, answering as --seg-images and --s2-cells say. Raises ValueError for another one than geo-cells."""
    changes = {}
    if images := getattr(options, "seg_images", None):
        changes["seg_images"] = images
    if level := getattr(options, "s2_cells", None):
        changes |= {
            "s2_cells": level.replace("hierarchical", "fine"),
            "hierarchical": level == "hierarchical",
        }
    if changes and getattr(getattr(module, "config", None), "model", "") != "geocells":
        raise ValueError("--seg-images and --s2-cells need the --checkpoint of a classifier of geo-cells")
    if changes:
        module.config = dataclasses.replace(module.config, **changes)
    return module


def read_gallery(wanted: str):
    """The Gallery that --gallery names: "official", a CSV of latitudes and longitudes, or a benchmark."""
    import torch

    from geoclip.datasets import benchmarks, folder
    from geoclip.gallery import Gallery

    if wanted == "official":
        return Gallery.official()
    if Path(wanted).suffix == ".csv" or Path(wanted).is_file():
        return Gallery(torch.from_numpy(folder.read_places(wanted)), Path(wanted).name)
    photos = benchmarks.load(wanted)
    return Gallery(torch.from_numpy(photos.latlon), photos.name)


def model_name(checkpoint: str | None) -> str:
    """What tables call a model: its run's folder, or the file's name if that is not `last`."""
    if not checkpoint:
        return "authors' weights"
    path = Path(checkpoint).resolve()
    return path.parent.name if path.stem == "last" else path.stem
