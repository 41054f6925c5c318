"""python -m geoclip gps-embed: rows in order, all columns kept, refused rows listed."""

import builtins
import os
import subprocess
import sys
import weakref

import numpy as np
import pandas as pd
import pytest

from geoclip import __main__ as command_line
from geoclip import gps_embedding, paths
from geoclip.commands import gps_embed
from geoclip.datasets import folder
from geoclip.gps_embedding import embed_places

TEXT = """id,Latitude,note,lng
007,48.8566,"a, b",2.3522
008,91,steep,3

009,,empty,4
010,-33.8688,Sydney,151.2093
"""


@pytest.fixture
def places(tmp_path):
    (tmp_path / "places.csv").write_text(TEXT)
    return tmp_path / "places.csv"


def embed(places, name, *options):
    out = places.with_name(name)
    return command_line.main(["gps-embed", str(places), "--out", str(out), *options]), out


@pytest.mark.slow
def test_a_csv_keeps_its_rows_and_columns_and_lists_what_it_refused(places, capsys, monkeypatch):
    monkeypatch.setattr(gps_embed, "ROWS", 3)
    status, out = embed(places, "out.csv")
    assert status == 1
    table = pd.read_csv(out, dtype={"id": str})
    assert table["id"].tolist() == ["007", "008", "009", "010"] and table["note"][0] == "a, b"
    assert list(table.columns[:6]) == ["id", "Latitude", "note", "lng", "gps_0", "gps_1"]
    found = table.filter(like="gps_").to_numpy(np.float32)
    expected = embed_places([[48.8566, 2.3522], [-33.8688, 151.2093]])
    np.testing.assert_allclose(found[[0, 3]], expected, atol=1e-6)
    assert np.isnan(found[1:3]).all()
    listed = pd.read_csv(places.with_name("out_refused.csv"), keep_default_na=False)
    assert listed[["line", "column", "value"]].values.tolist() == [[3, "Latitude", "91"], [5, "Latitude", ""]]
    assert f"refused: {places}, line 3: Latitude is '91'" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("levels", "columns"), [("concat", "gps_sigma"), ("best", "gps_best_")])
def test_npy_and_parquet_hold_the_same_embeddings(places, levels, columns):
    places.write_text("lat,lon,id\n1,2,a\n3,4,b\n")
    status, out = embed(places, "out.npy", "--levels", levels)
    found, expected = np.load(out), embed_places([[1, 2], [3, 4]], levels=levels)
    assert status == 0 and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not places.with_name("out_refused.csv").exists()
    pytest.importorskip("pyarrow")
    _, out = embed(places, "out.parquet", "--levels", levels)
    table = pd.read_parquet(out)
    assert table["id"].tolist() == ["a", "b"] and table["lat"].tolist() == [1.0, 3.0]
    np.testing.assert_array_equal(table.filter(like=columns), found)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("lat,lon\n1,2\n", "out.txt", "the name must end in .parquet, .npy, .csv"),
        ("lat,lon\n", "out.npy", "there are no rows below the header"),
        ("lat,x\n1,2\n", "out.npy", "no column for lon"),
        ("lat,lon\n151,-33\n2,48\n", "out.npy", "lat and lon are swapped: line 2"),
        ("lat,lon\nx,1\n", "out.npy", "no row has valid coordinates"),
        ("lat,lon,gps_0\n1,2,3\n", "out.csv", "the column gps_0 would be written twice"),
    ],
)
def test_what_cannot_be_embedded_is_named_and_nothing_is_written(places, capsys, text, name, message):
    places.write_text(text)
    status, out = embed(places, name)
    assert status == 2 and message in capsys.readouterr().err and list(out.parent.iterdir()) == [places]


def test_a_single_row(places):
    places.write_text("lat,lon\n1,2\n")
    status, out = embed(places, "out.npy")
    assert status == 0
    np.testing.assert_allclose(np.load(out), embed_places([[1, 2]]), atol=1e-6)


