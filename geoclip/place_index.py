"""An index over a gallery of millions of places: approximate search with faiss, its recall measured.

Exact search (gallery.scan) reads every place for every block of queries, which is the memory's speed and at
100 K places a few milliseconds. Beyond a few million places an index reads a small part of them.
"""

import json
import math
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from geoclip import gallery, paths

WORTH_IT = 2_000_000  # places
TRAINED_ON = 32  # places per list, of which k-means learns the lists
ADDED_AT_ONCE = 1 << 17
CANDIDATES = 64  # beyond k: found by 8-bit codes, compared as they are


class PlaceIndex:
    """Places (m, d), unit-norm, in inverted lists of 8-bit codes; what a query finds there is compared exactly.

    lists: number of lists of a new index, about 2 √m by default; probes: lists that a query looks into, so
    that recall grows with it. path: kept there and memory-mapped the next time. measured: recall of the five
    best places of synthetic_queries, measured when the index was made. Raises ImportError, saying what to
    install, without faiss.
    """

    def __init__(
        self,
        places: Float[Tensor, "m d"],
        probes: int = 32,
        lists: int | None = None,
        path: Path | None = None,
    ):
        faiss = import_faiss()
        self.places = places
        if path is not None and path.is_file():
            self.index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        else:
            self.index = build(places, lists or max(1, round(2 * math.sqrt(len(places)))))
            if path is not None:
                with paths.atomic(path) as temporary:
                    faiss.write_index(self.index, str(temporary))
        self.index.nprobe = min(probes, self.index.nlist)
        self.measured = self._measured(
            None if path is None else path.with_suffix(f".recall-{self.index.nprobe}.json")
        )

    def _measured(self, kept: Path | None) -> float:
        if kept is not None and kept.is_file():
            return json.loads(kept.read_text())
        measured = self.recall(synthetic_queries(self.places))
        if kept is not None:
            with paths.atomic(kept) as temporary:
                temporary.write_text(json.dumps(measured))
        return measured

    def scan(
        self,
        query: Float[Tensor, "n d"],
        k: int,
        scale: float | None = None,
        exact: gallery.Exact | None = None,
    ) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"], Float[Tensor, " n"]]:
        """As gallery.scan, over the places that the index finds: the sum counts these alone, a lower bound.

        So a probability made with it is an upper bound. A query whose lists hold fewer than k places is
        compared with all. On the CPU, wherever the query is. Raises ValueError for k larger than the gallery.
        """
        gallery.check_k(k, len(self.places))
        query = query.float().cpu()
        _, index = self.index.search(query.numpy(), min(len(self.places), k + CANDIDATES))
        index = torch.from_numpy(index)
        found = index >= 0  # faiss says -1 where the lists hold fewer
        score = gallery.compare(query, index.clamp(min=0), self.places, exact)
        score = score.masked_fill(~found, -math.inf)
        total = torch.logsumexp(score * (1.0 if scale is None else scale), 1)
        score, order = score.topk(k, dim=-1)
        index = index.gather(1, order)
        if (few := found.sum(1) < k).any():
            score[few], index[few], total[few] = gallery.scan(query[few], self.places, k, scale, exact)
        return score, index, total

    def recall(self, query: Float[Tensor, "n d"], k: int = 5) -> float:
        """The part of the k places found that are as near as the k that an exact search finds."""
        query, k = query.float().cpu(), min(k, len(self.places))
        exact, found = gallery.search(query, self.places, k)[0], self.scan(query, k)[0]
        return (found >= exact[:, -1:] - 1e-6).double().mean().item()


def synthetic_queries(places: Float[Tensor, "m d"], n: int = 256) -> Float[Tensor, "n d"]:
    """Unit-norm queries as far from the places as photos are: cosines of about 0.55 to the one they are made of."""
    generator = torch.Generator().manual_seed(0)
    noise = functional.normalize(torch.randn(n, places.shape[1], generator=generator), dim=1)
    chosen = places[torch.randint(len(places), (n,), generator=generator)].float()
    return functional.normalize(chosen + 1.5 * noise, dim=1)


def build(places: Float[Tensor, "m d"], lists: int):
    """A trained faiss index of these places, in bounded memory beside its own half kilobyte a place."""
    faiss = import_faiss()
    m, d = places.shape
    coarse = faiss.IndexFlatIP(d)
    index = faiss.IndexIVFScalarQuantizer(
        coarse, d, min(lists, m), faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    chosen = torch.randperm(m, generator=torch.Generator().manual_seed(0))[: TRAINED_ON * index.nlist]
    index.cp.min_points_per_centroid = 1  # small galleries are for tests
    index.train(places[chosen.sort().values].float().numpy())
    for part in places.split(ADDED_AT_ONCE):
        index.add(part.float().numpy())
    return index


def import_faiss():
    """The module faiss; ImportError says how to install it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "an index of places needs faiss: pip install faiss-cpu, or search exactly, without an index"
        ) from error
    return faiss
