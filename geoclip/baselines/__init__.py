"""Other ways to locate photos: classification over geo-cells, and regression with context heads."""

from pathlib import Path
from typing import Any

from geoclip.baselines.config import ContextConfig, GeocellsConfig
from geoclip.training import config
from geoclip.training.config import RunConfig, TrainConfig

CONFIGS = {"geoclip": TrainConfig, "geocells": GeocellsConfig, "context": ContextConfig}


def config_class(model: str) -> type[RunConfig]:
    """Return the class of a model's configurations; raises ValueError for an unknown model."""
    if model not in CONFIGS:
        raise ValueError(f"model {model!r} must be one of {', '.join(CONFIGS)}")
    return CONFIGS[model]


def kind(model: str):
    """Return the training module of a model: geoclip, geocells or context."""
    if model == "geocells":
        from geoclip.baselines.geocells import GeocellsTraining as found
    elif model == "context":
        from geoclip.baselines.context import ContextTraining as found
    else:
        from geoclip.training.module import GeoCLIPTraining as found
    return found


def as_config(values: dict[str, Any] | Path | str) -> RunConfig:
    """Read the configuration of any model, from a dict or a YAML file; `model` in it says of which."""
    named = values if isinstance(values, dict) else config.read_yaml(values)
    return config.as_config(values, config_class(named.get("model", "geoclip")))
