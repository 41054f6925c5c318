"""The commands of `python -m geoclip`, one module each.

The module's docstring is the command's help; `options(add)` adds its options, and `run(options)` returns its exit
status, or None for 0.
"""

import dataclasses
import sys
from pathlib import Path


def say(message: str) -> None:
    """Print a line to stderr."""
    print(f"geoclip: {message}", file=sys.stderr)


def add_model_options(add, precision: str) -> None:
    """Add the options that `load_model`, `choose_gallery` and `decide` read, and --ten-crop."""
    from jsonargparse.typing import restricted_string_type

    add("--checkpoint", help="a model trained with `train`; default: the authors' released weights with CLIP")
    add("--clip-weights", help="a local file of CLIP's weights, for machines that cannot download them")
    add("--ten-crop", action="store_true", help="average the logits over ten crops: slower, more accurate")
    about = "arithmetic of the image tower; auto: bf16 if that is faster; int8: fastest on a CPU"
    add("--precision", choices=["auto", "fp32", "bf16", "int8"], default=precision, help=about)
    rule = restricted_string_type("decision", r"^(argmax|mode|median|geoscore|disc:\d+(\.\d+)?)$")
    about = """rule of the answer: argmax (the place with the largest cosine), or on the posterior mode, disc:KM
        (the most probability within KM), median (least expected distance) or geoscore; default: mode for a
        checkpoint that `calibrate` has calibrated, else argmax"""
    add("--decision", type=rule, help=about)
    about = """features of the training images (`embed`), as given to `calibrate --neighbours`: they enter the
        posterior, and tell photos that are unlike all of them"""
    add("--neighbours", help=about)
    about = """official (the authors' 100 K), own (the checkpoint's), a benchmark's name, or a CSV with latitudes and
        longitudes; default: own if the checkpoint has one, else official"""
    add("--gallery", help=about)
    add("--seg-images", help="segmentation maps (`segment`) of the photos, for geo-cells that see them")
    about = "geo-cells that answer: of one level, or the product of all (default: as trained)"
    add("--s2-cells", choices=["coarse", "middle", "fine", "hierarchical"], help=about)


def load_model(options, of_tiles: bool = False):
    """The model that --checkpoint names, or the authors' released one, on a GPU if there is one.

    Returns GeoCLIP, or the module of a baseline; both are a predictor.Model. of_tiles: returns the training module
    too, as a pair, and raises ValueError for a model that was not trained on the embedded tiles.
    """
    import torch

    from geoclip.model import GeoCLIP
    from geoclip.training import checkpoints

    path, device = options.checkpoint, "cuda" if torch.cuda.is_available() else "cpu"
    if not path:
        choose_cells(None, options)
        return GeoCLIP.pretrained(options.clip_weights, options.precision)
    last = Path(path).resolve()
    if last.name == "last.ckpt" and not last.with_name("result.json").is_file():
        say(f"the training run in {last.parent} has not finished")
    checkpoint = checkpoints.read_checkpoint(path)
    kind = checkpoint["geoclip_config"].get("model", "geoclip")
    if kind == "geoclip" and not of_tiles:  # without Lightning, which takes seconds to import
        try:
            module = model = checkpoints.from_checkpoint(checkpoint, clip_weights=options.clip_weights)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    else:
        from geoclip import baselines
        from geoclip.training import runs

        module = runs.restore(checkpoint, baselines.kind(kind), path)
        model = module.model if kind == "geoclip" else module
        if of_tiles and module.config.data != "blue_marble":
            raise ValueError(f"{path} was not trained on tiles; give --benchmark or --csv")
    choose_cells(module, options).to(device)
    if kind == "geoclip":
        model.image_encoder.use_precision(options.precision)
    return (model, module) if of_tiles else model


