"""Say where photos were taken, or which places fit a text: best places, probability, nearest town, a link to a map."""

import csv
import functools
import json
import math
import sys
from pathlib import Path

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from geoclip.commands import (
    add_model_options,
    decide,
    load_model,
    model_name,
    read_gallery,
)

FORMATS = ("table", "json", "csv", "geojson")
COLUMNS = ["file", "rank", "lat", "lon", "probability", "town", "country", "town_km", "map"]
COLUMNS += ["truth_lat", "truth_lon", "error_km"]
MAP_SUFFIXES = (".png", ".pdf", ".svg")
PROGRESS_FROM = 20  # photos
LEVELS = (0.5, 0.9)  # probabilities of the regions
DENSITY = "log₁₀ of the probability per km²"
EPILOG = """
Photos that cannot be used are listed on stderr with the reason; the others are answered, and the exit status
is 1. If EXIF records where a photo was taken, the output shows that position and the error of each answer in
km; the model never sees it. With --decision argmax, probabilities are shares of the gallery's places and are
not calibrated. With another decision the answers are distinct places, 25 km apart, each with the probability
of being within 25 km of it, and the output tells the areas that hold 50 and 90 % and the likely countries; json and
geojson carry the outlines of these areas, and the map of a single photo draws them.
"""


def parser() -> ArgumentParser:
    """The options."""
    parser = ArgumentParser(prog="python -m geoclip predict", description=__doc__, epilog=EPILOG)
    parser.add_argument("photos", nargs="*", type=str, help="photos, or folders to search for photos")
    parser.add_argument("--text", type=str, nargs="+", default=[], help="texts to locate instead of photos")
    parser.add_argument("--top-k", type=PositiveInt, default=5, help="number of places for each photo")
    parser.add_argument("--format", choices=FORMATS, default="table", help="format of the output")
    parser.add_argument(
        "--map", nargs="?", const="map.png", help="also draw a map: OUT.png, .pdf or .svg (default: map.png)"
    )
    add_model_options(parser, precision="auto")
    parser.add_argument(
        "--gallery",
        help="official (the authors' 100 K), a benchmark's name, or a CSV with latitudes and longitudes; "
        "default: the checkpoint's own",
    )
    parser.add_argument(
        "--index", action="store_true", help="search approximately (faiss), for galleries above 2 M places"
    )
    return parser


