"""A small synthetic set in the official layout of NUS-WIDE, to run its probes without the photos."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from geoclip import earth
from geoclip.datasets import features, sources
from geoclip.datasets.embedding import Shard, claim
from geoclip.image_encoder import Preprocessing

DIM, NOISE = 128, 6.0  # columns of the visual features, and their noise beside 1 for each concept


def write(
    root: Path | str,
    n: int = 3000,
    concepts: int = 8,
    planted: bool = True,
    seed: int = 0,
    with_features: bool = True,
) -> Path:
    """Write n photos with `concepts` concepts, and a feature folder ROOT/features. Returns `root`.

    A concept applies to 80 % of the photos within 1,500 km of its three centres and to 3 % of the others. A
    tenth of the photos has no geotag. planted=False shuffles the geotags: places then carry no information.
    """
    root, rng = Path(root), np.random.default_rng(seed)
    draw = torch.Generator().manual_seed(seed)
    places = earth.sample_sphere(n, draw)
    centres = earth.sample_sphere(3 * concepts, draw).reshape(concepts, 3, 2)
    near = (earth.haversine_km(places[:, None, None], centres[None]) < 1500).any(-1).numpy()
    label = (rng.random(near.shape) < np.where(near, 0.8, 0.03)).astype(int)
    names = [f"concept{i:02d}" for i in range(concepts)]
    ids = rng.choice(10**9, n, replace=False) + 10**9
    files = [f"{names[i % concepts]}\\{i:04d}_{photo}.jpg" for i, photo in enumerate(ids)]
    if not planted:
        places = places[torch.randperm(n, generator=draw)]
    for folder_name in ("ConceptsList", "Groundtruth/TrainTestLabels", "ImageList", "NUS_WID_Tags"):
        (root / folder_name).mkdir(parents=True, exist_ok=True)
    (root / "ConceptsList/Concepts81.txt").write_text("\n".join(names) + "\n")
    cut = 3 * n // 5
    for name, rows in (("Train", slice(0, cut)), ("Test", slice(cut, n))):
        (root / f"ImageList/{name}Imagelist.txt").write_text("\n".join(files[rows]) + "\n")
        for column, concept in enumerate(names):
            path = root / f"Groundtruth/TrainTestLabels/Labels_{concept}_{name}.txt"
            path.write_text("\n".join(map(str, label[rows, column])) + "\n")
    lines = [f"{photo} " + " ".join(np.array(names)[row == 1]) for photo, row in zip(ids, label, strict=True)]
    (root / "NUS_WID_Tags/All_Tags.txt").write_text("\n".join(lines) + "\n")
    tagged = np.flatnonzero(rng.random(n) < 0.9)
    lat, lon = places.numpy()[tagged].T
    geotags = pd.DataFrame({"id": ids[tagged], "latitude": lat, "longitude": lon})
    geotags.sample(frac=1, random_state=rng).to_csv(root / "geotags.csv", index=False)
    seen = label @ rng.standard_normal((concepts, DIM)) + NOISE * rng.standard_normal((n, DIM))
    if not with_features:
        return root
    # as `python -m geoclip embed` leaves them, of a tower that does not exist
    info = features.FeatureInfo(
        tower="synthetic", weights=None, tower_hash="synthetic",
        preprocessing=Preprocessing(), views=sources.Views(number=1),
        dim=DIM, source="synthetic", data="synthetic", recipe=features.RECIPE, shards=1,
    )  # fmt: skip
    claim(root / "features", info)
    names = [name.replace("\\", "/") for name in files]
    shard = Shard([seen[:, None].astype(np.float16)], names, [*map(tuple, places.tolist())])
    shard.write(root / "features", 0, info, "fp32")
    return root
