"""What the measured rows say: aims reached or not, gaps left open; and the measuring itself, on the smallest sizes."""

import math

import pandas as pd
import pytest
import torch

from geoclip.studies import bench


def row(task, seconds, system=bench.OURS, size=None, share=math.nan, precision="bf16", note=""):
    return {
        "task": task, "system": system, "size": size, "precision": precision, "median_s": seconds,
        "share_of_limit": share, "note": note,
    }  # fmt: skip


@pytest.fixture
def rows():
    return pd.DataFrame([
        row("import torch", 1.0, "PyTorch"), row("import geoclip", 1.1), row("python -m geoclip --help", 2.0),
        row("predict a photo", 0.3, size=1), row("predict a photo", 12.0, bench.AUTHORS, 1),
        row("image tower alone", 0.2, size=1), row("image tower", 1.0, size=8, share=0.9),
        row("image tower", 9.0, size=8, share=0.99, precision="fp32"), row("image tower", 4.0, size=32, share=0.8),
        row("encode a gallery", 2.0, size=100_000, share=0.8), row("search, 1 query", 0.01, size=100_000, share=0.5),
        row("search, 1 query", 0.01, size=10_000, share=0.1), row(bench.STEP, 2.0),
        row(bench.AUTHORS_STEP, 300.0, bench.AUTHORS),
    ])  # fmt: skip


def test_aims_are_held_to_what_was_measured(rows):
    aims = bench.aims(rows).set_index("what")
    assert len(aims) == 11
    expected = {
        "predict a photo, warm: times the authors' speed": (40, True),
        "… times the image tower alone": (1.5, False),
        "image tower, batch 8: % of the matrix rate": (90, True),
        "image tower, batch 32: % of the matrix rate": (80, False),
        "100 K gallery, first time: times its limit": (1.25, False),
        "search 100 K, 1 query: times its limit": (2, True),
        "training step: times the authors' speed": (150, False),
        "import geoclip: seconds beyond torch's import": (0.1, True),
        "python -m geoclip --help, seconds": (2, False),
    }
    for what, (measured, reached) in expected.items():
        assert aims.at[what, "measured"] == pytest.approx(measured), what
        assert bool(aims.at[what, "reached"]) is reached, what
    for what in (
        "… after, seconds",
        "search 100 K, 64 queries: times its limit",
    ):  # not measured is not reached
        assert math.isnan(aims.at[what, "measured"]) and not aims.at[what, "reached"]
    beside = bench.beside_authors(rows).set_index("task")["times_faster"]
    assert beside["predict a photo"] == 40 and math.isnan(beside["predict 64 photos"])
    with pytest.raises(KeyError, match="no row 'predict 64 photos'"):
        bench.one(rows, "predict 64 photos", "median_s")


def test_limits_are_those_of_the_work(monkeypatch):
    measured = bench.Bench("cpu", bench.SIZES["tiny"], lambda *_: None)
    bench.limits(measured)
    measured.dtype = torch.float32
    bench.places(measured)
    bench.searching(measured)
    bench.indexing(measured)
    table = bench.table(measured).set_index("task")
    encoded = table.loc["encode a gallery"]
    assert encoded["rate"] == pytest.approx(200 / encoded["median_s"])
    assert encoded["limit_s"] == pytest.approx(
        200 * 2 * 3 * (512 * 1024 + 2 * 1024**2 + 1024 * 512) / measured.gemm[torch.float32]
    )
    searched = table.loc["search, 1 query"]
    assert (searched["limit_s"] >= searched["size"] * 512 * 4 / measured.bandwidth * 0.999).all()
    assert table.loc["search with an index, recall of the five best", "rate"] > 50
