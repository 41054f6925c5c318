"""Score a model on a benchmark, on a CSV of your own photos, or on the embedded tiles."""

import hashlib
import re
from pathlib import Path

from jsonargparse import ArgumentParser

SPLITS = ("random", "blocked")
EPILOG = """
Writes one tidy table (default data/results/evaluate/NAME.csv, with what it comes from in NAME.json): accuracy
with its 95 % interval over photographers, accuracy without the test points that the gallery holds, the gallery's
ceiling, random and constant floors; NAME_answers.csv with every answer; NAME_unreadable.csv with the photos that
could not be read, which are misses, and which make the exit status 1. Benchmarks are read from the folder that
GEOCLIP_DATA names; its layout, and where to get them, stand in geoclip/datasets/benchmarks.py.
"""


def parser() -> ArgumentParser:
    """The options."""
    parser = ArgumentParser(prog="python -m geoclip evaluate", description=__doc__, epilog=EPILOG)
    parser.add_argument("--benchmark", help="im2gps3k, yfcc26k, gws15k, … (a card of geoclip.datasets)")
    parser.add_argument("--csv", help="or photos of your own: any CSV with their names, LAT and LON")
    parser.add_argument(
        "--data", choices=["blue_marble"], help="or the embedded tiles (default with a --checkpoint)"
    )
    parser.add_argument("--split", choices=[*SPLITS, "both"], default="both", help="of the embedded tiles")
    parser.add_argument(
        "--images", help="the folder of images; default: GEOCLIP_DATA/images/NAME, the CSV's folder"
    )
    parser.add_argument(
        "--checkpoint", help="a model of `train`; default: the authors' released weights with CLIP"
    )
    parser.add_argument(
        "--clip-weights", help="a local file of CLIP's weights, where they cannot be downloaded"
    )
    parser.add_argument(
        "--coordinates-only", action="store_true", help="ceiling, floors and leaks, without a model"
    )
    parser.add_argument(
        "--gallery",
        help="official (the authors' 100 K), own (the checkpoint's), a benchmark's name or a CSV with LAT and LON; "
        "default: own where the checkpoint has one, else official",
    )
    parser.add_argument("--gallery-size", type=int, help="that many different places of it, drawn at random")
    parser.add_argument("--ten-crop", action="store_true", help="mean of the logits over ten crops")
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16", "auto"],
        default="fp32",
        help="auto: bf16 where it is computed faster",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the gallery's draw, random floor and bootstrap"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="views that the tower sees together")
    parser.add_argument(
        "--workers", type=int, help="processes that open photos; default: a core each on a GPU, else 0"
    )
    parser.add_argument("--out", help="the table to write, such as my.csv")
    return parser


