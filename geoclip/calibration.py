"""Calibration: the temperature and the kernel with which a posterior's probabilities can be believed.

They are fitted by maximum likelihood on images with known places that the model was not trained on.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geoclip import earth, evaluation, paths
from geoclip.kernels import density, log_kernel, softmax
from geoclip.posterior import Places, Posterior

FALSE_ALARMS = 0.05  # share of familiar images that may be called unlike all training images
APART_KM = 25.0  # least distance between the places of one answer

# The grid of the fit, in steps of √2.
TEMPERATURES = tuple(2.0 ** (step / 2) for step in range(-6, 7))
KERNELS_KM = tuple(2.0 ** (step / 2) for step in range(2, 19))
BACKGROUNDS = tuple(2.0 ** (step / 2) for step in range(-20, 0))


@dataclass(frozen=True)
class NeighbourFit:
    """How training images enter the logits, and when an image is unlike all of them.

    Args:
        features: Name and hash of the features of the training images.
        gallery_temperature: Divides the logits of the gallery before the neighbours are added.
        temperature, kernel_km: Of the neighbours' own density, as in Calibration.
        least: 100 × the cosine with the nearest training image, below which an image is unlike all of them.
        false_alarms: Share of the images that it was fitted on that are below `least`.
        share: Factor of the neighbours' log density.
    """

    features: str
    gallery_temperature: float
    temperature: float
    kernel_km: float
    least: float
    false_alarms: float = FALSE_ALARMS
    share: float = 1.0


@dataclass(frozen=True)
class Calibration:
    """How scores become a posterior, and what that was fitted on. The defaults are those of training.

    Args:
        temperature: Divides the logits, in addition to the trained temperature.
        kernel_km: Standard deviation of each place's kernel, in each direction.
        background: Share of the gallery's own density, for images that tell the model nothing.
        fitted_on: Name of the images it was fitted on; None: not calibrated.
        images: Number of those images.
        nats: Mean log density of their true places, in nats per km².
        within: What the posterior says of being within 25 km of its mode, in increasing order, and
        found: how often that was so, see `with_hit_rate`.
        prior: As in Places.posterior.
        neighbours: With training images as a second gallery, what `fused` adds to the logits.
    """

    temperature: float = 1.0
    kernel_km: float = 25.0
    background: float = 0.0
    fitted_on: str | None = None
    images: int = 0
    nats: float | None = None
    within: tuple[float, ...] = ()
    found: tuple[float, ...] = ()
    prior: str = "gallery"
    neighbours: NeighbourFit | None = None

    def __post_init__(self):
        positive = 0 < self.temperature < math.inf and 0 < self.kernel_km < math.inf
        if not positive or not 0 <= self.background < 1 or len(self.within) != len(self.found):
            raise ValueError("temperature and kernel_km must be positive, and background in [0, 1)")

    @property
    def status(self) -> str:
        """What may be said of its probabilities."""
        return f"calibrated on {self.fitted_on}" if self.fitted_on else "not calibrated"

    def hit_rate(self, mass: Tensor) -> Tensor:
        """How often best answers with this probability of being within 25 km were so; the probability if not fitted."""
        if not self.within:
            return mass
        return torch.from_numpy(np.interp(mass.numpy(), self.within, self.found))

    def posterior(self, places: Places, logits: Float[Tensor, "n m"]) -> Posterior:
        """The posteriors of n images from the logits of all places."""
        return places.posterior(logits, self.kernel_km, self.temperature, self.background, self.prior)

    def save(self, checkpoint: Path | str) -> Path:
        """Write it beside a checkpoint, see `beside`."""
        path = beside(checkpoint, self.neighbours is not None)
        with paths.atomic(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, checkpoint: Path | str, neighbours: bool = False) -> "Calibration":
        """Read the calibration of a checkpoint; the default if there is none. Raises ValueError for another file."""
        path = beside(checkpoint, neighbours)
        if not path.is_file():
            return cls()
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            values |= {name: tuple(values.get(name, ())) for name in ("within", "found")}
            if values.get("neighbours"):
                values["neighbours"] = NeighbourFit(**values["neighbours"])
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a calibration ({error}); delete it, or run `calibrate` again"
            ) from error


def beside(checkpoint: Path | str, neighbours: bool = False) -> Path:
    """The file of a checkpoint's calibration: NAME.calibration.json, or NAME.neighbours.json with neighbours."""
    return Path(checkpoint).with_suffix(".neighbours.json" if neighbours else ".calibration.json")


@torch.inference_mode()
def fit(
    logits: Iterable[Float[Tensor, "_ m"]],
    truth: Float[Tensor, "n 2"],
    places: Places,
    fitted_on: str,
    prior: str = "gallery",
) -> Calibration:
    """The calibration under which `truth` is most likely, on a grid in steps of √2. prior: as in Places.posterior.

    logits: of all gallery places, in batches of images in the order of `truth`. Gallery places that are true
    places of these images, to 1 m, are left out, because a gallery does not hold the places of new images.
    """
    known = evaluation.leaked(places.latlon, truth)
    share, counts = places.share(prior, ~known), places.counts(prior).log().float()
    vectors = iter(earth.unit_sphere(truth.double()))
    likelihood, background = [], []
    for batch in logits:
        for scores, vector in zip(batch.masked_fill(known, -math.inf), vectors, strict=False):
            h = (1 - places.xyz @ vector).clamp_min(0).float()
            likelihood.append(_densities(scores, h, counts))
            around = log_kernel(1 - places.centre @ vector, places.wide_km(KERNELS_KM[0])).exp()
            background.append((around * share).sum())
    fitted = _most_likely(torch.stack(likelihood), torch.stack(background), fitted_on)
    return dataclasses.replace(fitted, prior=prior)


