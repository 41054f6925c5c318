"""Reading the checkpoints of training runs. It imports no Lightning, so that prediction starts quickly."""

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import torch

from geoclip.config import ImageEncoderConfig, LocationEncoderConfig
from geoclip.gallery import Gallery
from geoclip.image_encoder import ImageEncoder, Preprocessing, tower_hash
from geoclip.location_encoder import LocationEncoder
from geoclip.model import GeoCLIP


def load_checkpoint(path: Path | str, clip_weights: Path | str | None = None) -> GeoCLIP:
    """Load the model of a checkpoint of `python -m geoclip train`, with its gallery, in evaluation mode.

    clip_weights: a local file to read a frozen tower's weights from, if it was trained on features.
    """
    checkpoint = read_checkpoint(path)
    try:
        return from_checkpoint(checkpoint, clip_weights=clip_weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint of `python -m geoclip train`; nothing in the file is executed."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch does not compare the checksums that it writes
                raise ValueError(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = checkpoint["state_dict"]
        checkpoint["geoclip_config"]["image"]  # of all models
    except Exception as error:  # torch's own message may advise to load the file unsafely
        wrong = f"is not a checkpoint of `python -m geoclip train`, or is damaged ({type(error).__name__})"
        raise ValueError(f"{path} {wrong}") from error
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds values that are not finite; use another checkpoint")
    return checkpoint


def from_checkpoint(
    checkpoint: dict[str, Any], with_tower: bool = True, clip_weights: Path | str | None = None
) -> GeoCLIP:
    """Build the model of a checkpoint that was read. with_tower: False leaves the image tower out."""
    config, prefix = checkpoint["geoclip_config"], "model."
    if (kind := config.get("model", "geoclip")) != "geoclip":
        raise ValueError(f"the checkpoint holds the model {kind!r}, not GeoCLIP")
    image = ImageEncoderConfig(**config["image"])
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix) and (with_tower or not name.startswith(f"{prefix}image_encoder.tower."))
    }
    has_tower = any(name.startswith("image_encoder.tower.") for name in weights)
    if has_tower:  # no pretrained weights are needed
        encoder = ImageEncoder(dataclasses.replace(image, weights=None, frozen=False))
        encoder.config, encoder.preprocess = image, Preprocessing.of(image)
    else:
        weights_file = str(clip_weights) if clip_weights else image.weights
        encoder = ImageEncoder(dataclasses.replace(image, weights=weights_file), with_tower=False)
    model = GeoCLIP(encoder, LocationEncoder(LocationEncoderConfig(**config["location"])))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's weights do not fit its configuration: {error}") from error
    if with_tower and not has_tower:
        encoder.load_tower()
        if checkpoint.get("geoclip_tower") not in (None, tower_hash(encoder.tower)):
            wrong = f"weights {weights_file!r} of {image.tower} are not those that the model was trained with"
            raise ValueError(f"{wrong}: name the right file with --clip-weights")
    if kept := checkpoint.get("geoclip_gallery"):
        model.use_gallery(Gallery(kept["latlon"], kept["source"]))
    return model.eval()
