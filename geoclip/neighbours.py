"""Training images as a second gallery: where the images most like a query were taken."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from geoclip import earth
from geoclip.calibration import FALSE_ALARMS, KERNELS_KM, Calibration, NeighbourFit, fit, fit_neighbours
from geoclip.kernels import density
from geoclip.posterior import Places

BATCH = 50  # queries whose cosines with all training images are held at once
SHARES = (0.25, 1.0, 2.0)  # of the neighbours' log density, see fit_fused
AREA_KM = 50.0  # a kernel with which neighbours tell the area, and the gallery the place in it
FLOOR = 1e-3  # part of the neighbours' density that is uniform, so that they rule nothing out


class Neighbours:
    """Training images whose backbone features are compared with a query's.

    features: of the training images; latlon: where they were taken, (lat, lon) degrees; authors: the photographer
    of each, if `find` is to leave out the query's own.
    """

    def __init__(
        self, features: Float[Tensor, "t c"], latlon: Float[Tensor, "t 2"], authors: Sequence | None = None
    ):
        self.mean = features.mean(0)
        self.features, self.latlon = self._unit(features), latlon.double()
        self.authors = None if authors is None else np.asarray(authors)

    def _unit(self, features: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        return normalize(features - self.mean, dim=-1)  # centred: else every cosine is close to 1

    def find(
        self, features: Float[Tensor, "n c"], k: int = 32, authors: Sequence | None = None
    ) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k 2"]]:
        """The k nearest training images: 100 × cosine, and where they were taken, best first.

        authors: photographers of the queries; training images by the same one are left out (−inf if fewer than k
        are left). Raises ValueError if those of the training images are not known.
        """
        if authors is not None and self.authors is None:
            raise ValueError("the photographers of the training images are not known")
        found = []
        for start in range(0, len(features), BATCH):
            rows = slice(start, start + BATCH)
            cosine = self._unit(features[rows]) @ self.features.T
            if authors is not None:
                same = np.asarray(authors)[rows, None] == self.authors
                cosine = cosine.masked_fill(torch.from_numpy(same), -math.inf)
            found.append(cosine.topk(min(k, len(self.latlon))))
        index = torch.cat([part.indices for part in found])
        return 100 * torch.cat([part.values for part in found]), self.latlon[index]


def fused(
    logits: Iterable[Float[Tensor, "_ m"]],
    places: Places,
    near: tuple[Float[Tensor, "n k"], Float[Tensor, "n k 2"]],
    how: NeighbourFit,
) -> Iterator[Float[Tensor, "_ m"]]:
    """The product of both: logits of all gallery places plus a share of the neighbours' log density there.

    near: as `Neighbours.find` returns them, for the images of all batches of `logits`. Both say the same in part,
    so the sum needs a calibration of its own.
    """
    yield from _product(logits, _log_density(places, near, how), how)


def _product(
    logits: Iterable[Float[Tensor, "_ m"]], log_density: Iterable[Float[Tensor, " m"]], how: NeighbourFit
) -> Iterator[Float[Tensor, "_ m"]]:
    found = iter(log_density)
    for batch in logits:
        rows = zip(batch, found, strict=False)
        yield torch.stack([scores / how.gallery_temperature + how.share * log for scores, log in rows])


def _log_density(
    places: Places, near: tuple[Float[Tensor, "n k"], Float[Tensor, "n k 2"]], how: NeighbourFit
) -> Iterator[Float[Tensor, " m"]]:
    """The neighbours' log density at all gallery places, an image at a time."""
    uniform = FLOOR / (4 * math.pi * earth.EARTH_RADIUS_KM**2)
    for cosine, latlon in zip(*near, strict=True):
        h = (1 - places.xyz @ earth.unit_sphere(latlon).T).clamp_min(0)
        weight = (cosine / how.temperature).softmax(0).nan_to_num()  # 0 if all are −inf
        yield (density(how.kernel_km)(h, False)[0] @ weight + uniform).log()


def fit_fused(
    logits: Sequence[Float[Tensor, "_ m"]],
    places: Places,
    alone: Calibration,
    near: tuple[Float[Tensor, "n k"], Float[Tensor, "n k 2"]],
    truth: Float[Tensor, "n 2"],
    features: str = "",
) -> Calibration:
    """The calibration of the product, with the neighbours' kernel and share that make `truth` most likely.

    The kernel is the one that suits the neighbours alone, or AREA_KM; the share is one of SHARES. alone: the
    calibration without neighbours, fitted to the same images. features: as in NeighbourFit.
    """
    fitted_on, least = alone.fitted_on or "", near[0][:, 0].quantile(FALSE_ALARMS).item()
    fits = []
    for kernels_km in (KERNELS_KM, (AREA_KM,)):
        own = fit_neighbours(*near, truth, fitted_on, kernels_km)
        how = NeighbourFit(features, alone.temperature, own.temperature, own.kernel_km, least)
        log_density = list(_log_density(places, near, how))
        for share in SHARES:
            how = dataclasses.replace(how, share=share)
            fitted = fit(_product(logits, log_density, how), truth, places, fitted_on, alone.prior)
            fits.append(dataclasses.replace(fitted, neighbours=how))
    return max(fits, key=lambda fitted: fitted.nats or -math.inf)
