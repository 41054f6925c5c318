"""The gallery: the places on Earth among which an image's place is looked for (paper, section 3.4)."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from geoclip import earth, paths


class Gallery:
    """Places (m, 2) in (lat, lon) degrees, and where they come from.

    Raises ValueError for an empty gallery or coordinates out of range, with the row.
    """

    def __init__(self, latlon: Float[Tensor, "m 2"], source: str = "gallery"):
        self.latlon = earth.check_latlon(latlon, source).float()
        self.source = source
        if len(self.latlon) == 0:
            raise ValueError(f"{source}: the gallery is empty")

    def __len__(self) -> int:
        return len(self.latlon)

    @property
    def unique(self) -> int:
        """Number of different places; duplicates split a place's probability between them."""
        return len(torch.unique(self.latlon, dim=0))

    @classmethod
    def official(cls) -> "Gallery":
        """The authors' released gallery: 100,000 MP-16 training places, 94,123 of them different."""
        from geoclip import weights

        return cls(torch.as_tensor(weights.official_gallery()), "authors' 100 K gallery")

    def embed(
        self, location_encoder: nn.Module, keep: bool = False, block: int = 4096
    ) -> Float[Tensor, "m d"]:
        """Unit-norm embeddings of the places, in blocks of bounded memory.

        keep: kept on disk by the hash of weights and places, and memory-mapped from there the next time.
        """
        if not keep:
            return embed(location_encoder, self.latlon, block)
        path = paths.CACHE / "galleries" / f"{self.key(location_encoder)}.npy"
        if not path.is_file():
            with paths.atomic(path) as temporary:
                np.save(temporary, embed(location_encoder, self.latlon, block).cpu().numpy())
        return torch.from_numpy(np.load(path, mmap_mode="c"))

    def key(self, location_encoder: nn.Module) -> str:
        """Hash of the encoder's weights and the places: what the kept embedding is found by."""
        digest = hashlib.sha256(self.latlon.numpy().tobytes())
        for name, tensor in sorted(location_encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:24]


@torch.inference_mode()
def embed(
    location_encoder: nn.Module, latlon: Float[Tensor, "m 2"], block: int = 4096
) -> Float[Tensor, "m d"]:
    """Unit-norm embeddings of (lat, lon) degrees, computed block by block on the encoder's device."""
    device = next(location_encoder.parameters()).device
    return torch.cat(
        [functional.normalize(location_encoder(part.to(device)), dim=-1) for part in latlon.split(block)]
    )


def search(
    query: Float[Tensor, "n d"], places: Float[Tensor, "m d"], k: int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k most similar places of each query, exact: (cosine, index), best first.

    Both sides unit-norm. Raises ValueError for k larger than the gallery or below 1.
    """
    check_k(k, len(places))
    return (query @ places.T).topk(k, dim=-1)


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
