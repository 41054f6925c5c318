"""The Earth divided into S2 cells by where the training photos are: PlaNet's adaptive subdivision.

Cell ids are 64-bit numbers whose order is a walk along the cells, so that a cell is an interval of leaf
ids: dividing, counting and finding are array operations on sorted integers, and only the step from a
coordinate to its leaf goes through the S2 library, point by point (about 3 µs each).
"""

import dataclasses
import decimal
from pathlib import Path

import numpy as np
import pandas as pd
import s2geometry
import torch

from geoclip import earth, paths

COLUMNS = ("class_label", "hex_id", "imgs_per_cell", "latitude_mean", "longitude_mean")
LEAF_LEVEL = 30


@dataclasses.dataclass(frozen=True)
class PartitionConfig:
    """How finely the Earth is divided; the defaults give the published fine partition's rule.

    Published partitions differ only in `img_max`: 5,000 coarse, 2,000 middle, 1,000 fine.
    """

    img_min: int = 50  # a cell with fewer images is dropped, and its images have no class
    img_max: int = 1000  # a cell with more is divided into its four children
    lvl_min: int = 2  # no cell is larger than one of this level (about 2,000 km across)
    lvl_max: int = 30  # nor smaller than one of this level (about 1 cm)

    def __post_init__(self) -> None:
        if not 1 <= self.img_min <= self.img_max:
            raise ValueError(
                f"img_min {self.img_min} and img_max {self.img_max}: 1 <= img_min <= img_max is needed"
            )
        if not 0 <= self.lvl_min <= self.lvl_max <= LEAF_LEVEL:
            raise ValueError(
                f"lvl_min {self.lvl_min} and lvl_max {self.lvl_max}: 0 <= lvl_min <= lvl_max <= {LEAF_LEVEL} is needed"
            )


def leaf_ids(latlon: np.ndarray) -> np.ndarray:
    """S2 leaf cell ids, uint64 (n,), of (lat, lon) degrees (n, 2)."""
    degrees, cell = s2geometry.S2LatLng.FromDegrees, s2geometry.S2CellId
    lats, lons = np.asarray(latlon, dtype=np.float64).T.tolist()
    ids = (cell(degrees(lat, lon)).id() for lat, lon in zip(lats, lons, strict=True))
    return np.fromiter(ids, dtype=np.uint64, count=len(lats))


def parents(ids: np.ndarray, level: int) -> np.ndarray:
    """The cells of `level` that hold the leaf cells `ids`, both uint64."""
    lowest = np.uint64(1 << 2 * (LEAF_LEVEL - level))  # a cell's lowest set bit tells its level
    return (ids & ~(lowest - np.uint64(1))) | lowest


