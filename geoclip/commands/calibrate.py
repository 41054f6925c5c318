"""Fit the probabilities of a checkpoint to images with known places that it was not trained on.

Writes CHECKPOINT.calibration.json beside the checkpoint; `predict` and `evaluate` use it from then on, with the
checkpoint's own gallery. Choose images as unlike the training photos as the ones to come: other photographers, and
other places if those will be elsewhere. `train --holdout` leaves such photos out and lists them in holdout.csv.
With --neighbours, CHECKPOINT.neighbours.json is written too, for `predict` and `evaluate` with the same --neighbours;
it says how like its nearest training image a photo must be: 5 % of these images are called unfamiliar.
"""

from pathlib import Path
from types import SimpleNamespace

from jsonargparse.typing import PositiveInt

from geoclip.commands import load_model, read_neighbours
from geoclip.commands.evaluate import read_photos


def options(add) -> None:
    """The checkpoint, and the images it is fitted on."""
    add("--checkpoint", required=True, help="a GeoCLIP model trained with `train`")
    add("--clip-weights", help="a local file of CLIP's weights")
    add("--benchmark", help="the images: im2gps3k, … (geoclip.datasets.benchmarks)")
    add("--csv", help="or a CSV of your own photos; default: the validation tiles")
    add("--images", help="the folder of images; default: as of `evaluate`")
    add("--neighbours", help="features of the training images (`embed`): fit answers that compare with them")
    prior = "gallery: photos come from where the gallery has many places; divided: evenly from all its land"
    add("--prior", choices=["gallery", "divided"], default="gallery", help=prior)
    add("--limit", type=PositiveInt, default=1000, help="number of images that are used")


def run(options) -> None:
    """Fit, write and print the calibration, and that with neighbours if they are given."""
    import torch

    from geoclip import calibration
    from geoclip.datasets.blue_marble import LABEL
    from geoclip.neighbours import fit_fused, fused
    from geoclip.posterior import Places

    options.precision = "auto"
    of_tiles = not (options.csv or options.benchmark)
    model, module = load_model(options, True) if of_tiles else (load_model(options), None)
    if model.gallery is None or not hasattr(model, "scores"):
        raise ValueError(f"{options.checkpoint} is a baseline, which has no posterior to calibrate")
    if of_tiles:
        from geoclip.studies.decisions import tile_features

        name, (features, truth) = f"{LABEL}, val", tile_features(module, "val", options.limit)
    else:
        name, features, truth = photos(options, model)
    if len(truth) < 50:
        raise ValueError(f"{name}: {len(truth)} images are too few to fit a calibration on; 50 are the least")
    places = Places(model.gallery.latlon)
    with torch.inference_mode():
        parts = features.to(model.logit_scale.device).split(50)
        logits = [model.scores(model.encode_features(part)).cpu() for part in parts]
    alone = calibration.fit(logits, truth, places, name, options.prior)
    report(calibration.with_hits(alone, logits, truth, places), options)
    if options.neighbours:
        neighbours, source = read_neighbours(options.neighbours, model)
        near = neighbours.find(features.cpu().float())
        together = fit_fused(logits, places, alone, near, truth, source)
        both = fused(logits, places, near, together.neighbours)
        report(calibration.with_hits(together, both, truth, places), options)


def report(fitted, options) -> None:
    """Write a calibration and print what was fitted."""
    print(
        f"{fitted.save(options.checkpoint)}: temperature {fitted.temperature:.3g}, kernel {fitted.kernel_km:.3g} km, "
        f"background {fitted.background:.2g}; {fitted.nats:.2f} nats per km² on {fitted.images:,} images of "
        f"{fitted.fitted_on}",
        end="",
    )
    if near := fitted.neighbours:
        unlike = f"{near.false_alarms:.0%} have a cosine below {near.least / 100:.3f} with all of them"
        print(f", with neighbours in {options.neighbours}; {unlike}", end="")
    print()


def photos(options, model):
    """Name, tower features and places of the photos that can be read, at random if there are more than --limit."""
    import torch

    from geoclip import predictor

    features = []

    @torch.inference_mode()
    def keep(views, k: int = 1):  # instead of locating the photos that the predictor opens
        features.append(model.image_encoder.features(views[:, 0].to(model.logit_scale.device)).cpu())
        return torch.zeros(len(views), k, 2), torch.zeros(len(views), k)

    known = read_photos(options)
    rows = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[: options.limit].tolist()
    asked = SimpleNamespace(views=model.views, locate=keep)
    failed = predictor.answer(asked, [known[row] for row in rows], progress=True).unreadable
    if failed:
        first = next(iter(failed.values()))
        print(f"{len(failed):,} photos could not be read and are left out; the first: {first}")
    truth = torch.from_numpy(known.latlon)[[row for i, row in enumerate(rows) if i not in failed]]
    name = Path(options.csv).name if options.csv else known.name
    return name, torch.cat(features) if features else torch.empty(0, 1), truth
