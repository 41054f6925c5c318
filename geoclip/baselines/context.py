"""Geolocalization by regression, through what an image shows of its context: climate, month, region.

Heads classify the context from the image feature; their probabilities or logits and the feature together give the
coordinates, trained by a distance on the sphere. Before that, the tower can be trained on captions made of
the context.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from geoclip import earth
from geoclip.baselines import labels, samples
from geoclip.baselines.config import ContextConfig
from geoclip.baselines.towers import Tower
from geoclip.image_encoder import CONV_TOWER, TIMM, load_clip
from geoclip.layers import mlp
from geoclip.location_encoder import initialise
from geoclip.training.data import seeded
from geoclip.training.module import TrainingModule, accuracies, gather

DEGREES = torch.tensor([90.0, 180.0])
LISTED = 5  # classes of a head that are listed with an answer


@dataclass(frozen=True)
class Encoding:
    """How context becomes numbers: classes of the heads and words of the captions; saved in checkpoints."""

    config: ContextConfig
    classes: dict[str, tuple[str, ...]]
    words: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: ContextConfig, context: pd.DataFrame) -> "Encoding":
        """Return the encoding that the context of a training set defines."""
        said = labels.captions(context, config.caption) if config.caption_epochs else []
        words = tuple(sorted({word for sentence in said for word in split_words(sentence)}))
        return cls(config, labels.classes_of(context, config.used_heads), words)

    def __call__(self, context: pd.DataFrame) -> dict[str, Tensor]:
        """Return the class numbers of each head, and `caption` (n, words), padded with 0."""
        encoded = labels.encode(context, self.classes)
        if self.config.caption_epochs:
            encoded["caption"] = self.tokens(labels.captions(context, self.config.caption))
        return encoded

    def tokens(self, sentences: list[str]) -> Tensor:
        """Return CLIP's tokens, or, for a tower without a text encoder, numbers of the known words from 1."""
        if not has_clip(self.config):
            number = {word: i for i, word in enumerate(self.words, start=1)}
            rows = [[number[word] for word in split_words(text) if word in number] for text in sentences]
            width = max(map(len, rows), default=1)
            return torch.tensor([row + [0] * (width - len(row)) for row in rows]).long()
        import open_clip

        return open_clip.get_tokenizer(self.config.image.tower)(sentences)


def split_words(sentence: str) -> list[str]:
    """Return the lower-case words of a caption, without punctuation."""
    return re.findall(r"\w+", sentence.lower())


def has_clip(config: ContextConfig) -> bool:
    """Return whether the tower is CLIP's, which has a text encoder."""
    return config.image.tower != CONV_TOWER and not config.image.tower.startswith(TIMM)


class WordBag(nn.Module):
    """A small text encoder: the mean of the word vectors, then two layers; tokens (n, w) → (n, d)."""

    def __init__(self, words: int, dim: int, generator: torch.Generator):
        super().__init__()
        self.words = nn.EmbeddingBag(words + 1, dim, mode="mean", padding_idx=0)
        self.layers = mlp(dim, dim, dim)
        nn.init.normal_(self.words.weight, generator=generator)
        initialise(self.layers, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.words(tokens))


