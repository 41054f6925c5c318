"""A model that answers by a decision on its posterior, as the commands ask it."""

import math
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from geoclip.calibration import APART_KM, Calibration, NeighbourFit
from geoclip.model import GeoCLIP
from geoclip.neighbours import Neighbours, fused
from geoclip.posterior import Places, Posterior


class Decider:
    """A GeoCLIP model that answers by a decision on its posterior; a predictor.Model.

    decision: as in Posterior.answer. describe: called with the posteriors of each batch; what it returns for
    each photo is kept in `described`, in the order of the photos that could be read. neighbours: training images
    that enter the posterior too, as calibration.neighbours says; if their photographers are known, the features of
    the photos are kept for `by_others`.
    """

    def __init__(
        self,
        model: GeoCLIP,
        decision: str,
        calibration: Calibration,
        describe: Callable[[Posterior], list[dict]] | None = None,
        neighbours: Neighbours | None = None,
    ):
        if model.gallery is None:
            raise ValueError("the model has no gallery; give it one with use_gallery(Gallery(latlon))")
        self.model, self.decision, self.calibration, self.describe = model, decision, calibration, describe
        if neighbours is not None and calibration.neighbours is None:
            raise ValueError(
                "the calibration was not fitted with training images; run `calibrate --neighbours`"
            )
        self.views, self.neighbours = model.views, neighbours
        self.gallery = model.gallery
        self.places = Places(model.gallery.latlon)
        self.described: list[dict] = []
        self._kept: list[Tensor] = []  # features (b, v, c) of each batch

    @torch.inference_mode()
    def posterior(self, query: Float[Tensor, "n d"] | Float[Tensor, "n v c h w"]) -> Posterior:
        """The posteriors of n images. query: as in GeoCLIP.locate; with neighbours, the views."""
        return self.calibration.posterior(self.places, self._logits(query)[0])

    def _logits(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of all places, and 100 × the cosine of each image with its nearest training image."""
        fit = self.calibration.neighbours
        if self.neighbours is None or fit is None:
            return self.model.scores(query).cpu(), None
        features = self.model.image_encoder.features(query.flatten(0, 1).to(self.model.logit_scale.device))
        features = features.unflatten(0, query.shape[:2])
        if self.neighbours.authors is not None:
            self._kept.append(features.cpu())
        return self._fused(features, fit, self.neighbours)

    def _fused(
        self, features: Tensor, fit: NeighbourFit, neighbours: Neighbours, authors: Sequence | None = None
    ) -> tuple[Tensor, Tensor]:
        flat = features.flatten(0, 1).to(self.model.logit_scale.device)
        encoded = self.model.encode_features(flat).unflatten(0, features.shape[:2])
        scores, near = self.model.scores(encoded.mean(1)).cpu(), features.mean(1).cpu().float()
        found = neighbours.find(near, authors=authors)
        return next(fused([scores], self.places, found, fit)), found[0][:, 0]

    @torch.inference_mode()
    def by_others(self, authors: Sequence) -> Float[Tensor, "n 2"]:
        """Answers for all photos located so far, without the training images by their own photographers, `authors`.

        Raises ValueError if the photographers of the training images are not known.
        """
        fit, theirs, found = self.calibration.neighbours, iter(authors), []
        if fit is None or self.neighbours is None or self.neighbours.authors is None:
            raise ValueError("the photographers of the training images are not known")
        for features in self._kept:
            own = list(islice(theirs, len(features)))
            logits = self._fused(features, fit, self.neighbours, own)[0]
            found.append(self.calibration.posterior(self.places, logits).answer(self.decision))
        return torch.cat(found)

    @torch.inference_mode()
    def locate(
        self, query: Float[Tensor, "n d"] | Float[Tensor, "n v c h w"], k: int = 1
    ) -> tuple[Float[Tensor, "n k 2"], Float[Tensor, "n k"]]:
        """The k best places that are 25 km apart, and the probability of being within 25 km of each.

        The first is the decision's; the others follow in the order of their probability. query: as in `posterior`.
        Where a posterior has fewer such places, the rest is NaN.
        """
        logits, nearest = self._logits(query)
        posterior = self.calibration.posterior(self.places, logits)
        latlon = posterior.answers(self.decision, k, APART_KM)
        mass = posterior.mass_within(latlon.nan_to_num(), APART_KM)
        rank = mass.masked_fill(latlon.isnan().any(-1), -1)
        rank[:, 0] = math.inf
        order = rank.argsort(dim=1, descending=True, stable=True)
        latlon, mass = latlon.take_along_dim(order[..., None], 1), mass.take_along_dim(order, 1)
        first, others = mass[:, :1], mass[:, 1:]
        # The hit rate was fitted to first answers; what it leaves is shared out in proportion to the others' mass.
        hit = self.calibration.hit_rate(first)
        mass = torch.cat([hit, others * (1 - hit) / (1 - first).clamp_min(1e-9)], 1)
        if self.describe:
            found, fit = self.describe(posterior), self.calibration.neighbours
            if fit is not None and nearest is not None:
                for about, cosine in zip(found, nearest.tolist(), strict=True):
                    about["unfamiliar"] = cosine < fit.least
            self.described += found
        return latlon, mass.masked_fill(latlon.isnan().any(-1), math.nan)
