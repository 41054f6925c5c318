"""An index over a gallery of millions of places: approximate search with faiss, its recall measured.

Exact search (gallery.scan) reads every place for every block of queries, which is the memory's speed and at
100 K places a few milliseconds. Beyond a few million places an index reads a small part of them.
"""

import math
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoclip import gallery, paths

WORTH_IT = 2_000_000  # places
TRAINED_ON = 32  # places per list, of which k-means learns the lists
ADDED_AT_ONCE = 1 << 17
CANDIDATES = 64  # beyond k: found by 8-bit codes, compared as they are


class PlaceIndex:
    """Places (m, d), unit-norm, in inverted lists of 8-bit codes; what a query finds there is compared exactly.

    lists: number of lists, about 2 √m by default; probes: lists that a query looks into, so that recall grows with
    it and with probes = lists only the codes' rounding is left. path: kept there and memory-mapped the next time.
    Raises ImportError, saying what to install, without faiss.
    """

    def __init__(
        self, places: Float[Tensor, "m d"], probes: int = 32, lists: int | None = None, path: Path | None = None
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

    def scan(
        self, query: Float[Tensor, "n d"], k: int, scale: float | None = None
    ) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"], Float[Tensor, " n"]]:
        """As gallery.scan, over the places that the index finds: the sum counts these alone, a lower bound.

        So a probability made with it is an upper bound. Raises ValueError for k larger than the gallery.
        """
        gallery.check_k(k, len(self.places))
        wanted = min(len(self.places), k + CANDIDATES)
        _, index = self.index.search(query.float().cpu().numpy(), wanted)
        index = torch.from_numpy(index)
        found = index >= 0  # faiss says -1 where the probed lists hold fewer
        score = (self.places[index.clamp(min=0)].float() @ query.float().cpu()[:, :, None])[..., 0]
        score = score.masked_fill(~found, -math.inf)
        total = torch.logsumexp(score * (1.0 if scale is None else scale), 1)
        score, order = score.topk(k, dim=-1)
        return score, index.gather(1, order), total

    def recall(self, query: Float[Tensor, "n d"], k: int = 5) -> float:
        """The part of the k places that an exact search of these queries finds which the index finds too."""
        exact, found = gallery.search(query, self.places, k)[1], self.scan(query, k)[1]
        return (exact[:, :, None] == found[:, None, :]).any(2).double().mean().item()


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
