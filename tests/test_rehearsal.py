"""The rehearsal: its world is the same each time, has the layouts of the real sets, and holds their faults."""

import io
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request

import numpy as np
import pandas as pd
import pytest

from geoclip import photos
from geoclip.__main__ import main
from geoclip.baselines import samples
from geoclip.baselines.config import GeocellsConfig
from geoclip.datasets import benchmarks, geography, nus_wide, shards
from geoclip.reproduce import notebooks, rehearsal, stages
from geoclip.reproduce.profiles import Profile

N = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return rehearsal.make(tmp_path_factory.mktemp("made") / "world", N, port=0)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_seed_gives_one_world(world, tmp_path):
    assert contents(rehearsal.make(tmp_path / "again", N, port=0)) == contents(world)
    before = contents(world)
    assert rehearsal.make(world, N, port=0) == world and contents(world) == before  # it is kept
    with pytest.raises(ValueError, match="holds something else than this rehearsal"):
        rehearsal.make(world, N, seed=1, port=0)
    with pytest.raises(ValueError, match="at least 20 images"):
        rehearsal.make(tmp_path / "small", 19)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", rehearsal.BENCHMARKS)
def test_the_readers_of_the_real_sets_read_it(world, name):
    found = benchmarks.load(name, world)
    wanted = benchmarks.card(name)
    assert found.name == f"{wanted.title} rehearsal, 40 of {wanted.n:,}"
    assert len(found.missing()) == 1 and (found.authors is None) == (name == "gws15k")
    opened, unusable = {}, []
    for row in range(N):
        if found.path(row).exists():
            try:
                opened[row] = photos.open_photo(found.path(row))
            except photos.PhotoError as error:
                unusable.append(error.reason)
    assert len(opened) == N - 2 and len(unusable) == 1 and "truncated" in unusable[0]
    assert {image.size for image in opened.values()} == {rehearsal.PIXELS}  # upright
    for row in opened:
        assert photos.exif_latlon(found.path(row)) == pytest.approx(found.latlon[row], abs=1e-6)
    if found.authors is not None:  # several photos of a place, by several photographers
        places = pd.DataFrame(found.latlon.round(1)).assign(author=found.authors).groupby([0, 1])["author"]
        assert places.size().max() > 2 and places.nunique().max() > 1


def test_the_list_of_mp16_joins_its_places(world):
    urls = shards.read_urls(world / rehearsal.ADDRESSES)
    places = benchmarks.load("mp16", world).table
    assert len(urls) == len(places) == 2 * N - 1
    assert len(shards.join_places(urls, places)) == 2 * N - 2  # one without a place, one without an address
    assert urls["url"].str.rsplit("/", n=1).str[1].duplicated().sum() == 2  # a photo under two ids
    assert set(places["scene"]) == set(benchmarks.SCENES)


@pytest.mark.slow
def test_addresses_answer_as_their_fault_says(world, monkeypatch):
    monkeypatch.setattr(rehearsal, "SLOW_S", 0.05)
    names = shards.read_urls(world / rehearsal.ADDRESSES)["url"].str.rsplit("/", n=1).str[1]
    stored = (world / rehearsal.SERVER / names[7]).read_bytes()
    with rehearsal.addresses(world) as address:

        def get(kind):
            with urllib.request.urlopen(f"{address}/{kind}/{names[7]}") as response:
                return response.read(), int(response.headers["Content-Length"])

        assert get("photo") == get("slow") == (stored, len(stored))
        assert get("page")[0].startswith(b"<html>")
        with pytest.raises(Exception, match="IncompleteRead"):
            get("cut")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get("gone")


def test_mp16_as_images_has_its_scenes_and_maps(world):
    config = GeocellsConfig(data=str(world / "mp16/mp16_places365.csv"), images=str(world / "mp16/images"))
    found = samples.Samples.of(config, ["scene"])
    assert len(found.latlon) == 2 * N - 10 - 2 and not found.photos.missing()  # five faults of 40, one twice
    maps = samples.Maps(3, world / "segmentation/mp16")
    assert maps.present(found.photos)[0].all()
    assert maps.open(found.photos.table.file.iloc[0]).size == rehearsal.PIXELS
    maps = samples.Maps(3, world / "segmentation/im2gps3k")
    im2gps3k = benchmarks.load("im2gps3k", world)
    assert list(maps.present(im2gps3k)[1]) == im2gps3k.missing() and len(im2gps3k.missing()) == 1