TEN = "lat,lon\n" + "".join(f"{i},{i}\n" for i in range(8)) + "nan,8\n9,9\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npy", "csv"])
def test_an_interrupted_run_is_continued_but_not_with_other_places(places, kind, monkeypatch, capsys):
    monkeypatch.setattr(gps_embed, "ROWS", 2)
    places.write_text(TEN)
    _, whole = embed(places, f"whole.{kind}")
    calls = []

    def interrupted(latlon, **options):
        calls.append(len(latlon))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return embed_places(latlon, **options)

    monkeypatch.setattr(gps_embedding, "embed_places", interrupted)
    status, out = embed(places, f"out.{kind}")
    [partial] = out.parent.glob("*.partial")
    assert status == 130 and not out.exists()
    with partial.open("ab") as file:
        file.write(b"\0" * 1000)  # of a row that was being written

    places.write_text(TEN.replace("3,3", "3,4"))
    capsys.readouterr()
    assert embed(places, f"out.{kind}")[0] == 1 and len(calls) == 4 + 5
    assert f"{partial} is from other places or options and is not continued" in capsys.readouterr().err
    assert partial.exists() and out.read_bytes() != whole.read_bytes()

    places.write_text(TEN)
    assert embed(places, f"out.{kind}")[0] == 1 and len(calls) == 4 + 5 + 3  # the third part is made again
    assert not partial.exists() and out.read_bytes() == whole.read_bytes()
    lists = [places.with_name(f"{name}_refused.csv").read_text() for name in ("out", "whole")]
    assert lists[0] == lists[1] and "line" in lists[0] and ",10,lat,nan\n" in lists[0]


# Run number i is killed when it syncs, renames or removes a file for the i-th time, until one comes to its end.
KILLED = """
import os, sys
from geoclip import __main__, gps_embedding
from geoclip.commands import gps_embed
gps_embed.ROWS = 2

def deadly(original):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return original(*arguments, **options)
    return call

for left in range(1, 100):
    if not (child := os.fork()):
        os.fsync, os.replace, os.unlink = map(deadly, (os.fsync, os.replace, os.unlink))
        os._exit(__main__.main(["gps-embed", *sys.argv[1:]]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != -9:
        break
print(left, status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npy", "csv", "parquet"])
def test_killed_at_any_moment_and_run_again_it_leaves_the_same_file(places, kind, monkeypatch):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(gps_embed, "ROWS", 2)
    places.write_text(TEN)
    _, whole = embed(places, f"whole.{kind}")
    out = places.with_name(f"out.{kind}")
    search = os.pathsep.join([str(paths.ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", KILLED, str(places), "--out", str(out)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True)
    runs, status = map(int, done.stdout.split()[-2:])
    assert status == 1 and runs > 5, done.stderr
    assert out.read_bytes() == whole.read_bytes() and not list(out.parent.glob("*.partial"))
    assert (
        places.with_name("out_refused.csv").read_bytes() == places.with_name("whole_refused.csv").read_bytes()
    )


@pytest.mark.slow
def test_parquet_without_pyarrow_says_what_to_install(places, capsys, monkeypatch):
    original = builtins.__import__

    def missing(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    status, _ = embed(places, "out.parquet")
    assert status == 2 and "pip install pyarrow); .csv and .npy do not" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_rows(places, monkeypatch, capsys):
    """A part has at most ROWS rows, and earlier parts are gone: two are alive while the next one is read."""
    original, held, alive, lengths = folder.read_parts, [], [], []

    def watched(*arguments, **options):
        for table in original(*arguments, **options):
            held.append(weakref.ref(table))
            alive.append(sum(part() is not None for part in held))
            lengths.append(len(table))
            yield table
            del table

    monkeypatch.setattr(folder, "read_parts", watched)
    monkeypatch.setattr(gps_embed, "ROWS", 20)
    places.write_text("lat,lon,id\n" + "1,2,a\n" * 199 + "95,1,last\n")
    status, out = embed(places, "out.csv")
    found = pd.read_csv(out)
    assert status == 1 and len(found) == 200 and found["gps_511"].isna().tolist() == [False] * 199 + [True]
    assert "line 201: lat is '95'" in capsys.readouterr().out
    assert max(lengths) == 20 and len(lengths) > 20 and max(alive) <= 2


def test_a_row_may_be_wrong_in_any_part_but_columns_are_swapped_in_all(places, capsys, monkeypatch):
    monkeypatch.setattr(gps_embed, "ROWS", 2)
    places.write_text("lat,lon\n" + "1,2\n" * 20 + "95,2\n99,3\n")  # the last part has no valid row
    status, out = embed(places, "out.npy")
    assert status == 1 and np.isnan(np.load(out)).any(axis=1).sum() == 2
    places.write_text("lat,lon\n" + "2,48\n" * 20 + "151,-33\n" * 4)
    status, out = embed(places, "swapped.npy")
    assert status == 2 and "lat and lon are swapped: line 22 has lat 151" in capsys.readouterr().err
    places.write_text("lat,lon\n" + "1,2\n" * 5 + "1,2,3\n")
    assert embed(places, "long.npy")[0] == 2 and "not a CSV" in capsys.readouterr().err
