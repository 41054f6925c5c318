"""NUS-WIDE (Chua et al. 2009): Flickr photos with 81 concepts, and the geo-tagged subset of the paper.

The official layout, in one folder (GEOCLIP_DATA/nus-wide)::

    ConceptsList/Concepts81.txt                                      one concept per line
    Groundtruth/TrainTestLabels/Labels_<concept>_<Train|Test>.txt    0 or 1 per line, one line per photo
    ImageList/<Train|Test>Imagelist.txt                              <folder>\\<number>_<Flickr id>.jpg
    NUS_WID_Tags/All_Tags.txt                                        <Flickr id> tag tag …    (optional)
    geotags.csv                                                      id,latitude,longitude

The geotag file has no public mirror and no fixed name: any CSV with these three columns, where id is
Flickr's. The paper's subset consists of the photos of either official part that are in it: 41,173 and 27,401.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from geoclip import paths
from geoclip.datasets import benchmarks, folder

PUBLISHED = {"train": 41_173, "test": 27_401}  # GPS2Vec's paper
LOST = 0.05  # largest share of photos without visual features
GEOTAGS = {**folder.ALIASES, "file": ("id", "photo_id", "photoid", "image_id", "flickr_id"), "author": ()}


@dataclass(frozen=True, eq=False)
class NusWide:
    """The geo-tagged photos."""

    table: pd.DataFrame  # part ("train", "test"), photo (Flickr id), file, lat, lon, tags (or None)
    concepts: list[str]
    labels: np.ndarray  # (n, q) of {0, 1}, uint8
    notes: list[str]  # what was left out, and what differs from the published subset

    @property
    def latlon(self) -> np.ndarray:
        """(n, 2) float64, (lat, lon) degrees."""
        return self.table[["lat", "lon"]].to_numpy(float, copy=True)

    def rows(self, part: str) -> np.ndarray:
        """(n,) bool: which rows belong to the part "train" or "test"."""
        return (self.table["part"] == part).to_numpy()


def find() -> Path:
    """The NUS-WIDE folder in GEOCLIP_DATA; FileNotFoundError explains how to provide it."""
    data = paths.geoclip_data()
    for name in ("nus-wide", "nus_wide", "NUS-WIDE"):
        if data is not None and (data / name).is_dir():
            return data / name
    raise FileNotFoundError(
        "needs NUS-WIDE: ask the National University of Singapore for it, set GEOCLIP_DATA and put its files and "
        "geotags.csv into GEOCLIP_DATA/nus-wide"
    )


def read(root: Path | str) -> NusWide:
    """Read the geo-tagged photos of NUS-WIDE in `root`."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such NUS-WIDE folder")
    concepts = _lines(_file(root, "ConceptsList/Concepts81.txt", "Concepts81.txt"))
    if twice := sorted({name for name in concepts if concepts.count(name) > 1}):
        raise ValueError(f"{root}: concept {twice[0]!r} is listed twice")
    notes = ["a rehearsal, not NUS-WIDE"] if (root.parent / benchmarks.REHEARSAL).is_file() else []
    notes += [] if len(concepts) == 81 else [f"{len(concepts)} concepts are listed; NUS-WIDE has 81"]
    places = _geotags(root / "geotags.csv", notes)
    tables, labels = [], []
    for part, published in PUBLISHED.items():
        name = part.capitalize()
        file = _file(root, f"ImageList/{name}Imagelist.txt")
        table = _photos(file)
        label = np.stack([_labels(root, concept, name, file, len(table)) for concept in concepts], 1)
        table = table.assign(part=part).join(places, on="photo")
        kept = table["lat"].notna().to_numpy()
        tables.append(table[kept])
        labels.append(label[kept])
        if not kept.any():
            raise ValueError(f"{root}: no {part} photo is in the geotag file; are its ids Flickr's?")
        if kept.sum() != published:
            notes.append(f"{kept.sum():,} geo-tagged {part} photos; the published subset has {published:,}")
    table = pd.concat(tables, ignore_index=True)
    if elsewhere := len(places) - table["photo"].nunique():
        notes.append(f"{elsewhere:,} geotags are of photos that no image list names")
    table["tags"] = table["photo"].map(_tags(root))
    table = table[["part", "photo", "file", "lat", "lon", "tags"]]
    return NusWide(table, concepts, np.concatenate(labels), notes)