def test_osv_mini_has_its_labels_and_stations_their_temperatures(world, monkeypatch):
    monkeypatch.setenv("GEOCLIP_DATA", str(world))
    train, context = samples.read_photos(str(world / "osv-mini/train_mini.csv"))
    assert len(train) == N and not train.missing() and len(benchmarks.load("osv-mini").missing()) == 1
    assert set(context) == {"state", "county", "city", "climate", "month"}
    assert context["climate"].nunique() > 3 and 0 < context["month"].isna().sum() < N
    assert geography.mean_temperature().target.std() > 3


def test_nus_wide_is_whole(world, monkeypatch):
    monkeypatch.setenv("GEOCLIP_DATA", str(world))
    data = nus_wide.read(nus_wide.find())
    assert data.notes[0] == "a rehearsal, not NUS-WIDE"
    listed = benchmarks.read_csv(world / rehearsal.NUS_WIDE_CSV, world / "images/nus-wide")
    assert listed.table.file.tolist() == data.table.file.tolist() and not listed.missing()


@pytest.fixture
def damaged(world, tmp_path):
    """A copy of the world without one benchmark, with a CSV in another encoding and a tar that was cut off."""
    data = shutil.copytree(world, tmp_path / "data")
    (data / "yfcc4k_places365.csv").unlink()
    csv = data / benchmarks.card("yfcc26k").csv
    csv.write_bytes(csv.read_bytes().replace(b"@N00", "@Nør".encode("cp1252"), 1))
    (data / "shards").mkdir()
    found = benchmarks.load("gws15k", data)
    place = json.dumps({"id": "1", "LAT": 1.5, "LON": 2.5}).encode()
    for name in ("00000.tar", "00001.tar"):
        with tarfile.open(data / "shards" / name, "w") as tar:
            tar.add(found.path(0), "0.jpg")
            about = tarfile.TarInfo("0.json")
            about.size = len(place)
            tar.addfile(about, io.BytesIO(place))
    cut = data / "shards/00001.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    return data


def test_check_names_what_is_damaged_and_goes_on(damaged, capsys):
    command = ["rehearse", "--check", str(damaged), "--tower", "tiny-clip"]
    assert main(command) == 1
    said = capsys.readouterr().out
    problems = [line for line in said.splitlines() if line.startswith("PROBLEM")]
    assert any("yfcc25600_places365.csv: not a CSV file in UTF-8" in line for line in problems)
    assert any("00001.tar: the tar is cut off" in line for line in problems)
    assert not any("00000.tar" in line or "YFCC4k" in line for line in problems)
    assert re.search(r"YFCC4k rehearsal +missing", said)
    assert re.search(r"GWS15k rehearsal +40 of 14,955 +38 of the first 40 opened, embedded at", said)
    assert "04_ablation_location_encoder: MP-16 features (missing), Im2GPS3k" in said
    assert "yfcc4k (nothing)" in said and "MP-16 features: MISSING" in said