def run(options) -> int:
    """Print the answers and draw the map; 1 if some photos could not be used."""
    import torch

    from geoclip import photos, predictor
    from geoclip.model import GeoCLIP

    if bool(options.photos) == bool(options.text) or (options.text and options.neighbours):
        raise ValueError("give photos, or --text; --neighbours compares photos")
    if options.map and Path(options.map).suffix not in MAP_SUFFIXES:
        raise ValueError(f"--map {options.map}: the name must end in {', '.join(MAP_SUFFIXES)}")
    if options.index and options.decision not in (None, "argmax"):
        raise ValueError("--index: a decision needs the scores of all places; give --decision argmax")
    found, failed = [], {}
    for source in options.photos:
        try:
            found += photos.find_photos([source])
        except FileNotFoundError as error:
            failed[source] = str(error).removeprefix(f"{source}: ")
    if not options.text and not any(
        path.exists() for path in found
    ):  # said before the model is loaded, or even downloaded
        failed |= {str(path): "no such file" for path in found}
        raise FileNotFoundError(f"no photos: {'; '.join(f'{name}: {why}' for name, why in failed.items())}")
    found = [photos.Upload(text, b"") for text in options.text] or list(dict.fromkeys(found))
    model = load_model(options)
    prepare_gallery(model, options)
    outlined = options.format in ("json", "geojson") or (bool(options.map) and len(found) == 1)
    describe = functools.partial(describe_posteriors, outlined=outlined)
    asked = model if options.index else decide(model, options, describe)
    top_k = 1 if model.gallery is None else options.top_k
    progress = len(found) >= PROGRESS_FROM
    if options.text:
        if not isinstance(model, GeoCLIP):
            raise ValueError("--text: a baseline reads no text")
        with torch.inference_mode():
            places, shares = asked.locate(model.encode_text(options.text), top_k)
        answers = predictor.Answers(places.cpu(), shares.cpu(), {})
    else:
        answers = predictor.answer(asked, found, top_k, options.ten_crop, batch_size=16, progress=progress)
    failed |= {str(found[index]): reason for index, reason in answers.unreadable.items()}
    answered = describe_all(found, answers)
    if described := getattr(asked, "described", []):
        answered = [photo | more for photo, more in zip(answered, described, strict=True)]
    for stream in (sys.stdout, sys.stderr):  # a terminal may be unable to show names of towns and files
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    print_answers(answered, failed, options.format)
    if options.format == "table" and answered and model.gallery is not None:
        shares = f"shares of the gallery ({model.gallery.source}) and are not calibrated"
        within = shares if asked is model else f"those of being within 25 km, {asked.calibration.status}"
        print(f"Probabilities are {within}.")
        if asked is not model:
            print(familiarity(asked.calibration.neighbours))
    for name, reason in failed.items():
        print(f"geoclip: {name}: {reason}", file=sys.stderr)
    if failed:
        total = len(answered) + len(failed)
        print(f"geoclip: {len(failed)} of {total} photos could not be used", file=sys.stderr)
    if options.map and answered:
        draw(asked, answered, options)
    return 1 if failed else 0


def prepare_gallery(model, options) -> None:
    """Set the gallery and the index that the options name. Raises ValueError for options that do not fit."""
    from geoclip.engines import place_index
    from geoclip.model import GeoCLIP

    if not isinstance(model, GeoCLIP):
        if options.gallery or options.index:
            name = "--gallery" if options.gallery else "--index"
            raise ValueError(f"{name}: {options.checkpoint} is a baseline, which answers from no gallery")
        name = model_name(options.checkpoint)
        print(f"geoclip: {name} answers with one place, without probability", file=sys.stderr)
        return
    if options.gallery or model.gallery is None:
        model.use_gallery(read_gallery(options.gallery or "official"))
    if options.top_k > len(model.gallery):
        raise ValueError(f"--top-k {options.top_k}: the gallery has {len(model.gallery)} places")
    if options.index:
        model.index = place_index.PlaceIndex.of(model.gallery, model.location_encoder)
        recall = 100 * model.index.measured
        print(
            f"geoclip: the index finds {recall:.1f} % of the five best places of synthetic queries; "
            "probabilities are upper bounds",
            file=sys.stderr,
        )
        return
    if len(model.gallery) > place_index.WORTH_IT:
        print(
            f"geoclip: the gallery has {len(model.gallery):,} places; --index searches it faster",
            file=sys.stderr,
        )
    model.places(keep=True)


def describe_all(found: list, answers) -> list[dict]:
    """For each answered photo: `file`, `truth` (lat, lon) or None, and `places`, dicts in order of rank.

    found: paths or photos.Uploads; a text is an Upload without data.
    """
    import torch

    from geoclip import earth
    from geoclip.datasets.reverse_geocoding import nearest_town

    described = []
    for index, path in enumerate(found):
        if index in answers.unreadable:
            continue
        latlon, truth = answers.latlon[index].double(), truth_of(path)
        error_km = None
        if truth:
            error_km = earth.haversine_km(latlon, torch.tensor(truth, dtype=torch.float64)).tolist()
        latlon = latlon[~latlon.isnan().any(-1)]  # a posterior may have fewer distinct places than asked for
        towns = nearest_town(latlon.numpy()).to_dict("records")
        places = []
        for i, (lat, lon) in enumerate(latlon.tolist()):
            share = answers.probability[index, i].item()
            place = {"rank": i + 1, "lat": round(lat, 6), "lon": round(lon, 6)}
            place |= {"probability": None if math.isnan(share) else share, **towns[i]}
            place["map"] = f"https://www.google.com/maps/search/?api=1&query={lat:.6f},{lon:.6f}"
            places.append(place | ({"error_km": error_km[i]} if error_km else {}))
        described.append({"file": str(path), "truth": truth, "places": places})
    return described


