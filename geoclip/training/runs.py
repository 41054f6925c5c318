"""Training runs: each has a folder, named after configuration and data, and is resumed if it was interrupted."""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
import torch
import yaml
from filelock import FileLock
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import Dataset

from geoclip import paths
from geoclip.training.checkpoints import read_checkpoint
from geoclip.training.config import RunConfig, plain, read_yaml
from geoclip.training.data import LeftOut, Loaders, fingerprint, on_features
from geoclip.training.module import GeoCLIPTraining, TrainingModule

# Raise it when a change of the code changes what is trained, so that kept runs are trained again.
RECIPE = 1
# Lightning's advice on worker counts, hardware and the like would end up in notebooks.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
ADVICE = (
    "does not have many workers|exists and is not empty|Checkpoint directory|Experiment logs directory|"
    "number of training batches.*is smaller than the logging|across ranks is zero|isinstance.treespec, LeafSpec|"
    "in eval mode at the start of training"
)


@dataclass(frozen=True)
class Run:
    """A training run: its folder, which holds the checkpoint, metrics.csv and TensorBoard's events."""

    directory: Path
    config: RunConfig
    kind: type[TrainingModule] = GeoCLIPTraining

    @property
    def checkpoint(self) -> Path:
        return self.directory / "last.ckpt"

    @property
    def holdout(self) -> Path:
        return self.directory / "holdout.csv"

    @property
    def result_file(self) -> Path:
        """The file that is written when the run has ended."""
        return self.directory / "result.json"

    @property
    def result(self) -> dict[str, Any]:
        """Steps, seconds, samples and parameters of a run that has ended."""
        try:
            found = json.loads(self.result_file.read_text(encoding="utf-8"))
            return {"steps": found["steps"], "seconds": found["seconds"]} | found
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.result_file} is damaged ({error!r}): delete it and rerun") from error

    def metrics(self) -> pd.DataFrame:
        """Return the logged values of the whole run: epoch, step, train/loss, val/loss, …"""
        files = [*sorted(self.directory.glob("metrics-*.csv")), self.directory / "metrics.csv"]
        parts = [pd.read_csv(file) for file in files]
        for i in range(len(parts) - 1):  # steps after the last checkpoint were repeated
            parts[i] = parts[i][parts[i]["step"] < parts[i + 1]["step"].min()]
        return pd.concat(parts, ignore_index=True)

    def load(self, with_tower: bool = True) -> TrainingModule:
        """Return the trained module in evaluation mode. with_tower: False leaves GeoCLIP's image tower out."""
        return restore(read_checkpoint(self.checkpoint), self.kind, self.checkpoint, with_tower)


def run_folder(config: RunConfig) -> Path:
    """Return the folder of a configuration's run in the cache."""
    return paths.CACHE / "runs" / run_key(config)


def run_key(config: RunConfig) -> str:
    """Return a hash of configuration, training data and RECIPE: runs with the same key give the same weights."""
    parts = {"config": dataclasses.asdict(config), "data": fingerprint(config), "recipe": RECIPE}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def is_kept(config: RunConfig) -> bool:
    """Return whether the cache holds a finished run of this configuration."""
    return (run_folder(config) / "result.json").is_file()


def restore(checkpoint: dict[str, Any], kind: type, path, with_tower: bool = True) -> TrainingModule:
    """Return the module of a checkpoint that was read from `path`, in evaluation mode."""
    try:
        return kind.restore(checkpoint, with_tower).eval()
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from error


def train(
    config: RunConfig,
    directory: Path | str | None = None,
    kind: type[TrainingModule] = GeoCLIPTraining,
    resume: bool = True,
    progress: bool = False,
    epochs: int | None = None,
    devices: int | str = "auto",
    accelerator: str = "auto",
    nodes: int = 1,
) -> Run:
    """Train a model of this kind, or return the run if it has ended before.

    directory: folder of the run; by default run_folder(config). resume: continue an interrupted run from its
    last checkpoint; False starts again. progress: show a progress bar, or a line an epoch without a terminal.
    epochs: stop after this many, to be resumed later. devices: processes on each machine; nodes: machines,
    each started by torchrun or SLURM, on a shared disk.
    """
    hardware = check_devices(config, devices, accelerator, nodes)
    run = Run(Path(directory or run_folder(config)), config, kind)
    named = config.data == "blue_marble" or config.data.endswith(".tar")
    if not named and not run.result_file.is_file():
        os.stat(config.data)  # raises FileNotFoundError before a folder is made
    paths.make_folder(run.directory)
    if rank_zero_only.rank > 0:  # the first rank holds the lock, and prepares and ends the run for all
        if not (resume and run.result_file.is_file()):
            fit(run, resume, progress, epochs, hardware)
        return run
    with FileLock(run.directory / "lock"):
        if not resume:
            for file in (run.result_file, run.checkpoint, previous(run.checkpoint)):
                file.unlink(missing_ok=True)
        check_same_configuration(run)
        if not run.result_file.is_file():
            fit(run, resume, progress, epochs, hardware)
        elif progress:
            print(f"{run.directory} holds this run, which ended before: --resume false trains it again")
    return run


