"""Train a model from a YAML file: --config FILE.yaml [--out FOLDER] [--epochs 20 …]"""

import argparse
from pathlib import Path

from jsonargparse import ArgumentParser


class TrainParser(ArgumentParser):
    """The options of the model that `--model` or the YAML file of `--config` names, each with its own fields."""

    def parse_args(self, args=None, **kwargs):
        try:
            options = options_of(model_named(args))
        except ValueError as error:
            self.error(str(error))
        return options.parse_args(args, **kwargs)


def parser() -> TrainParser:
    """A parser that chooses the model's own when it meets the arguments."""
    return TrainParser(prog="python -m geoclip train")


def options_of(model: str) -> ArgumentParser:
    """The options of one model and of the command."""
    from geoclip.training import runs

    parser = runs.config_parser(model, exit_on_error=True)
    parser.description = (
        "Train a model, or go on with a run that was interrupted. --model geocells or context, here or in the "
        "file, trains a baseline, which has options of its own."
    )
    parser.add_argument(
        "--out", type=str | None, default=None, help="folder of the run; default: by its hash"
    )
    parser.add_argument("--resume", type=bool, default=True, help="go on with an interrupted run")
    parser.add_argument("--devices", type=int | str, default="auto", help='number of devices, or "auto"')
    parser.add_argument("--nodes", type=int, default=1, help="machines, each started by torchrun or SLURM")
    parser.add_argument("--accelerator", type=str, default="auto", help='"auto", "cpu" or "gpu"')
    return parser


def model_named(arguments: list[str] | None) -> str:
    """The model that the arguments name, or their YAML file; GeoCLIP where neither does."""
    import yaml

    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--config")
    known.add_argument("--model")
    found, _ = known.parse_known_args(arguments)
    if found.model:
        return found.model
    if found.config and Path(found.config).is_file():
        values = yaml.safe_load(Path(found.config).read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values.get("model", "geoclip")
    return "geoclip"


def run(options) -> int:
    import sys

    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from geoclip.training import runs

    config = runs.from_namespace(options_of(options.model), options)
    run = runs.train(
        config,
        options.out,
        resume=options.resume,
        progress=sys.stderr.isatty(),
        devices=options.devices,
        accelerator=options.accelerator,
        nodes=options.nodes,
    )
    if rank_zero_only.rank > 0:  # the first process speaks for all
        return 0
    result = run.result
    print(f"{result['steps']} steps in {result['seconds']} s; checkpoint {run.checkpoint}")
    print(f"evaluate it with: python -m geoclip evaluate --checkpoint {run.checkpoint}")
    return 0
