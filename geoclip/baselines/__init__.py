"""Other ways to locate photos: classification over geo-cells, and regression with context heads."""

from pathlib import Path
from typing import Any


def kind(model: str):
    """Return the training module of a model, geoclip, geocells or context; raises ValueError for others."""
    if model == "geoclip":
        from geoclip.training.module import GeoCLIPTraining as found
    elif model == "geocells":
        from geoclip.baselines.geocells import GeocellsTraining as found
    elif model == "context":
        from geoclip.baselines.context import ContextTraining as found
    else:
        raise ValueError(f"model {model!r} must be one of geoclip, geocells, context")
    return found


def as_config(values: dict[str, Any] | Path | str):
    """Read the configuration of any model, from a dict or a YAML file; `model` in it says of which."""
    from geoclip.training import config

    named = values if isinstance(values, dict) else config.read_yaml(values)
    return config.as_config(values, kind(named.get("model", "geoclip")).config_class)


def load(path: Path | str):
    """Return the trained module of any model's checkpoint; raises as training.runs.load does."""
    from geoclip.model import read_checkpoint
    from geoclip.training import runs

    checkpoint = read_checkpoint(path)
    return runs.restore(checkpoint, kind(checkpoint["geoclip_config"].get("model", "geoclip")), path)
