"""Segmentation maps of photos by torchvision's models, for classifiers that see one beside each photo.

A map is a palette PNG of class numbers, which a model with 3 channels sees in colour and one with 150 as planes.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from geoclip import paths
from geoclip.datasets import folder, sources
from geoclip.image_encoder import Preprocessing
from geoclip.photos import PhotoError

SIDE, CLASSES = 520, 21  # of the square that the model sees, and a map's long side; Pascal VOC's, 0 is none
SEEN = Preprocessing(SIDE, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "squash")


def load(name: str, weights: str | None) -> nn.Module:
    """Return a torchvision segmentation model, "pretrained" or with random weights (None).

    Raises ValueError for an unknown name, and OSError for weights that cannot be downloaded.
    """
    import torchvision.models as models

    known = models.list_models(module=models.segmentation)
    if name not in known:
        raise ValueError(f"no segmentation model {name!r}; choose from {', '.join(known)}")
    if weights is None:
        return models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES).eval()
    wanted = models.get_model_weights(name).DEFAULT
    try:
        return models.get_model(name, weights=wanted).eval()
    except OSError as error:
        kept = Path(torch.hub.get_dir()) / "checkpoints" / wanted.url.rpartition("/")[2]
        raise OSError(
            f"the weights of {name} are not on this machine and could not be downloaded ({error}): connect to the "
            f"network once, or copy them to {kept}; maps of your own work too, as PNG files of the photos' names"
        ) from error


@torch.inference_mode()
def segment(
    photos: folder.Geotagged, model: nn.Module, out: Path, batch_size: int = 8, workers: int = 0
) -> dict[str, str]:
    """Write OUT/NAME.png for each photo that has none there; return those that cannot be read, with the reason."""
    names, unreadable = photos.table["file"].tolist(), {}
    palette = torch.randint(256, (CLASSES, 3), generator=torch.Generator().manual_seed(0)).flatten().tolist()
    wanted = [row for row, name in enumerate(names) if not (out / name).with_suffix(".png").is_file()]

    def opened(rows: list[int]) -> list[tuple]:
        found = []
        for row in rows:
            try:
                image = sources.decode(photos[row], SIDE)
                size = tuple(max(1, round(side * SIDE / max(image.size))) for side in image.size)
                found.append((row, SEEN(image), size))
            except PhotoError as error:
                found.append((row, error.reason, None))
        return found

    for batch in tqdm(DataLoader(wanted, batch_size, num_workers=workers, collate_fn=opened), "maps"):
        unreadable |= {names[row]: reason for row, reason, size in batch if size is None}
        if not (seen := [found for found in batch if found[2]]):
            continue
        images = torch.stack([image for _, image, _ in seen]).to(next(model.parameters()).device)
        classes = model(images)["out"].argmax(1).byte().cpu().numpy()
        for numbers, (row, _, size) in zip(classes, seen, strict=True):
            drawn = Image.fromarray(numbers).resize(size, Image.Resampling.NEAREST)
            drawn.putpalette(palette)
            with paths.atomic((out / names[row]).with_suffix(".png")) as temporary:
                drawn.save(temporary, "PNG")
    return unreadable