def write_csv(data: NusWide, path: Path | str) -> None:
    """Write the photos as IMG_FILE,LAT,LON, so that `python -m geoclip embed` can compute visual features."""
    table = data.table[["file", "lat", "lon"]].set_axis(["IMG_FILE", "LAT", "LON"], axis=1)
    with paths.atomic(path) as temporary:
        table.to_csv(temporary, index=False)


def visual_features(data: NusWide, features: Path | str) -> np.ndarray:
    """Features (n, c) of the photos in their order: view 0 of a feature folder.

    Up to LOST of the photos may have none: they get the mean of the others and are counted in `data.notes`.
    """
    from geoclip.datasets.features import FeatureData

    kept = FeatureData(features)
    whole = pd.DataFrame(kept.tensor()[:, 0].float().numpy(), kept.ids())
    found = whole.reindex(data.table["file"])
    absent = found.isna().all(axis=1).to_numpy()
    if absent.mean() > LOST:
        first, more = data.table["file"][absent.argmax()], absent.sum() - 1
        lost = f"{first} and {more:,} more of {len(absent):,} photos"
        raise ValueError(f"{features}: no features of {lost}; embed the CSV of nus_wide.write_csv")
    if absent.any():
        data.notes.append(f"{absent.sum():,} photos have no visual features and got the mean of the others")
    return found.fillna(found.mean()).to_numpy()


def _file(root: Path, *names: str) -> Path:
    """The first of `names` in `root`, ignoring case, which differs between public copies."""
    for wanted in (root / name for name in names):
        if wanted.is_file():
            return wanted
        for path in sorted(wanted.parent.glob("*")):
            if path.name.lower() == wanted.name.lower():
                return path
    raise FileNotFoundError(f"{root / names[0]}: no such file; it belongs to the layout of NUS-WIDE")


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if "\0" in text:
        raise ValueError(f"{path}: not a text file in UTF-8; is it UTF-16, or damaged?")
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not lines:
        raise ValueError(f"{path}: the file is empty")
    return lines


def _photos(path: Path) -> pd.DataFrame:
    """file (with /) and photo (Flickr id) of an image list."""
    files = pd.Series(_lines(path)).str.replace("\\", "/")
    photo = files.str.extract(r"_(\d+)\.\w+$", expand=False)
    if photo.isna().any():
        row = int(photo.isna().idxmax())
        raise ValueError(f"{path}, line {row + 1}: {files[row]!r} does not end in _<Flickr id>.jpg")
    return pd.DataFrame({"file": files, "photo": photo})


def _labels(root: Path, concept: str, name: str, image_list: Path, n: int) -> np.ndarray:
    path = _file(root, f"Groundtruth/TrainTestLabels/Labels_{concept}_{name}.txt")
    lines = _lines(path)
    if len(lines) != n:
        raise ValueError(f"{path}: {len(lines):,} lines, but {image_list.name} names {n:,} photos")
    for row, value in enumerate(lines):
        if value not in ("0", "1"):
            raise ValueError(f"{path}, line {row + 1}: {value!r} is neither 0 nor 1")
    return np.array(lines, dtype=np.uint8)


def _tags(root: Path) -> dict[str, str]:
    try:
        path = _file(root, "NUS_WID_Tags/All_Tags.txt")
    except FileNotFoundError:
        return {}
    pairs = (line.split(maxsplit=1) for line in _lines(path) if line)
    return {pair[0]: pair[1] if len(pair) > 1 else "" for pair in pairs}


def _geotags(path: Path, notes: list[str]) -> pd.DataFrame:
    """lat, lon by Flickr id, one row per photo; what was left out is noted."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no geotag file; expected a CSV of id, latitude and longitude")
    columns = folder.recognise(path, folder.header(path), ("file", "lat", "lon"), GEOTAGS)
    table = folder.read(path, columns=columns).table.rename(columns={"file": "photo"})
    nowhere = (table["lat"] == 0) & (table["lon"] == 0)
    if nowhere.any():
        notes.append(f"{nowhere.sum():,} geotags of exactly (0, 0), which means none, are left out")
        table = table[~nowhere]
    table = table.drop_duplicates(["photo", "lat", "lon"])
    twice = table["photo"].duplicated()
    if twice.any():
        row = table[twice].iloc[0]
        raise ValueError(f"{path}, line {row['line']}: photo {row['photo']} has another place above")
    return table.set_index("photo")[["lat", "lon"]]
