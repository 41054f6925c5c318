"""Train a model from a YAML file: --config FILE.yaml [--out FOLDER] [--epochs 20 …]"""

import argparse
import shlex
from pathlib import Path

from jsonargparse import ArgumentParser


class TrainParser(ArgumentParser):
    """The options of the model that `--model`, or the YAML file of `--config`, names."""

    def parse_args(self, args=None, **kwargs):
        return options_of(model_named(args)).parse_args(args, **kwargs)


def parser() -> TrainParser:
    """Return a parser that chooses the options of the model when it meets the arguments."""
    return TrainParser(prog="python -m geoclip train")


def options_of(model: str) -> ArgumentParser:
    """Return a parser of the options of one model and of the command."""
    from geoclip import baselines
    from geoclip.training.config import config_parser

    parser = config_parser(baselines.config_class(model))
    parser.description = (
        "Train a model, or resume an interrupted run. --model geocells or --model context, here or in the file, "
        "trains a baseline, which has options of its own."
    )
    add = parser.add_argument
    add("--out", type=str | None, default=None, help="Folder of the run; by default in the cache.")
    add("--resume", type=bool, default=True, help="Resume an interrupted run.")
    add("--devices", type=int | str, default="auto", help='Number of devices, or "auto".')
    add("--nodes", type=int, default=1, help="Machines, each started by torchrun or SLURM.")
    add("--accelerator", default="auto", help='Hardware: "auto", "cpu" or "gpu".')
    return parser


def model_named(arguments: list[str] | None) -> str:
    """Return the model that the arguments or their YAML file name; geoclip if neither does."""
    from geoclip.training.config import read_yaml

    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--config")
    known.add_argument("--model")
    found, _ = known.parse_known_args(arguments)
    if found.model or not found.config:
        return found.model or "geoclip"
    return read_yaml(found.config).get("model", "geoclip")


def run(options) -> int:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from geoclip import baselines
    from geoclip.training import config, runs

    kind = baselines.kind(options.model)
    chosen = config.from_namespace(options, kind.config_class, options_of(options.model))
    hardware = {name: options[name] for name in ("devices", "accelerator", "nodes")}
    run = runs.train(chosen, options.out, kind, options.resume, progress=True, **hardware)
    if rank_zero_only.rank > 0:  # the first process reports for all
        return 0
    result = run.result
    print(f"{result['steps']} steps in {result['seconds']} s; checkpoint {run.checkpoint}")
    print(f"evaluate it with: python -m geoclip {shlex.join(evaluation_of(run))}")
    return 0


def evaluation_of(run) -> list[str]:
    """Return the `evaluate` command that fits a run: on the embedded tiles, the hold-out or photos to be named."""
    command = ["evaluate", "--checkpoint", str(run.checkpoint)]
    if run.config.data == "blue_marble":
        return command
    if getattr(run.config, "holdout", 0):
        images = run.config.images or Path(run.config.data).parent
        return [*command, "--csv", str(run.holdout), "--images", str(images)]
    return [*command, "--csv", "PHOTOS_NOT_TRAINED_ON.csv"]
