"""Say where photos were taken, or which places fit a text: best places, probability, nearest town, a link to a map.

Photos that cannot be used are listed on stderr with the reason; the others are answered, and the exit status
is 1. If EXIF records where a photo was taken, the output shows that position and the error of each answer in
km; the model never sees it. With --decision argmax, probabilities are shares of the gallery's places and are
not calibrated. With another decision the answers are distinct places, 25 km apart, each with the probability
of being within 25 km of it: first the decision's own, then the others in the order of that probability. The output
also tells the areas that hold 50 and 90 % and the likely countries; json and geojson carry the outlines of these
areas, and the map of a single photo draws them.
"""

import functools
import json
import math
import sys
from pathlib import Path

from jsonargparse.typing import PositiveInt

from geoclip.commands import add_model_options, choose_gallery, decide, load_model, model_name, say

FORMATS = ("table", "json", "csv", "geojson")
COLUMNS = "file rank lat lon probability town country town_km map truth_lat truth_lon error_km".split()
MAP_SUFFIXES = (".png", ".pdf", ".svg")
PROGRESS_FROM = 20  # photos
LEVELS = (0.5, 0.9)  # probabilities of the regions
DENSITY = "log₁₀ of the probability per km²"


def options(add) -> None:
    """What is asked, the model and its gallery, and how the answers are shown."""
    add("photos", nargs="*", help="photos, or folders to search for photos")
    add("--text", nargs="+", default=[], help="texts to locate instead of photos")
    add("--top-k", type=PositiveInt, default=5, help="number of places for each photo")
    add("--format", choices=FORMATS, default="table", help="format of the output")
    add("--map", nargs="?", const="map.png", help="also draw a map: OUT.png, .pdf or .svg (default: map.png)")
    add_model_options(add, precision="auto")
    add("--index", action="store_true", help="search approximately (faiss), for galleries above 2 M places")


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
    # said before the model is loaded, or even downloaded
    if options.photos and not any(path.exists() for path in found):
        failed |= {str(path): "no such file" for path in found}
        raise FileNotFoundError(f"no photos: {'; '.join(f'{name}: {why}' for name, why in failed.items())}")
    found = [photos.Upload(text, b"") for text in options.text] or list(dict.fromkeys(found))
    model = load_model(options)
    prepare_gallery(model, options)
    outlined = options.format in ("json", "geojson") or (bool(options.map) and len(found) == 1)
    describe = functools.partial(describe_posteriors, outlined=outlined)
    asked = model if options.index else decide(model, options, describe)
    top_k = 1 if model.gallery is None else options.top_k
    if not options.text:
        progress = len(found) >= PROGRESS_FROM
        answers = predictor.answer(asked, found, top_k, options.ten_crop, batch_size=16, progress=progress)
    elif isinstance(model, GeoCLIP):
        with torch.inference_mode():
            places, shares = asked.locate(model.encode_text(options.text), top_k)
        answers = predictor.Answers(places.cpu(), shares.cpu(), {})
    else:
        raise ValueError("--text: a baseline reads no text")
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
        if asked is not model and (fit := asked.calibration.neighbours):
            rate = f"{fit.false_alarms:.0%} of photos like those"
            print(f"{rate} are called far from anything it was trained on.")
        elif asked is not model:
            print("Whether a photo is far from anything it was trained on is not known without --neighbours.")
    for name, reason in failed.items():
        say(f"{name}: {reason}")
    if failed:
        say(f"{len(failed)} of {len(answered) + len(failed)} photos could not be used")
    if options.map and answered:
        draw(asked, answered, options)
    return 1 if failed else 0


def prepare_gallery(model, options) -> None:
    """Set the gallery and the index that the options name. Raises ValueError for options that do not fit."""
    from geoclip.engines import place_index
    from geoclip.model import GeoCLIP

    if not (isinstance(model, GeoCLIP) or options.gallery or options.index):
        say(f"{model_name(options.checkpoint)} answers with one place, without probability")
        return
    gallery = choose_gallery(model, options)
    if options.top_k > len(gallery):
        raise ValueError(f"--top-k {options.top_k}: the gallery has {len(gallery)} places")
    if options.index:
        model.index = place_index.PlaceIndex.of(gallery, model.location_encoder)
        found = f"{100 * model.index.measured:.1f} % of the five best places of synthetic queries"
        say(f"the index finds {found}; probabilities are upper bounds")
        return
    if len(gallery) > place_index.WORTH_IT:
        say(f"the gallery has {len(gallery):,} places; --index searches it faster")
    model.places(keep=True)


def describe_all(found: list, answers) -> list[dict]:
    """For each answered photo: `file`, `truth` ({"lat", "lon"} or None), and `places`, dicts in order of rank.

    found: paths or photos.Uploads; a text is an Upload without data.
    """
    import torch

    from geoclip import earth
    from geoclip.datasets.reverse_geocoding import nearest_town

    described = []
    for index in (index for index in range(len(found)) if index not in answers.unreadable):
        latlon, truth = answers.latlon[index].double(), truth_of(found[index])
        latlon = latlon[~latlon.isnan().any(-1)]  # a posterior may have fewer distinct places than asked for
        places = nearest_town(latlon.numpy()).to_dict("records")
        shares = answers.probability[index].tolist()
        for i, (lat, lon) in enumerate(latlon.tolist()):
            place = {"rank": i + 1, "lat": round(lat, 6), "lon": round(lon, 6)}
            place |= {"probability": None if math.isnan(shares[i]) else shares[i], **places[i]}
            places[i] = place | {
                "map": f"https://www.google.com/maps/search/?api=1&query={lat:.6f},{lon:.6f}"
            }
        if truth:
            there = torch.tensor([*truth.values()], dtype=torch.float64)
            for place, error_km in zip(places, earth.haversine_km(latlon, there).tolist(), strict=True):
                place["error_km"] = error_km
        described.append({"file": str(found[index]), "truth": truth, "places": places})
    return described


