"""Say where photos were taken: best places, probability, nearest town, a link to a map."""

import json
import sys
from pathlib import Path

from jsonargparse import ArgumentParser

FORMATS = ("table", "json", "csv")
MAP_SUFFIXES = (".png", ".pdf", ".svg")
BATCH = 16
PROGRESS_FROM = 20  # photos
EPILOG = """
Photos that cannot be used are named on stderr with the reason, the others are answered, and the exit status is
1. Where EXIF says where a photo was taken, that and each answer's error in km stand beside it; the model never
sees it. Probabilities are shares of the gallery's places and not calibrated.
"""


def parser() -> ArgumentParser:
    """The options."""
    parser = ArgumentParser(prog="python -m geoclip predict", description=__doc__, epilog=EPILOG)
    parser.add_argument("photos", nargs="+", type=str, help="photos, or folders that are searched for them")
    parser.add_argument("--top-k", type=int, default=5, help="places for each photo")
    parser.add_argument(
        "--ten-crop", action="store_true", help="mean of the logits over ten crops: slower, better"
    )
    parser.add_argument("--format", choices=FORMATS, default="table", help="of what is printed")
    parser.add_argument("--map", help="also draw a map: OUT.png, .pdf or .svg")
    parser.add_argument(
        "--checkpoint", help="a model of `train`; default: the authors' released weights with CLIP"
    )
    parser.add_argument(
        "--clip-weights", help="a local file of CLIP's weights, where they cannot be downloaded"
    )
    parser.add_argument(
        "--gallery",
        help="official (the authors' 100 K) or a CSV with LAT and LON; default: the checkpoint's own",
    )
    parser.add_argument(
        "--index", action="store_true", help="search approximately (faiss), for galleries of over 2 M places"
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="auto: bf16 where it is computed faster",
    )
    return parser


def run(options) -> int:
    """Print the answers and draw the map; 1 where photos could not be used."""
    from geoclip import gallery, photos

    if options.map and Path(options.map).suffix not in MAP_SUFFIXES:
        raise ValueError(f"--map {options.map}: a map is written as {', '.join(MAP_SUFFIXES)}")
    found = list(dict.fromkeys(photos.find_photos(options.photos)))
    model = load_model(options)
    if isinstance(model, OnePlace):
        top_k = 1
        print(f"geoclip: {model.asked.name} answers with one place, without probability", file=sys.stderr)
    else:
        top_k = options.top_k
        gallery.check_k(top_k, len(model.gallery))
    answers, failed = answer(model, found, top_k, options.ten_crop)
    if hasattr(sys.stdout, "reconfigure"):  # towns and files have names that a terminal may not know
        sys.stdout.reconfigure(errors="backslashreplace")
    print_answers(answers, failed, options.format, model.gallery)
    for name, reason in failed:
        print(f"geoclip: {name}: {reason}", file=sys.stderr)
    if failed:
        print(f"geoclip: {len(failed)} of {len(found)} photos could not be used", file=sys.stderr)
    if options.map and len(answers):
        draw(model, answers, found, options)
    return 1 if failed else 0


class OnePlace:
    """A baseline (geo-cells, context) asked as predict asks GeoCLIP: one place a photo, no probability."""

    gallery = None

    def __init__(self, asked):
        """asked: the predictor.Asked of a baseline's checkpoint."""
        self.asked = asked

    def views(self, path: Path, ten_crop: bool):
        return self.asked.views(ten_crop)(path)

    def locate_views(self, views, _):
        import torch

        return self.asked.locate(views)[:, None], torch.full((len(views), 1), float("nan"))


