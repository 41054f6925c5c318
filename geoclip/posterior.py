"""The posterior: where on the sphere an image was taken, as a density, and the best answers that it gives.

Each gallery place carries a von Mises–Fisher kernel, the Gaussian of the sphere, with the softmax of the
scores as its weight. An answer is a Bayes decision: the place p with the largest expected utility,

    argmax_p ∫ u(d(p, q)) posterior(q) dq = argmax_p Σ_i w_i U(d(p, x_i)),

where U is u smoothed by the kernel, a function of one distance. It need not be a place of the gallery.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize, pad

from geoclip import earth
from geoclip.earth import EARTH_RADIUS_KM
from geoclip.kernels import Profile, density, log_kernel, softmax, table

PAIRS = 1 << 17  # pairs of a place and a kernel that are computed at once; they fit in a CPU's cache
HEAVIEST, STARTS, ASCENTS, STEPS = 512, 128, 4, 12  # of a search, see Posterior.answers
ROWS = 16  # images whose weights of all places are held at once
GROUP = 8  # places that are compared as one at first, see _largest
CROWD_KM = 25.0  # a prior that is divided out counts the places within this distance
DRAWS = 256  # places drawn from each posterior, for regions and entropy


class Layer(NamedTuple):
    """Kernels of one width: unit vectors, weights, and the standard deviation in km in each direction."""

    xyz: Float[Tensor, "n k 3"]  # or (1, k, 3), shared by all
    weight: Float[Tensor, "n k"]
    kernel_km: float


class Posterior:
    """n mixtures of kernels on the sphere: layers of one kernel width each, whose weights add up to 1.

    Places are (lat, lon) degrees. Methods take one place (n, 2) or q places (n, q, 2) for each image.
    """

    def __init__(self, layers: list[Layer]):
        self.layers = layers

    @classmethod
    def at(
        cls, latlon: Float[Tensor, "... k 2"], log_weight: Float[Tensor, "n k"], kernel_km: float
    ) -> "Posterior":
        """Kernels of `kernel_km` at `latlon`, (k, 2) for all or (n, k, 2), weighted by exp(log_weight).

        A weight may be 0 (−inf). Raises ValueError for NaN, rows without a positive weight, coordinates out
        of range, and a kernel_km that is not positive.
        """
        xyz = earth.unit_sphere(earth.check_latlon(latlon, "places of the posterior").double())
        if xyz.shape[-2] == 0 or xyz.shape[-2] != log_weight.shape[-1]:
            raise ValueError(f"{log_weight.shape[-1]} weights for {xyz.shape[-2]} places")
        _check_positive(kernel_km=kernel_km)
        _check_scores(log_weight)
        weight = log_weight.softmax(-1, torch.double)
        return cls([Layer(xyz if xyz.ndim == 3 else xyz[None], weight, float(kernel_km))])

    def __len__(self) -> int:
        return max(len(layer.weight) for layer in self.layers)

    def __getitem__(self, rows) -> "Posterior":
        """The posteriors of some images; rows: a slice, a mask or indices."""
        return Posterior([Layer(x if len(x) == 1 else x[rows], w[rows], km) for x, w, km in self.layers])

    def log_density(self, latlon: Float[Tensor, "n ... 2"]) -> Float[Tensor, "n ..."]:
        """Logarithm of the density in nats per km²; uniform on the Earth it is −20.05."""

        def log_sum(vector, layers):
            terms = [w.log()[:, None] + log_kernel(1 - vector @ x.mT, km) for x, w, km in layers]
            return torch.cat(terms, -1).logsumexp(-1)

        return self._at(latlon, log_sum)

    def mass_within(self, latlon: Float[Tensor, "n ... 2"], km: float) -> Float[Tensor, "n ..."]:
        """Probability, in [0, 1], that the image was taken within `km` of a place."""
        return self._expected(latlon, "disc", km)

    def expected_km(self, latlon: Float[Tensor, "n ... 2"]) -> Float[Tensor, "n ..."]:
        """Expected great-circle distance from a place, in km."""
        return -self._expected(latlon, "distance")

    def expected_geoscore(self, latlon: Float[Tensor, "n ... 2"]) -> Float[Tensor, "n ..."]:
        """Expected geoscore of answering with a place, in [0, 5000]."""
        return self._expected(latlon, "geoscore")

    def answer(self, decision: str) -> Float[Tensor, "n 2"]:
        """The best place by a decision rule.

        "mode": the highest density. "disc:KM": the most probability within KM, best for accuracy@KM. "median":
        the least expected distance, best for the mean error. "geoscore": the largest expected geoscore.
        """
        return self.answers(decision, 1)[:, 0]

    def answers(self, decision: str, k: int, apart_km: float = 25.0) -> Float[Tensor, "n k 2"]:
        """The k best places by a decision rule that are `apart_km` from each other; NaN where there are fewer.

        Each is a local maximum, so that the second is another possibility and not a neighbour of the first.
        Raises ValueError for an unknown rule.
        """
        profiles = self._profiles(decision)

        def ascend(steps):
            return lambda place, layers: _ascend(place, layers, profiles, steps)

        # The places of the heaviest kernels are compared; the best of them ascend, among the heaviest kernels
        # at first, then the k best among all.
        h_apart = 1 - math.cos(min(apart_km / EARTH_RADIUS_KM, math.pi))
        heavy = Posterior([heaviest(layer, HEAVIEST) for layer in self.layers])
        starts = torch.cat([heaviest(layer, STARTS).xyz for layer in heavy.layers], 1)
        value = heavy._each(starts, lambda place, layers: _utility(place, layers, profiles)[:1])[0]
        place, value = _distinct(starts, value, ASCENTS + 2 * (k - 1), h_apart)
        place, value = heavy._each(place, ascend(STEPS))
        place, value = _distinct(place, value, k, h_apart)
        none = value.isneginf()
        place, value = self._each(place, ascend(STEPS // 2))
        place, value = _distinct(place, value.masked_fill(none, -math.inf), k, h_apart)
        place = earth.from_unit_sphere(place).masked_fill(value.isneginf()[..., None], math.nan)
        return pad(place, (0, 0, 0, k - place.shape[1]), value=math.nan)

    def _profiles(self, decision: str) -> list[Profile]:
        rule, _, km = decision.partition(":")
        if decision == "mode":
            return [density(layer.kernel_km) for layer in self.layers]
        if decision in ("median", "geoscore"):
            return self._tables("distance" if decision == "median" else decision)
        if rule == "disc" and km.replace(".", "", 1).isdecimal() and float(km) > 0:
            return self._tables("disc", float(km))
        raise ValueError(
            f"the decision {decision!r} is not mode, disc:KM (such as disc:25), median or geoscore"
        )

    @functools.cached_property
    def drawn(self) -> tuple[Float[Tensor, "n 256 2"], Float[Tensor, "n 256"]]:
        """Places drawn from each posterior, always the same, and the log density at each in nats per km²."""
        steps = torch.arange(DRAWS, dtype=torch.double) + 0.5
        u, turn = (steps / 1.324717957244746**power % 1 for power in (1, 2))  # evenly spread pairs
        cumulative = torch.cat([layer.weight for layer in self.layers], 1).cumsum(1)
        chosen = torch.searchsorted(cumulative, steps / DRAWS * cumulative[:, -1:])
        chosen = chosen.clamp_max(cumulative.shape[1] - 1)
        widths = [torch.full((x.shape[1],), km, dtype=torch.double) for x, _, km in self.layers]
        kappa = (EARTH_RADIUS_KM / torch.cat(widths)[chosen]) ** 2
        h = -torch.log(u + (1 - u) * torch.exp(-2 * kappa)) / kappa
        distance = 2 * EARTH_RADIUS_KM * (h / 2).clamp(0, 1).sqrt().asin()
        xyz = torch.cat([layer.xyz.expand(len(self), -1, -1) for layer in self.layers], 1)
        angle = 2 * math.pi * turn
        centre = earth.from_unit_sphere(_take(xyz, chosen))
        places = earth.destination(centre, distance * angle.sin(), distance * angle.cos())
        profiles = [density(layer.kernel_km) for layer in self.layers]
        return places, self._at(places, lambda vector, layers: _utility(vector, layers, profiles)[0]).log()

    @property
    def entropy(self) -> Float[Tensor, " n"]:
        """Entropy in nats, relative to 1 km²; uniform on the Earth it is 20.05. An estimate from draws."""
        return -self.drawn[1].mean(1)

    def level(self, latlon: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
        """Probability of the smallest region that holds a place, in [0, 1]; an estimate from draws."""
        return (self.drawn[1] > self.log_density(latlon)[:, None]).double().mean(1)

    def region(self, level: float) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """The smallest region of probability `level` in (0, 1): (its least log density, its area in km²).

        A place belongs to it if its log_density is at least that. Estimates from draws.
        """
        if not 0 < level < 1:
            raise ValueError(f"the level of a region must be in (0, 1), got {level}")
        log_density = self.drawn[1]
        least = log_density.quantile(1 - level, dim=1)
        # the area is ∫ 1 = E[1 / density] over the region
        return least, torch.where(log_density >= least[:, None], (-log_density).exp(), 0).mean(1)

    def mass_by(self, label: Callable[[np.ndarray], np.ndarray]) -> list[dict[str, float]]:
        """Probability of areas, such as countries, by name, for each image, the largest first; from draws.

        label: places (m, 2) → the name of the area of each (m,), or None.
        """
        found = label(self.drawn[0].flatten(0, 1).numpy()).reshape(len(self), -1)
        counted = (Counter(row.tolist()).most_common() for row in found)
        return [{name: n / DRAWS for name, n in row if name is not None} for row in counted]

    def _tables(self, utility: str, km: float = 0.0) -> list[Profile]:
        return [table(utility, km, layer.kernel_km) for layer in self.layers]

    def _expected(self, latlon: Tensor, utility: str, km: float = 0.0) -> Tensor:
        profiles = self._tables(utility, km)
        return self._at(latlon, lambda vector, layers: _utility(vector, layers, profiles)[0])

    def _at(self, latlon: Tensor, compute) -> Tensor:
        """compute(unit vectors (b, q, 3), layers) of one or q places for each image, in chunks."""
        if len(latlon) != len(self):
            raise ValueError(f"{len(latlon)} places for {len(self)} posteriors")
        vector = earth.unit_sphere(latlon.double()).view(len(latlon), -1, 3)
        return self._each(vector, lambda *part: [compute(*part)])[0].view(latlon.shape[:-1])

    def _each(self, vector: Float[Tensor, "n q 3"], compute) -> list[Tensor]:
        """The tensors of compute(unit vectors (b, q, 3), layers), of b images at a time: at most PAIRS pairs."""
        step = max(1, PAIRS // (vector.shape[1] * sum(layer.weight.shape[1] for layer in self.layers)))
        slices = [slice(start, start + step) for start in range(0, len(self), step)]
        parts = [compute(vector[rows], self[rows].layers) for rows in slices]
        return [torch.cat(part) for part in zip(*parts, strict=True)]


class Places:
    """Gallery places, prepared for posteriors.

    A posterior keeps the `keep` heaviest places. What the others weigh is pooled in cells of `pooled_km`,
    each with a wider kernel at the mean of its places, so that no mass is lost.
    """

    def __init__(self, latlon: Float[Tensor, "m 2"], keep: int = 2048, pooled_km: float = 200.0):
        self.latlon = earth.check_latlon(latlon, "gallery").double()
        self.xyz = earth.unit_sphere(self.latlon)
        self.keep, self.pooled_km = keep, pooled_km
        height = math.degrees(pooled_km / EARTH_RADIUS_KM)
        row = ((self.latlon[:, 0] + 90) / height).floor()
        width = height / torch.deg2rad((row + 0.5) * height - 90).cos().clamp_min(height / 360)
        column = ((self.latlon[:, 1] + 180) / width).floor()
        self.cell: Int[Tensor, " m"] = torch.unique(row * 1e6 + column, return_inverse=True)[1]
        total = torch.zeros(int(self.cell.max()) + 1, 3, dtype=torch.double)
        self.centre = normalize(total.index_add_(0, self.cell, self.xyz), dim=-1)

    @functools.cached_property
    def crowd(self) -> Float[Tensor, " m"]:
        """Number of places within CROWD_KM of each, itself among them."""
        from scipy.spatial import KDTree

        tree, chord = KDTree(self.xyz), 2 * math.sin(CROWD_KM / EARTH_RADIUS_KM / 2)
        return torch.from_numpy(tree.query_ball_point(self.xyz, chord, return_length=True)).double()

    def counts(self, prior: str) -> Float[Tensor, " m"]:
        """What each place counts before an image is seen, see `posterior`. Raises ValueError for another prior."""
        if prior not in ("gallery", "divided"):
            raise ValueError(f"the prior {prior!r} is not gallery or divided")
        return 1 / self.crowd if prior == "divided" else torch.ones(len(self.xyz), dtype=torch.double)

    def share(self, prior: str = "gallery", keep: Tensor | None = None) -> Float[Tensor, " c"]:
        """Share of each cell before an image is seen; keep: a mask of the places that count."""
        counts = self.counts(prior) if keep is None else self.counts(prior) * keep
        share = torch.zeros(len(self.centre), dtype=torch.double).index_add_(0, self.cell, counts)
        return share / share.sum()

    def posterior(
        self,
        logits: Float[Tensor, "n m"],
        kernel_km: float,
        temperature: float = 1.0,
        background: float = 0.0,
        prior: str = "gallery",
    ) -> Posterior:
        """The posteriors of n images from the logits, cosine × e^s, of all places.

        temperature: divides the logits. kernel_km: standard deviation of each place's kernel, in each
        direction. background: share of the gallery's own density, pooled in cells. prior: "gallery" expects
        images where the gallery has many places; "divided" divides by their number within 25 km, so that
        images are expected evenly over the land that the gallery covers. Raises ValueError as Posterior.at does.
        """
        if logits.shape[1] != len(self.xyz):
            raise ValueError(f"{logits.shape[1]} scores for {len(self.xyz)} places")
        _check_positive(temperature=temperature, kernel_km=kernel_km)
        expected = self.counts(prior).log().float()  # 0 for the gallery's
        parts = [self._weights(expected.add(part, alpha=1 / temperature)) for part in logits.split(ROWS)]
        kept, index, pooled = (torch.cat(part) for part in zip(*parts, strict=True))
        total = kept.double().sum(1, keepdim=True) + pooled.sum(1, keepdim=True)
        pooled = (1 - background) * pooled / total + background * self.share(prior)
        near = Layer(self.xyz[index], (1 - background) * kept / total, kernel_km)
        return Posterior([near, Layer(self.centre[None], pooled, self.wide_km(kernel_km))])

    def _weights(self, logits: Float[Tensor, "n m"]) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of the heaviest places, their indices, and the weights of the cells of the others."""
        _check_scores(logits)
        weight = softmax(logits)
        kept, index = _largest(weight, min(self.keep, len(self.xyz)))
        pooled = torch.zeros(len(weight), len(self.centre)).index_add_(1, self.cell, weight)
        return kept, index, pooled.scatter_add_(1, self.cell[index], -kept).clamp_min(0).double()

    def wide_km(self, kernel_km: float) -> float:
        """Standard deviation of the kernel of a cell of pooled places."""
        return math.hypot(kernel_km, self.pooled_km / math.sqrt(12))


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_scores(logits: Tensor) -> None:
    if not logits.amax(-1).isfinite().all():  # the largest is NaN if one is
        raise ValueError(
            "the scores are NaN or infinite: the model's weights or the image's values are damaged"
        )


