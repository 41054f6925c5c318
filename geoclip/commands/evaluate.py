"""Score a model on a benchmark, on a CSV of your own photos, or on the embedded tiles."""

import hashlib
import re
from pathlib import Path

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt

from geoclip.commands import (
    add_model_options,
    decide,
    load_model,
    load_tiles_model,
    model_name,
    read_gallery,
)

SPLITS = ("random", "blocked")
EPILOG = """
Writes one tidy table (default data/results/evaluate/NAME.csv, with its provenance in NAME.json): accuracy
with its 95 % interval over photographers, accuracy without the test points that the gallery holds, the
gallery's ceiling, random and constant floors; NAME_answers.csv with every answer; NAME_unreadable.csv with
the photos that could not be read, which count as misses and make the exit status 1. Where the CSV knows the scene
of each photo, the same rows follow for indoor, natural and urban photos. A model with context heads also writes
NAME_context.csv: how often each true class is a head's first, or among its first five. Benchmarks are read from the
folder that GEOCLIP_DATA names; its layout and sources are described in geoclip/datasets/benchmarks.toml.
"""


def parser() -> ArgumentParser:
    """The options."""
    parser = ArgumentParser(prog="python -m geoclip evaluate", description=__doc__, epilog=EPILOG)
    parser.add_argument("--benchmark", help="im2gps3k, yfcc26k, gws15k, … (geoclip.datasets.benchmarks)")
    parser.add_argument(
        "--csv", help="or your own photos: any CSV with their names, latitudes and longitudes, or tar shards"
    )
    parser.add_argument(
        "--data", choices=["blue_marble"], help="or the embedded tiles (default with a --checkpoint)"
    )
    parser.add_argument("--split", choices=[*SPLITS, "both"], default="both", help="of the embedded tiles")
    parser.add_argument(
        "--images", help="their folder, or tar shards; default: GEOCLIP_DATA/images/NAME, or the CSV's folder"
    )
    add_model_options(parser, precision="fp32")
    parser.add_argument(
        "--photographer-disjoint",
        metavar="CSV",
        help="the CSV of the training images of --neighbours (or mp16), with their photographers: also score answers "
        "without the neighbours that the photographer of the photo took",
    )
    parser.add_argument(
        "--coordinates-only", action="store_true", help="ceiling, floors and leaks, without a model"
    )
    parser.add_argument(
        "--gallery",
        help="official (the authors' 100 K), own (the checkpoint's), a benchmark's name or a CSV with "
        "latitudes and longitudes; default: own if the checkpoint has one, else official",
    )
    parser.add_argument(
        "--gallery-size", type=PositiveInt, help="draw that many distinct places of it at random"
    )
    parser.add_argument(
        "--seed", type=NonNegativeInt, default=0, help="of the gallery's draw, random floor and bootstrap"
    )
    parser.add_argument(
        "--batch-size", type=PositiveInt, default=64, help="views that the tower processes together"
    )
    parser.add_argument(
        "--workers",
        type=NonNegativeInt,
        help="processes that open photos; default: one per core with a GPU, else 0",
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse a benchmark with another number of rows than published"
    )
    parser.add_argument("--out", help="the table to write, such as my.csv")
    return parser


def run(options) -> int:
    """Answer, score, write; 1 if some photos could not be read."""
    from geoclip import evaluation, paths
    from geoclip.reproduce import report

    check(options)
    of_photos = bool(options.benchmark or options.csv)
    table, answers = score_photos(options) if of_photos else score_tiles(options)
    out = Path(options.out) if options.out else paths.RESULTS / "evaluate" / f"{slug(table.iloc[0])}.csv"
    given = {key: value for key, value in vars(options).items() if value is not None}
    report.save_table(table, out, report.provenance(given, data_hash(options)))
    shown = ["split", "measure", *evaluation.ACCURACY_COLUMNS, "median_km", "mean_km", "geoscore", "n"]
    print(table[shown].round(2).to_string(index=False, na_rep=""))
    print("\n".join(["", *summary(table), *pinned(options), f"written: {out}"]))
    for kind, rows in answers.items():
        path = out.with_name(f"{out.stem}_{kind}.csv")
        with paths.atomic(path) as temporary:
            rows.to_csv(temporary, index=False, float_format="%.7g", errors="backslashreplace")
        print(f"{kind}: {len(rows):,} rows in {path}")
        if kind == "context":
            print(rows.round(1).to_string(index=False))
    if unreadable := len(answers.get("unreadable", ())):
        print(f"{unreadable:,} photos could not be read and are misses")
    return 1 if unreadable else 0


