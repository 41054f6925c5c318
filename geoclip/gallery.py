"""The gallery: the candidate places that an image is matched against (paper, section 3.4)."""

import hashlib
import math
import sys
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from geoclip import earth, paths, pretrained

BLOCK, KEPT_AT_ONCE = 4096, 1 << 18  # places embedded at once, and before they are written to disk
SCORES_AT_ONCE = {"cpu": 1 << 23}  # scores that fit in the CPU's cache; a GPU computes four times as many
GROUP = 64  # scores per group in `top`


class Gallery:
    """Places (m, 2) in (lat, lon) degrees, and the name of their source. given: in the precision of the source."""

    def __init__(self, latlon: Float[Tensor, "m 2"], source: str = "gallery"):
        self.given = earth.check_latlon(latlon, source)
        self.latlon = self.given.float()
        self.source = source
        if len(self.latlon) == 0:
            raise ValueError(f"{source}: the gallery is empty")

    def __len__(self) -> int:
        return len(self.latlon)

    @classmethod
    def official(cls) -> "Gallery":
        """The authors' released gallery: 100,000 places of MP-16 training photos, 94,123 of them distinct."""
        return cls(torch.as_tensor(pretrained.official_gallery()), "authors' 100 K gallery")

    def embed(self, location_encoder: nn.Module, keep: bool = False) -> Float[Tensor, "m d"]:
        """Unit-norm float32 embeddings of the places.

        keep: store them in the cache and memory-map them from there the next time, if the file is intact.
        """
        if not keep:
            return embed(location_encoder, self.latlon)
        path = self.kept_at(location_encoder)
        try:
            if not path.is_file() or not paths.is_sealed(path):
                if path.is_file():
                    _say(f"{path} is damaged or belongs to another gallery; computing it again")
                self._write(path, location_encoder)
            return torch.from_numpy(np.load(path, mmap_mode="c"))
        except OSError as error:
            _say(f"the gallery's embeddings cannot be cached ({error}); answering without")
            return embed(location_encoder, self.latlon)

    def kept_at(self, location_encoder: nn.Module) -> Path:
        """The cache file of the embeddings; its name is a hash of the encoder's weights and the places."""
        digest = hashlib.sha256(self.latlon.numpy().tobytes())
        for name, tensor in sorted(location_encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return paths.CACHE / "galleries" / f"{digest.hexdigest()[:24]}.npy"

    def _write(self, path: Path, location_encoder: nn.Module) -> None:
        """Write the embeddings as a .npy file, followed by the digest that paths.is_sealed compares."""
        with paths.atomic(path) as temporary:
            with temporary.open("wb") as file:
                for part in self.latlon.split(KEPT_AT_ONCE):
                    rows = embed(location_encoder, part).cpu().numpy()
                    if file.tell() == 0:
                        header = np.lib.format.header_data_from_array_1_0(rows)
                        header["shape"] = (len(self), rows.shape[1])
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(rows.data)
            paths.seal(temporary, path.name)


def _say(message: str) -> None:
    print(f"geoclip: {message}", file=sys.stderr)


@torch.inference_mode()
def embed(location_encoder: nn.Module, latlon: Float[Tensor, "m 2"]) -> Float[Tensor, "m d"]:
    """Unit-norm float32 embeddings of (lat, lon) degrees, computed in blocks on the encoder's device."""
    device = next(location_encoder.parameters()).device
    parts = (location_encoder(part.to(device)) for part in latlon.split(BLOCK))
    rows = torch.cat([functional.normalize(part, dim=-1).float() for part in parts])
    if not rows.sum().isfinite():
        raise ValueError("the location encoder's embeddings are not finite: its weights are damaged")
    return rows


def search(
    query: Float[Tensor, "n d"], places: Float[Tensor, "m d"], k: int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k most similar places of each query: (cosine, index), best first. Exact: every place is compared.

    query, places: unit-norm; places in float32, or in float16 on a GPU.
    """
    return scan(query, places, k)[:2]


def scan(
    query: Float[Tensor, "n d"], places: Float[Tensor, "m d"], k: int, scale: float | None = None
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"], Float[Tensor, " n"]]:
    """Like `search`, and also log Σ exp(scale × cosine) over all places, computed in blocks.

    The probability of a place is exp(scale × cosine − that logarithm).
    """
    check_k(k, len(places))
    rows = max(1 << 14, SCORES_AT_ONCE.get(places.device.type, 1 << 25) // max(1, len(query)))
    best: list[tuple[Tensor, Tensor]] = []
    total = torch.full((len(query),), -math.inf, device=query.device)
    for start in range(0, len(places), rows):
        scores = products(places[start : start + rows], query)
        if scale is not None:
            total = torch.logaddexp(total, (scores * scale).logsumexp(0))
        score, index = top(scores, min(k, len(scores)))
        best.append((score, index + start))
    score, index = (torch.cat(parts, 1) for parts in zip(*best, strict=True))
    score, order = score.topk(k, dim=-1)
    check_finite(score)
    return score, index.gather(1, order), total


def products(places: Float[Tensor, "m d"], query: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
    """places × queryᵀ in float32, in the memory layout that is fastest to compute and for `top` to read."""
    if places.is_cuda:
        if places.dtype == torch.float16:
            return torch.mm(query.half(), places.T, out_dtype=torch.float32).T
        return (query @ places.T).T
    if len(query) == 1:  # MKL multiplies by a single vector on one core only
        return (places @ query.repeat(2, 1).T)[:, :1]
    return places @ query.T


def top(scores: Float[Tensor, "m n"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k best rows of each column, found on a CPU in the k best groups, which is faster than topk."""
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
    """Raises ValueError unless 1 ≤ k ≤ n_places."""
    if not 1 <= k <= n_places:
        raise ValueError(f"top_k is {k}, but the gallery has {n_places} places")


def check_finite(score: Tensor) -> None:
    """Raises ValueError if a score is NaN or infinite, as damaged weights and inputs make it."""
    if not score.isfinite().all():
        raise ValueError("the scores are not finite: the model's weights or the image's values are damaged")