def choose_cells(module, options):
    """The model, answering as --seg-images and --s2-cells say. Raises ValueError for another one than geo-cells."""
    images, level = (getattr(options, name, None) for name in ("seg_images", "s2_cells"))
    changes = {"seg_images": images} if images else {}
    if level:
        cells = level.replace("hierarchical", "fine")
        changes |= {"s2_cells": cells, "hierarchical": level == "hierarchical"}
    if changes and getattr(getattr(module, "config", None), "model", "") != "geocells":
        raise ValueError("--seg-images and --s2-cells need the --checkpoint of a classifier of geo-cells")
    if changes:
        module.config = dataclasses.replace(module.config, **changes)
    return module


def choose_gallery(model, options):
    """The Gallery that --gallery and --gallery-size name, by default the model's or else the official one.

    GeoCLIP answers from it from now on. Raises ValueError for a baseline with --gallery or --index.
    """
    import torch

    from geoclip.datasets import benchmarks, folder
    from geoclip.gallery import Gallery
    from geoclip.model import GeoCLIP

    gallery, wanted = getattr(model, "gallery", None), options.gallery
    if wanted == "own" and gallery is None:
        raise ValueError("--gallery own: there is no checkpoint with a gallery; give official, or a CSV")
    for name in ("gallery", "index"):
        if getattr(options, name, None) and model is not None and not isinstance(model, GeoCLIP):
            raise ValueError(f"--{name}: {options.checkpoint} is a baseline, which answers from no gallery")
    if wanted == "official" or (wanted is None and gallery is None):
        gallery = Gallery.official()
    elif wanted not in (None, "own"):
        if Path(wanted).suffix == ".csv" or Path(wanted).is_file():
            latlon, name = folder.read_places(wanted), Path(wanted).name
        else:
            photos = benchmarks.load(wanted)
            latlon, name = photos.latlon, photos.name
        gallery = Gallery(torch.from_numpy(latlon), name)
    if size := getattr(options, "gallery_size", None):
        places = torch.unique(gallery.given, dim=0)
        if size > len(places):
            raise ValueError(f"--gallery-size {size:,}: the gallery has {len(places):,} distinct places")
        drawn = torch.randperm(len(places), generator=torch.Generator().manual_seed(options.seed))[:size]
        gallery = Gallery(places[drawn], f"{size:,} places of {gallery.source}, seed {options.seed}")
    if isinstance(model, GeoCLIP):
        model.use_gallery(gallery)
    return gallery


def decide(model, options, describe=None):
    """The model, or a Decider that answers by --decision. Raises ValueError for a model without a gallery.

    A calibration holds for the checkpoint's own, whole gallery; with another one nothing is calibrated.
    """
    from geoclip.calibration import Calibration, beside
    from geoclip.decider import Decider

    found, neighbours = Calibration(), None
    if options.checkpoint and options.gallery in (None, "own"):
        found = Calibration.load(options.checkpoint, bool(options.neighbours))
        if getattr(options, "gallery_size", None) and found.fitted_on:
            say("not calibrated: the calibration is of the whole gallery")
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

    encoder, authors = model.image_encoder, None
    data = FeatureData(folder, encoder.config)
    if encoder.tower is not None and data.info.tower_hash != tower_hash(encoder.tower):
        raise ValueError(f"{folder} holds features of another tower than the checkpoint's; embed again")
    if photographers:
        read = benchmarks.load if photographers in benchmarks.CARDS else benchmarks.read_csv
        table = read(photographers).table
        by = dict(zip(map(printable, table["file"]), table["author"], strict=True))
        authors = [by.get(name) for name in data.ids()]
        if lacking := [name for name, author in zip(data.ids(), authors, strict=True) if not author]:
            raise ValueError(
                f"--photographer-disjoint: {photographers} names no photographer of {len(lacking):,} of the images in "
                f"{folder}, the first is {lacking[0]}; give the CSV that the features were made of"
            )
    neighbours = Neighbours(data.tensor()[:, 0].float(), data.latlon, authors)
    return neighbours, f"{data.info.source}, {data.info.data}"


def model_name(checkpoint: str | None) -> str:
    """What tables call a model: its run's folder, or the file's name if that is not `last`."""
    if not checkpoint:
        return "authors' weights"
    path = Path(checkpoint).resolve()
    return path.parent.name if path.stem == "last" else path.stem