def truth_of(path) -> tuple[float, float] | None:
    """The EXIF position of a photo; an unusable one is reported on stderr."""
    from geoclip import photos

    if isinstance(path, photos.Upload) and not path.data:
        return None
    try:
        return photos.exif_latlon(path)
    except photos.PhotoError as error:
        print(f"geoclip: {error}; answered without a truth to compare with", file=sys.stderr)
        return None


def describe_posteriors(posterior, outlined: bool = False) -> list[dict]:
    """For each photo: regions that hold 50 and 90 % with their areas, and the five most probable countries.

    outlined: regions with their outlines too, as GeoJSON.
    """
    from shapely.geometry import mapping

    from geoclip import regions
    from geoclip.datasets import geography

    areas = {level: posterior.region(level)[1].tolist() for level in LEVELS}
    shares = posterior.mass_by(lambda places: geography.country_and_continent(places)[0])
    described = []
    for i, share in enumerate(shares):
        found = [{"probability": level, "area_km2": areas[level][i]} for level in LEVELS]
        for region in found if outlined else ():
            shape, pixel_km = regions.outline(posterior[i : i + 1], region["probability"])
            region |= {"outline_pixel_km": round(pixel_km, 3), "geometry": mapping(shape)}
        countries = [{"country": name, "probability": mass} for name, mass in list(share.items())[:5]]
        described.append({"regions": found, "countries": countries})
    return described


def familiarity(neighbours) -> str:
    """What "far from anything it was trained on" means, or that it is not known."""
    if neighbours is None:
        return "Whether a photo is far from anything it was trained on is not known without --neighbours."
    return (
        f"{neighbours.false_alarms:.0%} of photos like those are called far from anything it was trained on."
    )


def print_answers(answered: list[dict], failed: dict[str, str], style: str) -> None:
    """Write the answers to stdout."""
    if style == "csv":
        heads = list(dict.fromkeys(head for photo in answered for head in photo.get("context", ())))
        table = csv.DictWriter(sys.stdout, [*COLUMNS, *heads], lineterminator="\n")
        table.writeheader()
        for photo in answered:
            truth = dict(zip(("truth_lat", "truth_lon"), photo["truth"] or (), strict=False))
            truth |= {head: next(iter(likely)) for head, likely in photo.get("context", {}).items()}
            for place in photo["places"]:
                row = {"file": photo["file"], **place, **truth}
                table.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()})
    elif style == "json":
        listed = [{"file": name, "reason": reason} for name, reason in failed.items()]
        found = [
            photo | {"truth": photo["truth"] and dict(zip(("lat", "lon"), photo["truth"], strict=True))}
            for photo in answered
        ]
        print(json.dumps({"photos": found, "failed": listed}, indent=2, ensure_ascii=False))
    elif style == "geojson":
        features = [feature for photo in answered for feature in as_features(photo)]
        print(json.dumps({"type": "FeatureCollection", "features": features}, ensure_ascii=False))
    elif answered:
        for photo in answered:
            print(f"{photo['file']}\n{as_text(photo)}\n")


def as_features(photo: dict) -> list[dict]:
    """The answers for one photo as features of GeoJSON: its regions, then its places."""
    places = [
        place | {"geometry": {"type": "Point", "coordinates": [place["lon"], place["lat"]]}}
        for place in photo["places"]
    ]
    features = []
    for found in [*photo.get("regions", ()), *places]:
        about = {"file": photo["file"]} | {name: value for name, value in found.items() if name != "geometry"}
        features.append({"type": "Feature", "geometry": found["geometry"], "properties": about})
    return features


