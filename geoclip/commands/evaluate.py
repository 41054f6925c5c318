"""Score a model on a benchmark, on a CSV of your own photos, or on the embedded tiles.

Writes one tidy table (default data/results/evaluate/NAME.csv, with its provenance in NAME.json): accuracy
with its 95 % interval over photographers, accuracy without the test points that the gallery holds, the
gallery's ceiling, random and constant floors; NAME_answers.csv with every answer; NAME_unreadable.csv with
the photos that could not be read, which count as misses and make the exit status 1. Where the CSV knows the scene
of each photo, the same rows follow for indoor, natural and urban photos. A model with context heads also writes
NAME_context.csv: how often each true class is a head's first, or among its first five. Benchmarks are read from the
folder that GEOCLIP_DATA names; its layout and sources are described in geoclip/datasets/benchmarks.toml.
"""

import re
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt

from geoclip.commands import add_model_options, choose_gallery, decide, load_model, model_name

SPLITS = ("random", "blocked")


def options(add) -> None:
    """Photos or tiles, the model and its gallery, and what is scored."""
    add("--benchmark", help="im2gps3k, yfcc26k, gws15k, … (geoclip.datasets.benchmarks)")
    add("--csv", help="or your photos: any CSV with their names, latitudes and longitudes, or tar shards")
    add("--data", choices=["blue_marble"], help="or the embedded tiles (default with a --checkpoint)")
    add("--split", choices=[*SPLITS, "both"], default="both", help="of the embedded tiles")
    add("--images", help="their folder or tar shards; default: GEOCLIP_DATA/images/NAME or the CSV's folder")
    add_model_options(add, precision="fp32")
    disjoint = """the CSV of the training images of --neighbours (or mp16), with their photographers: also score answers
        without the neighbours that the photographer of the photo took"""
    add("--photographer-disjoint", metavar="CSV", help=disjoint)
    add("--coordinates-only", action="store_true", help="ceiling, floors and leaks, without a model")
    add("--gallery-size", type=PositiveInt, help="draw that many distinct places of it at random")
    add("--seed", type=NonNegativeInt, default=0, help="of the gallery's draw, random floor and bootstrap")
    add("--batch-size", type=PositiveInt, default=64, help="views that the tower processes together")
    workers = "processes that open photos; default: one per core with a GPU, else 0"
    add("--workers", type=NonNegativeInt, help=workers)
    add("--strict", action="store_true", help="refuse a benchmark with another number of rows than published")
    add("--out", help="the table to write, such as my.csv")


def run(options) -> int:
    """Answer, score, write; 1 if some photos could not be read."""
    from geoclip import evaluation, paths
    from geoclip.datasets import benchmarks
    from geoclip.reproduce import report

    check(options)
    table, listed = score(options)
    out = Path(options.out) if options.out else paths.RESULTS / "evaluate" / f"{slug(table.iloc[0])}.csv"
    given = {key: value for key, value in vars(options).items() if value is not None}
    report.save_table(table, out, report.provenance(given, data_hash(options)))
    shown = ["split", "measure", *evaluation.ACCURACY_COLUMNS, "median_km", "mean_km", "geoscore", "n"]
    print(table[shown].round(2).to_string(index=False, na_rep=""))
    print("", *summary(table), sep="\n")
    if options.benchmark:
        wanted = benchmarks.card(options.benchmark)
        csv, other = benchmarks.find_csv(wanted), f"not the pinned file, SHA-256 {wanted.sha256}"
        known = {None: "no SHA-256 is known for it", True: "the pinned file"}
        print(f"{csv.name}: {known.get(benchmarks.is_pinned(wanted, csv), other)}")
    print(f"written: {out}")
    for kind, rows in listed.items():
        path = out.with_name(f"{out.stem}_{kind}.csv")
        with paths.atomic(path) as temporary:
            rows.to_csv(temporary, index=False, float_format="%.7g", errors="backslashreplace")
        print(f"{kind}: {len(rows):,} rows in {path}")
        if kind == "context":
            print(rows.round(1).to_string(index=False))
    if unreadable := len(listed.get("unreadable", ())):
        print(f"{unreadable:,} photos could not be read and are misses")
    return 1 if unreadable else 0