def check(options) -> None:
    """Raises ValueError for options that do not go together."""
    asked = [choice for choice in (options.benchmark, options.csv, options.data) if choice is not None]
    if len(asked) > 1 or not (asked or options.checkpoint):
        raise ValueError("give one of --benchmark, --csv and --data, or a --checkpoint of the embedded data")
    if options.coordinates_only and options.checkpoint:
        raise ValueError("--coordinates-only uses no model; omit --checkpoint")
    if options.data and (options.coordinates_only or not options.checkpoint):
        raise ValueError("--data blue_marble is scored with your own model; give --checkpoint")
    of_photos = (options.benchmark or options.csv) and not options.coordinates_only
    if options.photographer_disjoint and not (options.neighbours and of_photos):
        raise ValueError(
            "--photographer-disjoint is of photos and --neighbours; give --benchmark or --csv, and both"
        )
    if options.out and not options.out.endswith(".csv"):
        raise ValueError(f"--out {options.out}: the result is a table; give a name that ends in .csv")
    if not (options.benchmark or options.csv) and options.ten_crop:
        raise ValueError(
            "--ten-crop: tiles are rendered at the tower's size; ten crops cannot be cut from them"
        )


def score_photos(options):
    """The table of a benchmark or CSV; and answers, unreadable photos and context as tables by name."""
    import joblib
    import pandas as pd
    import torch

    from geoclip import earth, evaluation, predictor

    photos = read_photos(options)
    if options.photographer_disjoint and photos.authors is None:
        raise ValueError(
            f"--photographer-disjoint: {photos.name} does not name the photographer of each photo"
        )
    model = None if options.coordinates_only else load_model(options)
    gallery = choose_gallery(options, model)
    truth, answers, predicted = torch.from_numpy(photos.latlon), {}, None
    if model is not None:
        workers = options.workers
        if workers is None:  # on a CPU the tower needs the cores itself
            workers = joblib.cpu_count() if torch.cuda.is_available() else 0
        model = decide(model, options)
        found = predictor.answer(
            model, photos, 1, options.ten_crop, options.batch_size, workers, progress=True
        )
        predicted = found.latlon[:, 0].double()
        rows = photos.table[["file", "line", "lat", "lon"]].copy()
        rows[["predicted_lat", "predicted_lon"]] = predicted.numpy()
        rows["error_km"] = earth.haversine_km(predicted, truth).numpy()
        missed = photos.table.loc[list(found.unreadable), ["file", "line"]]
        answers = {"answers": rows, "unreadable": missed.assign(reason=list(found.unreadable.values()))}
        if hasattr(model, "encoding"):  # context heads
            from geoclip.baselines import context, samples

            described = iter(model.described)
            each = [{} if i in found.unreadable else next(described) for i in range(len(photos))]
            answers["context"] = context.score_context(each, samples.context_of(photos.table))
    ceiling = model is None or model.gallery is not None
    tables = []
    for split, rows in [("test", slice(None)), *(by_scene(photos) if answers else ())]:
        about = describe(options, photos.name, split, gallery.source)
        authors = None if photos.authors is None else photos.authors[rows]
        answered = None if predicted is None else predicted[rows]
        tables.append(
            evaluation.benchmark(truth[rows], gallery.given, answered, authors, about, ceiling, options.seed)
        )
    if options.photographer_disjoint:
        read = [index for index in range(len(photos)) if index not in found.unreadable]
        predicted = torch.full_like(predicted, torch.nan)
        predicted[read] = model.by_others(photos.authors[read].tolist())
        about = describe(options, photos.name, "test", gallery.source)
        other = evaluation.benchmark(
            truth, gallery.given, predicted, photos.authors, about, False, options.seed
        )
        other = other[~other["measure"].str.endswith("floor")]
        tables.append(other.assign(measure=other["measure"] + ", neighbours by others"))
    return pd.concat(tables, ignore_index=True), answers


def by_scene(photos):
    """("test, indoor", its rows) and so on, where the scenes of photos are known."""
    import numpy as np

    for scene in sorted(set(photos.table.get("scene", ()))):
        yield f"test, {scene}", np.flatnonzero(photos.table["scene"] == scene)


def score_tiles(options):
    """As score_photos, of a checkpoint's answers for the embedded tiles."""
    import pandas as pd
    import torch
    from tqdm import tqdm

    from geoclip import evaluation
    from geoclip.datasets import blue_marble

    module, model = load_tiles_model(options)
    gallery = choose_gallery(options, model)
    model = decide(model, options)
    from_places = model.gallery is not None
    tables, scored = [], []
    for split in SPLITS if options.split == "both" else (options.split,):
        images, truth = module.test_tiles(split)
        parts = tqdm(images.split(options.batch_size), f"tiles, {split}", disable=None)
        predicted = torch.cat([model.locate(part[:, None])[0][:, 0].cpu() for part in parts])
        about = describe(options, blue_marble.LABEL, split, gallery.source)
        tables.append(
            evaluation.benchmark(truth, gallery.given, predicted, None, about, from_places, options.seed)
        )
        if hasattr(module, "encoding"):
            from geoclip.baselines import context, samples

            known = samples.tile_context(truth, module.config.used_heads)
            scored.append(context.score_context(module.described[-len(truth) :], known).assign(split=split))
    return pd.concat(tables, ignore_index=True), {"context": pd.concat(scored)} if scored else {}