def as_text(photo: dict) -> str:
    """The answers for one photo as a table."""
    from tabulate import tabulate

    from geoclip.datasets.reverse_geocoding import describe

    rows = []
    for place in photo["places"]:
        share = "–" if place["probability"] is None else f"{place['probability']:.2%}"
        row = {"rank": place["rank"], "lat": f"{place['lat']:.4f}", "lon": f"{place['lon']:.4f}"}
        row |= {"probability": share, "near": describe(place["town"], place["country"], place["town_km"])}
        if "error_km" in place:
            row["error km"] = f"{place['error_km']:,.1f}"
        rows.append(row | {"map": place["map"]})
    text = tabulate(rows, headers="keys", disable_numparse=True)
    for region in photo.get("regions", ()):
        text += f"\n{region['probability']:.0%} within a region of {region['area_km2']:,.0f} km²"
    for head, likely in photo.get("context", {}).items():
        text += f"\n{head}: " + ", ".join(f"{name} {share:.0%}" for name, share in likely.items())
    if photo.get("unfamiliar"):
        text += "\nfar from anything it was trained on"
    if photo.get("countries"):
        text += "\n" + ", ".join(f"{c['country']} {c['probability']:.0%}" for c in photo["countries"])
    truth = "\n  EXIF says {:.4f}, {:.4f}".format(*photo["truth"]) if photo["truth"] else ""
    return "\n".join(f"  {line}" for line in text.splitlines()) + truth


def draw(model, answered: list[dict], options) -> None:
    """One photo: a map of the similarity, or of the posterior and its regions, and the places. Several: the best
    place of each, and arcs to the truth."""
    import torch
    from shapely.geometry import shape

    from geoclip import gallery, maps, paths, regions

    source = model_name(options.checkpoint) if model.gallery is None else model.gallery.source
    figure = maps.figure(data=maps.plain(f"answers from {source}"))
    best = [(photo["places"][0]["lat"], photo["places"][0]["lon"]) for photo in answered]
    known = [index for index, photo in enumerate(answered) if photo["truth"]]
    if len(answered) == 1 and model.gallery is not None:
        [photo] = answered
        axes = maps.earth_axes(figure, title=maps.plain(Path(photo["file"]).name), filled=False)
        pixels = maps.grid(axes, 300)
        latlon, encoder = torch.as_tensor(pixels.latlon), getattr(model, "model", model)
        with torch.inference_mode():
            if options.text:
                query = encoder.encode_text(options.text)
            else:
                query = encoder.views(photo["file"], options.ten_crop)[None]
        shown = {"top_k": [(place["lat"], place["lon"]) for place in photo["places"]]}
        if "regions" in photo:
            density = regions.widened(model.posterior(query), pixels.width_km).log_density(latlon[None])[0]
            outlines = {f"{r['probability']:.0%}": shape(r["geometry"]) for r in photo["regions"]}
            values, top = density / math.log(10), density.max().item() / math.log(10)
            shown |= {"regions": outlines, "label": DENSITY, "limits": (top - 6, top)}
        else:
            with torch.inference_mode():
                query = query if options.text else encoder.encode_views(query)
            values = (gallery.embed(model.location_encoder, latlon.float()) @ query[0]).cpu()
        maps.similarity(axes, pixels, values, truth=photo["truth"], **shown)
    else:
        axes = maps.earth_axes(figure, title=f"Best place of each photo ({len(best)})")
        maps.points(axes, best, "answer", size=14)
        if known:
            maps.errors(axes, [answered[i]["truth"] for i in known], [best[i] for i in known])
        else:
            axes.legend(loc="lower left")
    with paths.atomic(options.map) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
    print(f"geoclip: map in {options.map}", file=sys.stderr)