def check_devices(config: RunConfig, devices: int | str, accelerator: str, nodes: int) -> dict[str, Any]:
    """Return the Trainer's options of the hardware. Raises ValueError that names an option that cannot be met."""
    if accelerator not in ("auto", "cpu", "gpu"):
        raise ValueError(f"accelerator must be auto, cpu or gpu, got {accelerator!r}")
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("accelerator gpu: no GPU was found; use cpu or auto")
    if nodes < 1:
        raise ValueError(f"nodes must be at least 1, got {nodes}")
    if devices != "auto":
        if not str(devices).isdecimal() or int(devices) < 1:
            raise ValueError(f'devices must be "auto" or a number of at least 1, got {devices!r}')
        devices = int(devices)
        on_gpu = accelerator != "cpu" and torch.cuda.is_available()
        there = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
        if devices > there:
            raise ValueError(f"devices {devices}: this machine has {there} {'GPUs' if on_gpu else 'cores'}")
        if config.batch_size % (devices * nodes):
            ranks = devices * nodes
            raise ValueError(f"batch_size {config.batch_size} cannot be divided over {ranks} devices")
    ranks = nodes * (torch.cuda.device_count() if devices == "auto" else int(devices))
    in_turn = ranks > 1 and getattr(config, "caption_epochs", 0)  # captions, then heads
    strategy = "ddp_find_unused_parameters_true" if in_turn else "auto"
    return {"accelerator": accelerator, "devices": devices, "num_nodes": nodes, "strategy": strategy}


def check_same_configuration(run: Run) -> None:
    """Raise ValueError that lists the fields in which the run kept in the folder differs from `run`."""
    path, wanted = run.directory / "config.yaml", plain(run.config)
    if path.is_file() and any(file.is_file() for file in (run.checkpoint, previous(run.checkpoint))):
        kept = read_yaml(path)
        changed = [name for name in wanted if kept.get(name) != wanted[name]]
        different = [f"{name}: {kept.get(name)} there, {wanted[name]} here" for name in changed]
        if run.result_file.is_file() and (old := run.result.get("recipe", RECIPE)) != RECIPE:
            different.append(f"recipe of the code: {old} there, {RECIPE} here")
        if different:
            other = f"{run.directory} holds a run of another configuration ({'; '.join(different)})"
            raise ValueError(f"{other}: name another folder, or start again with --resume false")
    with paths.atomic(path) as temporary:
        temporary.write_text(yaml.safe_dump(wanted, sort_keys=False))


