"""The configuration of a training run: frozen dataclasses, read from YAML files and from the command line."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml

from geoclip.config import ImageEncoderConfig, LocationEncoderConfig, SplitConfig, TileConfig, require


@dataclass(frozen=True)
class RunConfig:
    """What every trained model shares. The defaults are the paper's, or those of its re-implementations (README).

    Args:
        data: Training data: "blue_marble" (the embedded tiles), a folder of features made by `embed`, or a
            CSV of photos.
        images: Folder of the photos that a CSV names; by default the folder of the CSV.
        fraction: Part of the training set that is used, in (0, 1]; smaller parts are contained in larger ones.
        image: Image tower and head.
        tiles: How the embedded tiles are rendered.
        splits: Sizes of the splits of the embedded tiles.
        views: Augmented views of each image in a step.
        batch_size: Images in a step, over all devices.
        epochs: Passes over the training set.
        learning_rate: Learning rate of Adam in the first epoch.
        weight_decay: Weight decay of Adam.
        decay: Factor of the learning rate after each epoch.
        seed: Seed of all random draws.
        precision: Arithmetic of training; "auto" is bf16-mixed on a GPU that supports it, else 32-true.
        workers: Processes that load data; 0 loads in the main process.
    """

    data: str = "blue_marble"
    images: str | None = None
    fraction: float = 1.0
    image: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    tiles: TileConfig = field(default_factory=TileConfig)
    splits: SplitConfig = field(default_factory=SplitConfig)
    views: int = 1
    batch_size: int = 512
    epochs: int = 10
    learning_rate: float = 3e-5
    weight_decay: float = 1e-6
    decay: float = 0.87
    seed: int = 0
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    workers: int = 0

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")
        require(self, "", 1, "batch_size", "epochs", "views")
        require(self, "", 0, "seed", "workers", "weight_decay")
        for name in ("learning_rate", "decay"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Training of GeoCLIP.

    Args:
        holdout: Part of the photos of a CSV that training leaves out and lists in holdout.csv, for
            `evaluate`; whole photographers where ten or more are known, else whole places. Larger parts
            contain smaller ones.
        model: The model to train: geoclip, or the baselines geocells and context, which have further options.
        location: Location encoder.
        queue: Length of the GPS queue; 0 turns it off.
        queue_start: Places that the queue starts with: "training" places, or points within a degree of the
            "origin" (0, 0), as in the released code.
        noise_m: Standard deviation of the GPS noise on the batch, in metres.
        queue_noise_m: Standard deviation of the GPS noise on the queue, in metres.
    """

    holdout: float = 0.0
    model: Literal["geoclip"] = "geoclip"
    location: LocationEncoderConfig = field(default_factory=LocationEncoderConfig)
    queue: int = 4096
    queue_start: Literal["training", "origin"] = "training"
    noise_m: float = 150.0
    queue_noise_m: float = 1000.0

    def __post_init__(self):
        super().__post_init__()
        require(self, "", 0, "queue", "noise_m", "queue_noise_m")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must be in [0, 1), got {self.holdout}")
        if self.queue and self.batch_size > self.queue:
            fix = "enlarge the queue, or set queue to 0 to turn it off"
            raise ValueError(f"batch_size {self.batch_size} is larger than the queue of {self.queue}: {fix}")
        if self.image.dim != self.location.dim:
            raise ValueError(f"location.dim {self.location.dim} differs from image.dim {self.image.dim}")


def config_parser(config_class: type[RunConfig] = TrainConfig):
    """Return a jsonargparse parser of the fields of a configuration; --config reads them from a YAML file."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="python -m geoclip train", exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of the options below.")
    parser.add_class_arguments(config_class, as_group=False)
    return parser


def as_config(values: dict[str, Any] | Path | str, config_class: type[RunConfig] = TrainConfig) -> RunConfig:
    """Read a configuration from a dict of its fields or from a YAML file."""
    from jsonargparse import ArgumentError

    source = "configuration" if isinstance(values, dict) else str(values)
    values = values if isinstance(values, dict) else read_yaml(values)
    parser = config_parser(config_class)
    try:
        return from_namespace(parser.parse_object(values), config_class, parser)
    except (ArgumentError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def from_namespace(parsed, config_class: type[RunConfig], parser) -> RunConfig:
    """Return the configuration that config_parser(config_class) parsed. Raises ValueError for an empty value."""
    refuse_empty(parsed, config_class)
    built = parser.instantiate(parsed)
    return config_class(**{field.name: built[field.name] for field in dataclasses.fields(config_class)})


def refuse_empty(values, config_class: type, prefix: str = "") -> None:
    """Raise ValueError for the name of a field without a value (null), which jsonargparse accepts for any type."""
    for name, kind in get_type_hints(config_class).items():
        if dataclasses.is_dataclass(kind) and hasattr(values[name], "keys"):
            refuse_empty(values[name], kind, f"{prefix}{name}.")
        elif dataclasses.is_dataclass(kind) or (values[name] is None and type(None) not in get_args(kind)):
            raise ValueError(f"{prefix}{name} is {values[name]}: give it a value, or remove the line")


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML file of names and values. Raises ValueError that names the file, and OSError."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a YAML file of plain values: {error}") from error
    if not isinstance(values or {}, dict):
        raise ValueError(f"{path} must hold names and values (NAME: VALUE), not {type(values).__name__}")
    return values or {}


def plain(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration as YAML and JSON return them, with lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
