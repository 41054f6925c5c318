"""Geo-localization by regression, with what an image says of its context on the way: climate, month, region.

Heads on the image feature tell the context apart; their probabilities and the feature give the coordinates,
learned by a distance on the sphere. Before that, the tower can be trained against captions made of the
context.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from geoclip import earth
from geoclip.baselines import labels, samples
from geoclip.baselines.geocells import known_cross_entropy
from geoclip.baselines.towers import Tower
from geoclip.image_encoder import CONV_TOWER, TIMM, ImageEncoderConfig, load_clip
from geoclip.location_encoder import initialise
from geoclip.training.config import RunConfig
from geoclip.training.data import seeded
from geoclip.training.module import TrainingModule

DEGREES = torch.tensor([90.0, 180.0])


@dataclass(frozen=True)
class ContextConfig(RunConfig):
    """A regressor of coordinates.

    heads: the labels that are told apart (the defaults are OSV-Mini's; the embedded data have climate,
        continent, country and state). use_context: off, the coordinates come from the feature alone and no
        head is there. context_weight: of the heads' losses, their mean added to the distance.
    distance: what is minimised: the chord through the Earth or the great circle between the places, both in
        Earth radii; or, for comparison, the mean of |Δlat| / 90 and |Δlon| / 180, which tears at ±180°.
    hidden: width of the layer that makes coordinates of feature and probabilities.
    caption_epochs: of `epochs`, the first ones that train tower and text encoder on image–caption pairs; the
        step decay starts anew after them. caption: the captions' template; unknown parts are left out.
    """

    model: Literal["context"] = "context"
    image: ImageEncoderConfig = field(default_factory=lambda: ImageEncoderConfig(frozen=False))
    heads: tuple[str, ...] = ("climate", "month", "state", "county", "city")
    use_context: bool = True
    context_weight: float = 1.0
    distance: Literal["chord", "great_circle", "degrees"] = "chord"
    hidden: int = 512
    caption_epochs: int = 0
    caption: str = "a photo in {city}, {county}, {state}, {climate} climate, in {month}"
    caption_dim: int = 256

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.caption_epochs < self.epochs:
            raise ValueError(f"caption_epochs {self.caption_epochs} leaves none of the {self.epochs} epochs")
        if self.caption_epochs and self.image.frozen:
            raise ValueError(
                "captions cannot train a frozen tower: set image.frozen false, or caption_epochs 0"
            )
        if self.use_context and not self.heads:
            raise ValueError("use_context needs heads; without any, switch use_context off")

    @property
    def columns(self) -> tuple[str, ...]:
        """The labels that heads or captions need."""
        heads = self.heads if self.use_context else ()
        named = tuple(re.findall(r"{(.*?)}", self.caption)) if self.caption_epochs else ()
        return tuple(dict.fromkeys(heads + named))


@dataclass(frozen=True)
class Encoding:
    """How context becomes numbers: classes of the heads, and words of the captions; kept in checkpoints."""

    config: ContextConfig
    classes: labels.Classes
    words: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: ContextConfig, context: pd.DataFrame) -> "Encoding":
        """That of a training set's context."""
        said = labels.captions(context, config.caption) if config.caption_epochs else []
        words = tuple(sorted({word for sentence in said for word in split_words(sentence)}))
        return cls(config, labels.Classes.of(context, config.heads if config.use_context else ()), words)

    def __call__(self, context: pd.DataFrame) -> dict[str, Tensor]:
        """Class numbers of each head, and the captions' `caption` (n, words), 0 where a caption has ended."""
        encoded = self.classes(context)
        if self.config.caption_epochs:
            encoded["caption"] = self.tokens(labels.captions(context, self.config.caption))
        return encoded

    def tokens(self, sentences: list[str]) -> Tensor:
        """Word numbers from 1 for the tower trained from scratch (unknown words left out), else CLIP's tokens."""
        if not has_clip(self.config):
            number = {word: i for i, word in enumerate(self.words, start=1)}
            rows = [[number[word] for word in split_words(text) if word in number] for text in sentences]
            width = max(map(len, rows), default=1)
            return torch.tensor([row + [0] * (width - len(row)) for row in rows]).long()
        import open_clip

        return open_clip.get_tokenizer(self.config.image.tower)(sentences)