def check(options) -> None:
    """Raises ValueError for options that do not go together."""
    asked = [choice for choice in (options.benchmark, options.csv, options.data) if choice is not None]
    of_photos = bool(options.benchmark or options.csv)
    if len(asked) > 1 or not (asked or options.checkpoint):
        raise ValueError("give one of --benchmark, --csv and --data, or a --checkpoint of the embedded data")
    if options.coordinates_only and options.checkpoint:
        raise ValueError("--coordinates-only uses no model; omit --checkpoint")
    if options.data and (options.coordinates_only or not options.checkpoint):
        raise ValueError("--data blue_marble is scored with your own model; give --checkpoint")
    if options.photographer_disjoint:
        if not (options.neighbours and of_photos) or options.coordinates_only:
            needs = "is of photos and --neighbours; give --benchmark or --csv, and both"
            raise ValueError(f"--photographer-disjoint {needs}")
    if options.out and not options.out.endswith(".csv"):
        raise ValueError(f"--out {options.out}: the result is a table; give a name that ends in .csv")
    if options.ten_crop and not of_photos:
        rendered = "tiles are rendered at the tower's size; ten crops cannot be cut from them"
        raise ValueError(f"--ten-crop: {rendered}")


def score(options):
    """The table; and tables of answers, unreadable photos and context by name."""
    import pandas as pd

    from geoclip import evaluation
    from geoclip.datasets import blue_marble
    from geoclip.model import GeoCLIP

    model = module = photos = None
    if options.benchmark or options.csv:
        photos = read_photos(options, not options.coordinates_only)
        if options.photographer_disjoint and photos.authors is None:
            unnamed = f"{photos.name} does not name the photographer of each photo"
            raise ValueError(f"--photographer-disjoint: {unnamed}")
        model = None if options.coordinates_only else load_model(options)
    else:
        model, module = load_model(options, of_tiles=True)
    gallery = choose_gallery(model, options)
    if isinstance(model, GeoCLIP):
        official = options.gallery == "official" or not options.checkpoint
        model.places(keep=official and options.gallery_size is None)
    name = "coordinates only" if model is None else model_name(options.checkpoint)
    model = model and decide(model, options)
    if options.decision not in (None, "argmax"):
        name += f", {options.decision}{', neighbours' if options.neighbours else ''}"
    about = {"data": blue_marble.LABEL if photos is None else photos.name, "split": "", "model": name}
    about |= {"crops": 10 if options.ten_crop else 1, "seed": options.seed, "gallery": gallery.source}
    answer = answer_tiles if photos is None else answer_photos
    answered, listed = answer(options, model, module if photos is None else photos)
    from_places, tables = model is None or model.gallery is not None, []
    for split, by, truth, predicted, authors in answered:
        of = about | {"split": split}
        rows = evaluation.benchmark(truth, gallery.given, predicted, authors, of, from_places, options.seed)
        if by:  # a second answer to the same photos, which have the same ceiling and floors
            rows = rows[~rows["measure"].str.contains("ceiling|floor")]
        tables.append(rows.assign(measure=rows["measure"] + by))
    return pd.concat(tables, ignore_index=True), listed