def run(options) -> int:
    """Answer, score, write; 1 where photos could not be read."""
    import pandas as pd
    import torch

    from geoclip import evaluation, paths, predictor
    from geoclip.datasets import blue_marble
    from geoclip.reproduce import report

    check(options)
    photos = read_photos(options) if options.benchmark or options.csv else None
    model = (
        None
        if options.coordinates_only
        else predictor.load(options.checkpoint, options.clip_weights, options.precision)
    )
    if photos is None and model.trained.config.data != "blue_marble":
        raise ValueError(
            f"{options.checkpoint} was not trained on the embedded data: give --benchmark or --csv"
        )
    places, gallery = read_gallery(options, model)
    about = {
        "data": blue_marble.LABEL if photos is None else photos.name,
        "split": "test",
        "model": "coordinates only" if model is None else model.name,
        "crops": 10 if options.ten_crop else 1,
        "seed": options.seed,
        "gallery": gallery,
    }
    score = {"from_places": model is None or model.geoclip is not None, "seed": options.seed}

    answers = None
    if photos is None:
        tables = []
        for split in SPLITS if options.split == "both" else (options.split,):
            predicted, truth = model.locate_tiles(split, options.batch_size)
            tables.append(
                evaluation.benchmark(truth, places, predicted, None, about | {"split": split}, **score)
            )
        table = pd.concat(tables, ignore_index=True)
    else:
        truth, predicted = torch.from_numpy(photos.latlon), None
        if model is not None:
            views = model.views(options.ten_crop)
            batch_size = max(1, options.batch_size // 10) if options.ten_crop else options.batch_size
            answers = predictor.answer(photos, views, model.locate, batch_size, workers(options))
            predicted = answers.predicted
        table = evaluation.benchmark(truth, places, predicted, photos.authors, about, **score)

    out = Path(options.out) if options.out else paths.RESULTS / "evaluate" / f"{slug(about)}.csv"
    given = {key: value for key, value in vars(options).items() if value is not None}
    report.save_table(table, out, report.provenance(given, data_hash(options)))
    shown = table[["split", "measure", *evaluation.ACCURACY_COLUMNS, "median_km", "mean_km", "geoscore", "n"]]
    print(shown.round(2).to_string(index=False, na_rep=""))
    print("\n".join(["", *summary(table), *pinned(options), f"written: {out}"]))
    if answers is None:
        return 0
    answers_csv, unreadable_csv = predictor.save(answers, photos, out)
    print(f"every answer: {answers_csv}")
    if answers.unreadable.empty:
        return 0
    print(f"{len(answers.unreadable):,} photos could not be read and are misses: {unreadable_csv}")
    return 1


def check(options) -> None:
    """ValueError for options that do not go together."""
    asked = [choice for choice in (options.benchmark, options.csv, options.data) if choice is not None]
    if len(asked) > 1 or not (asked or options.checkpoint):
        raise ValueError("give one of --benchmark, --csv and --data, or a --checkpoint of the embedded data")
    if options.coordinates_only and options.checkpoint:
        raise ValueError("--coordinates-only asks no model: leave --checkpoint out")
    if options.data and (options.coordinates_only or not options.checkpoint):
        raise ValueError("--data blue_marble is scored with a model of yours: give --checkpoint")
    if options.out and not options.out.endswith(".csv"):
        raise ValueError(f"--out {options.out}: the result is a table, give a name that ends in .csv")
    if not (options.benchmark or options.csv) and options.ten_crop:
        raise ValueError("tiles are rendered at the tower's size: ten crops cannot be cut out of them")


def read_photos(options):
    """The benchmark or the CSV, with its folder of images unless only coordinates are asked for."""
    from geoclip.datasets import benchmarks

    if options.csv:
        csv = Path(options.csv)
        images = None if options.coordinates_only else options.images or csv.parent
        return benchmarks.read_csv(csv, images)
    photos = benchmarks.load(options.benchmark, images=options.images)
    if photos.images is None and not options.coordinates_only:
        wanted = benchmarks.card(options.benchmark)
        raise FileNotFoundError(
            f"{wanted.title}: its images are not in {benchmarks.data_folder() / 'images' / wanted.name}: put them there or "
            f"name their folder with --images (they come from: {wanted.source}), or ask for --coordinates-only"
        )
    return photos


def read_gallery(options, model):
    """((m, 2) places in double precision, what to call them); the model answers from them from now on."""
    import torch

    from geoclip import pretrained
    from geoclip.datasets import benchmarks, folder
    from geoclip.gallery import Gallery

    own = model.gallery if options.checkpoint else None
    wanted = options.gallery or ("own" if own is not None else "official")
    if wanted == "own":
        if own is None:
            raise ValueError("--gallery own is the checkpoint's, and there is none: give official, or a CSV")
        places, source = own.latlon.double(), own.source
    elif wanted == "official":
        places, source = torch.from_numpy(pretrained.official_gallery()), "authors' 100 K gallery"
    elif wanted.endswith(".csv"):
        places, source = torch.from_numpy(folder.read_places(wanted)), Path(wanted).name
    else:
        photos = benchmarks.load(wanted)
        places, source = torch.from_numpy(photos.latlon), photos.name
    if options.gallery_size is not None:
        places = sample(places, options.gallery_size, options.seed)
        source = f"{options.gallery_size:,} places of {source}, seed {options.seed}"
    if model is not None and (model.geoclip is not None or options.gallery):
        whole = options.gallery_size is None
        answers_from = own if wanted == "own" and whole else Gallery(places, source)
        model.use_gallery(answers_from, keep=wanted == "official" and whole)
    return places, source


def sample(places, size: int, seed: int):
    """`size` different places, drawn without replacement; ValueError where there are fewer."""
    import torch

    unique = torch.unique(places, dim=0)
    if not 1 <= size <= len(unique):
        raise ValueError(f"--gallery-size {size:,}: the gallery has {len(unique):,} different places")
    return unique[torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed))[:size]]


def workers(options) -> int:
    """Processes that open photos: on a CPU the tower needs the cores itself."""
    import joblib
    import torch

    if options.workers is not None:
        return options.workers
    return joblib.cpu_count() if torch.cuda.is_available() else 0


def data_hash(options) -> str:
    """Hash of the benchmark's or the user's CSV, or of the embedded data."""
    from geoclip.datasets import benchmarks, blue_marble

    if not (options.csv or options.benchmark):
        return blue_marble.data_hash()
    csv = Path(options.csv) if options.csv else benchmarks.find_csv(benchmarks.card(options.benchmark))
    return hashlib.sha256(csv.read_bytes()).hexdigest()


def summary(table) -> list[str]:
    """What the table rests on, in words."""
    lines = []
    for split, rows in table.groupby("split", sort=False):
        first = rows.iloc[0]
        readable = "" if first.n_readable is None else f", {first.n_readable:,} readable"
        authors = "" if first.authors is None else f", {first.authors:,} photographers"
        lines.append(f"{first.data}, {split}: {first.n_expected:,} expected{readable}{authors}")
        lines.append(
            f"{first.n_leaked:,} of them are in the gallery to within 1 m; interval over {first.interval_over}"
        )
    return [
        *lines,
        f"gallery: {first.gallery}, {first.gallery_n:,} places, {first.gallery_unique:,} of them different",
    ]


def pinned(options) -> list[str]:
    """Whether a benchmark's CSV is the one that its card pins."""
    from geoclip.datasets import benchmarks

    if not options.benchmark:
        return []
    wanted = benchmarks.card(options.benchmark)
    csv = benchmarks.find_csv(wanted)
    same = benchmarks.is_pinned(wanted, csv)
    if same is None:
        return [f"{csv.name}: no SHA-256 is known for it"]
    return [
        f"{csv.name}: " + ("the pinned file" if same else f"not the pinned file, SHA-256 {wanted.sha256}")
    ]


def slug(about: dict) -> str:
    """A file name that tells results apart."""
    parts = [str(about[key]) for key in ("data", "split", "model", "gallery")] + [f"{about['crops']} crops"]
    return "-".join(re.sub(r"[^a-z0-9]+", "_", part.split("(")[0].lower()).strip("_") for part in parts)
