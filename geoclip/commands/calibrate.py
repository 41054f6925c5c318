"""Fit the probabilities of a checkpoint to images with known places that it was not trained on."""

from pathlib import Path

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from geoclip.commands import load_model, load_tiles_model, read_neighbours
from geoclip.commands.evaluate import read_photos

EPILOG = """
Writes CHECKPOINT.calibration.json beside the checkpoint; `predict` and `evaluate` use it from then on, with the
checkpoint's own gallery. Choose images as unlike the training photos as the ones to come: other photographers, and
other places if those will be elsewhere. `train --holdout` leaves such photos out and lists them in holdout.csv.
With --neighbours, CHECKPOINT.neighbours.json is written too, for `predict` and `evaluate` with the same --neighbours;
it says how like its nearest training image a photo must be: 5 % of these images are called unfamiliar.
"""


def parser() -> ArgumentParser:
    """The options."""
    parser = ArgumentParser(prog="python -m geoclip calibrate", description=__doc__, epilog=EPILOG)
    parser.add_argument("--checkpoint", required=True, help="a GeoCLIP model trained with `train`")
    parser.add_argument("--clip-weights", help="a local file of CLIP's weights")
    parser.add_argument("--benchmark", help="the images: im2gps3k, … (geoclip.datasets.benchmarks)")
    parser.add_argument("--csv", help="or a CSV of your own photos; default: the validation tiles")
    parser.add_argument("--images", help="the folder of images; default: as of `evaluate`")
    parser.add_argument(
        "--neighbours",
        help="features of the training images (`embed`): fit answers that compare with them too",
    )
    parser.add_argument(
        "--prior",
        choices=["gallery", "divided"],
        default="gallery",
        help="gallery: photos come from where the gallery has many places; divided: evenly from all its land",
    )
    parser.add_argument("--limit", type=PositiveInt, default=1000, help="number of images that are used")
    return parser


def run(options) -> int:
    """Fit, write and print the calibration, and that with neighbours if they are given."""
    import dataclasses

    import torch

    from geoclip import calibration
    from geoclip.neighbours import fit_fused, fused
    from geoclip.posterior import Places

    options.precision, options.coordinates_only = "auto", False
    of_tiles = not (options.csv or options.benchmark)
    module, model = load_tiles_model(options) if of_tiles else (None, load_model(options))
    if model.gallery is None or not hasattr(model, "scores"):
        raise ValueError(f"{options.checkpoint} is a baseline, which has no posterior to calibrate")
    name, features, truth = tiles(options, module) if of_tiles else photos(options, model)
    if len(truth) < 50:
        raise ValueError(f"{name}: {len(truth)} images are too few to fit a calibration on; 50 are the least")
    places = Places(model.gallery.latlon)
    with torch.inference_mode():
        parts = features.to(model.logit_scale.device).split(50)
        logits = [model.scores(model.encode_features(part)).cpu() for part in parts]
    alone = calibration.fit(logits, truth, places, name, options.prior)
    report(calibration.with_hits(alone, logits, truth, places), truth, options)
    if options.neighbours:
        neighbours, source = read_neighbours(options.neighbours, model)
        near = neighbours.find(features.cpu().float())
        by_near = calibration.fit_neighbours(*near, truth, name)
        known = places, alone, near, by_near
        share, together = fit_fused(logits, *known, truth, name, options.prior)
        least = near[0][:, 0].quantile(calibration.FALSE_ALARMS).item()
        how = calibration.NeighbourFit(
            source, alone.temperature, by_near.temperature, by_near.kernel_km, least, share=share
        )
        together = dataclasses.replace(together, neighbours=how)
        report(calibration.with_hits(together, fused(logits, *known, share), truth, places), truth, options)
    return 0


def report(fitted, truth, options) -> None:
    """Write a calibration and print what was fitted."""
    with_neighbours = ""
    if fitted.neighbours:
        with_neighbours = (
            f", with neighbours in {options.neighbours}; {fitted.neighbours.false_alarms:.0%} have a cosine below "
            f"{fitted.neighbours.least / 100:.3f} with all of them"
        )
    print(
        f"{fitted.save(options.checkpoint)}: temperature {fitted.temperature:.3g}, kernel {fitted.kernel_km:.3g} km, "
        f"background {fitted.background:.2g}; {fitted.nats:.2f} nats per km² on {len(truth):,} images of "
        f"{fitted.fitted_on}{with_neighbours}"
    )


def tiles(options, module):
    """Name, tower features and places of validation tiles."""
    from geoclip.datasets.blue_marble import LABEL
    from geoclip.studies import decisions

    return f"{LABEL}, val", *decisions.tile_features(module, "val", options.limit)


def photos(options, model):
    """Name, tower features and places of the photos that can be read, drawn at random if there are more than --limit."""
    import torch

    from geoclip import predictor

    known = read_photos(options)
    rows = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[: options.limit].tolist()
    kept = _Features(model)
    found = predictor.answer(kept, [known[row] for row in rows], progress=True)
    read = [row for i, row in enumerate(rows) if i not in found.unreadable]
    if found.unreadable:
        first = next(iter(found.unreadable.values()))
        print(f"{len(found.unreadable):,} photos could not be read and are left out; the first: {first}")
    features = torch.cat(kept.features) if kept.features else torch.empty(0, 1)
    return (
        Path(options.csv).name if options.csv else known.name,
        features,
        torch.from_numpy(known.latlon)[read],
    )


class _Features:
    """Keeps the tower features of the photos that the predictor opens, instead of locating them."""

    def __init__(self, model):
        self.model, self.views, self.features = model, model.views, []

    def locate(self, views, k: int = 1):
        import torch

        with torch.inference_mode():
            images = views[:, 0].to(self.model.logit_scale.device)
            self.features.append(self.model.image_encoder.features(images).cpu())
        return torch.zeros(len(views), k, 2), torch.zeros(len(views), k)
