"""The Earth divided into S2 cells by the density of training photos: PlaNet's adaptive subdivision.

Cell ids are 64-bit numbers in the order of a curve through the cells, so that a cell is an interval of leaf
ids: dividing, counting and finding are array operations on sorted integers. Only the step from a coordinate
to its leaf goes through the S2 library, point by point (about 3 µs each).
"""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import s2geometry
import torch

from geoclip import earth, paths
from geoclip.datasets import folder

COLUMNS = ("class_label", "hex_id", "imgs_per_cell", "latitude_mean", "longitude_mean")
LEAF_LEVEL = 30


@dataclasses.dataclass(frozen=True)
class PartitionConfig:
    """How finely the Earth is divided; the defaults are the rule of the published fine partition.

    The published partitions differ only in `img_max`: 5,000 coarse, 2,000 middle, 1,000 fine.
    """

    img_min: int = 50  # a cell with fewer images is dropped; its images have no class
    img_max: int = 1000  # a cell with more is divided into its four children
    lvl_min: int = 2  # level of the largest cells (2: about 2,000 km across)
    lvl_max: int = 30  # level of the smallest cells (30: about 1 cm)

    def __post_init__(self) -> None:
        if not 1 <= self.img_min <= self.img_max:
            raise ValueError(f"1 <= img_min <= img_max is needed, not {self.img_min} and {self.img_max}")
        if not 0 <= self.lvl_min <= self.lvl_max <= LEAF_LEVEL:
            levels = f"{self.lvl_min} and {self.lvl_max}"
            raise ValueError(f"0 <= lvl_min <= lvl_max <= {LEAF_LEVEL} is needed, not {levels}")


def leaf_ids(latlon: np.ndarray) -> np.ndarray:
    """Return the S2 leaf cell ids, uint64 (n,), of (lat, lon) degrees (n, 2)."""
    degrees, cell = s2geometry.S2LatLng.FromDegrees, s2geometry.S2CellId
    lats, lons = np.asarray(latlon, dtype=np.float64).T.tolist()
    ids = (cell(degrees(lat, lon)).id() for lat, lon in zip(lats, lons, strict=True))
    return np.fromiter(ids, dtype=np.uint64, count=len(lats))


def parents(ids: np.ndarray, level: int) -> np.ndarray:
    """Return the cells of `level` that contain the leaf cells `ids`, both uint64."""
    lowest = np.uint64(1 << 2 * (LEAF_LEVEL - level))  # a cell's lowest set bit tells its level
    return (ids & ~(lowest - np.uint64(1))) | lowest


