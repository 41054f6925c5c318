"""Training straight on photos of a CSV: augmented views, drawn anew in each epoch.

For a frozen tower `python -m geoclip embed` is the way to train on many photos; this one trains the tower too,
and needs no features.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from geoclip import earth, photos
from geoclip.datasets import folder


class PhotoTraining(Dataset):
    """Photos of a CSV with IMG_FILE, LAT, LON: batches of `image` (b, v, 3, side, side) and `latlon` (b, 2).

    Views: a crop of 0.6 to 1 of the area, resized to side × side, mirrored in half of the cases, normalised.
    What is drawn depends on seed, epoch and photo alone, not on its batch or its worker.
    """

    def __init__(
        self,
        csv: Path | str,
        images: Path | str | None,
        side: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        views: int = 1,
        fraction: float = 1.0,
        seed: int = 0,
    ):
        """Raises as folder.read does, and FileNotFoundError where photos that the CSV names are not there."""
        from torchvision.transforms import v2

        self.photos = folder.read(csv, images if images is not None else Path(csv).parent)
        if missing := self.photos.missing():
            raise FileNotFoundError(
                f"{csv}: {len(missing):,} of {len(self.photos):,} photos are not in {self.photos.images}, the "
                f"first is {missing[0]}: bring them, or take their rows out"
            )
        order = torch.randperm(len(self.photos), generator=torch.Generator().manual_seed(seed))
        self.rows = order[: max(1, round(fraction * len(order)))]
        self.latlon = earth.check_latlon(torch.from_numpy(self.photos.latlon), str(csv)).float()[self.rows]
        self.views, self.seed = views, seed
        # differs 2: the released loader crops to 8 % and more, and normalises by ImageNet's statistics though
        # CLIP was trained with its own; these are the ranges of the same lab's later code
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(
                    side, scale=(0.6, 1), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
                ),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def view(self, epoch: int, index: int) -> Float[Tensor, "v 3 s s"]:
        """The augmented views of one photo; PhotoError names a photo that cannot be read."""
        image = photos.open_photo(self.photos.path(int(self.rows[index])))
        with torch.random.fork_rng(
            devices=[]
        ):  # torchvision draws from the global state: lend it one of ours
            torch.manual_seed(hash((self.seed, epoch, index)) & 0x7FFF_FFFF_FFFF_FFFF)
            return torch.stack([self.augment(image) for _ in range(self.views)])

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        index = torch.tensor([index for _, index in keys])
        images = torch.stack([self.view(epoch, index) for epoch, index in keys])
        return {"image": images, "latlon": self.latlon[index], "index": index}