def split_words(sentence: str) -> list[str]:
    """Lower-case words of a caption, without punctuation."""
    return re.findall(r"\w+", sentence.lower())


def has_clip(config: ContextConfig) -> bool:
    """Whether the tower is CLIP's, and has a text tower beside it."""
    return config.image.tower != CONV_TOWER and not config.image.tower.startswith(TIMM)


class WordBag(nn.Module):
    """A small text encoder: the mean of a caption's word vectors, then two layers; tokens (n, w) → (n, d)."""

    def __init__(self, words: int, dim: int, generator: torch.Generator):
        super().__init__()
        self.words = nn.EmbeddingBag(words + 1, dim, mode="mean", padding_idx=0)
        self.layers = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        nn.init.normal_(self.words.weight, generator=generator)
        initialise(self.layers, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.words(tokens))


class ClipText(nn.Module):
    """CLIP's text tower, and a projection; tokens (n, 77) → (n, d)."""

    def __init__(self, config: ContextConfig, generator: torch.Generator):
        super().__init__()
        self.clip = load_clip(config.image.tower, config.image.weights)
        del self.clip.visual
        self.project = nn.Linear(self.clip.text_projection.shape[1], config.caption_dim)
        initialise(self.project, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.project(self.clip.encode_text(tokens))


class ContextModel(nn.Module):
    """Images (n, 3, h, w) → places, through the context where it is used."""

    def __init__(self, config: ContextConfig, encoding: Encoding):
        super().__init__()
        self.config = config
        self.tower = Tower(config.image, seeded(config.seed, "tower"))
        sizes = {head: len(names) for head, names in encoding.classes.names.items()}
        self.heads = nn.ModuleDict({head: nn.Linear(self.tower.dim, size) for head, size in sizes.items()})
        for name, head in self.heads.items():
            initialise(head, seeded(config.seed, "head", name))
        outputs = 2 if config.distance == "degrees" else 3
        self.coordinates = nn.Sequential(
            nn.Linear(self.tower.dim + sum(sizes.values()), config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, outputs),
        )
        initialise(self.coordinates, seeded(config.seed, "coordinates"))
        if config.caption_epochs:
            generator = seeded(config.seed, "captions")
            self.image_projection = nn.Linear(self.tower.dim, config.caption_dim)
            initialise(self.image_projection, generator)
            self.text: nn.Module = (
                ClipText(config, generator)
                if has_clip(config)
                else WordBag(len(encoding.words), config.caption_dim, generator)
            )
            self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, "n d"], dict[str, Tensor]]:
        """A vector (n, 3) towards the place, or (n, 2) degrees where those are learned; logits of the heads."""
        feature = self.tower(images)
        logits = {name: head(feature) for name, head in self.heads.items()}
        probabilities = [values.softmax(-1) for values in logits.values()]
        return self.coordinates(torch.cat([feature, *probabilities], 1)), logits

    def places(self, output: Float[Tensor, "n d"]) -> Float[Tensor, "n 2"]:
        """(lat, lon) degrees (n, 2) of what `forward` gives."""
        if self.config.distance != "degrees":
            return earth.from_unit_sphere(output.float())
        lat, lon = (output.float() * DEGREES.to(output.device)).unbind(-1)
        return torch.stack([lat.clamp(-90, 90), earth.wrap_lon(lon)], -1)

    def caption_loss(self, images: Float[Tensor, "n 3 h w"], tokens: Int[Tensor, "n t"]) -> Float[Tensor, ""]:
        """Symmetric cross-entropy of image–caption similarities; equal captions in the batch are all right."""
        seen = functional.normalize(self.image_projection(self.tower(images)), dim=-1)
        read = functional.normalize(self.text(tokens), dim=-1)
        logits = (self.logit_scale.exp() * seen @ read.T).float()
        same = (tokens[:, None] == tokens[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def distance(output: Float[Tensor, "n d"], latlon: Float[Tensor, "n 2"], kind: str) -> Float[Tensor, ""]:
    """Mean distance of what the model gives from the places (n, 2): see ContextConfig.distance."""
    if kind == "degrees":
        return (output.float() - latlon / DEGREES.to(latlon.device)).abs().mean()
    found = functional.normalize(output.float(), dim=-1)
    truth = earth.unit_sphere(latlon.float())
    chord = (found - truth).norm(dim=-1)
    if kind == "chord":
        return chord.mean()
    # atan2, not acos: its gradient stays finite where the answer is right, or opposite
    across = torch.linalg.cross(found, truth).norm(dim=-1)
    return torch.atan2(across, (found * truth).sum(-1)).mean()


class ContextTraining(TrainingModule):
    """Captions first, where there are epochs for them; then the distance on the sphere and the heads' losses."""

    config_class = ContextConfig

    def __init__(self, config: ContextConfig, encoding: Encoding | None = None):
        """encoding: the training set's; None where a checkpoint brings it."""
        super().__init__(config)
        self.encoding: Encoding | None = None
        if encoding is not None:
            self.use(encoding)

    @classmethod
    def training_set(cls, config: ContextConfig) -> Dataset:
        """Images with the class numbers of each head, and captions where they are used."""
        found = samples.Samples.of(config, config.columns)
        return found.dataset(config, config.columns, Encoding.of(config, found.context))

    @classmethod
    def build(cls, config: ContextConfig, data: Dataset | None = None) -> "ContextTraining":
        return cls(config, None if data is None else data.encode)

    def use(self, encoding: Encoding) -> None:
        """Tell these classes apart."""
        self.encoding = encoding
        self.model = ContextModel(self.config, encoding)

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The caption loss in its epochs; after them distance and context, unknown labels left out."""
        images, views = batch["image"].flatten(0, 1), self.config.views
        if self.current_epoch < self.config.caption_epochs:
            loss = self.model.caption_loss(images, batch["caption"].repeat_interleave(views, 0))
            return {"loss": loss, "caption": loss.detach()}
        output, logits = self.model(images)
        far = distance(output, batch["latlon"].repeat_interleave(views, 0), self.config.distance)
        values = {"distance": far}
        for head, value in logits.items():
            values[head] = known_cross_entropy(value, batch[head].repeat_interleave(views))
        loss = far
        if logits:
            loss = far + self.config.context_weight * torch.stack([values[head] for head in logits]).mean()
        return {"loss": loss} | {name: value.detach() for name, value in values.items()}

    @torch.inference_mode()
    def locate(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 2"]:
        output, _ = self.model(images)
        return self.model.places(output).cpu()

    def configure_optimizers(self):
        """As all models; the decay starts anew when the captions' epochs are over."""
        optimizers, schedules = super().configure_optimizers()
        first = self.config.caption_epochs
        if first:
            decay = self.config.decay
            anew = torch.optim.lr_scheduler.LambdaLR(
                optimizers[0], lambda epoch: decay ** (epoch if epoch < first else epoch - first)
            )
            schedules = [anew]
        return optimizers, schedules

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["classes"] = {head: list(names) for head, names in self.encoding.classes.names.items()}
        checkpoint["words"] = list(self.encoding.words)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.encoding is None:  # where training goes on, its data gave the same classes
            names = {head: tuple(kept) for head, kept in checkpoint["classes"].items()}
            self.use(Encoding(self.config, labels.Classes(names), tuple(checkpoint["words"])))