def id_ranges(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and last leaf id inside each of the cells `ids`, uint64."""
    half = (ids & (~ids + np.uint64(1))) - np.uint64(1)
    return ids - half, ids + half


class Partition:
    """Cells that do not overlap, in the order of their file, each with the mean place of its images.

    tokens: S2 tokens (k,), the column hex_id. images: counts (k,). latlon: means (k, 2) in degrees, float64.
    Raises ValueError for a token that is not an S2 cell, occurs twice or overlaps another, and for invalid
    means.
    """

    def __init__(self, tokens, images, latlon, source: str = "partition") -> None:
        self.tokens = [str(token).lower() for token in tokens]
        self.images = np.asarray(images, dtype=np.int64)
        places = torch.as_tensor(np.asarray(latlon, dtype=np.float64))
        self.latlon = earth.check_latlon(places, source).numpy()
        if not self.tokens:
            raise ValueError(f"{source} contains no cell")
        for row, token in enumerate(self.tokens):
            cell = s2geometry.S2CellId.FromToken(token)
            if not cell.is_valid() or cell.ToToken() != token:
                advice = "a spreadsheet may have read it as a number, so import that column as text"
                raise ValueError(f"{source}, cell {row}: hex_id {token!r} is not an S2 cell token; {advice}")
        self.ids = np.array([s2geometry.S2CellId.FromToken(t).id() for t in self.tokens], dtype=np.uint64)
        first, last = id_ranges(self.ids)
        self._order = np.argsort(first, kind="stable")
        self._first, self._last = first[self._order], last[self._order]
        clash = np.flatnonzero(self._first[1:] <= self._last[:-1])  # if any cells overlap, two neighbours do
        if clash.size:
            one, other = sorted(self._order[clash[0] : clash[0] + 2].tolist())
            pair = f"cell {one}, {self.tokens[one]!r}, and cell {other}, {self.tokens[other]!r}"
            raise ValueError(f"{source}: {pair}, overlap or are the same: remove one of them")

    def __len__(self) -> int:
        return len(self.ids)

    def label(self, latlon: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Return the class (n,), int64, of the cell that contains each of `latlon` (n, 2), or −1."""
        return self.label_leaves(leaf_ids(np.asarray(latlon)))

    def parent(self, finer: "Partition") -> torch.Tensor:
        """Return the class (k,), int64, of the cell of this partition that contains each of `finer`'s cells.

        Raises ValueError for a finer cell that lies in none: the two were not made from the same places.
        """
        label, last = map(self.label_leaves, id_ranges(finer.ids))
        inside = (label == last) & (label >= 0)
        if not inside.all():
            outside = finer.tokens[int(torch.nonzero(~inside)[0])]
            advice = "make both from the same coordinates with the same img_min and lvl_min"
            raise ValueError(
                f"cell {outside!r} of the finer partition lies in no cell of the coarser one: {advice}"
            )
        return label

    def label_leaves(self, ids: np.ndarray) -> torch.Tensor:
        """As `label`, for S2 leaf ids (or ids of any cells), uint64 (n,)."""
        at = np.searchsorted(self._first, ids, side="right") - 1
        inside = (at >= 0) & (ids <= self._last[np.maximum(at, 0)])
        return torch.from_numpy(np.where(inside, self._order[at], -1))

    def write(self, path: Path | str) -> None:
        """Write a CSV with one row for each cell, in the published columns."""
        values = (range(len(self)), self.tokens, self.images, self.latlon[:, 0], self.latlon[:, 1])
        table = pd.DataFrame(dict(zip(COLUMNS, values, strict=True)))
        with paths.atomic(path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.7f")

    @classmethod
    def read(cls, path: Path | str) -> "Partition":
        """Read a partition in the published columns, with or without lines before the header.

        Rows are sorted by class_label, which must be 0, 1, 2, … Raises ValueError for a missing column, a
        missing or repeated label, and as the class does.
        """
        path = Path(path)
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            head = [{name.strip() for name in line.split(",")} for line in itertools.islice(file, 10)]
        start = next((number for number, names in enumerate(head) if names >= set(COLUMNS)), None)
        if start is None:
            raise ValueError(f"{path}: no header with the columns {', '.join(COLUMNS)} in its first 10 lines")
        table = folder.read_text(path, skip=start)  # as text: 1e5 and 0089 are tokens, not numbers
        table["imgs_per_cell"] = folder.numbers(
            path, table, "imgs_per_cell", "a number of images", lambda n: (n % 1 == 0) & (n >= 0)
        )
        for column in (COLUMNS[0], *COLUMNS[3:]):
            table[column] = folder.numbers(path, table, column, "a number")
        table = table.sort_values("class_label", kind="stable")
        wrong = np.flatnonzero(table["class_label"].to_numpy() != np.arange(len(table)))
        if wrong.size:
            found = table["class_label"].iloc[wrong[0]]
            expected = f"class_label {found:g} where {wrong[0]} was expected"
            raise ValueError(f"{path}: {expected}; labels must be 0, 1, 2, …")
        tokens, places = table["hex_id"].str.strip(), table[list(COLUMNS[3:])].to_numpy()
        return cls(tokens, table["imgs_per_cell"], places, source=str(path))


def partition(
    latlon: np.ndarray | torch.Tensor,
    config: PartitionConfig = PartitionConfig(),
    source: str = "training coordinates",
) -> Partition:
    """Divide every cell with more than `img_max` of the places `latlon` (n, 2), then drop sparse cells.

    Each cell that is kept holds img_min to img_max places (more only at lvl_max, where it cannot be divided);
    its place is their mean on the sphere. Raises ValueError if no cell has img_min places.
    """
    latlon = earth.check_latlon(torch.as_tensor(np.asarray(latlon, dtype=np.float64)), source).numpy()
    leaves = leaf_ids(latlon)
    order = np.argsort(leaves, kind="stable")
    leaves, places = leaves[order], earth.unit_sphere(torch.from_numpy(latlon[order])).numpy()
    ids, counts, means = [], [], []
    for level in range(config.lvl_min, config.lvl_max + 1):
        cells, start, count = np.unique(parents(leaves, level), return_index=True, return_counts=True)
        done = (count <= config.img_max) | (level == config.lvl_max)
        kept = done & (count >= config.img_min)
        ids.append(cells[kept])
        counts.append(count[kept])
        means.append(np.add.reduceat(places, start)[kept])
        again = np.repeat(~done, count)
        leaves, places = leaves[again], places[again]
        if len(leaves) == 0:
            break
    ids, counts, means = np.concatenate(ids), np.concatenate(counts), np.concatenate(means)
    if len(ids) == 0:
        none = f"no cell has img_min {config.img_min} of the {len(latlon)} coordinates"
        raise ValueError(f"{source}: {none}: lower img_min or lvl_min")
    order = np.argsort(ids)
    tokens = [s2geometry.S2CellId(int(cell)).ToToken() for cell in ids[order]]
    return Partition(tokens, counts[order], earth.from_unit_sphere(torch.from_numpy(means[order])))