def load_model(options):
    """The model that the options name, with a gallery."""
    from geoclip import place_index, predictor
    from geoclip.gallery import Gallery, load

    asked = predictor.load(options.checkpoint, options.clip_weights, options.precision)
    model = asked.geoclip
    if model is None:
        if options.gallery or options.index:
            raise ValueError(f"{options.checkpoint} holds a baseline, which answers from no gallery")
        return OnePlace(asked)
    if options.gallery not in (None, "official"):
        model.use_gallery(load(options.gallery))
    elif model.gallery is None or (options.gallery == "official" and options.checkpoint):
        model.use_gallery(Gallery.official())
    if options.index:
        recall = 100 * model.use_index().index.measured
        print(
            f"geoclip: the index finds {recall:.1f} % of the five best places of made queries; probabilities are upper "
            f"bounds",
            file=sys.stderr,
        )
    elif len(model.gallery) > place_index.WORTH_IT:
        print(
            f"geoclip: the gallery has {len(model.gallery):,} places; --index searches them faster",
            file=sys.stderr,
        )
    return model


def answer(model, found: list[Path], top_k: int, ten_crop: bool):
    """A table of answers, a row a photo and rank, and the photos that failed with the reason."""
    import pandas as pd
    import torch
    from tqdm import tqdm

    from geoclip import photos
    from geoclip.datasets import reverse_geocoding

    if model.gallery is not None and model.index is None:
        model.places(keep=True)
    step = max(1, BATCH // 10) if ten_crop else BATCH
    parts, failed = [], []
    quiet = len(found) < PROGRESS_FROM or not sys.stderr.isatty()
    with tqdm(total=len(found), unit="photo", disable=quiet) as bar:
        for start in range(0, len(found), step):
            views, names = [], []
            for path in found[start : start + step]:
                try:
                    views.append(model.views(path, ten_crop))
                    names.append(path)
                except photos.PhotoError as error:
                    failed.append((str(path), error.reason))
            if views:
                latlon, probability = model.locate_views(torch.stack(views), top_k)
                parts += [
                    rows(*answered)
                    for answered in zip(names, latlon.double(), probability.double(), strict=True)
                ]
            bar.update(len(found[start : start + step]))
    if not parts:
        return pd.DataFrame(), failed
    table = pd.concat(parts, ignore_index=True)
    near = reverse_geocoding.nearest_town(table[["lat", "lon"]].to_numpy())
    table.insert(5, "town", near["town"])
    table.insert(6, "country", near["country"])
    table.insert(7, "town_km", near["town_km"])
    return table, failed


def rows(path: Path, latlon, probability):
    """The answers for one photo, best first: a row a rank."""
    import pandas as pd
    import torch

    from geoclip import earth

    truth = truth_of(path)
    table = pd.DataFrame({"file": str(path), "rank": range(1, len(latlon) + 1)})
    table["lat"], table["lon"] = latlon.numpy().round(6).T
    table["probability"] = probability.numpy()
    table["map"] = [
        f"https://www.google.com/maps/search/?api=1&query={lat:.6f},{lon:.6f}" for lat, lon in latlon
    ]
    table["truth_lat"], table["truth_lon"] = truth or (float("nan"),) * 2
    there = torch.tensor(truth or (0.0, 0.0), dtype=torch.float64)
    table["error_km"] = earth.haversine_km(latlon, there).numpy() if truth else float("nan")
    return table


def truth_of(path: Path) -> tuple[float, float] | None:
    """The EXIF position of a photo that was answered; an unusable one is named on stderr."""
    from geoclip import photos

    try:
        return photos.exif_latlon(path)
    except photos.PhotoError as error:
        print(f"geoclip: {error}; it is answered without a truth to compare with", file=sys.stderr)
        return None


def print_answers(answers, failed: list[tuple[str, str]], style: str, gallery) -> None:
    """What was found, on stdout."""
    if style == "csv":
        print(answers.to_csv(index=False, float_format="%.9g").rstrip() if len(answers) else "")
    elif style == "json":
        print(json.dumps(as_json(answers, failed), indent=2, ensure_ascii=False))
    elif len(answers):
        for name, one in answers.groupby("file", sort=False):
            print(f"{name}\n{as_text(one)}\n")
        if gallery is not None:
            print(f"Probabilities are shares of the gallery ({gallery.source}) and not calibrated.")


def as_text(one) -> str:
    """The answers for one photo, for a reader."""
    from tabulate import tabulate

    from geoclip.datasets import reverse_geocoding

    columns = {
        "rank": list(one["rank"]),
        "lat": [f"{lat:.4f}" for lat in one["lat"]],
        "lon": [f"{lon:.4f}" for lon in one["lon"]],
        "probability": [f"{p:.2%}" if p == p else "–" for p in one["probability"]],
        "near": [
            reverse_geocoding.describe(*place)
            for place in zip(one["town"], one["country"], one["town_km"], strict=True)
        ],
    }
    first = one.iloc[0]
    truth = ""
    if first["error_km"] == first["error_km"]:
        columns["error km"] = [f"{error:,.1f}" for error in one["error_km"]]
        truth = f"\n  EXIF says {first['truth_lat']:.4f}, {first['truth_lon']:.4f}"
    columns["map"] = list(one["map"])
    text = tabulate(columns, headers="keys", disable_numparse=True)
    return "\n".join(f"  {line}" for line in text.splitlines()) + truth


def as_json(answers, failed: list[tuple[str, str]]) -> dict:
    """All that was found: `photos`, each with its `truth` (or null) and `places`, and what `failed`."""
    found = []
    for name, one in answers.groupby("file", sort=False) if len(answers) else ():
        first, known = one.iloc[0], bool(one["error_km"].notna().all())
        columns = ["rank", "lat", "lon", "probability", "town", "country", "town_km", "map"]
        kept = one[columns + ["error_km"] * known]
        places = kept.astype(object).where(kept.notna(), None).to_dict("records")  # JSON knows no NaN
        truth = {"lat": first["truth_lat"], "lon": first["truth_lon"]} if known else None
        found.append({"file": name, "truth": truth, "places": places})
    return {"photos": found, "failed": [{"file": name, "reason": reason} for name, reason in failed]}


def draw(model, answers, found: list[Path], options) -> None:
    """One photo: similarity everywhere and its numbered answers. Several: each one's best place, and arcs to truth."""
    from geoclip import maps, paths

    one_place = model.gallery is None
    figure = maps.figure(data=f"answers from {model.asked.name if one_place else model.gallery.source}")
    best = answers[answers["rank"] == 1]
    truth = best[["truth_lat", "truth_lon"]].to_numpy()
    if len(best) == 1 and not one_place:
        axes = maps.earth_axes(figure, title=Path(best["file"].iloc[0]).name, filled=False)
        pixels = maps.grid(axes, 300)
        values = similarity(model, best["file"].iloc[0], pixels.latlon, options.ten_crop)
        known = truth[0] if best["error_km"].notna().all() else None
        maps.similarity(axes, pixels, values, top_k=answers[["lat", "lon"]].to_numpy(), truth=known)
    else:
        axes = maps.earth_axes(figure, title=f"Best place of each photo ({len(best)})")
        known = best["error_km"].notna().to_numpy()
        maps.points(axes, best[["lat", "lon"]].to_numpy(), "answer", size=14)
        if known.any():
            maps.errors(axes, truth[known], best[["lat", "lon"]].to_numpy()[known])
        else:
            axes.legend(loc="lower left")
    with paths.atomic(options.map) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
    print(f"geoclip: map in {options.map}", file=sys.stderr)


def similarity(model, path: str, latlon, ten_crop: bool):
    """Cosine of one photo with each of (lat, lon), degrees."""
    import torch

    from geoclip.gallery import embed

    with torch.inference_mode():
        query = model.encode_images(model.views(path, ten_crop).to(model.logit_scale.device)).mean(0)
        places = embed(model.location_encoder, torch.as_tensor(latlon).float())
        return (places @ query).cpu()
