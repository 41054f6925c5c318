"""Approximate search with faiss for galleries of millions of places.

An exact search (gallery.scan) reads every place; above a few million, an index reads a small part of them.
"""

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from geoclip import gallery, paths

WORTH_IT = 2_000_000  # places
TRAINED_ON = 32  # places per inverted list on which k-means is trained
ADDED_AT_ONCE = 1 << 17
CANDIDATES = 64  # beyond k: found with 8-bit codes, then compared in float32


class PlaceIndex:
    """An inverted-file index of 8-bit codes; the candidates that it finds are compared in full precision.

    places: unit-norm embeddings. path: where the index is stored, to be memory-mapped the next time. probes:
    lists searched per query; recall grows with it. measured: recall of the five best places, for synthetic queries.
    """

    def __init__(self, places: Float[Tensor, "m d"], path: Path, probes: int = 32):
        faiss = import_faiss()
        self.places = places
        self.index: Any = _open(path, places) if path.is_file() else None
        if self.index is None:
            self.index = build(places)
            with paths.atomic(path) as temporary:
                faiss.write_index(self.index, str(temporary))
                paths.seal(temporary, path.name)
        self.index.nprobe = min(probes, self.index.nlist)
        self.measured = self._measured(path.with_suffix(f".recall-{self.index.nprobe}.json"))

    @classmethod
    def of(cls, places: gallery.Gallery, location_encoder: nn.Module) -> "PlaceIndex":
        """The index of a gallery, stored in the cache beside its embeddings."""
        path = places.kept_at(location_encoder).with_suffix(".faiss")
        return cls(places.embed(location_encoder, keep=True), path)

    def _measured(self, kept: Path) -> float:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return float(json.loads(kept.read_text()))
        measured = self.recall(synthetic_queries(self.places))
        with paths.atomic(kept) as temporary:
            temporary.write_text(json.dumps(measured))
        return measured

    def scan(
        self, query: Float[Tensor, "n d"], k: int, scale: float | None = None
    ) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"], Float[Tensor, " n"]]:
        """Like gallery.scan, but over the places that the index finds.

        The sum counts these places alone, so it is a lower bound, and a probability computed from it an upper
        bound. A query whose lists hold fewer than k places is compared with all places. Runs on the CPU.
        """
        gallery.check_k(k, len(self.places))
        query = query.float().cpu()
        _, index = self.index.search(query.numpy(), min(len(self.places), k + CANDIDATES))
        index = torch.from_numpy(index)
        found = index >= 0  # faiss returns -1 if the lists hold fewer places
        score = (self.places[index.clamp(min=0)] @ query[:, :, None])[..., 0]
        gallery.check_finite(score)
        score = score.masked_fill(~found, -math.inf)
        total = torch.logsumexp(score * (1.0 if scale is None else scale), 1)
        score, order = score.topk(k, dim=-1)
        index = index.gather(1, order)
        if (few := found.sum(1) < k).any():
            score[few], index[few], total[few] = gallery.scan(query[few], self.places, k, scale)
        return score, index, total

    def recall(self, query: Float[Tensor, "n d"]) -> float:
        """Fraction of five places found that are as similar as the five best of an exact search."""
        query, k = query.float().cpu(), min(5, len(self.places))
        exact, found = gallery.search(query, self.places, k)[0], self.scan(query, k)[0]
        return (found >= exact[:, -1:] - 1e-6).double().mean().item()


def _open(path: Path, places: Float[Tensor, "m d"]):
    """The stored index, memory-mapped; None, reported on stderr, if it is damaged or indexes other places."""
    if paths.is_sealed(path):
        faiss = import_faiss()
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        if (index.ntotal, index.d) == tuple(places.shape):
            return index
    print(f"geoclip: {path} is damaged or indexes other places; building it again", file=sys.stderr)
    return None


def synthetic_queries(places: Float[Tensor, "m d"], n: int = 256) -> Float[Tensor, "n d"]:
    """Unit-norm queries at a cosine of about 0.55 to random places, as photos are to theirs."""
    generator = torch.Generator().manual_seed(0)
    noise = functional.normalize(torch.randn(n, places.shape[1], generator=generator), dim=1)
    chosen = places[torch.randint(len(places), (n,), generator=generator)].float()
    return functional.normalize(chosen + 1.5 * noise, dim=1)


def build(places: Float[Tensor, "m d"]):
    """A trained faiss index of the places, with 2 √m lists; needs half a kilobyte of memory per place."""
    faiss = import_faiss()
    m, d = places.shape
    coarse, lists = faiss.IndexFlatIP(d), min(m, round(2 * math.sqrt(m)))
    codes = (faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    index = faiss.IndexIVFScalarQuantizer(coarse, d, lists, *codes)
    chosen = torch.randperm(m, generator=torch.Generator().manual_seed(0))[: TRAINED_ON * index.nlist]
    index.cp.min_points_per_centroid = 1  # faiss warns about small galleries, which tests use
    index.train(places[chosen.sort().values].numpy())
    for part in places.split(ADDED_AT_ONCE):
        index.add(part.numpy())
    return index


def import_faiss():
    """The module faiss. Raises ImportError, with what to install, if it is missing."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError("an index needs faiss: pip install faiss-cpu, or search exactly") from error
    return faiss
