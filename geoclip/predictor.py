"""Asking a model about a whole set of photos: opened in batches; what cannot be read is listed and is a miss."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from geoclip import baselines, earth, evaluation, paths
from geoclip.datasets import benchmarks
from geoclip.datasets.folder import Geotagged
from geoclip.gallery import Gallery
from geoclip.image_encoder import Preprocessing
from geoclip.model import GeoCLIP
from geoclip.photos import PhotoError, open_photo
from geoclip.training.module import TrainingModule


@dataclass(frozen=True)
class Asked:
    """A model as evaluation sees it: views of a photo in, a place out.

    geoclip: the model where it is one. trained: the training module of a checkpoint, with locate(images) → (n, 2),
    test_tiles and its configuration; None for the authors' weights.
    """

    name: str
    geoclip: GeoCLIP | None
    trained: TrainingModule | None = None

    @property
    def gallery(self) -> Gallery | None:
        """The gallery that it answers from; None where it has none yet or answers in another way."""
        return self.geoclip.gallery if self.geoclip else None

    def use_gallery(self, gallery: Gallery, keep: bool = False) -> None:
        """Answer from `gallery` from now on, its embedding kept on disk or not; ValueError for other models."""
        if self.geoclip is None:
            raise ValueError(f"{self.name} does not answer from a gallery")
        if gallery is not self.gallery:
            self.geoclip.use_gallery(gallery)
        self.geoclip.places(keep)

    def views(self, ten_crop: bool = False) -> Callable[[Path], Tensor]:
        """path → (v, 3, h, w), or PhotoError."""
        if self.geoclip is not None:
            return functools.partial(self.geoclip.views, ten_crop=ten_crop)
        if ten_crop:
            raise ValueError(f"{self.name} has no ten-crop answer; only GeoCLIP averages logits over crops")
        if getattr(self.trained.config, "seg_channels", 0):
            raise ValueError(
                f"{self.name} wants a segmentation map behind each photo; it answers tiles alone"
            )
        return functools.partial(centre, preprocess=Preprocessing.of(self.trained.config.image))

    @torch.inference_mode()
    def locate(self, views: Float[Tensor, "n v c h w"]) -> Float[Tensor, "n 2"]:
        """The best place of each photo, (lat, lon) degrees."""
        if self.geoclip is not None:
            return self.geoclip.locate_views(views)[0][:, 0].cpu()
        return self.trained.locate(views[:, 0].to(self.trained.device)).cpu()

    def locate_tiles(
        self, split: str, batch_size: int = 256
    ) -> tuple[Float[Tensor, "n 2"], Float[Tensor, "n 2"]]:
        """Its answers for the tiles of a split of the embedded data, and their places."""
        images, latlon = self.trained.test_tiles(split)
        return torch.cat([self.locate(part[:, None]) for part in images.split(batch_size)]), latlon


def centre(path: Path, preprocess: Preprocessing) -> Float[Tensor, "1 3 h w"]:
    """The middle of a photo as a tower takes it, or PhotoError."""
    return preprocess(open_photo(path))[None]


@dataclass(frozen=True)
class Answers:
    """predicted: (n, 2) in (lat, lon) degrees, NaN for a photo that could not be read; unreadable: file, line (of
    the CSV) and reason of these."""

    predicted: Float[Tensor, "n 2"]
    unreadable: pd.DataFrame


def load(
    checkpoint: Path | str | None = None, clip_weights: Path | str | None = None, precision: str = "fp32"
) -> Asked:
    """The model of a checkpoint of `python -m geoclip train`, or the authors' released one, on the GPU if any.

    precision: "fp32", "bf16" or "auto" (geoclip.precision) of GeoCLIP; baselines answer in fp32.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if checkpoint is None:
        name, trained, model = "authors' weights", None, GeoCLIP.pretrained(clip_weights, precision)
    else:
        name, trained = Path(checkpoint).stem, baselines.load(checkpoint).to(device)
        model = trained.model if isinstance(getattr(trained, "model", None), GeoCLIP) else None
    if model is not None:
        model = model.to(device).eval().use_precision(precision)
    return Asked(name, model, trained)


def answer(
    photos: Geotagged,
    views: Callable[[Path], Tensor],
    locate: Callable[[Tensor], Tensor],
    batch_size: int = 64,
    workers: int = 0,
) -> Answers:
    """Opens each photo, in `workers` processes, and asks where it was taken; shows progress on a terminal.

    views: path → (v, 3, h, w), what is looked at of a photo, or PhotoError; locate: (b, v, 3, h, w) → (b, 2) in
    (lat, lon) degrees; batch_size: photos whose views the tower sees together. A photo that is missing or cannot
    be decoded is listed, and stays in the denominator.
    """
    predicted = torch.full((len(photos), 2), float("nan"), dtype=torch.float64)
    reasons: dict[int, str] = {}
    opened = DataLoader(Opened(photos, views), batch_size, num_workers=workers, collate_fn=apart)
    with tqdm(total=len(photos), unit="photo", disable=None) as progress:
        for index, seen, failed in opened:
            if index:
                predicted[index] = locate(seen).double()
            reasons |= failed
            progress.update(len(index) + len(failed))
    unreadable = photos.table.loc[list(reasons), ["file", "line"]].assign(reason=list(reasons.values()))
    return Answers(predicted, unreadable.reset_index(drop=True))


def benchmark_table(
    name: str,
    model: Asked | None,
    gallery: Gallery,
    places: Float[Tensor, "m 2"],
    ten_crop: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """evaluation.benchmark of a card of geoclip.datasets, as far as GEOCLIP_DATA goes: empty where it holds
    nothing, ceilings and floors for coordinates alone, and the model's accuracy where the photos are there.

    places: the gallery's, in double precision. Photos that cannot be read are misses.
    """
    state = benchmarks.on_disk(name)
    if state == "nothing":
        return pd.DataFrame()
    photos, predicted = benchmarks.load(name), None
    if state == "photos" and model is not None:
        model.use_gallery(gallery, keep=True)
        batch_size = 6 if ten_crop else 64
        predicted = answer(photos, model.views(ten_crop), model.locate, batch_size).predicted
    about = {
        "data": photos.name,
        "split": "test",
        "model": "coordinates" if predicted is None else model.name,
    }
    truth = torch.from_numpy(photos.latlon)
    return evaluation.benchmark(truth, places, predicted, photos.authors, about, seed=seed)


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
