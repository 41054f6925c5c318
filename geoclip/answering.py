"""Asking a model about a whole set of photos: opened in batches; what cannot be read is listed and is a miss."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from geoclip import earth, paths
from geoclip.datasets.folder import Geotagged
from geoclip.gallery import Gallery
from geoclip.model import GeoCLIP
from geoclip.photos import PhotoError, open_photo


@dataclass(frozen=True)
class Asked:
    """A model as evaluation sees it: views of a photo in, a place out.

    module: GeoCLIP, or another trained module with locate(images (n, 3, h, w)) → (n, 2) and preprocess.
    config: what it was trained with, None for the authors' weights.
    """

    name: str
    module: nn.Module
    config: object | None = None

    @property
    def gallery(self) -> Gallery | None:
        """The gallery that it answers from; None where it answers in another way or has none yet."""
        return self.module.gallery if isinstance(self.module, GeoCLIP) else None

    def use_gallery(self, gallery: Gallery) -> None:
        """Answer from `gallery` from now on; ValueError for a model that answers in another way."""
        if not isinstance(self.module, GeoCLIP):
            raise ValueError(f"{self.name} does not answer from a gallery")
        if gallery is not self.gallery:
            self.module.use_gallery(gallery)

    def views(self, ten_crop: bool = False) -> Callable[[Path], Tensor]:
        """path → (v, 3, h, w), or PhotoError."""
        if isinstance(self.module, GeoCLIP):
            return functools.partial(self.module.views, ten_crop=ten_crop)
        if ten_crop:
            raise ValueError(f"{self.name} has no ten-crop answer; only GeoCLIP averages logits over crops")
        return lambda path: self.module.preprocess(open_photo(path))[None]

    @torch.inference_mode()
    def locate(self, views: Float[Tensor, "n v 3 h w"]) -> Float[Tensor, "n 2"]:
        """The best place of each photo, (lat, lon) degrees."""
        views = views.to(next(self.module.parameters()).device)
        if isinstance(self.module, GeoCLIP):
            return self.module.locate_views(views)[0][:, 0]
        return self.module.locate(views[:, 0])


@dataclass(frozen=True)
class Answers:
    """predicted: (n, 2) in (lat, lon) degrees, NaN for a photo that could not be read; unreadable: file, line (of
    the CSV) and reason of these."""

    predicted: Float[Tensor, "n 2"]
    unreadable: pd.DataFrame


def load(checkpoint: Path | str | None = None, clip_weights: Path | str | None = None) -> Asked:
    """The model of a checkpoint of `python -m geoclip train`, or the authors' released one, on the GPU if any."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if checkpoint is None:
        return Asked("GeoCLIP, the authors' weights", GeoCLIP.pretrained(clip_weights).to(device))
    from geoclip import training

    trained = training.load(checkpoint)
    inner = getattr(trained, "model", None)
    module = inner if isinstance(inner, GeoCLIP) else trained
    return Asked(Path(checkpoint).stem, module.to(device).eval(), trained.config)


def answer(
    photos: Geotagged,
    views: Callable[[Path], Tensor],
    locate: Callable[[Tensor], Tensor],
    batch_size: int = 64,
    workers: int = 0,
) -> Answers:
    """Opens each photo, in `workers` processes, and asks where it was taken; shows progress on a terminal.

    views: path → (v, 3, h, w), what is looked at of a photo, or PhotoError; locate: (b, v, 3, h, w) → (b, 2) in
    (lat, lon) degrees. A photo that is missing or cannot be decoded is listed, and stays in the denominator.
    """
    predicted = torch.full((len(photos), 2), float("nan"), dtype=torch.float64)
    reasons: dict[int, str] = {}
    opened = DataLoader(Opened(photos, views), batch_size, num_workers=workers, collate_fn=apart)
    with tqdm(total=len(photos), unit="photo", disable=None) as progress:
        for index, seen, failed in opened:
            if index:
                predicted[index] = locate(seen).double().cpu()
            reasons |= failed
            progress.update(len(index) + len(failed))
    unreadable = photos.table.loc[list(reasons), ["file", "line"]].assign(reason=list(reasons.values()))
    return Answers(predicted, unreadable.reset_index(drop=True))


class Opened(Dataset):
    """(index, its views or the reason why there are none) of each photo."""

    def __init__(self, photos: Geotagged, views: Callable[[Path], Tensor]):
        self.photos, self.views = photos, views

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.views(self.photos.path(index))
        except PhotoError as error:
            return index, error.reason


def apart(batch: list[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor | None, dict[int, str]]:
    """The indices of the readable, their views stacked, and index → reason of the others."""
    good = {index: views for index, views in batch if not isinstance(views, str)}
    failed = {index: reason for index, reason in batch if isinstance(reason, str)}
    return list(good), torch.stack(list(good.values())) if good else None, failed


def save(answers: Answers, photos: Geotagged, table: Path) -> tuple[Path, Path]:
    """Write TABLE_answers.csv (every photo: truth, answer, error) and TABLE_unreadable.csv beside `table`."""
    rows = photos.table[["file", "line", "lat", "lon"]].copy()
    rows[["predicted_lat", "predicted_lon"]] = answers.predicted.numpy()
    rows["error_km"] = earth.haversine_km(answers.predicted, torch.from_numpy(photos.latlon)).numpy()
    written = []
    for part, kind in ((rows, "answers"), (answers.unreadable, "unreadable")):
        written.append(table.with_name(f"{table.stem}_{kind}.csv"))
        with paths.atomic(written[-1]) as temporary:
            part.to_csv(temporary, index=False, float_format="%.7g")
    return tuple(written)
