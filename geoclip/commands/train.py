"""Train a model from a YAML file: --config FILE.yaml [--out FOLDER] [--epochs 20 …]

An interrupted run is resumed. --model geocells or --model context, here or in the file, trains a baseline, which has
options of its own.
"""

import argparse
import shlex
from pathlib import Path

from jsonargparse import ArgumentParser


class Parser(ArgumentParser):
    """Reads the options of the model that `--model`, or the YAML file of `--config`, names."""

    def parse_args(self, args=None, **kwargs):
        from geoclip import baselines
        from geoclip.training import config

        known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        known.add_argument("--config")
        known.add_argument("--model")
        named, _ = known.parse_known_args(args)
        model = named.model or (named.config and config.read_yaml(named.config).get("model")) or "geoclip"
        parser = config.config_parser(baselines.config_class(model))
        parser.description, parser.epilog = self.description, self.epilog
        options(parser.add_argument)
        return parser.parse_args(args, **kwargs)


def options(add) -> None:
    """The options of the run, beside the model's."""
    add("--out", type=str | None, default=None, help="Folder of the run; by default in the cache.")
    add("--resume", type=bool, default=True, help="Resume an interrupted run.")
    add("--devices", type=int | str, default="auto", help='Number of devices, or "auto".')
    add("--nodes", type=int, default=1, help="Machines, each started by torchrun or SLURM.")
    add("--accelerator", default="auto", help='Hardware: "auto", "cpu" or "gpu".')


def run(options) -> None:
    """Train, and name the checkpoint and the command that evaluates it."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from geoclip import baselines
    from geoclip.training import config, runs

    kind = baselines.kind(options.model)
    chosen = config.from_namespace(options, kind.config_class, config.config_parser(kind.config_class))
    hardware = {name: options[name] for name in ("devices", "accelerator", "nodes")}
    run = runs.train(chosen, options.out, kind, options.resume, progress=True, **hardware)
    if rank_zero_only.rank == 0:  # reports for all
        print(f"{run.result['steps']} steps in {run.result['seconds']} s; checkpoint {run.checkpoint}")
        print(f"evaluate it with: python -m geoclip {shlex.join(evaluation_of(run))}")


def evaluation_of(run) -> list[str]:
    """Return the `evaluate` command that fits a run: on the embedded tiles, the hold-out or photos to be named."""
    command = ["evaluate", "--checkpoint", str(run.checkpoint)]
    if run.config.data == "blue_marble":
        return command
    if getattr(run.config, "holdout", 0):
        images = run.config.images or Path(run.config.data).parent
        return [*command, "--csv", str(run.holdout), "--images", str(images)]
    return [*command, "--csv", "PHOTOS_NOT_TRAINED_ON.csv"]
