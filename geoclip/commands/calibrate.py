"""Fit the probabilities of a checkpoint to images with known places that it was not trained on."""

from pathlib import Path

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from geoclip.commands import load_model
from geoclip.commands.evaluate import read_photos

EPILOG = """
Writes CHECKPOINT.calibration.json beside the checkpoint; `predict` and `evaluate` use it from then on, with the
checkpoint's own gallery. Choose images as unlike the training photos as the ones to come: other photographers, and
other places if those will be elsewhere. `train --holdout` leaves such photos out and lists them in holdout.csv.
"""


def parser() -> ArgumentParser:
    """The options."""
    parser = ArgumentParser(prog="python -m geoclip calibrate", description=__doc__, epilog=EPILOG)
    parser.add_argument("--checkpoint", required=True, help="a GeoCLIP model trained with `train`")
    parser.add_argument("--clip-weights", help="a local file of CLIP's weights")
    parser.add_argument("--benchmark", help="the images: im2gps3k, … (geoclip.datasets.benchmarks)")
    parser.add_argument("--csv", help="or a CSV of your own photos; default: the validation tiles")
    parser.add_argument("--images", help="the folder of images; default: as of `evaluate`")
    parser.add_argument("--limit", type=PositiveInt, default=1000, help="number of images that are used")
    return parser


def run(options) -> int:
    """Fit, write and print the calibration."""
    import torch

    from geoclip import calibration, earth
    from geoclip.posterior import Places

    options.precision, options.coordinates_only = "auto", False
    model = load_model(options)
    if model.gallery is None or not hasattr(model, "scores"):
        raise ValueError(f"{options.checkpoint} is a baseline, which has no posterior to calibrate")
    name, query, truth = (
        tiles(options, model) if not (options.csv or options.benchmark) else photos(options, model)
    )
    if len(truth) < 50:
        raise ValueError(f"{name}: {len(truth)} images are too few to fit a calibration on; 50 are the least")
    places = Places(model.gallery.latlon)
    fitted = calibration.fit((model.scores(part).cpu() for part in query.split(50)), truth, places, name)
    decider = calibration.Decider(model, "mode", fitted)
    found = [decider.locate(part) for part in query.split(50)]
    latlon, mass = (torch.cat(parts)[:, 0] for parts in zip(*found, strict=True))
    hit = earth.haversine_km(latlon, truth) <= calibration.APART_KM
    fitted = calibration.with_hit_rate(fitted, mass, hit)
    print(
        f"{fitted.save(options.checkpoint)}: temperature {fitted.temperature:.3g}, kernel {fitted.kernel_km:.3g} km, "
        f"background {fitted.background:.2g}; {fitted.nats:.2f} nats per km² on {len(truth):,} images of {name}"
    )
    return 0


def tiles(options, model):
    """Queries and places of validation tiles. Raises ValueError for a model that was not trained on tiles."""
    import torch

    from geoclip import baselines
    from geoclip.datasets.blue_marble import LABEL
    from geoclip.studies import decisions

    module = baselines.load(options.checkpoint)
    if module.config.data != "blue_marble":
        raise ValueError(
            f"{options.checkpoint} was not trained on the embedded data; give --benchmark or --csv"
        )
    features, truth = decisions.tile_features(module, "val", options.limit)
    with torch.inference_mode():
        return f"{LABEL}, val", model.encode_features(features.to(model.logit_scale.device)), truth


def photos(options, model):
    """Queries and places of the photos that can be read, drawn at random if there are more than --limit."""
    import torch

    from geoclip import predictor

    known = read_photos(options)
    rows = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[: options.limit].tolist()
    kept = _Queries(model)
    found = predictor.answer(kept, [known.path(row) for row in rows], progress=True)
    read = [row for i, row in enumerate(rows) if i not in found.unreadable]
    if found.unreadable:
        first = next(iter(found.unreadable.values()))
        print(f"{len(found.unreadable):,} photos could not be read and are left out; the first: {first}")
    query = torch.cat(kept.queries) if kept.queries else torch.empty(0, 1)
    return Path(options.csv).name if options.csv else known.name, query, torch.from_numpy(known.latlon)[read]


class _Queries:
    """Keeps the embeddings of the photos that the predictor opens, instead of locating them."""

    def __init__(self, model):
        self.model, self.views, self.queries = model, model.views, []

    def locate(self, views, k: int = 1):
        import torch

        with torch.inference_mode():
            self.queries.append(self.model.encode_views(views))
        return torch.zeros(len(views), k, 2), torch.zeros(len(views), k)