def truth_of(path) -> dict[str, float] | None:
    """The EXIF position of a photo; an unusable one is reported on stderr."""
    from geoclip import photos

    if isinstance(path, photos.Upload) and not path.data:
        return None
    try:
        place = photos.exif_latlon(path)
        return place and dict(zip(("lat", "lon"), place, strict=True))
    except photos.PhotoError as error:
        say(f"{error}; answered without a truth to compare with")
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


def print_answers(answered: list[dict], failed: dict[str, str], style: str) -> None:
    """Write the answers to stdout."""
    if style == "table":
        for photo in answered:
            print(f"{photo['file']}\n{as_text(photo)}\n")
    elif style == "csv":
        import pandas as pd

        rows, heads = [], {}
        for photo in answered:
            context = {head: next(iter(likely)) for head, likely in photo.get("context", {}).items()}
            truth = {f"truth_{name}": value for name, value in (photo["truth"] or {}).items()}
            rows += [{"file": photo["file"], **place, **truth, **context} for place in photo["places"]]
            heads |= context
        table = pd.DataFrame(rows, columns=[*COLUMNS, *heads])
        print(table.to_csv(index=False, float_format="%.9g"), end="")
    elif style == "json":
        listed = [{"file": name, "reason": reason} for name, reason in failed.items()]
        print(json.dumps({"photos": answered, "failed": listed}, indent=2, ensure_ascii=False))
    else:
        features = [feature for photo in answered for feature in as_features(photo)]
        print(json.dumps({"type": "FeatureCollection", "features": features}, ensure_ascii=False))


def as_features(photo: dict) -> list[dict]:
    """The answers for one photo as features of GeoJSON: its regions, then its places."""
    features = []
    for found in [*photo.get("regions", ()), *photo["places"]]:
        about = {"file": photo["file"], **found}
        shape = about.pop("geometry", None) or {"type": "Point", "coordinates": [found["lon"], found["lat"]]}
        features.append({"type": "Feature", "geometry": shape, "properties": about})
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
    lines = tabulate(rows, headers="keys", disable_numparse=True).splitlines()
    for region in photo.get("regions", ()):
        lines.append(f"{region['probability']:.0%} within a region of {region['area_km2']:,.0f} km²")
    for head, likely in photo.get("context", {}).items():
        lines.append(f"{head}: " + ", ".join(f"{name} {share:.0%}" for name, share in likely.items()))
    if photo.get("unfamiliar"):
        lines.append("far from anything it was trained on")
    if photo.get("countries"):
        likely = (f"{c['country']} {c['probability']:.0%}" for c in photo["countries"])
        lines.append("on land in " + ", ".join(likely))
    if photo["truth"]:
        lines.append("EXIF says {lat:.4f}, {lon:.4f}".format(**photo["truth"]))
    return "\n".join(f"  {line}" for line in lines)


def draw(model, answered: list[dict], options) -> None:
    """One photo: a map of the similarity, or of the posterior and its regions, and the places. Several: the best
    place of each, and arcs to the truth."""
    from geoclip import maps, paths

    source = model_name(options.checkpoint) if model.gallery is None else model.gallery.source
    figure = maps.figure(data=maps.plain(f"answers from {source}"))
    if len(answered) == 1 and model.gallery is not None:
        draw_one(model, answered[0], options, figure)
    else:
        axes = maps.earth_axes(figure, title=f"Best place of each photo ({len(answered)})")
        maps.points(axes, [degrees(photo["places"][0]) for photo in answered], "answer", size=14)
        if known := [photo for photo in answered if photo["truth"]]:
            best = [degrees(photo["places"][0]) for photo in known]
            maps.errors(axes, [degrees(photo["truth"]) for photo in known], best)
        else:
            axes.legend(loc="lower left")
    with paths.atomic(options.map) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
    say(f"map in {options.map}")


def degrees(place: dict) -> tuple[float, float]:
    """(lat, lon) of a place."""
    return place["lat"], place["lon"]


def draw_one(model, photo: dict, options, figure) -> None:
    """The similarity of one photo or text with every place, or its posterior and regions, and the best places."""
    import torch
    from shapely.geometry import shape

    from geoclip import gallery, maps, regions

    axes = maps.earth_axes(figure, title=maps.plain(Path(photo["file"]).name), filled=False)
    pixels = maps.grid(axes, 300)
    latlon, encoder = torch.as_tensor(pixels.latlon), getattr(model, "model", model)
    truth, shown = photo["truth"] and degrees(photo["truth"]), {"top_k": [*map(degrees, photo["places"])]}
    with torch.inference_mode():
        if options.text:
            query = encoder.encode_text(options.text)
        else:
            query = encoder.views(photo["file"], options.ten_crop)[None]
        if found := photo.get("regions"):
            density = regions.widened(model.posterior(query), pixels.width_km).log_density(latlon[None])[0]
            values = density / math.log(10)
            top, names = values.max().item(), [f"{region['probability']:.0%}" for region in found]
            outlines = dict(zip(names, [shape(region["geometry"]) for region in found], strict=True))
            shown |= {"regions": outlines, "label": DENSITY, "limits": (top - 6, top)}
        else:
            query = query if options.text else encoder.encode_views(query)
            values = (gallery.embed(encoder.location_encoder, latlon.float()) @ query[0]).cpu()
    maps.similarity(axes, pixels, values, truth=truth, **shown)
