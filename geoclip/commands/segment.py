"""Make the segmentation maps that classifiers of geo-cells with seg_channels see beside the photos.

Maps are PNG files of class numbers, named as the photos. The classes are Pascal VOC's 20; bring ADE20K's 150, which the
published maps have, for seg_channels 150. Rerun the command to resume. Photos that cannot be read are listed in
OUT/unreadable.csv, and the exit status is then 1.
"""

from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt


def options(add) -> None:
    """Photos, maps and model."""
    add("source", help="a CSV of photos, tar shards, or a benchmark")
    add("--images", help="folder or tar shards of the photos (default: the folder of the CSV)")
    add("--out", required=True, help="folder of the maps; an unfinished one is completed")
    add("--model", default="deeplabv3_resnet50", help="a segmentation model of torchvision")
    add("--weights", type=str | None, default="pretrained", help="null for random weights, as a trial")
    add("--batch-size", type=PositiveInt, default=8, help="photos that the model sees at once")
    add("--workers", type=NonNegativeInt, default=0, help="processes that open photos")


def run(options) -> int:
    """Write the maps; 1 if some photos could not be read."""
    import pandas as pd
    import torch

    from geoclip import paths
    from geoclip.baselines import samples, segmentation

    photos, out = samples.read_photos(options.source, options.images)[0], Path(options.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = segmentation.load(options.model, options.weights).to(device)
    unreadable = segmentation.segment(photos, model, out, options.batch_size, options.workers)
    with paths.atomic(out / "unreadable.csv") as temporary:
        pd.DataFrame(unreadable.items(), columns=["file", "reason"]).to_csv(temporary, index=False)
    read = len(photos) - len(unreadable)
    print(f"{out}: {read:,} maps, {len(unreadable):,} photos unreadable (unreadable.csv)")
    return 1 if unreadable else 0