def describe(options, data: str, split: str, gallery: str) -> dict[str, object]:
    """The columns that tell what was evaluated."""
    model = "coordinates only" if options.coordinates_only else model_name(options.checkpoint)
    if options.decision and options.decision != "argmax":
        model = f"{model}, {options.decision}{', neighbours' if options.neighbours else ''}"
    crops = 10 if options.ten_crop else 1
    about = {"data": data, "split": split, "model": model, "crops": crops}
    return about | {"seed": options.seed, "gallery": gallery}


def read_photos(options):
    """The benchmark or the CSV, with its folder of images unless only coordinates are evaluated."""
    from geoclip.datasets import benchmarks

    if options.csv:
        images = None if options.coordinates_only else options.images or Path(options.csv).parent
        return benchmarks.read_csv(Path(options.csv), images)
    wanted = benchmarks.card(options.benchmark)
    photos = benchmarks.load(options.benchmark, images=options.images, strict=options.strict)
    print(f"{wanted.title}: {benchmarks.expected(wanted, photos)} expected")
    if photos.images is None and not options.coordinates_only:
        raise FileNotFoundError(
            f"{wanted.title}: its images are not in {benchmarks.data_folder() / 'images' / wanted.name}; "
            f"put them there, name their folder with --images (source: {wanted.source}), or use "
            "--coordinates-only"
        )
    return photos


def choose_gallery(options, model):
    """The gallery that --gallery and --gallery-size name; the model answers from it from now on."""
    from geoclip.gallery import Gallery
    from geoclip.model import GeoCLIP

    own = model.gallery if options.checkpoint and model is not None else None
    wanted = options.gallery or ("own" if own is not None else "official")
    if wanted == "own" and own is None:
        raise ValueError("--gallery own: there is no checkpoint with a gallery; give official, or a CSV")
    gallery = own if wanted == "own" else read_gallery(wanted)
    if options.gallery_size is not None:
        source = f"{options.gallery_size:,} places of {gallery.source}, seed {options.seed}"
        gallery = Gallery(sample(gallery.given, options.gallery_size, options.seed), source)
    if isinstance(model, GeoCLIP):
        model.use_gallery(gallery).places(keep=wanted == "official" and options.gallery_size is None)
    elif model is not None and options.gallery:
        raise ValueError(f"--gallery: {options.checkpoint} is a baseline, which answers from no gallery")
    return gallery


def sample(places, size: int, seed: int):
    """`size` distinct places, drawn without replacement. Raises ValueError if there are fewer."""
    import torch

    unique = torch.unique(places, dim=0)
    if size > len(unique):
        raise ValueError(f"--gallery-size {size:,}: the gallery has {len(unique):,} distinct places")
    return unique[torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed))[:size]]


def data_hash(options) -> str:
    """Hash of the benchmark's or the user's CSV, or of the embedded data."""
    from geoclip.datasets import benchmarks, blue_marble, sources

    if not (options.csv or options.benchmark):
        return blue_marble.data_hash()
    if (options.csv or "").endswith(".tar"):
        return sources.TarShards(options.csv).hash
    csv = Path(options.csv) if options.csv else benchmarks.find_csv(benchmarks.card(options.benchmark))
    return hashlib.sha256(csv.read_bytes()).hexdigest()


def summary(table) -> list[str]:
    """What the table is based on, as text."""
    lines = []
    for split, rows in table.groupby("split", sort=False):
        first = rows.iloc[0]
        readable = "" if first.n_readable is None else f", {first.n_readable:,} readable"
        authors = "" if first.authors is None else f", {first.authors:,} photographers"
        lines.append(f"{first.data}, {split}: {first.n_expected:,} expected{readable}{authors}")
        leaked = f"{first.n_leaked:,} of them are in the gallery to within 1 m"
        lines.append(f"{leaked}; interval over {first.interval_over}")
    unique = f"{first.gallery_n:,} places, {first.gallery_unique:,} of them distinct"
    return [*lines, f"gallery: {first.gallery}, {unique}"]


def pinned(options) -> list[str]:
    """Whether the benchmark's CSV is the one whose SHA-256 is known."""
    from geoclip.datasets import benchmarks

    if not options.benchmark:
        return []
    wanted = benchmarks.card(options.benchmark)
    csv = benchmarks.find_csv(wanted)
    known = {None: "no SHA-256 is known for it", True: "the pinned file"}
    same = benchmarks.is_pinned(wanted, csv)
    return [f"{csv.name}: {known.get(same, f'not the pinned file, SHA-256 {wanted.sha256}')}"]


def slug(about) -> str:
    """A file name that distinguishes results."""
    parts = [str(about[key]) for key in ("data", "model", "gallery")] + [f"{about['crops']} crops"]
    return "-".join(re.sub(r"[^a-z0-9]+", "_", part.split("(")[0].lower()).strip("_") for part in parts)