def answer_photos(options, model, photos):
    """What was answered: (split, which answer, truth, answers, photographers); and tables of photos by name.

    Answers are (n, 2), NaN where a photo could not be read, or None without a model.
    """
    import joblib
    import torch

    from geoclip import earth, predictor

    truth, authors = torch.from_numpy(photos.latlon), photos.authors
    if model is None:
        return [("test", "", truth, None, authors)], {}
    workers = options.workers
    if workers is None:  # on a CPU the tower needs the cores itself
        workers = joblib.cpu_count() if torch.cuda.is_available() else 0
    how = options.ten_crop, options.batch_size, workers
    found = predictor.answer(model, photos, 1, *how, progress=True)
    predicted = found.latlon[:, 0].double()
    rows = photos.table[["file", "line", "lat", "lon"]].copy()
    rows[["predicted_lat", "predicted_lon"]] = predicted.numpy()
    rows["error_km"] = earth.haversine_km(predicted, truth).numpy()
    missed = photos.table.loc[list(found.unreadable), ["file", "line"]]
    listed = {"answers": rows, "unreadable": missed.assign(reason=list(found.unreadable.values()))}
    if hasattr(model, "encoding"):  # context heads
        from geoclip.baselines import context, samples

        described = iter(model.described)
        each = [{} if i in found.unreadable else next(described) for i in range(len(photos))]
        listed["context"] = context.score_context(each, samples.context_of(photos.table))
    answered = [("test", "", truth, predicted, authors)]
    for scene, of in photos.table.groupby("scene").indices.items() if "scene" in photos.table else ():
        theirs = None if authors is None else authors[of]
        answered.append((f"test, {scene}", "", truth[of], predicted[of], theirs))
    if options.photographer_disjoint:
        read, others = ~predicted.isnan().any(1), torch.full_like(predicted, torch.nan)
        others[read] = model.by_others(authors[read.numpy()].tolist())
        answered.append(("test", ", neighbours by others", truth, others, authors))
    return answered, listed


def answer_tiles(options, model, module):
    """As answer_photos, for the splits of the embedded tiles."""
    import pandas as pd
    import torch
    from tqdm import tqdm

    answered, scored = [], []
    for split in SPLITS if options.split == "both" else (options.split,):
        images, truth = module.test_tiles(split)
        parts = tqdm(images.split(options.batch_size), f"tiles, {split}", disable=None)
        predicted = torch.cat([model.locate(part[:, None])[0][:, 0].cpu() for part in parts])
        answered.append((split, "", truth, predicted, None))
        if hasattr(module, "encoding"):
            from geoclip.baselines import context, samples

            known = samples.tile_context(truth, module.config.used_heads)
            scored.append(context.score_context(module.described[-len(truth) :], known).assign(split=split))
    return answered, {"context": pd.concat(scored)} if scored else {}


def read_photos(options, opened: bool = True):
    """The benchmark or the CSV, with its folder of images if they are `opened`."""
    from geoclip.datasets import benchmarks

    if options.csv:
        images = options.images or Path(options.csv).parent if opened else None
        return benchmarks.read_csv(options.csv, images)
    wanted = benchmarks.card(options.benchmark)
    photos = benchmarks.load(options.benchmark, None, options.images, getattr(options, "strict", False))
    print(f"{wanted.title}: {benchmarks.expected(wanted, photos)} expected")
    if photos.images is None and opened:
        raise FileNotFoundError(
            f"{wanted.title}: its images are not in {benchmarks.data_folder() / 'images' / wanted.name}; "
            f"put them there, name their folder with --images (source: {wanted.source}), or use "
            "--coordinates-only"
        )
    return photos


def data_hash(options) -> str:
    """Hash of the benchmark's or the user's CSV, or of the embedded data."""
    from geoclip import paths
    from geoclip.datasets import benchmarks, blue_marble, sources

    if options.benchmark:
        return paths.sha256(benchmarks.find_csv(benchmarks.card(options.benchmark)))
    if not options.csv:
        return blue_marble.data_hash()
    return sources.TarShards(options.csv).hash if options.csv.endswith(".tar") else paths.sha256(options.csv)


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


def slug(about) -> str:
    """A file name that distinguishes results."""
    parts = [str(about[key]) for key in ("data", "model", "gallery")] + [f"{about['crops']} crops"]
    return "-".join(re.sub(r"[^a-z0-9]+", "_", part.split("(")[0].lower()).strip("_") for part in parts)