def id_ranges(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last leaf id (both inside) of the cells `ids`, uint64."""
    half = (ids & (~ids + np.uint64(1))) - np.uint64(1)
    return ids - half, ids + half


def intact_token(token: str, mean_leaf: int, source: str) -> str:
    """The S2 token that `token` is, or was before a spreadsheet took it for a number.

    Hexadecimal such as 47e63 or 478e4 comes back from a spreadsheet as 4.7E+064 or 4780000, and 0467 as 467
    (public copies of the published partitions have such rows). The reading whose cell holds the leaf of the
    images' mean place is the right one. Raises ValueError where `token` is no cell and no reading fits.
    """

    def holds_mean(text: str) -> bool:
        cell = s2geometry.S2CellId.FromToken(text)
        return cell.is_valid() and cell.range_min().id() <= mean_leaf <= cell.range_max().id()

    # A token as the library writes it has no zeros at its end; those of a number do.
    canonical = s2geometry.S2CellId.FromToken(token).ToToken() == token.lower()
    if canonical and holds_mean(token):
        return token.lower()
    for reading in spreadsheet_readings(token):
        if holds_mean(reading):
            return reading
    if not canonical:
        raise ValueError(f"{source}: hex_id {token!r} is not an S2 cell token")
    return token.lower()


def spreadsheet_readings(token: str) -> list[str]:
    """Tokens (at most 16 digits, none 0 at the end) that a spreadsheet would show as the number `token`."""
    try:
        number = decimal.Decimal(token)
        whole = number == int(number) > 0
    except (decimal.InvalidOperation, ValueError, OverflowError):
        return []
    if not whole:
        return []
    _, digits, power = number.normalize().as_tuple()
    digits = "".join(map(str, digits))
    readings = [digits + "0" * power] if power < 16 else []
    for zeros in range(power):
        for width in (1, 2, 3):
            readings.append(f"{digits}{'0' * zeros}e{power - zeros:0{width}d}")
    readings = ["0" * lost + reading for lost in range(4) for reading in readings]
    return [text for text in dict.fromkeys(readings) if len(text) <= 16 and not text.endswith("0")]


class Partition:
    """Cells that do not overlap, numbered as in their file, each with the mean place of its images.

    `tokens` (k,) are S2 tokens ("hex_id"), `images` (k,) counts, `latlon` (k, 2) degrees float64. Raises
    ValueError where a token is no cell, occurs twice, or lies inside another, or a mean is no place.
    """

    def __init__(self, tokens, images, latlon, source: str = "partition") -> None:
        self.tokens = [str(token) for token in tokens]
        self.images = np.asarray(images, dtype=np.int64)
        self.latlon = earth.check_latlon(
            torch.as_tensor(np.asarray(latlon, dtype=np.float64)), source
        ).numpy()
        if not self.tokens:
            raise ValueError(f"{source} holds no cell")
        means = leaf_ids(self.latlon)
        for row, (token, mean) in enumerate(zip(self.tokens, means, strict=True)):
            self.tokens[row] = intact_token(token, int(mean), f"{source}, cell {row}")
        self.ids = np.array([s2geometry.S2CellId.FromToken(t).id() for t in self.tokens], dtype=np.uint64)
        self._order = np.argsort(self.ids, kind="stable")
        self._first, self._last = (bound[self._order] for bound in id_ranges(self.ids))
        self._refuse_overlap(source)

    def _refuse_overlap(self, source: str) -> None:
        # Sorted by id, a cell inside another need not be its neighbour: compare with all that came before.
        by_first = np.lexsort((self._last, self._first))
        first, last = self._first[by_first], self._last[by_first]
        clash = np.flatnonzero(first[1:] <= np.maximum.accumulate(last)[:-1])
        if clash.size == 0:
            return
        row = clash[0] + 1
        holder = np.flatnonzero(last[:row] >= first[row])[0]
        one, other = (int(self._order[by_first[i]]) for i in (holder, row))
        if self.ids[one] == self.ids[other]:
            raise ValueError(
                f"{source}: hex_id {self.tokens[one]!r} occurs twice (cells {min(one, other)} and {max(one, other)}); "
                "remove one of them"
            )
        raise ValueError(f"{source}: cells {self.tokens[one]!r} and {self.tokens[other]!r} overlap")

    def __len__(self) -> int:
        return len(self.ids)

    def label(self, latlon: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Class (n,) int64 of the cell each of `latlon` (n, 2) lies in; −1 where it lies in none."""
        return self.label_leaves(leaf_ids(np.asarray(latlon)))

    def parent(self, finer: "Partition") -> torch.Tensor:
        """Class (k,) int64 of the cell of this partition that holds each of `finer`'s cells.

        Raises ValueError where a finer cell lies in none: the two were not made from the same places.
        """
        label = self.label_leaves(finer.ids)
        first, last = id_ranges(finer.ids)
        inside = (self.label_leaves(first) == label) & (self.label_leaves(last) == label) & (label >= 0)
        if not inside.all():
            raise ValueError(
                f"cell {finer.tokens[int(torch.nonzero(~inside)[0])]!r} of the finer partition lies in no cell of the "
                "coarser one; make both from the same coordinates with the same img_min and lvl_min"
            )
        return label

    def label_leaves(self, ids: np.ndarray) -> torch.Tensor:
        """As `label`, of S2 leaf ids (or any cells' ids), uint64 (n,)."""
        at = np.searchsorted(self._first, ids, side="right") - 1
        inside = (at >= 0) & (ids <= self._last[np.maximum(at, 0)])
        return torch.from_numpy(np.where(inside, self._order[at], -1))

    def table(self) -> pd.DataFrame:
        """The published columns, a row a cell: class_label, hex_id, imgs_per_cell and the mean place."""
        values = (range(len(self)), self.tokens, self.images, self.latlon[:, 0], self.latlon[:, 1])
        return pd.DataFrame(dict(zip(COLUMNS, values, strict=True)))

    def write(self, path: Path | str) -> None:
        """Save `table()` as CSV."""
        with paths.atomic(path) as temporary:
            self.table().to_csv(temporary, index=False, float_format="%.7f")

    @classmethod
    def read(cls, path: Path | str) -> "Partition":
        """Read a partition in the published columns, with or without lines before the header.

        Rows are put in the order of class_label, which must be 0 … k − 1. Raises ValueError where a column
        is absent, a label missing or a hex_id twice.
        """
        with open(path, encoding="utf-8") as file:
            head = [line for line, _ in zip(file, range(10), strict=False)]
        names = [[name.strip() for name in line.split(",")] for line in head]
        start = next((number for number, fields in enumerate(names) if set(COLUMNS) <= set(fields)), None)
        if start is None:
            raise ValueError(
                f"{path} has no header with the columns {', '.join(COLUMNS)} in its first 10 lines"
            )
        # A token such as 1e5 or 0089 is no number.
        table = pd.read_csv(
            path, skiprows=start, dtype={"hex_id": str}, skipinitialspace=True, encoding="utf-8"
        )
        table = table.rename(columns=str.strip).sort_values("class_label", kind="stable")
        wrong = np.flatnonzero(table["class_label"].to_numpy() != np.arange(len(table)))
        if wrong.size:
            found = table["class_label"].iloc[wrong[0]]
            raise ValueError(
                f"{path}: class_label {found} stands where {wrong[0]} is due; labels must be 0, 1, 2, …"
            )
        return cls(
            table["hex_id"], table["imgs_per_cell"], table[list(COLUMNS[3:])].to_numpy(), source=str(path)
        )


def partition(
    latlon: np.ndarray | torch.Tensor,
    config: PartitionConfig = PartitionConfig(),
    source: str = "training coordinates",
) -> Partition:
    """Adaptive subdivision: divide every cell with more than `img_max` of `latlon` (n, 2), drop the sparse.

    A kept cell holds img_min … img_max of the places; more than img_max only at `lvl_max`, where it cannot
    be divided. Its place is their mean on the sphere. Raises ValueError where no cell has img_min places.
    """
    latlon = earth.check_latlon(torch.as_tensor(np.asarray(latlon, dtype=np.float64)), source).numpy()
    if len(latlon) < config.img_min:
        raise ValueError(
            f"{source}: {len(latlon)} coordinates are fewer than img_min {config.img_min}: no cell would be kept; "
            "lower img_min or bring more coordinates"
        )
    leaves = leaf_ids(latlon)
    order = np.argsort(leaves, kind="stable")
    leaves, places = leaves[order], earth.unit_sphere(torch.from_numpy(latlon[order])).numpy()
    ids, counts, means = [], [], []
    for level in range(config.lvl_min, config.lvl_max + 1):
        if len(leaves) == 0:
            break
        cells, start, count = np.unique(parents(leaves, level), return_index=True, return_counts=True)
        done = (count <= config.img_max) | (level == config.lvl_max)
        kept = done & (count >= config.img_min)
        ids.append(cells[kept])
        counts.append(count[kept])
        means.append(np.add.reduceat(places, start)[kept])
        again = np.repeat(~done, count)
        leaves, places = leaves[again], places[again]
    ids, counts, means = np.concatenate(ids), np.concatenate(counts), np.concatenate(means)
    if len(ids) == 0:
        raise ValueError(
            f"{source}: no cell has img_min {config.img_min} of the {len(latlon)} coordinates; lower img_min or lvl_min"
        )
    order = np.argsort(ids)
    tokens = [s2geometry.S2CellId(int(cell)).ToToken() for cell in ids[order]]
    return Partition(tokens, counts[order], earth.from_unit_sphere(torch.from_numpy(means[order])))