class ClipText(nn.Module):
    """CLIP's text encoder with its own projection; tokens (n, 77) → (n, d)."""

    def __init__(self, config: ContextConfig):
        super().__init__()
        self.clip = load_clip(config.image.tower, config.image.weights)
        del self.clip.visual

    def forward(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_text(tokens)


class ContextModel(nn.Module):
    """Images → places, through the context heads if they are used.

    Captions are compared in CLIP's own space, from its own temperature, where the tower is CLIP's.
    """

    def __init__(self, config: ContextConfig, encoding: Encoding):
        super().__init__()
        self.config = config
        self.tower = Tower(config.image, seeded(config.seed, "tower"))
        sizes = {head: len(names) for head, names in encoding.classes.items()}
        self.heads = nn.ModuleDict({head: nn.Linear(self.tower.dim, size) for head, size in sizes.items()})
        for name, head in self.heads.items():
            initialise(head, seeded(config.seed, "head", name))
        outputs = 2 if config.distance == "degrees" else 3
        self.coordinates = mlp(self.tower.dim + sum(sizes.values()), config.hidden, outputs)
        initialise(self.coordinates, seeded(config.seed, "coordinates"))
        if config.caption_epochs:
            clip, generator = has_clip(config), seeded(config.seed, "captions")
            self.image_projection = nn.Identity() if clip else nn.Linear(self.tower.dim, config.caption_dim)
            initialise(self.image_projection, generator)
            words = len(encoding.words)
            self.text: nn.Module = ClipText(config) if clip else WordBag(words, config.caption_dim, generator)
            scale = self.text.clip.logit_scale.detach() if clip else torch.tensor(1 / 0.07).log()
            self.logit_scale = nn.Parameter(scale.clone())

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, "n d"], dict[str, Tensor]]:
        """Return a vector (n, 3) towards the place, or (n, 2) scaled degrees, and the logits of the heads."""
        feature = self.tower(images)
        logits = {name: head(feature) for name, head in self.heads.items()}
        as_logits = self.config.context_input == "logits"
        passed = [values if as_logits else values.softmax(-1) for values in logits.values()]
        return self.coordinates(torch.cat([feature, *passed], 1)), logits

    def places(self, output: Float[Tensor, "n d"]) -> Float[Tensor, "n 2"]:
        """Return (lat, lon) degrees of the output of `forward`."""
        if self.config.distance != "degrees":
            return earth.from_unit_sphere(output.float())
        lat, lon = (output.float() * DEGREES.to(output.device)).unbind(-1)
        return torch.stack([lat.clamp(-90, 90), earth.wrap_lon(lon)], -1)

    def caption_loss(
        self, images: Float[Tensor, "n 3 h w"], tokens: Int[Tensor, "n t"], gather: Callable = lambda x: x
    ) -> Float[Tensor, ""]:
        """Return CLIP's symmetric cross-entropy; all equal captions in a batch count as right. gather: over ranks."""
        seen = gather(functional.normalize(self.image_projection(self.tower(images)), dim=-1))
        read = gather(functional.normalize(self.text(tokens), dim=-1))
        tokens = gather(tokens)
        logits = (self.logit_scale.exp() * seen @ read.T).float()
        same = (tokens[:, None] == tokens[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def distance(output: Float[Tensor, "n d"], latlon: Float[Tensor, "n 2"], kind: str) -> Float[Tensor, ""]:
    """Return the mean distance of the model's output from the places; kind is ContextConfig.distance."""
    if kind == "degrees":
        return (output.float() - latlon / DEGREES.to(latlon.device)).abs().mean()
    found = functional.normalize(output.float(), dim=-1)
    truth = earth.unit_sphere(latlon.float())
    chord = (found - truth).norm(dim=-1)
    if kind == "chord":
        return chord.mean()
    # unlike acos, atan2 has a finite gradient at the right place and its antipode
    across = torch.linalg.cross(found, truth).norm(dim=-1)
    return torch.atan2(across, (found * truth).sum(-1)).mean()


class ContextTraining(TrainingModule):
    """A regressor with context heads: trained on captions first, then by distance and cross-entropies."""

    config_class = ContextConfig

    def __init__(self, config: ContextConfig, encoding: Encoding):
        super().__init__(config)
        self.encoding = encoding
        self.described: list[dict] = []
        self.model = ContextModel(config, encoding)

    @classmethod
    def training_set(cls, config: ContextConfig) -> Dataset:
        """Return images with the class numbers of each head, and captions if they are used."""
        found = samples.Samples.of(config, config.columns)
        return found.dataset(config, Encoding.of(config, found.context))

    @classmethod
    def build(cls, config: ContextConfig, data: Dataset) -> "ContextTraining":
        return cls(config, data.encode)

    @classmethod
    def rebuild(cls, config: ContextConfig, checkpoint: dict[str, Any]) -> "ContextTraining":
        names = {head: tuple(kept) for head, kept in checkpoint["classes"].items()}
        return cls(config, Encoding(config, names, tuple(checkpoint["words"])))

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return the caption loss in its epochs, then distance and context; unknown labels are left out."""
        images, views = batch["image"].flatten(0, 1), self.config.views
        if self.current_epoch < self.config.caption_epochs:
            tokens = batch["caption"].repeat_interleave(views, 0)
            loss = self.model.caption_loss(images, tokens, lambda rows: gather(rows, self))
            return {"loss": loss, "caption": loss}
        output, logits = self.model(images)
        far = distance(output, batch["latlon"].repeat_interleave(views, 0), self.config.distance)
        values = {"distance": far}
        for head, value in logits.items():
            values[head] = labels.known_cross_entropy(value, batch[head].repeat_interleave(views))
        if not self.training:
            found = self.model.places(output)
            values |= accuracies(found, batch["latlon"].repeat_interleave(views, 0))
        loss = far
        if logits:
            loss = far + self.config.context_weight * torch.stack([values[head] for head in logits]).mean()
        return {"loss": loss} | values

    @torch.inference_mode()
    def place(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 2"]:
        return self.model.places(self.model(images)[0]).cpu()

    @torch.inference_mode()
    def locate(
        self, query: Float[Tensor, "n 1 c h w"], k: int = 1
    ) -> tuple[Float[Tensor, "n 1 2"], Float[Tensor, "n 1"]]:
        """As TrainingModule.locate; each photo adds {"context": {head: {class: probability}}} to `described`."""
        output, logits = self.model(query[:, 0].to(self.device))
        found: list[dict] = [{} for _ in range(len(output))]
        for head, value in logits.items():
            share, index = value.softmax(-1).topk(min(LISTED, value.shape[1]))
            names = self.encoding.classes[head]
            for about, numbers, shares in zip(found, index.tolist(), share.tolist(), strict=True):
                about[head] = {names[number]: p for number, p in zip(numbers, shares, strict=True)}
        self.described += [{"context": about} for about in found]
        latlon = self.model.places(output).cpu()
        return latlon[:, None], torch.full((len(latlon), 1), torch.nan)

    def configure_optimizers(self):
        """As all models; the decay of the learning rate starts again after the caption epochs."""
        optimizers, schedules = super().configure_optimizers()
        if first := self.config.caption_epochs:

            def factor(epoch: int) -> float:
                return self.config.decay ** (epoch if epoch < first else epoch - first)

            schedules = [torch.optim.lr_scheduler.LambdaLR(optimizers[0], factor)]
        return optimizers, schedules

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["classes"] = {head: list(names) for head, names in self.encoding.classes.items()}
        checkpoint["words"] = list(self.encoding.words)


def score_context(described: Sequence[dict], truth: pd.DataFrame) -> pd.DataFrame:
    """Return how often, in percent, the true class is each head's first (top1), or among its first five (top5).

    described: as ContextTraining.locate makes it, {} for a photo that could not be read, which is a miss. truth:
    context in the same order; images whose class is unknown are left out of `n`.
    """
    named, rows = labels.named(truth), []
    answered = {head for photo in described for head in photo.get("context", ())}
    for head in filter(answered.__contains__, named):
        found = [list(photo.get("context", {}).get(head, ())) for photo in described]
        pairs = [pair for pair in zip(named[head], found, strict=True) if not pd.isna(pair[0])]
        right = {k: [name in classes[:k] for name, classes in pairs] or [np.nan] for k in (1, LISTED)}
        rows.append({"head": head, "n": len(pairs)} | {f"top{k}": 100 * np.mean(r) for k, r in right.items()})
    return pd.DataFrame(rows)
