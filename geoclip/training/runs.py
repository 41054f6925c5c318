"""Training with Lightning: image → GPS contrastive learning with a queue of GPS points.

Paper, section 3.3. Every draw is a function of (seed, epoch or step), so that a run resumed at an epoch's end
goes on exactly as the unbroken one. Other models (geoclip.baselines) share the loop through TrainingModule.
"""

import dataclasses
import hashlib
import importlib
import json
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
import yaml
from filelock import FileLock
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler

from geoclip import earth, paths
from geoclip.datasets import blue_marble, features
from geoclip.datasets.blue_marble import SplitConfig, TileConfig
from geoclip.datasets.features import FeatureData
from geoclip.datasets.photo_training import PhotoTraining
from geoclip.gallery import Gallery
from geoclip.gps_queue import GPSQueue
from geoclip.image_encoder import CONV_TOWER, ImageEncoderConfig, Preprocessing
from geoclip.location_encoder import LocationEncoderConfig
from geoclip.model import GeoCLIP


@dataclass(frozen=True)
class TrainConfig:
    """One training run; the defaults are the paper's where it, or its re-implementations, say (README).

    model: what is trained; the baselines have fields of their own (geoclip.baselines.geocells, .context).
    data: "blue_marble", the embedded tiles, or a folder of features made by `python -m geoclip embed` from a
        CSV of photos, tar shards or tiles.
    fraction: part of the training set that is used; smaller parts are contained in larger ones.
    queue, queue_start: length of the GPS queue, and whether it starts with "training" places or, as in the
        released code, within a degree of the "origin" (0, 0).
    noise_m, queue_noise_m: σ in metres of the GPS noise on the batch and on the queue.
    views: augmented views of each image per step.
    batch_size is global, over all devices; decay multiplies the learning rate after each epoch.
    precision: "auto" is bf16-mixed on a GPU, else single; the Fourier phase is single in all.
    """

    model: Literal["geoclip", "geocells", "context"] = "geoclip"
    data: str = "blue_marble"
    images: str | None = None
    fraction: float = 1.0
    image: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    location: LocationEncoderConfig = field(default_factory=LocationEncoderConfig)
    tiles: TileConfig = field(default_factory=TileConfig)
    splits: SplitConfig = field(default_factory=SplitConfig)
    queue: int = 4096
    queue_start: Literal["training", "origin"] = "training"
    noise_m: float = 150.0
    queue_noise_m: float = 1000.0
    views: int = 1
    batch_size: int = 512
    epochs: int = 10
    learning_rate: float = 3e-5
    weight_decay: float = 1e-6
    decay: float = 0.87
    seed: int = 0
    precision: str = "auto"
    workers: int = 0

    def __post_init__(self):
        if self.queue and self.batch_size > self.queue:
            raise ValueError(
                f"batch_size {self.batch_size} is larger than the queue of {self.queue}: enlarge the queue, or "
                f"turn it off with queue 0"
            )
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is the part of the training set in (0, 1], got {self.fraction}")
        for name in ("batch_size", "epochs", "views"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def baseline(model: str):
    """The module of a model of geoclip.baselines: its Config, training_set and build."""
    return importlib.import_module(f"geoclip.baselines.{model}")


def config_class(model: str) -> type[TrainConfig]:
    """The configuration's class of a model; ValueError for a model that is not there."""
    if model == "geoclip":
        return TrainConfig
    if model not in ("geocells", "context"):
        raise ValueError(f"model {model!r} is none of geoclip, geocells, context")
    return baseline(model).Config


def config_parser(model: str = "geoclip", exit_on_error: bool = False):
    """A jsonargparse parser whose options are the configuration's fields, and --config for a YAML of them."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="python -m geoclip train", exit_on_error=exit_on_error)
    parser.add_argument("--config", action="config", help="YAML file with the names below")
    parser.add_class_arguments(config_class(model), as_group=False)
    return parser


def as_config(values: dict[str, Any] | Path | str) -> TrainConfig:
    """A TrainConfig from a dict of its fields or a YAML file; ValueError names an unknown or wrong field."""
    from jsonargparse import ArgumentError

    source = "configuration"
    if not isinstance(values, dict):
        source, values = str(values), yaml.safe_load(Path(values).read_text())
    parser = config_parser((values or {}).get("model", "geoclip"))
    try:
        parsed = parser.parse_object(values or {})
    except ArgumentError as error:
        raise ValueError(f"{source}: {error}") from error
    return from_namespace(parser, parsed)


def from_namespace(parser, parsed) -> TrainConfig:
    """The TrainConfig that config_parser() parsed."""
    built = parser.instantiate(parsed)
    kind = config_class(built["model"])
    return kind(**{field.name: built[field.name] for field in dataclasses.fields(kind)})


def seeded(*keys: int | str) -> torch.Generator:
    """A generator whose state is a function of the keys alone."""
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ---------------------------------------------------------------------------------------------------- data


class EpochSampler(Sampler):
    """Yields (epoch, index) in an order that is a function of (seed, epoch), whole global batches only.

    With several ranks each global batch is cut into equal consecutive parts, one a rank.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1):
        if n < batch_size:
            raise ValueError(f"the training set has {n} samples, fewer than one batch of {batch_size}")
        if batch_size % ranks:
            raise ValueError(f"batch_size {batch_size} cannot be divided over {ranks} devices")
        self.n, self.batch_size, self.seed, self.rank, self.ranks = n, batch_size, seed, rank, ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n // self.batch_size * self.batch_size // self.ranks

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(self.n, generator=seeded(self.seed, "order", self.epoch))
        whole = order[: self.n // self.batch_size * self.batch_size]
        mine = whole.view(-1, self.ranks, self.batch_size // self.ranks)[:, self.rank].flatten()
        for part in mine.split(1 << 16):  # a list of all is 36 bytes an image, 4 GB for 100 M
            for index in part.tolist():
                yield self.epoch, index


class TileTraining(Dataset):
    """Blue Marble training tiles, rendered anew in each epoch: batches of `image` (b, v, 3, p, p), `latlon`."""

    def __init__(self, latlon: Tensor, config: TrainConfig):
        self.latlon, self.config = latlon, config
        self.drawn: tuple[int, Tensor] | None = None  # the epoch and its disturbances

    def __len__(self) -> int:
        return len(self.latlon)

    def at(self, latlon: Tensor) -> "TileTraining":
        """The same at other places."""
        return TileTraining(latlon, self.config)

    def disturbed(self, epoch: int) -> Tensor:
        """(n, v, 9) draws of this epoch."""
        if self.drawn is None or self.drawn[0] != epoch:
            n, views = len(self.latlon), self.config.views
            draws = blue_marble.augmentation(n * views, seeded(self.config.seed, "tiles", epoch))
            self.drawn = epoch, draws.view(n, views, -1)
        return self.drawn[1]

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        index = torch.tensor([index for _, index in keys])
        latlon, views = self.latlon[index], self.config.views
        draws = self.disturbed(keys[0][0])[index]
        images = blue_marble.render(
            latlon.repeat_interleave(views, 0), self.config.tiles, draws.flatten(0, 1)
        )
        return {"image": images.unflatten(0, (len(index), views)), "latlon": latlon, "index": index}


def training_set(config: TrainConfig) -> Dataset:
    """The training samples of a configuration: `latlon` (n, 2), and batches through __getitems__.

    A fraction keeps the first places of one fixed random order, so that the parts are nested.
    Raises ValueError for an empty set and FileNotFoundError for data that are not there.
    """
    if config.model != "geoclip":
        return baseline(config.model).training_set(config)
    if config.data == "blue_marble":
        return TileTraining(training_places(config), config)
    if on_features(config):
        return FeatureData(config.data, config.image, config.views, config.fraction, config.seed)
    if Path(config.data).is_file():
        return photo_training(config)
    raise FileNotFoundError(
        f'data {config.data!r} is neither "blue_marble" nor a folder of features nor a CSV of photos'
    )


def photo_training(config: TrainConfig) -> PhotoTraining:
    """The photos of a CSV, sized and normalised as the configuration's tower wants them."""
    expected = Preprocessing.of(config.image)
    side = config.tiles.pixels if config.image.tower == CONV_TOWER else expected.pixels
    mean, std = expected.mean, expected.std
    return PhotoTraining(
        config.data, config.images, side, mean, std, config.views, config.fraction, config.seed
    )


def on_features(config: TrainConfig) -> bool:
    """Whether the data are features, which were embedded before, so that the tower is not needed."""
    return (Path(config.data) / features.INFO).is_file()


def training_places(config: TrainConfig) -> Tensor:
    """The embedded data's training (lat, lon), of which a fraction keeps the first."""
    latlon = blue_marble.splits(config.splits)["train"]  # in random order
    return latlon[: max(1, round(config.fraction * len(latlon)))]


def whole_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Batches come whole from __getitems__; there is nothing to collate."""
    return batch


# --------------------------------------------------------------------------------------------------- model


class TrainingModule(lightning.LightningModule):
    """What all trained models share: optimiser, step decay, draws per step, logging, configuration.

    A subclass gives loss(batch, generator) → dict of scalars with "loss", and locate(images) → (n, 2).
    """

    def __init__(self, config: TrainConfig):
        super().__init__()
        self.config = config

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Scalars to log, "loss" among them, for a batch of `image` or `feature` and `latlon`."""
        raise NotImplementedError

    def locate(self, images: Tensor) -> Tensor:
        """The best place (n, 2) of preprocessed images (n, 3, h, w), in (lat, lon) degrees."""
        raise NotImplementedError

    def test_tiles(self, split: str) -> tuple[Tensor, Tensor]:
        """The images that `locate` is asked about in a split of the embedded data, and their places."""
        return blue_marble.test_tiles(split, self.config.tiles, self.config.splits)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        values = self.loss(batch, seeded(self.config.seed, "step", self.global_step))
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # as Lightning would, for less
            self.log_dict({f"train/{name}": value.detach() for name, value in values.items()})
        return values["loss"]

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        values = self.loss(batch, seeded(self.config.seed, "validation", index))
        self.log_dict(
            {f"val/{name}": value for name, value in values.items()}, batch_size=len(batch["latlon"])
        )

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(
            trained,
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            fused=trained[0].is_cuda
            or None,  # one kernel instead of a dozen; Lightning has moved them by now
        )
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=self.config.decay)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["geoclip_config"] = dataclasses.asdict(self.config)


class GeoCLIPTraining(TrainingModule):
    """The paper's objective on GeoCLIP."""

    def __init__(self, config: TrainConfig, places: Tensor | None = None):
        """places: training (lat, lon) that the queue starts with; None where a checkpoint fills it."""
        super().__init__(config)
        generator = seeded(config.seed, "weights")
        self.model = GeoCLIP.build(
            config.image, config.location, generator, with_tower=not on_features(config)
        )
        self.queue = GPSQueue(config.queue, initial_queue(config, places))

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Mean cross-entropy of each view's own place against batch and queue (paper, equation 3).

        batch: `image` (b, v, 3, h, w) or `feature` (b, v, c), and `latlon` (b, 2). With several ranks, each
        adds the others' coordinates as negatives and encodes them itself.
        """
        b = len(batch["latlon"])
        latlon = gather(batch["latlon"], self)
        mine = slice(self.global_rank * b, (self.global_rank + 1) * b)
        target = torch.arange(mine.start, mine.stop, device=latlon.device)
        queue = self.queue.contents()
        losses, hits = [], []
        for view in range(self.config.views):
            if "feature" in batch:
                seen = batch["feature"][:, view]
            else:
                seen = self.model.image_encoder.features(batch["image"][:, view])
            noise_km = torch.cat(
                [
                    earth.draw_noise_km((len(latlon),), self.config.noise_m, generator),
                    earth.draw_noise_km((len(queue),), self.config.queue_noise_m, generator),
                ]
            )
            # in single precision, 0.1 mm, it is small enough not to make the GPU wait for its copy
            noise_km = noise_km.float().to(latlon.device, non_blocking=True)
            loss, hit = self.contrastive_loss(seen, torch.cat([latlon, queue]), noise_km, target)
            losses.append(loss)
            hits.append(hit)
        if self.training:
            self.queue.push(latlon)
        scale = self.model.logit_scale.detach().exp()
        return {"loss": torch.stack(losses).mean(), "top1": torch.stack(hits).mean(), "scale": scale}

    def contrastive_loss(
        self, features: Tensor, places: Tensor, noise_km: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and share of hits, of tower features (b, c) whose places are the rows `target` of (m, 2).

        noise_km: (m, 2), how far each place is moved east and north.
        """
        images = self.model.encode_features(features)
        places = earth.destination(places, *noise_km.unbind(-1))
        logits = self.model.logit_scale.exp() * images @ self.model.encode_places(places).T
        hit = (logits.argmax(-1) == target).float().mean()
        return functional.cross_entropy(logits.float(), target), hit

    @torch.inference_mode()
    def locate(self, images: Tensor) -> Tensor:
        return self.model.locate(self.model.encode_images(images))[0][:, 0]


def gather(latlon: Tensor, module: lightning.LightningModule) -> Tensor:
    """The coordinates of all ranks' batches, in rank order; one rank's are returned as they are."""
    ranks = module.trainer.world_size if module._trainer is not None else 1
    return latlon if ranks == 1 else module.all_gather(latlon).flatten(0, 1)


def initial_queue(config: TrainConfig, places: Tensor | None) -> Tensor:
    """(q, 2) places that the queue starts with; with repetition where there are fewer training places."""
    # differs 1: the released queue starts with unit-norm noise read as degrees, so its first negatives all
    # lie within about a degree of (0, 0) and are told apart at once; ours starts with training places
    generator = seeded(config.seed, "queue")
    if config.queue_start == "origin" or places is None:
        return functional.normalize(torch.randn(config.queue, 2, generator=generator), dim=1)
    order = torch.randperm(len(places), generator=generator)
    return places[order.repeat(-(-config.queue // len(places)))[: config.queue]]


def build(config: TrainConfig, data: Dataset | None = None) -> TrainingModule:
    """The untrained module of a configuration; `data` is its training set."""
    if config.model != "geoclip":
        return baseline(config.model).build(config, data)
    return GeoCLIPTraining(config, None if data is None else data.latlon)


# ------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Run:
    """A training run that ended: its folder, with the checkpoint, metrics.csv and TensorBoard's events."""

    directory: Path
    config: TrainConfig

    @property
    def checkpoint(self) -> Path:
        return self.directory / "last.ckpt"

    @property
    def result(self) -> dict[str, Any]:
        """Steps, seconds and samples, as written when the run ended."""
        return json.loads((self.directory / "result.json").read_text())

    def metrics(self):
        """Logged values as a pandas table: epoch, step, train/loss, val/loss, …; of all parts of a resumed run."""
        import pandas as pd

        files = [*sorted(self.directory.glob("metrics-*.csv")), self.directory / "metrics.csv"]
        parts = [pd.read_csv(file) for file in files]
        for i in range(len(parts) - 1):  # what was done after the last checkpoint was done again
            parts[i] = parts[i][parts[i]["step"] < parts[i + 1]["step"].min()]
        return pd.concat(parts, ignore_index=True)

    def load(self) -> TrainingModule:
        """The trained module, in evaluation mode, with the gallery of its data."""
        return load(self.checkpoint)


def run_key(config: TrainConfig) -> str:
    """Hash of configuration, code and data: a run with the same key need not be repeated."""
    parts = {
        "config": dataclasses.asdict(config),
        "code": code_hash(config.model),
        "data": fingerprint(config),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def is_kept(config: TrainConfig) -> bool:
    """Whether a run of this configuration, code and data has ended and is kept in the cache."""
    return (paths.CACHE / "runs" / run_key(config) / "result.json").is_file()


def code_hash(model: str) -> str:
    """Hash of the modules that a training run of this model goes through."""
    package = Path(__file__).parents[1]
    names = ["earth", "location_encoder", "image_encoder", "model", "gps_queue", "training/runs"]
    files = [package / f"{name}.py" for name in names] + [package / "datasets" / "blue_marble.py"]
    if model != "geoclip":
        baselines = sorted((package / "baselines").glob("*.py"))
        files += [package / "datasets" / "geography.py", *baselines]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def fingerprint(config: TrainConfig) -> str:
    """Hash of the training data."""
    if config.data == "blue_marble":
        return blue_marble.data_hash()
    described = Path(config.data) / features.INFO if on_features(config) else Path(config.data)
    return hashlib.sha256(described.read_bytes()).hexdigest()[:16]


def train(
    config: TrainConfig,
    directory: Path | str | None = None,
    resume: bool = True,
    progress: bool = False,
    epochs: int | None = None,
    devices: int | str = "auto",
    accelerator: str = "auto",
    nodes: int = 1,
) -> Run:
    """Train, or return the run that is there already; each run is kept by the hash of what it is made from.

    directory: where the run is kept; by default data/cache/runs/<run_key>. resume: go on from the last epoch
    of a run that was interrupted; False starts again. epochs: stop after this many, to be resumed later.
    devices, nodes: processes on each machine, and machines (started by torchrun or SLURM, on a shared disk).
    Raises ValueError for a directory that holds a run of another configuration.
    """
    directory = Path(directory) if directory else paths.CACHE / "runs" / run_key(config)
    paths.make_folder(directory)
    run = Run(directory, config)
    if rank_zero_only.rank > 0:  # the first rank holds the lock, and prepares and ends the run for all
        if not (resume and (directory / "result.json").is_file()):
            fit(run, resume, progress, epochs, devices, accelerator, nodes)
        return run
    with FileLock(directory / "lock"):
        if not resume:
            (directory / "result.json").unlink(missing_ok=True)
            run.checkpoint.unlink(missing_ok=True)
        check_same_configuration(run)
        if not (directory / "result.json").is_file():
            fit(run, resume, progress, epochs, devices, accelerator, nodes)
    return run


def check_same_configuration(run: Run) -> None:
    """ValueError that lists the fields in which the run kept in this folder differs from the one asked for."""
    path = run.directory / "config.yaml"
    wanted = plain(dataclasses.asdict(run.config))
    if run.checkpoint.is_file() and path.is_file():
        kept = yaml.safe_load(path.read_text())
        different = [
            f"{name}: {kept.get(name)} there, {wanted[name]} here"
            for name in wanted
            if kept.get(name) != wanted[name]
        ]
        if different:
            raise ValueError(
                f"{run.directory} holds a run of another configuration ({'; '.join(different)}): give another "
                f"folder, or start again with resume off"
            )
    with paths.atomic(path) as temporary:
        temporary.write_text(yaml.safe_dump(wanted, sort_keys=False))


def plain(value):
    """`value` with tuples as lists, as YAML and JSON give them back."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def fit(
    run: Run,
    resume: bool,
    progress: bool,
    epochs: int | None,
    devices: int | str,
    accelerator: str,
    nodes: int,
) -> None:
    """One Lightning fit, from the last checkpoint where there is one; writes result.json when it is whole."""
    config = run.config
    data = training_set(config)
    module = build(config, data)
    callbacks: list = [
        ModelCheckpoint(run.directory, "last", save_top_k=1, enable_version_counter=False, every_n_epochs=1)
    ]
    if progress:
        callbacks.append(TQDMProgressBar())
    last = min(epochs or config.epochs, config.epochs)
    stopwatch = Stopwatch()
    callbacks.append(stopwatch)
    resumed = run.checkpoint if resume and run.checkpoint.is_file() else None
    if rank_zero_only.rank == 0:
        set_metrics_aside(run, resumed is not None)
    start = time.monotonic()
    with quiet():
        trainer = lightning.Trainer(
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            max_epochs=last,
            precision=precision(config, accelerator),
            logger=[
                CSVLogger(run.directory, name="", version="."),
                TensorBoardLogger(run.directory, name="", version="tensorboard"),
            ],
            callbacks=callbacks,
            use_distributed_sampler=False,
            log_every_n_steps=10,
            num_sanity_val_steps=0,
            enable_progress_bar=progress,
            enable_model_summary=False,
        )
        if compiling_pays(config, len(data), trainer.strategy.root_device):
            module.contrastive_loss = torch.compile(module.contrastive_loss, mode="reduce-overhead")
        loaders = Loaders(config, data)
        trainer.fit(module, datamodule=loaders, ckpt_path=resumed, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if last == config.epochs and trainer.is_global_zero:
        result = {"steps": trainer.global_step, "epochs": last, "samples": len(data)}
        result |= {"seconds": round(time.monotonic() - start, 1), "resumed": resumed is not None}
        result["epoch_seconds"] = stopwatch.seconds
        result["parameters"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
        with paths.atomic(run.directory / "result.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1))


def set_metrics_aside(run: Run, resumed: bool) -> None:
    """Keep what an interrupted part has logged, which the logger would overwrite; or drop that of an old run."""
    aside = sorted(run.directory.glob("metrics-*.csv"))
    logged = run.directory / "metrics.csv"
    if resumed and logged.is_file() and logged.stat().st_size:
        logged.rename(run.directory / f"metrics-{len(aside):03}.csv")
    elif not resumed:
        for file in aside:
            file.unlink()


class Stopwatch(lightning.Callback):
    """Seconds of each epoch's steps, without set-up and validation."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer, module) -> None:
        self.began = time.monotonic()

    def on_train_epoch_end(self, trainer, module) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(round(time.monotonic() - self.began, 2))


def compiling_pays(config: TrainConfig, samples: int, device: torch.device) -> bool:
    """Whether torch.compile, which takes half a minute, wins it back: on features, on a GPU, over many steps."""
    steps = config.epochs * (samples // config.batch_size)
    return config.model == "geoclip" and device.type == "cuda" and on_features(config) and steps >= 10_000


class Loaders(lightning.LightningDataModule):
    """Training batches, and for the embedded data validation batches, for the rank that asks."""

    def __init__(self, config: TrainConfig, data: Dataset):
        super().__init__()
        self.config, self.data = config, data

    def train_dataloader(self) -> DataLoader:
        if isinstance(self.data, FeatureData):
            self.data.keep_on(self.trainer.strategy.root_device)
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        sampler = EpochSampler(len(self.data), self.config.batch_size, self.config.seed, rank, ranks)
        return self.loader(self.data, sampler, self.config.batch_size // ranks)

    def val_dataloader(self) -> DataLoader | list:
        if self.config.data != "blue_marble":
            return []
        places = blue_marble.splits(self.config.splits)["val"]
        keys = [(-1, index) for index in range(len(places))]  # epoch -1: one disturbance for all epochs
        return self.loader(self.data.at(places), keys, self.config.batch_size)

    def loader(self, data: Dataset, keys, batch_size: int) -> DataLoader:
        there = (
            isinstance(data, FeatureData) and data.on_gpu
        )  # and so needs neither workers nor pinned memory
        workers = 0 if there else self.config.workers
        return DataLoader(
            data,
            batch_size,
            sampler=keys,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=whole_batch,
            pin_memory=torch.cuda.is_available() and not there,
        )


def precision(config: TrainConfig, accelerator: str) -> str:
    """Lightning's name of the precision; "auto" takes bf16 where a GPU has it."""
    if config.precision != "auto":
        return config.precision
    bf16 = accelerator != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bf16-mixed" if bf16 else "32-true"


class quiet(warnings.catch_warnings):
    """Lightning without its advice (worker counts, hardware, tips), which would land in notebooks."""

    def __enter__(self):
        super().__enter__()
        warnings.filterwarnings("ignore", message=".*(does not have many workers|exists and is not empty).*")
        warnings.filterwarnings("ignore", message=".*(Checkpoint directory|Experiment logs directory).*")
        warnings.filterwarnings(
            "ignore", message=".*number of training batches.*is smaller than the logging.*"
        )
        warnings.filterwarnings(
            "ignore", message=".*across ranks is zero.*"
        )  # features have no validation set
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        self.logger = logging.getLogger("lightning.pytorch")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *error):
        self.logger.setLevel(self.level)
        return super().__exit__(*error)


def load(path: Path | str) -> TrainingModule:
    """The trained module in a checkpoint, in evaluation mode, with the gallery of its data.

    Nothing in the file is executed (weights_only). Raises FileNotFoundError, or ValueError for a file that is
    no checkpoint of ours or that another configuration wrote.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        config = as_config(kept["geoclip_config"])
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of `python -m geoclip train`: {error}") from error
    module = build(config)
    module.on_load_checkpoint(kept)  # classes that only the training data knew
    try:
        module.load_state_dict(kept["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not fit the configuration in it: {error}") from error
    if config.data == "blue_marble" and isinstance(module, GeoCLIPTraining):
        module.model.use_gallery(tile_gallery(config.splits))
    if isinstance(module, GeoCLIPTraining) and module.model.image_encoder.tower is None:
        module.model.image_encoder.load_tower()
    return module.eval()


def tile_gallery(sizes: SplitConfig) -> Gallery:
    """The gallery of the embedded profile."""
    return Gallery(blue_marble.splits(sizes)["gallery"], f"{sizes.gallery:,} MP-16 places")


def tile_errors(
    module: TrainingModule, split: Literal["val", "random", "blocked"], block: int = 256
) -> Tensor:
    """Error in km of each tile of a split, as every table of the embedded profile counts it."""
    images, latlon = module.test_tiles(split)
    answers = torch.cat([module.locate(part) for part in images.split(block)])
    return earth.haversine_km(answers, latlon)