@torch.inference_mode()
def fit_neighbours(
    logits: Float[Tensor, "n k"],
    latlon: Float[Tensor, "n k 2"],
    truth: Float[Tensor, "n 2"],
    fitted_on: str,
    kernels_km: Sequence[float] = KERNELS_KM,
) -> Calibration:
    """As `fit`, for scores of k places of each image's own. The background is uniform on the Earth."""
    h = 1 - (earth.unit_sphere(latlon.double()) @ earth.unit_sphere(truth.double())[..., None])[..., 0]
    rows = zip(logits, h.clamp_min(0).float(), strict=True)
    likelihood = [_densities(*row, kernels_km=kernels_km) for row in rows]
    uniform = torch.full((len(truth),), 1 / (4 * math.pi * earth.EARTH_RADIUS_KM**2), dtype=torch.double)
    return _most_likely(torch.stack(likelihood), uniform, fitted_on, kernels_km)


def _densities(
    logits: Float[Tensor, " m"],
    h: Float[Tensor, " m"],
    log_count: Tensor | float = 0.0,
    kernels_km: Sequence[float] = KERNELS_KM,
) -> Float[Tensor, "t k"]:
    """Density per km² at a place where 1 − cos of the places' distances is h, by temperature and kernel."""
    weight = softmax(logits / torch.tensor(TEMPERATURES)[:, None] + log_count)
    return (weight @ torch.stack([density(km)(h, False)[0] for km in kernels_km]).T).double()


def _most_likely(
    likelihood: Float[Tensor, "n t k"],
    background: Float[Tensor, " n"],
    fitted_on: str,
    kernels_km: Sequence[float] = KERNELS_KM,
) -> Calibration:
    share = torch.tensor(BACKGROUNDS, dtype=torch.double)
    background = background.clamp_min(1e-30)[:, None, None, None]
    nats = ((1 - share) * likelihood[..., None] + share * background).log().mean(0)
    t, k, b = torch.unravel_index(nats.argmax(), nats.shape)
    best = TEMPERATURES[t], kernels_km[k], BACKGROUNDS[b]
    return Calibration(*best, fitted_on, len(likelihood), nats.max().item())


def with_hit_rate(fitted: Calibration, mass: Float[Tensor, " n"], hit: Bool[Tensor, " n"]) -> Calibration:
    """The calibration with the hit rate fitted to the probabilities m of n answers.

    The log odds of a hit are c − b log(1 − m), beta calibration (Kull, Silva Filho and Flach 2017) without its term in
    log m. Each answer counts a little as the opposite too, as in Platt scaling, so that one kind alone can be fitted.
    """
    from sklearn.linear_model import LogisticRegression

    def term(m):
        return -np.log1p(-np.clip(m, 0, 1 - 1e-6))[:, None]

    within, x, hits = -np.expm1(-np.geomspace(1e-4, 14, 120)), term(mass.double().numpy()), int(hit.sum())
    share = np.where(hit, (hits + 1) / (hits + 2), 1 / (len(hit) - hits + 2))
    model = LogisticRegression(C=1e3, max_iter=1000)
    model.fit(np.tile(x, (2, 1)), np.repeat([1, 0], len(x)), np.concatenate([share, 1 - share]))
    found = model.predict_proba(term(within))[:, 1]
    return dataclasses.replace(fitted, within=tuple(within.tolist()), found=tuple(found.tolist()))


@torch.inference_mode()
def with_hits(
    fitted: Calibration, logits: Iterable[Float[Tensor, "_ m"]], truth: Float[Tensor, "n 2"], places: Places
) -> Calibration:
    """`with_hit_rate`, of the modes of the posteriors of n images with known places. logits: as in `fit`."""
    found = []
    for batch in logits:
        posterior = fitted.posterior(places, batch)
        mode = posterior.answer("mode")
        found.append((mode, posterior.mass_within(mode, APART_KM)))
    mode, mass = (torch.cat(parts) for parts in zip(*found, strict=True))
    return with_hit_rate(fitted, mass, earth.haversine_km(mode, truth) <= APART_KM)


def calibration_error(mass: Float[Tensor, " n"], hit: Bool[Tensor, " n"], bins: int = 15) -> float:
    """Expected calibration error: mean `|predicted − observed|` over bins of equal size, in [0, 1].

    mass: predicted probability of a hit; hit: whether it was one.
    """
    order = mass.argsort()
    parts = zip(mass[order].double().chunk(bins), hit[order].double().chunk(bins), strict=True)
    return sum(len(p) * abs((p.mean() - h.mean()).item()) for p, h in parts) / len(mass)


def conformal_level(level: float, at_truth: Float[Tensor, " n"]) -> float:
    """The level whose regions cover `level` of exchangeable images (split conformal prediction).

    at_truth: Posterior.level at the true places of calibration images. It is their (n + 1) level / n quantile,
    or 1 if there are too few images.
    """
    rank = math.ceil((len(at_truth) + 1) * level)
    return 1.0 if rank > len(at_truth) else at_truth.sort().values[rank - 1].item()
