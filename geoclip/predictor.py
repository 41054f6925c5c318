"""Photos in, places out: the one loop that GeoCLIP.predict, the commands and the notebooks share."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from geoclip.photos import PhotoError


@runtime_checkable
class Model(Protocol):
    """What the loop asks of a model; GeoCLIP is one."""

    def views(self, photo, ten_crop: bool = False) -> Float[Tensor, "v c h w"]:
        """The preprocessed views of a photo. Raises PhotoError."""

    def locate(
        self, query: Float[Tensor, "n v c h w"], k: int = 1
    ) -> tuple[Float[Tensor, "n k 2"], Float[Tensor, "n k"]]:
        """The k best places of each photo, (lat, lon) in degrees, and their probabilities, best first."""


@dataclass(frozen=True)
class Answers:
    """Places and probabilities of n photos, best first; NaN for photos that could not be read."""

    latlon: Float[Tensor, "n k 2"]
    probability: Float[Tensor, "n k"]
    unreadable: dict[int, str]  # index of each such photo and the reason


def answer(
    model: Model,
    photos: Sequence,
    k: int = 1,
    ten_crop: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
    strict: bool = False,
) -> Answers:
    """Locates photos: paths, PIL images or arrays.

    ten_crop: average the logits over ten views of each photo instead of one. batch_size: number of views that
    the model processes together. workers: processes that open photos; 0 opens them in this one. progress:
    show it on stderr. strict: raise PhotoError for a photo that cannot be read, instead of listing it.
    """
    batch_size = max(1, batch_size // 10) if ten_crop else batch_size
    how = {"num_workers": workers, "generator": torch.Generator()}  # else it draws from the global one
    opened = DataLoader(_Opened(model, photos, ten_crop), batch_size, collate_fn=list, **how)
    latlon, probability = torch.full((len(photos), k, 2), torch.nan), torch.full((len(photos), k), torch.nan)
    unreadable: dict[int, str] = {}
    every = 0 if sys.stderr.isatty() else 30  # between two reports; a log gets none of a short run
    bar = tqdm(total=len(photos), unit="photo", disable=not progress, delay=every, mininterval=every or 0.1)
    with bar:
        for batch in opened:
            views = {index: found for index, found in batch if isinstance(found, Tensor)}
            for index, found in batch:
                if isinstance(found, PhotoError):
                    if strict:
                        raise found
                    unreadable[index] = found.reason
            if views:
                places, shares = model.locate(torch.stack(list(views.values())), k)
                latlon, probability = latlon.to(places.dtype), probability.to(shares.dtype)
                latlon[list(views)], probability[list(views)] = places.cpu(), shares.cpu()
            bar.update(len(batch))
    return Answers(latlon, probability, unreadable)


class _Opened(Dataset):
    """(index, views of the photo or the PhotoError) of each photo."""

    def __init__(self, model: Model, photos: Sequence, ten_crop: bool):
        self.model, self.photos, self.ten_crop = model, photos, ten_crop

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[int, Tensor | PhotoError]:
        try:
            return index, self.model.views(self.photos[index], self.ten_crop)
        except PhotoError as error:
            return index, error