@pytest.mark.slow
def test_the_steps_name_what_is_damaged_and_the_rest_goes_on(damaged, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GEOCLIP_DATA", str(damaged))

    def score(name):
        out = str(tmp_path / f"{name}.csv")
        return main(
            ["evaluate", "--benchmark", name, "--coordinates-only", "--out", out]
        ), capsys.readouterr()

    assert [score(name)[0] for name in ("im2gps3k", "gws15k")] == [0, 0]
    status, said = score("yfcc4k")
    assert status == 2 and "YFCC4k: yfcc4k_places365.csv was not found" in said.err
    status, said = score("yfcc26k")
    assert status == 2 and "yfcc25600_places365.csv: not a CSV file in UTF-8" in said.err
    tars, out = str(damaged / "shards/{00000..00001}.tar"), str(tmp_path / "features")
    tower = ["--tower", "tiny-clip", "--weights", "null", "--precision", "fp32", "--workers", "0"]
    assert main(["embed", tars, "--out", out, "--views", "1", *tower]) == 1
    said = capsys.readouterr()
    assert "00001.tar" in said.out + said.err and "1 images embedded" in said.out
    states = {name: benchmarks.on_disk(name) for name in rehearsal.BENCHMARKS}
    assert states.pop("yfcc26k").startswith("damaged: ")
    assert states == {"im2gps3k": "photos", "yfcc4k": "nothing", "gws15k": "photos"}


def test_check_is_quiet_about_a_part_unless_it_is_strict(world, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    assert main(["rehearse", "--check", str(data)]) == 0
    shutil.copy(world / "gws15k.csv", data)
    assert main(["rehearse", "--check", str(data)]) == 0
    assert main(["rehearse", "--check", str(data), "--strict"]) == 1
    assert "PROBLEM GWS15k: incomplete: 40 of 14,955" in capsys.readouterr().out
    assert main(["rehearse"]) == 2
    assert "give either --out" in capsys.readouterr().err


@pytest.fixture
def moved(world, tmp_path):
    """A copy of the world, with its profile and configuration, to run steps in."""
    copy = shutil.copytree(world, tmp_path / "rehearsal")
    stages.write_profile(copy)
    return copy


def test_the_profile_is_the_papers_under_other_names(moved, monkeypatch):
    monkeypatch.setenv("GEOCLIP_DATA", str(moved))
    paper, small = Profile.load("paper"), Profile.load(moved / stages.PROFILE)
    for path in map(notebooks.find, stages.plan(moved)["notebooks"]):
        known = notebooks.declared(path)
        for name, value in small.whole(path, known).items():  # raises for a parameter that the notebook lacks
            assert known[name] is None or isinstance(value, type(known[name])), (path.stem, name)
    assert small.notebooks.keys() > paper.notebooks.keys() and small.data.keys() != paper.data.keys()
    assert list(small.parameters["TESTS"]) == ["Im2GPS3k rehearsal", "YFCC26k rehearsal"]
    assert list(small.parameters["TESTS"].values()) == list(paper.parameters["TESTS"].values())
    made = {about["make"] for about in paper.data.values() if "without" not in about}
    assert made < {about["make"] for about in small.data.values()}
    steps = {step.name: step for step in stages.steps(moved)}
    assert steps.keys() >= {"shards", "embed dinov3/mp16", "train", "evaluate gws15k", "notebook 04"}
    two = [
        step.command for step in stages.steps(moved, (), devices=2) if step.command[0] in ("embed", "train")
    ]
    assert two and all(command[command.index("--devices") + 1] == "2" for command in two)
    assert steps["train geocells"].reads == moved / "mp16/mp16_places365.csv"
    assert steps["evaluate osv-mini"].drops == moved / "results/evaluate/rehearsal_osv-mini_unreadable.csv"
    towers = small.notebooks["18_towers"]["parameters"]["TOWERS"]
    assert list(towers) == ["ViT-L-14", "DINOv3"] and "image" not in towers["ViT-L-14"]
    assert all((moved / f"{name}.yaml").is_file() for name in stages.plan(moved)["configurations"])


# Goes through one step of the rehearsal in the first argument, and one that ends with exit status 1 and lists nothing.
DRIVER = """
import sys
from pathlib import Path
from geoclip.reproduce import stages
planned, nowhere = stages.steps, Path("none")
lost = stages.Step("lost", ["rehearse", "--check", sys.argv[2], "--strict"], nowhere, nowhere)
stages.steps = lambda *_: [lost, *(step for step in planned(Path(sys.argv[1]), ()) if step.name == "cells fine")]
stages.PHASES = (("rehearse", "cells"),)
stages.run(Path(sys.argv[1]), jobs=2)
"""


@pytest.mark.slow
def test_a_step_that_fails_is_listed_and_the_others_go_on(moved, tmp_path):
    about = json.loads((moved / benchmarks.REHEARSAL).read_text()) | {"port": 0}
    (moved / benchmarks.REHEARSAL).write_text(json.dumps(about))
    part = tmp_path / "part"
    part.mkdir()
    shutil.copy(moved / "gws15k.csv", part)
    subprocess.run([sys.executable, "-c", DRIVER, str(moved), str(part)], check=True)
    lost, fine = pd.read_csv(moved / stages.LOG).fillna("").itertuples()
    assert lost.why.startswith("FAILED with exit status 1: ") and "PROBLEM GWS15k: incomplete" in lost.why
    assert (fine.step, fine.images, fine.why) == ("cells fine", 68, "")
    assert (moved / "cells/fine.csv").is_file()


def test_shards_and_batches_grow_with_the_world(moved, monkeypatch):
    def planned(addresses):
        monkeypatch.setattr(stages.shards, "read_urls", lambda _: range(addresses))
        plan = stages.plan(moved)
        return (
            plan["tars"].rpartition("..")[2],
            plan["configurations"]["train_paper"]["batch_size"],
            plan["configurations"]["train_paper"]["queue"],
            plan["profile"]["notebooks"]["01_data_preparation"]["parameters"]["SHARD_SIZE"],
        )

    assert planned(39) == ("00000}.tar", 2, 64, 100)
    assert planned(399_999) == ("00040}.tar", 512, 4096, 9999)


def drive(world, names):
    """Go through the named steps of a rehearsal, in a process of its own."""
    planned, rehearsal.SLOW_S = stages.steps, 4
    stages.steps = lambda *_: [step for step in planned(world, ()) if step.name in names]
    stages.run(world)


def driven(world, names):
    """The process of `drive`, started."""
    process = multiprocessing.get_context("forkserver").Process(target=drive, args=(world, names))
    process.start()
    return process


def drive_to_the_end(world, names):
    process = driven(world, names)
    process.join()
    assert process.exitcode == 0


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_to_the_same_tables(tmp_path):
    names = ["shards", "embed mp16/features", "embed im2gps3k/features", "train", "evaluate im2gps3k"]
    worlds = [tmp_path / name / "world" for name in ("whole", "killed")]
    shutil.copytree(rehearsal.make(worlds[0], N, port=free_port()), worlds[1])
    began = time.monotonic()
    drive_to_the_end(worlds[0], names)
    lasts, kills = time.monotonic() - began, 0
    moments = np.random.default_rng(int(os.environ.get("SEED", 0))).uniform(0.1, 0.9, 2) * lasts
    for seconds in moments:
        process = driven(worlds[1], names)
        process.join(seconds)
        kills += process.is_alive()
        process.kill()  # this process alone: its own follow it
        process.join()
    drive_to_the_end(worlds[1], names)
    assert kills
    log = pd.read_csv(worlds[0] / stages.LOG, index_col="step")
    # 79 addresses, one without a place, twice gone, slow, cut, a page, and (in the tar) truncated
    assert log["images"].tolist() == [79, 78 - 8 - 2, 38, 68, 40] and log["dropped"].tolist() == [
        8,
        2,
        2,
        0,
        2,
    ]
    scores = pd.read_csv(worlds[0] / "results/evaluate/rehearsal_im2gps3k.csv")
    assert set(scores["data"]) == {"Im2GPS3k rehearsal, 40 of 2,997"} and scores["acc_2500km"].notna().all()
    logs = [pd.read_csv(world / stages.LOG).drop(columns="seconds") for world in worlds]
    pd.testing.assert_frame_equal(*logs)
    tables = {path.relative_to(worlds[0]) for path in (worlds[0] / "results").rglob("*.csv")}
    kept = [*tables, *(path.relative_to(worlds[0]) for path in worlds[0].rglob("features.npy"))]
    assert tables and len(kept) > len(tables)
    for path in kept:
        assert (worlds[1] / path).read_bytes() == (worlds[0] / path).read_bytes(), path


@pytest.mark.slow
def test_evaluate_counts_a_part_and_refuses_it_if_it_has_to_be_whole(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GEOCLIP_DATA", str(world))
    command = ["evaluate", "--benchmark", "gws15k", "--coordinates-only", "--out", str(tmp_path / "part.csv")]
    assert main([*command, "--strict"]) == 2
    assert "GWS15k: 40 rows, but the published set has 14,955" in capsys.readouterr().err
    assert main(command) == 0
    assert "GWS15k: 40 of 14,955 expected" in capsys.readouterr().out
    assert set(pd.read_csv(tmp_path / "part.csv")["data"]) == {"GWS15k rehearsal, 40 of 14,955"}
