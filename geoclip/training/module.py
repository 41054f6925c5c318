"""What is trained: a Lightning module that all models share, and GeoCLIP's own (paper, section 3.3)."""

import dataclasses
from typing import Any

import lightning
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from geoclip import earth, evaluation
from geoclip.datasets import blue_marble
from geoclip.datasets.features import FeatureData
from geoclip.gallery import Gallery
from geoclip.gps_queue import GPSQueue
from geoclip.image_encoder import ImageEncoder, Preprocessing, tower_hash
from geoclip.location_encoder import LocationEncoder
from geoclip.loss import contrastive_loss
from geoclip.model import GeoCLIP
from geoclip.training import data
from geoclip.training.checkpoints import from_checkpoint
from geoclip.training.config import RunConfig, TrainConfig, as_config
from geoclip.training.data import seeded

GALLERY = 100_000  # places of a gallery made of training places, as in the released one


class TrainingModule(lightning.LightningModule):
    """What all trained models share: optimiser, step decay, draws of each step, logging, checkpoints, answers.

    It is a predictor.Model with one answer for a photo. A subclass implements

    - build(config, data) and rebuild(config, checkpoint): the untrained module for a training set, and one of a
      checkpoint's shape with new weights;
    - loss(batch, generator): scalars to log, "loss" among them, for a batch of `image` or `feature`, and `latlon`;
    - place(images): the best place (n, 2) of each preprocessed image.
    """

    config_class: type[RunConfig]
    gallery = None
    ways: tuple[str, ...] = ("",)  # the names of `answers`

    def __init__(self, config: RunConfig):
        super().__init__()
        self.config = config

    @classmethod
    def training_set(cls, config: RunConfig) -> Dataset:
        """Return the training samples of a configuration."""
        return data.training_set(config)

    @classmethod
    def restore(cls, checkpoint: dict[str, Any], with_tower: bool = True) -> "TrainingModule":
        """Return the module that a checkpoint holds, without reading pretrained weights or training data."""
        config = as_config(checkpoint["geoclip_config"], cls.config_class)
        image = dataclasses.replace(config.image, weights=None)
        module = cls.rebuild(dataclasses.replace(config, image=image), checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        module.config = config
        return module

    def answers(self, images: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n 2"]]:
        """Return the best places by the name of the answer; a model that has only one calls it ""."""
        return {"": self.place(images)}

    def locate(
        self, query: Float[Tensor, "n 1 c h w"], k: int = 1
    ) -> tuple[Float[Tensor, "n 1 2"], Float[Tensor, "n 1"]]:
        """Return the best place of each photo's view, whatever k is, and NaN for its unknown probability."""
        latlon = self.place(query[:, 0].to(self.device)).cpu()
        return latlon[:, None], torch.full((len(latlon), 1), torch.nan)

    def views(self, photo, ten_crop: bool = False) -> Float[Tensor, "1 c h w"]:
        """Return the preprocessed photo."""
        if ten_crop:
            raise ValueError("--ten-crop: a baseline has no ten-crop answer; GeoCLIP averages over crops")
        return Preprocessing.of(self.config.image).views(photo)

    def test_tiles(self, split: str) -> tuple[Tensor, Tensor]:
        """Return the images (n, 3, p, p) of a split of the embedded tiles, and their places (n, 2)."""
        return blue_marble.test_tiles(split, self.config.tiles, self.config.splits)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        values = self.loss(batch, seeded(self.config.seed, "step", self.global_step))
        loss, step = values["loss"].detach(), self.global_step + 1
        logged = step % self.trainer.log_every_n_steps == 0  # log() in every step is slow
        if (logged or not loss.is_cuda) and not loss.isfinite():  # a GPU would have to wait for it
            where = f"in epoch {self.current_epoch + 1}, step {step}"
            raise ValueError(f"the loss is {loss.item()} {where}: lower learning_rate, or look at the data")
        if logged:
            self.log_dict({f"train/{name}": value.detach() for name, value in values.items()}, prog_bar=True)
        return values["loss"]

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        values = self.loss(batch, seeded(self.config.seed, "validation", index))
        values = {f"val/{name}": value for name, value in values.items()}
        self.log_dict(values, batch_size=len(batch["latlon"]), sync_dist=True)

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        fused = trained[0].is_cuda or None  # one kernel instead of a dozen
        rates = {"lr": self.config.learning_rate, "weight_decay": self.config.weight_decay}
        optimizer = torch.optim.Adam(trained, **rates, fused=fused)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=self.config.decay)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the configuration. Raises ValueError for weights that are not finite, before a good file is replaced."""
        for name, parameter in self.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(f"{name} holds values that are not finite: lower learning_rate")
        checkpoint["geoclip_config"] = dataclasses.asdict(self.config)


class GeoCLIPTraining(TrainingModule):
    """GeoCLIP, its GPS queue and the paper's loss."""

    config_class = TrainConfig

    def __init__(self, config: TrainConfig, geoclip: GeoCLIP, queue: Float[Tensor, "q 2"]):
        super().__init__(config)
        self.model = geoclip
        self.queue = GPSQueue(queue)
        self.tower_hash: str | None = None  # of a frozen tower

    @classmethod
    def build(cls, config: TrainConfig, data: Dataset) -> "GeoCLIPTraining":
        on_features = isinstance(data, FeatureData)
        generator = seeded(config.seed, "weights")
        image = ImageEncoder(config.image, generator, with_tower=not on_features)
        location = LocationEncoder(config.location, generator)
        geoclip = GeoCLIP(image, location, gallery_of(config, data.latlon))
        module = cls(config, geoclip, initial_queue(config, data.latlon))
        if on_features:
            module.tower_hash = data.info.tower_hash
        return module

    @classmethod
    def restore(cls, checkpoint: dict[str, Any], with_tower: bool = True) -> "GeoCLIPTraining":
        config, weights = as_config(checkpoint["geoclip_config"]), checkpoint["state_dict"]
        module = cls(config, from_checkpoint(checkpoint, with_tower), torch.zeros(config.queue, 2))
        module.queue.load_state_dict({name: weights[f"queue.{name}"] for name in ("places", "oldest")})
        return module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        gallery, encoder = self.model.gallery, self.model.image_encoder
        if self.tower_hash is None and encoder.config.frozen:
            self.tower_hash = tower_hash(encoder.load_tower())
        checkpoint["geoclip_tower"] = self.tower_hash  # identifies its weights on another machine
        checkpoint["geoclip_gallery"] = gallery and {"latlon": gallery.latlon, "source": gallery.source}

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return the loss, the share of images that find their place (top1) and e^s (scale), means over views.

        batch: `image` (b, v, 3, h, w) or `feature` (b, v, c), and `latlon` (b, 2). Negatives are the places
        of the batch, those of the other ranks, and the queue, all with GPS noise.
        """
        b = len(batch["latlon"])
        latlon = gather(batch["latlon"], self)
        target = torch.arange(b, device=latlon.device) + self.global_rank * b
        queue = self.queue.contents()
        losses, hits = [], []
        for view in range(self.config.views):
            if "feature" in batch:
                feature = batch["feature"][:, view]
            else:
                feature = self.model.image_encoder.features(batch["image"][:, view])
            sizes = ((len(latlon), self.config.noise_m), (len(queue), self.config.queue_noise_m))
            noise_km = torch.cat([earth.draw_noise_km(n, sigma_m, generator) for n, sigma_m in sizes])
            # in single precision (0.1 mm), so that the GPU does not wait for the copy
            noise_km = noise_km.float().to(latlon.device, non_blocking=True)
            loss, hit = self.view_loss(feature, torch.cat([latlon, queue]), noise_km, target)
            losses.append(loss)
            hits.append(hit)
        if self.training:
            self.queue.push(latlon)
        scale = self.model.logit_scale.detach().exp()
        return {"loss": torch.stack(losses).mean(), "top1": torch.stack(hits).mean(), "scale": scale}

    def view_loss(self, feature: Tensor, latlon: Tensor, noise_km: Tensor, target: Tensor) -> tuple:
        """Return contrastive_loss of tower features (b, c) and places (m, 2) moved by noise_km (m, 2) east, north."""
        images = self.model.encode_features(feature)
        places = self.model.encode_places(earth.destination(latlon, *noise_km.unbind(-1)))
        return contrastive_loss(images, places, self.model.logit_scale, target)

    @torch.inference_mode()
    def place(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 2"]:
        return self.model.locate(self.model.encode_images(images))[0][:, 0]


def accuracies(found: Float[Tensor, "n 2"], truth: Float[Tensor, "n 2"]) -> dict[str, Tensor]:
    """Return the percent of answers within each threshold, to be logged in validation."""
    error_km = earth.haversine_km(found, truth)
    return {name: 100 * (error_km <= km).float().mean() for name, km in evaluation.named_thresholds()}


def gather(rows: Tensor, module: lightning.LightningModule) -> Tensor:
    """Return the rows of all ranks' batches, in the order of the ranks; each rank's loss has a gradient in all."""
    ranks = module.trainer.world_size if module._trainer is not None else 1
    return rows if ranks == 1 else module.all_gather(rows, sync_grads=True).flatten(0, 1)


def initial_queue(config: TrainConfig, places: Float[Tensor, "n 2"]) -> Float[Tensor, "q 2"]:
    """Return the places that the queue starts with; they repeat if there are fewer training places."""
    # differs 1: the released queue starts with unit-norm noise read as degrees, so its first negatives all
    # lie within about a degree of (0, 0) and are told apart at once; ours starts with training places
    generator = seeded(config.seed, "queue")
    if config.queue_start == "origin":
        return functional.normalize(torch.randn(config.queue, 2, generator=generator), dim=1)
    order = torch.randperm(len(places), generator=generator)
    return places[order.repeat(-(-config.queue // len(places)))[: config.queue]]


def gallery_of(config: RunConfig, places: Float[Tensor, "n 2"]) -> Gallery:
    """Return the places that a model answers from: those of the embedded tiles, or the training places."""
    if config.data == "blue_marble":
        sizes = config.splits
        return Gallery(blue_marble.splits(sizes)["gallery"], f"{sizes.gallery:,} MP-16 places")
    unique = places.cpu().unique(dim=0)
    order = torch.randperm(len(unique), generator=seeded("gallery"))
    unique = unique[order[:GALLERY]]
    return Gallery(unique, f"{len(unique):,} training places of {config.data}")
