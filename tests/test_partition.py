"""S2 partitions: divided as promised, read and written as published, wrong files refused."""

import itertools

import numpy as np
import pandas as pd
import pytest
import s2geometry
import torch

from geoclip.__main__ import main
from geoclip.baselines.partition import (
    COLUMNS,
    Partition,
    PartitionConfig,
    leaf_ids,
    parents,
    partition,
)
from geoclip.earth import haversine_km, sample_sphere
from geoclip.pretrained import official_gallery

CONFIG = PartitionConfig(img_min=50, img_max=1000)


@pytest.fixture(scope="module")
def gallery() -> np.ndarray:
    return official_gallery()


@pytest.fixture(scope="module")
def fine(gallery) -> Partition:
    return partition(gallery, CONFIG)


def s2_cells(cells: Partition) -> list:
    return [s2geometry.S2CellId.FromToken(token) for token in cells.tokens]


@pytest.mark.slow
def test_official_gallery_every_kept_place_is_in_exactly_one_cell_of_allowed_size(gallery, fine):
    """Counted with the S2 library's own `contains`, which the partition does not use."""
    leaves = leaf_ids(gallery)
    inside = np.zeros(len(gallery), dtype=np.int64)
    label = np.full(len(gallery), -1)
    for row, cell in enumerate(s2_cells(fine)):
        # The library's bounds of the cell, one pass over the leaves for each cell.
        here = (leaves >= cell.range_min().id()) & (leaves <= cell.range_max().id())
        inside += here
        label[here] = row
        assert fine.images[row] == here.sum()
        assert CONFIG.img_min <= here.sum() <= CONFIG.img_max
    assert inside.max() == 1
    assert np.array_equal(fine.label(gallery).numpy(), label)
    assert inside.sum() == fine.images.sum() > 0.95 * len(gallery)


def test_official_gallery_cells_do_not_overlap_and_are_as_large_as_allowed(gallery, fine):
    cells = s2_cells(fine)
    assert not any(one.intersects(other) for one, other in itertools.combinations(cells, 2))
    # Not divided further than needed: the parent of every cell below lvl_min holds more than img_max places.
    leaves = leaf_ids(gallery)
    for cell in cells:
        if cell.level() > CONFIG.lvl_min:
            parent = cell.parent()
            held = (leaves >= parent.range_min().id()) & (leaves <= parent.range_max().id())
            assert held.sum() > CONFIG.img_max


@pytest.mark.slow
def test_dropped_places_lie_in_sparse_cells(gallery, fine):
    lost = gallery[fine.label(gallery).numpy() < 0]
    assert 0 < len(lost) < 0.05 * len(gallery)
    # All lost places that share a cell of any level with no kept cell are fewer than img_min: join the four
    # children rule by rule, from the other side, for the largest cells.
    leaves, kept = leaf_ids(gallery), s2_cells(fine)
    for cell, held in zip(
        *np.unique(parents(leaf_ids(lost), CONFIG.lvl_min), return_counts=True), strict=True
    ):
        top = s2geometry.S2CellId(int(cell))
        if not any(top.contains(other) for other in kept):
            assert held < CONFIG.img_min
            assert held == (parents(leaves, CONFIG.lvl_min) == cell).sum()


@pytest.mark.slow
def test_finer_partitions_nest_in_coarser_ones(gallery, fine):
    coarse = partition(gallery, PartitionConfig(img_max=5000))
    assert len(coarse) < len(fine)
    parent, big, small = coarse.parent(fine), s2_cells(coarse), s2_cells(fine)
    assert all(big[int(up)].contains(cell) for up, cell in zip(parent, small, strict=True))
    both = (coarse.label(gallery) >= 0) & (fine.label(gallery) >= 0)
    assert torch.equal(parent[fine.label(gallery)[both]], coarse.label(gallery)[both])
    with pytest.raises(ValueError, match="lies in no cell of the coarser"):
        fine.parent(coarse)


def test_ids_agree_with_the_library():
    generator = torch.Generator().manual_seed(0)
    places = torch.cat(
        [sample_sphere(200, generator), torch.tensor([[90.0, 0], [-90, 0], [0, -180], [12, 180]])]
    )
    leaves = leaf_ids(places.numpy())
    for level in (0, 1, 7, 30):
        expected = [s2geometry.S2CellId(int(leaf)).parent(level).id() for leaf in leaves]
        assert parents(leaves, level).tolist() == expected


def test_mean_place_is_taken_on_the_sphere():
    """Around the pole the mean of the longitudes says nothing."""
    ring = np.stack([np.full(60, 89.0), np.linspace(-180, 174, 60)], 1)
    cells = partition(ring, PartitionConfig(img_min=1, img_max=60, lvl_min=0))
    assert len(cells) == 1 and cells.images.tolist() == [60]
    assert cells.latlon[0, 0] == pytest.approx(90, abs=1e-6)


def test_one_place_many_times_stops_at_lvl_max():
    same = np.tile([[48.8566, 2.3522]], (300, 1))
    cells = partition(same, PartitionConfig(img_min=10, img_max=100, lvl_max=12))
    assert cells.images.tolist() == [300] and s2_cells(cells)[0].level() == 12
    assert haversine_km(torch.tensor(cells.latlon), torch.tensor(same[:1])).item() < 1e-6


