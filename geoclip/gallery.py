"""The gallery: the places on Earth among which an image's place is looked for (paper, section 3.4)."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from geoclip import cpu_bf16, earth, paths, precision

KEPT_AT_ONCE = 1 << 18  # places embedded in memory before they are written
SCORES_AT_ONCE = {
    "cpu": 1 << 23
}  # they stay in its cache; a GPU, which pays for each launch, has four times as many
GROUP = 64
SPARE = 32  # candidates beyond k that bfloat16 scores choose for the comparison in float32
ENCODED = 128  # as many where they are encoded again: then 99 % of best places are those of float32 (LOG)
Exact = Callable[
    [Tensor], Tensor
]  # rows (n, w) of the gallery → their unit-norm embeddings (n, w, d) in float32


class Gallery:
    """Places (m, 2) in (lat, lon) degrees, and where they come from.

    Raises ValueError for an empty gallery or coordinates out of range, with the row.
    """

    def __init__(self, latlon: Float[Tensor, "m 2"], source: str = "gallery"):
        self.given = earth.check_latlon(latlon, source)
        self.latlon = self.given.float()
        self.source = source
        if len(self.latlon) == 0:
            raise ValueError(f"{source}: the gallery is empty")

    def __len__(self) -> int:
        return len(self.latlon)

    @property
    def unique(self) -> int:
        """Number of different places as given; duplicates split a place's probability between them.

        Single precision, in which places are embedded, tells places less than a metre apart apart no more.
        """
        return len(torch.unique(self.given, dim=0))

    @classmethod
    def official(cls) -> "Gallery":
        """The authors' released gallery: 100,000 MP-16 training places, 94,123 of them different."""
        from geoclip import pretrained

        return cls(torch.as_tensor(pretrained.official_gallery()), "authors' 100 K gallery")

    def embed(
        self,
        location_encoder: nn.Module,
        keep: bool = False,
        block: int = 4096,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "m d"]:
        """Unit-norm embeddings of the places, in blocks of bounded memory.

        keep: kept on disk by the hash of weights and places, and memory-mapped from there the next time.
        dtype: bfloat16 halves time and memory (see precision); the phase is single in both.
        """
        if not keep:
            return embed(location_encoder, self.latlon, block, dtype)
        path = self.kept_at(location_encoder, dtype)
        if not path.is_file():
            with paths.atomic(path) as temporary, temporary.open("wb") as file:
                for start in range(0, len(self), KEPT_AT_ONCE):
                    part = self.latlon[start : start + KEPT_AT_ONCE]
                    rows = as_numpy(embed(location_encoder, part, block, dtype).cpu())
                    if start == 0:
                        header = np.lib.format.header_data_from_array_1_0(rows)
                        np.lib.format.write_array_header_1_0(
                            file, header | {"shape": (len(self), rows.shape[1])}
                        )
                    file.write(rows.data)
        rows = torch.from_numpy(np.load(path, mmap_mode="c"))
        return rows if dtype == torch.float32 else rows.view(dtype)

    def kept_at(self, location_encoder: nn.Module, dtype: torch.dtype = torch.float32) -> Path:
        """The file of the kept embedding, found by the hash of the encoder's weights and the places."""
        digest = hashlib.sha256(self.latlon.numpy().tobytes())
        for name, tensor in sorted(location_encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        kind = "" if dtype == torch.float32 else "-bf16"
        return paths.CACHE / "galleries" / f"{digest.hexdigest()[:24]}{kind}.npy"


def as_numpy(rows: Float[Tensor, "m d"]) -> np.ndarray:
    """float32 as it is, bfloat16, which numpy does not know, as its 16 bits."""
    return rows.numpy() if rows.dtype == torch.float32 else rows.view(torch.int16).numpy()


@torch.inference_mode()
def embed(
    location_encoder: nn.Module,
    latlon: Float[Tensor, "m 2"],
    block: int = 4096,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "m d"]:
    """Unit-norm embeddings of (lat, lon) degrees, computed block by block on the encoder's device."""
    device = next(location_encoder.parameters()).device
    rows, encode = None, location_encoder
    if dtype == torch.bfloat16 and precision.packs(device):
        encode = cpu_bf16.Places(location_encoder)
    with precision.arithmetic(dtype, device):
        for start in range(0, len(latlon), block):
            part = functional.normalize(encode(latlon[start : start + block].to(device)).float(), dim=-1)
            if rows is None:
                rows = torch.empty(len(latlon), part.shape[1], dtype=dtype, device=device)
            rows[start : start + block] = part
    return rows


def search(
    query: Float[Tensor, "n d"], places: Float[Tensor, "m d"], k: int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k most similar places of each query: (cosine, index), best first; every place is compared.

    Both sides unit-norm. Exact for places in float32. In bfloat16 the candidates are found in bfloat16 and
    compared in float32. Raises ValueError for k larger than the gallery or below 1.
    """
    return scan(query, places, k)[:2]


def scan(
    query: Float[Tensor, "n d"],
    places: Float[Tensor, "m d"],
    k: int,
    scale: float | None = None,
    exact: Exact | None = None,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"], Float[Tensor, " n"]]:
    """As search, and with a scale the logarithm of the sum of exp(scale × cosine) over all places, in blocks.

    So exp(scale × cosine − it) is a place's probability, without keeping the scores of a large gallery. exact:
    gives the candidates of a bfloat16 gallery in float32.
    """
    check_k(k, len(places))
    rounds = places.dtype != torch.float32
    wanted = min(len(places), k + (SPARE if exact is None else ENCODED)) if rounds else k
    rows = max(1 << 14, SCORES_AT_ONCE.get(places.device.type, 1 << 25) // max(1, len(query)))
    best: list[tuple[Tensor, Tensor]] = []
    total = torch.full((len(query),), -math.inf, device=query.device)
    for start in range(0, len(places), rows):
        scores = products(places[start : start + rows], query.to(places.dtype))
        if scale is not None:
            total = torch.logaddexp(total, (scores.float() * scale).logsumexp(0))
        score, index = top(scores, min(wanted, len(scores)))
        best.append((score.float(), index + start))
    score, index = (torch.cat(parts, 1) for parts in zip(*best, strict=True))
    if rounds:  # the scores themselves were rounded to three digits
        score, order = score.topk(min(wanted, score.shape[1]), dim=-1)
        index, rounded = index.gather(1, order), score
        score = compare(query, index, places, exact)
        if scale is not None:  # the sum counts them as they are too: shares add up to 1
            low, high = (
                ((s.double() * scale) - total.double()[:, None]).exp().sum(1) for s in (rounded, score)
            )
            total = (total.double() + ((1 - low).clamp(min=0) + high).log()).float()
    score, order = score.topk(k, dim=-1)
    return score, index.gather(1, order), total


def compare(
    query: Float[Tensor, "n d"], index: Int[Tensor, "n w"], places: Float[Tensor, "m d"], exact: Exact | None
) -> Float[Tensor, "n w"]:
    """Cosines in float32 of each query with its own places."""
    rows = places[index].float() if exact is None else exact(index)
    return (rows @ query[:, :, None].float())[..., 0]


def products(places: Float[Tensor, "m d"], query: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
    """places queryᵀ, laid out as each device does it, and `top` reads it, fastest."""
    if places.is_cuda:
        return (query @ places.T).T
    if len(query) == 1 and places.dtype == torch.float32:  # MKL leaves a single vector to a single core
        return (places @ query.repeat(2, 1).T)[:, :1]
    return places @ query.T


def top(scores: Float[Tensor, "m n"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k best rows of each column; on a CPU several times faster than topk: they lie in the k best groups."""
    m, n = scores.shape
    groups = m // GROUP
    if scores.is_cuda or groups < 8 * k:
        return scores.T.topk(k, dim=-1)
    whole = groups * GROUP
    chosen = scores[:whole].view(groups, GROUP, n).amax(1).T.topk(k, dim=-1).indices
    index = (chosen[..., None] * GROUP + torch.arange(GROUP)).flatten(1)
    index = torch.cat([index, torch.arange(whole, m).expand(n, -1)], 1)
    score, order = scores.T.gather(1, index).topk(k, dim=-1)
    return score, index.gather(1, order)


def check_k(k: int, n_places: int) -> None:
    """ValueError unless 1 ≤ k ≤ n_places."""
    if not 1 <= k <= n_places:
        raise ValueError(f"top_k is {k}, but the gallery has {n_places} places: give 1 to {n_places}")


def load(path: Path | str) -> Gallery:
    """A gallery from a CSV with the columns LAT and LON (the released format)."""
    import pandas as pd

    table = pd.read_csv(path)
    if not {"LAT", "LON"} <= set(table):
        raise ValueError(f"{path}: a gallery needs the columns LAT and LON, found {', '.join(table)}")
    return Gallery(torch.from_numpy(table[["LAT", "LON"]].to_numpy(float)), str(path))