def _largest(weight: Float[Tensor, "n m"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """weight.topk(k) in less time: the k largest are in the k groups of GROUP places with the largest maxima."""
    groups = pad(weight, (0, -weight.shape[1] % GROUP), value=-1).unflatten(1, (GROUP, -1))
    if groups.shape[2] <= k:
        return weight.topk(k, dim=1)
    near = groups.amax(1).topk(k, dim=1, sorted=False).indices
    index = (near[:, None] + groups.shape[2] * torch.arange(GROUP)[:, None]).flatten(1)
    kept, at = groups.flatten(1).gather(1, index).topk(k, dim=1)
    return kept, index.gather(1, at)


def _utility(
    vector: Tensor, layers: list[Layer], profiles: list[Profile], weighted: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Expected utility (b, q) at unit vectors (b, q, 3), and its gradient in space (b, q, 3).

    weighted: weight × xyz of each layer, which the gradient needs; it is 0 without.
    """
    value, pull, one = torch.zeros(()), torch.zeros(()), vector.new_ones(())
    for i, ((xyz, weight, _), profile) in enumerate(zip(layers, profiles, strict=True)):
        h = torch.baddbmm(one, vector, xyz.mT.expand(len(vector), -1, -1), alpha=-1)
        worth, fall = profile(h, weighted is not None)
        value = value + (worth.double() @ weight[..., None])[..., 0]
        if weighted is not None and fall is not None:
            pull = pull + fall.double() @ weighted[i]
    return value, pull


def _ascend(place: Tensor, layers: list[Layer], profiles: list[Profile], steps: int) -> tuple[Tensor, Tensor]:
    """Mean shift from (b, q, 3), in longer steps while they improve and shorter ones after one did not."""
    weighted = [weight[..., None] * xyz for xyz, weight, _ in layers]
    value, pull = _utility(place, layers, profiles, weighted)
    step = torch.ones_like(value)
    for _ in range(steps):
        aim = normalize(pull, dim=-1) - place
        there = normalize(place + step[..., None] * aim, dim=-1)
        reached, pulls = _utility(there, layers, profiles, weighted)
        better = reached > value
        value, step = torch.where(better, reached, value), torch.where(better, step * 1.5, step / 2)
        place, pull = (torch.where(better[..., None], *pair) for pair in ((there, place), (pulls, pull)))
    return place, value


def _distinct(place: Tensor, value: Tensor, k: int, h_apart: float) -> tuple[Tensor, Tensor]:
    """The k best of the places (b, q, 3) that are at least h_apart = 1 − cos d apart; the value −inf means none."""
    chosen, values = [], []
    for _ in range(min(k, place.shape[1])):
        best, index = value.max(1, keepdim=True)
        chosen.append(_take(place, index))
        values.append(best)
        near = 1 - (place * chosen[-1]).sum(-1) < h_apart
        value = value.masked_fill(near.scatter(1, index, True), -math.inf)
    return torch.cat(chosen, 1), torch.cat(values, 1)


def heaviest(layer: Layer, count: int) -> Layer:
    """The `count` heaviest kernels of each image."""
    xyz, weight, km = layer
    weight, index = weight.topk(min(count, weight.shape[1]), dim=1)
    return Layer(_take(xyz.expand(len(weight), -1, -1), index), weight, km)


def _take(xyz: Tensor, index: Tensor) -> Tensor:
    return xyz.gather(1, index[..., None].expand(-1, -1, 3))