def test_label_is_minus_one_outside():
    cells = partition(np.random.default_rng(0).uniform([40, 0], [50, 10], (500, 2)), PartitionConfig(10, 100))
    assert cells.label(torch.tensor([[45.0, 5.0], [-45.0, 5.0]]))[1] == -1


@pytest.mark.parametrize("preamble", ["", "img_min,50\nimg_max,1000\n", "made by,someone,2018\n"])
def test_published_columns_with_and_without_preamble(tmp_path, fine, preamble):
    path = tmp_path / "cells.csv"
    fine.write(path)
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    path.write_text(preamble + path.read_text())
    again = Partition.read(path)
    assert again.tokens == fine.tokens and np.array_equal(again.images, fine.images)
    np.testing.assert_allclose(again.latlon, fine.latlon, atol=1e-7)


def small_file(tmp_path, **change):
    """Three published-style cells around Europe, columns replaced by `change`."""
    table = pd.DataFrame(
        {
            "class_label": [0, 1, 2],
            "hex_id": ["47c", "484", "0d4"],
            "imgs_per_cell": [60, 70, 80],
            "latitude_mean": [52.0, 48.0, 38.0],
            "longitude_mean": [0.5, 10.0, -6.0],
        }
    )
    path = tmp_path / "cells.csv"
    table.assign(**change).to_csv(path, index=False)
    return path


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hex_id": ["47c", "484", "47c"]}, "cell 0, '47c', and cell 2, '47c', overlap"),
        ({"hex_id": ["47c", "484", "4794"]}, "'47c', and cell 2, '4794', overlap"),
        ({"hex_id": ["47c", "484", "zz"]}, "'zz' is not an S2 cell token"),
        ({"hex_id": ["47c", "484", "4780000"]}, "cell 2: hex_id '4780000' .* import that column as text"),
        ({"hex_id": ["47c", "484", "4.7E+064"]}, "'4.7e\\+064' is not an S2 cell token"),
        ({"class_label": [0, 1, 3]}, "class_label 3 where 2 was expected"),
        ({"class_label": [0, 1, 1]}, "class_label 1 where 2 was expected"),
        ({"latitude_mean": [52.0, 148.0, 38.0]}, "row 1.*148"),
        ({"latitude_mean": [52.0, np.nan, 38.0]}, "line 3: latitude_mean is ''"),
    ],
)
def test_wrong_cell_files_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        Partition.read(small_file(tmp_path, **change))
    assert "cells.csv" in str(caught.value)


def test_file_without_header_is_refused(tmp_path):
    path = tmp_path / "cells.csv"
    path.write_text("0,47c,60,52,0.5\n")
    with pytest.raises(ValueError, match="no header with the columns class_label"):
        Partition.read(path)


def test_rows_of_a_shuffled_file_come_back_in_the_order_of_their_labels(tmp_path):
    path = small_file(tmp_path)
    pd.read_csv(path, dtype=str).iloc[[2, 0, 1]].to_csv(path, index=False)
    cells = Partition.read(path)
    assert cells.tokens == ["47c", "484", "0d4"]
    # the label is the file's, although the ids sort otherwise
    assert cells.label(np.array([[38.0, -6.0]])).item() == 2


def test_too_few_places_and_no_dense_cell():
    places = np.random.default_rng(0).uniform([-80, -180], [80, 180], (100, 2))
    with pytest.raises(ValueError, match="no cell has img_min 50 of the 30"):
        partition(places[:30], CONFIG)
    with pytest.raises(ValueError, match="no cell has img_min 50 of the 100"):
        partition(places, CONFIG)
    with pytest.raises(ValueError, match=r"row 1: .*swapped"):
        partition(np.array([[10.0, 20.0], [120.0, 30.0]] * 50), CONFIG)


@pytest.mark.parametrize(
    "wrong", [{"img_min": 0}, {"img_min": 2000}, {"lvl_min": 9, "lvl_max": 8}, {"lvl_max": 31}]
)
def test_impossible_settings(wrong):
    with pytest.raises(ValueError, match="is needed"):
        PartitionConfig(**wrong)


def test_command_line(tmp_path, capsys, gallery):
    csv, out = tmp_path / "places.csv", tmp_path / "made" / "cells.csv"
    pd.DataFrame(gallery[:20_000], columns=["LAT", "LON"]).assign(IMG_FILE="x.jpg").to_csv(csv, index=False)
    assert main(["cells", str(csv), "--img_min", "20", "--img_max", "300", "--out", str(out)]) == 0
    cells = Partition.read(out)
    assert f"{len(cells)} cells of" in capsys.readouterr().out
    assert 20 <= cells.images.min() and cells.images.max() <= 300
    assert (cells.label(gallery[:20_000]) >= 0).sum() == cells.images.sum()

    assert main(["cells", str(csv), "--img_min", "30000", "--img_max", "40000", "--out", str(out)]) == 2
    assert "no cell has img_min" in capsys.readouterr().err
    pd.DataFrame({"LAT": [1.0], "LONG": [2.0]}).to_csv(csv, index=False)
    assert main(["cells", str(csv), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "LON" in error and "places.csv" in error