def fit(run: Run, resume: bool, progress: bool, epochs: int | None, hardware: dict[str, Any]) -> None:
    """Run one Lightning fit, from the last good checkpoint; write result.json when the run has ended."""
    config = run.config
    last, first = min(epochs or config.epochs, config.epochs), rank_zero_only.rank == 0
    bar = progress and sys.stderr.isatty()
    watch = Watch(run.checkpoint, lines=progress and not bar)
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*({ADVICE}).*")
        trainer = lightning.Trainer(
            max_epochs=last,
            precision=precision(config, hardware["accelerator"]),
            logger=[
                CSVLogger(run.directory, name="", version=".", flush_logs_every_n_steps=1),
                TensorBoardLogger(run.directory, name="", version="tensorboard"),
            ],
            callbacks=[
                ModelCheckpoint(run.directory, "last", enable_version_counter=False, every_n_epochs=1),
                watch,
                LeftOut(run.directory),
                *([TQDMProgressBar()] if bar else []),
            ],
            plugins=[Checkpoints()],
            use_distributed_sampler=False,
            log_every_n_steps=10,
            num_sanity_val_steps=0,
            enable_progress_bar=bar,
            enable_model_summary=False,
            **hardware,
        )
        data = run.kind.training_set(config)
        module = run.kind.build(config, data)
        resumed = last_good(run.checkpoint, set_aside=first) if resume else None
        if first:
            set_metrics_aside(run, resumed is not None)
            write_holdout(run, data)
        if first and progress and (left := len(data) % config.batch_size):
            print(
                f"batches are whole: each epoch leaves out {left} of {len(data):,} samples, chosen at random"
            )
        # compiling takes half a minute: it pays on features, on a GPU, in long runs
        long = config.epochs * (len(data) // config.batch_size) >= 10_000 and on_features(config)
        if long and trainer.strategy.root_device.type == "cuda" and hasattr(module, "view_loss"):
            module.view_loss = torch.compile(module.view_loss, mode="reduce-overhead")
        try:
            trainer.fit(module, datamodule=Loaders(config, data), ckpt_path=resumed, weights_only=True)
        except SystemExit as error:
            if isinstance(watch.stopped_by, KeyboardInterrupt):  # which Lightning turns into exit status 1
                raise KeyboardInterrupt from error
            raise
    if last == config.epochs and trainer.is_global_zero:
        result = {
            "steps": trainer.global_step,
            "epochs": last,
            "samples": len(data),
            "seconds": round(time.monotonic() - start, 1),
            "resumed": resumed is not None,
            "epoch_seconds": watch.seconds,
            "parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
            "recipe": RECIPE,
        }
        with paths.atomic(run.result_file) as temporary:
            temporary.write_text(json.dumps(result, indent=1))


def write_holdout(run: Run, data: Dataset) -> None:
    """Write holdout.csv, the photos that training leaves out, as a CSV that `evaluate` reads."""
    if getattr(run.config, "holdout", 0):
        names = {"file": "IMG_FILE", "lat": "LAT", "lon": "LON", "author": "AUTHOR"}
        with paths.atomic(run.holdout) as temporary:
            data.held_out.table[list(names)].rename(columns=names).to_csv(temporary, index=False)


def set_metrics_aside(run: Run, resumed: bool) -> None:
    """Rename the metrics of an interrupted run, which the logger would overwrite, or remove those of an old run."""
    aside = sorted(run.directory.glob("metrics-*.csv"))
    logged = run.directory / "metrics.csv"
    if resumed and logged.is_file() and logged.stat().st_size:
        logged.rename(run.directory / f"metrics-{len(aside):03}.csv")
    elif not resumed:
        for file in aside:
            file.unlink()


class Watch(lightning.Callback):
    """Times epochs (`seconds`, of the steps and validation), and remembers and reports what stopped the run.

    lines: print a line after each epoch, for logs without a terminal.
    """

    def __init__(self, checkpoint: Path, lines: bool = False):
        self.checkpoint = checkpoint
        self.seconds: list[float] = []
        self.lines = lines
        self.stopped_by: BaseException | None = None
        self.sigterm = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer, module) -> None:
        # Lightning's handler broadcasts the signal, and waits for ever if a rank is inside another collective
        if trainer.world_size > 1 and "SLURM_JOB_ID" not in os.environ:
            signal.signal(signal.SIGTERM, self.sigterm)

    def on_train_epoch_start(self, trainer, module) -> None:
        self.began = time.monotonic()

    def on_train_epoch_end(self, trainer, module) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(round(time.monotonic() - self.began, 2))
        if self.lines and trainer.is_global_zero:
            metrics = trainer.callback_metrics
            shown = ("train/loss", "val/loss", "val/acc_25km", "val/acc_200km")
            losses = [f"{name} {metrics[name]:.4f}" for name in shown if name in metrics]
            about = ", ".join([*losses, f"{self.seconds[-1]} s"])
            print(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {about}", flush=True)

    def on_exception(self, trainer, module, exception) -> None:
        self.stopped_by = exception
        if isinstance(exception, SystemExit | KeyboardInterrupt) and trainer.is_global_zero:
            whole = f"{self.checkpoint} holds its last whole epoch: rerun the command to resume"
            none = "no epoch was complete: rerun the command to start again"
            kept = whole if self.checkpoint.is_file() else none
            print(f"training stopped before its end; {kept}", file=sys.stderr)
        if trainer.world_size > 1:
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.SIGTERM)  # the ranks that this one started
            timer = threading.Timer(30, os._exit, (getattr(exception, "code", 1),))
            timer.daemon = True  # what remains of the ending may wait for a rank that has ended
            timer.start()


class Checkpoints(TorchCheckpointIO):
    """Writes checkpoints so that a good one is on the disk at any time, whatever ends the process."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        with paths.atomic(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:  # all that torch says about a full disk is "unexpected pos"
                raise OSError(errno.ENOSPC, "cannot be saved (is the disk full?)", str(path)) from error
            if Path(path).is_file():
                os.replace(path, previous(path))


def previous(checkpoint: Path | str) -> Path:
    """Return the path of the checkpoint before the last."""
    return Path(checkpoint).with_name("previous.ckpt")


def last_good(checkpoint: Path, set_aside: bool = True) -> Path | None:
    """Return the last checkpoint that can be read, or None. Others are renamed to `*.damaged`, with a warning."""
    for path in filter(Path.is_file, (checkpoint, previous(checkpoint))):
        try:
            read_checkpoint(path)
            return path
        except (ValueError, FileNotFoundError) as error:
            if set_aside:
                path.rename(f"{path}.damaged")
                print(f"{error}; it was renamed to {path.name}.damaged", file=sys.stderr)
    return None


def precision(config: RunConfig, accelerator: str) -> str:
    """Return Lightning's name of the precision."""
    if config.precision != "auto":
        return config.precision
    bf16 = accelerator != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bf16-mixed" if bf16 else "32-true"
