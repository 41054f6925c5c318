"""Better answers from the same weights: what the notebooks on decisions and on uncertainty share."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geoclip import evaluation
from geoclip.calibration import Calibration
from geoclip.datasets import blue_marble
from geoclip.datasets.features import FeatureData
from geoclip.gallery import Gallery
from geoclip.model import GeoCLIP
from geoclip.posterior import Places, Posterior
from geoclip.studies.runner import Study
from geoclip.training import runs
from geoclip.training.data import seeded
from geoclip.training.module import GeoCLIPTraining

BATCH = 50  # images whose scores of all places are held at once


@dataclass(frozen=True)
class Case:
    """A model, images with known places, and `parts`: pairs of rows to fit a posterior on and to answer for."""

    module: GeoCLIPTraining
    features: Float[Tensor, "n c"]
    latlon: Float[Tensor, "n 2"]
    parts: list[tuple[Tensor, Tensor]]

    @property
    def model(self) -> GeoCLIP:
        return self.module.model

    @cached_property
    def places(self) -> Places:
        return Places(self.model.gallery.latlon)

    @property
    def answered(self) -> Tensor:
        """Rows of the images that are answered for."""
        return torch.cat([rows for _, rows in self.parts])

    def training(self, views: int = 1) -> tuple[Float[Tensor, "t c"], Float[Tensor, "t 2"]]:
        """Backbone features of `views` views of the images that the model was trained on, and their places."""
        if self.module.config.data == "blue_marble":
            return tile_features(self.module, "train", views=views)
        known = FeatureData(self.module.config.data)
        features = known.tensor()[:, :views].float()
        return features.flatten(0, 1), known.latlon.double().repeat_interleave(features.shape[1], 0)

    def logits(self, rows: Tensor) -> Iterator[Float[Tensor, "_ m"]]:
        """Logits of all gallery places, a batch of images at a time."""
        for part in self.features[rows].split(BATCH):
            yield self.model.scores(self.model.encode_features(part))


@torch.inference_mode()
def tile_case(module: GeoCLIPTraining, split: str, n: int) -> Case:
    """n test tiles of a split, drawn at random.

    For `random`, the posterior is fitted on n tiles of `val`; for `blocked`, on each half of the blocks in turn.
    """
    if split == "random":
        (known, there), (features, latlon) = (tile_features(module, name, n) for name in ("val", split))
        parts = [(torch.arange(len(known)), len(known) + torch.arange(len(features)))]
        return Case(module, torch.cat([known, features]), torch.cat([there, latlon]), parts)
    features, latlon = tile_features(module, split, n)
    return Case(module, features, latlon, _halves(latlon, module.config.splits.block_deg))


def photo_case(study: Study, split: str, seed: int, n: int) -> Case:
    """A model trained on the study's photos, and n test photos of a split, drawn at random, the first view of each.

    The posterior is fitted on each half of the blocks of 1° in turn, and answers for the other.
    """
    module = runs.train(replace(study.reference, seed=seed)).load(with_tower=False)
    module.model.use_gallery(Gallery(study.gallery, "study"))
    features, latlon = study.tests[split]
    rows = torch.randperm(len(latlon), generator=seeded("decisions", split))[:n]
    features, latlon = features[rows, 0].float(), latlon[rows].double()
    return Case(module, features, latlon, _halves(latlon, 1.0))


def _halves(latlon: Float[Tensor, "n 2"], block_deg: float) -> list[tuple[Tensor, Tensor]]:
    """Both orders of the rows in one half of the blocks and in the other."""
    block = (latlon / block_deg).floor().unique(dim=0, return_inverse=True)[1]
    first = torch.randperm(int(block.max()) + 1, generator=seeded("halves"))[block] % 2 == 0
    rows = [half.nonzero()[:, 0] for half in (first, ~first)]
    return [(rows[0], rows[1]), (rows[1], rows[0])]


@torch.inference_mode()
def tile_features(
    module: GeoCLIPTraining, split: str, n: int | None = None, views: int = 1
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n 2"]]:
    """Backbone features of n tiles of a split, drawn at random from `views` views of each, and their places."""
    latlon = blue_marble.splits(module.config.splits)[split].repeat(views, 1)
    draws = blue_marble.test_augmentation(split, len(latlon))
    rows = torch.randperm(len(latlon), generator=seeded("decisions", split))[:n]
    tiles, tower = module.config.tiles, module.model.image_encoder
    images = (blue_marble.render(latlon[part], tiles, draws[part]) for part in rows.split(256))
    return torch.cat([tower.features(part) for part in images]), latlon[rows].double()


@torch.inference_mode()
def collect(
    logits: Iterable[Float[Tensor, "_ m"]],
    places: Places,
    fitted: Calibration,
    measures: Mapping[str, str | Callable[[Posterior, slice], Tensor]],
) -> dict[str, Tensor]:
    """Measures of each image's posterior: a rule of Posterior.answer, or a function of posteriors and their slice."""
    kept: dict[str, list[Tensor]] = {name: [] for name in measures}
    start = 0
    for batch in logits:
        rows, posterior = slice(start, start := start + len(batch)), fitted.posterior(places, batch)
        for name, measure in measures.items():
            found = posterior.answer(measure) if isinstance(measure, str) else measure(posterior, rows)
            kept[name].append(found)
    return {name: torch.cat(parts) for name, parts in kept.items()}


def paired(
    error_km: Float[Tensor, " n"], reference_km: Float[Tensor, " n"], clusters: Sequence
) -> dict[str, float]:
    """Difference of accuracies, in points, of two answers to the same images, with its 95 % bootstrap interval."""
    draws = evaluation.bootstrap(error_km, clusters) - evaluation.bootstrap(reference_km, clusters)
    row = {}
    for (name, km), drawn in zip(evaluation.named_thresholds(), draws.T, strict=True):
        row[name] = 100 * ((error_km <= km).double() - (reference_km <= km).double()).mean().item()
        row[f"{name}_low"], row[f"{name}_high"] = np.quantile(drawn, [0.025, 0.975])
    return row
