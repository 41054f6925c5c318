import dataclasses
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from PIL import Image

from geoclip import baselines, earth, evaluation, paths
from geoclip.baselines import geocells
from geoclip.datasets import embedding, features, sources
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig
from geoclip.reproduce import notebooks, sweep
from geoclip.reproduce.profiles import Profile
from geoclip.studies import runner
from geoclip.training import runs
from geoclip.training.config import as_config

IMAGES = 500
TINY = {
    "image": {"tower": "conv", "weights": None, "frozen": False, "hidden": 16, "dim": 8},
    "location": {"sigmas": [1.0, 4.0], "frequencies": 8, "width": 16, "hidden_layers": 1, "dim": 8},
    "queue": 64,
    "batch_size": 64,
    "epochs": 2,
    "learning_rate": 0.01,
}


@pytest.fixture(scope="module")
def mp16(tmp_path_factory):
    """500 photos in MP-16's format (IMG_FILE, LAT, LON) whose colour tells the place, and their features."""
    folder = tmp_path_factory.mktemp("mp16")
    (folder / "images").mkdir()
    places = earth.sample_sphere(IMAGES, torch.Generator().manual_seed(0)).numpy()
    for row, (lat, lon) in enumerate(places):
        colour = (int((lat + 90) / 180 * 255), int((lon + 180) / 360 * 255), row % 256)
        Image.new("RGB", (40, 32), colour).save(folder / "images" / f"{row}.jpg")
    table = pd.DataFrame(
        {"IMG_FILE": [f"{row}.jpg" for row in range(IMAGES)], "LAT": places[:, 0], "LON": places[:, 1]}
    )
    table.to_csv(folder / "mp16.csv", index=False)
    table.head(100).to_csv(folder / "test.csv", index=False)
    encoder = ImageEncoder(ImageEncoderConfig(**TINY["image"]), torch.Generator().manual_seed(0))
    for name, out in (("mp16", "features"), ("test", "test_features")):
        source = sources.open_source(str(folder / f"{name}.csv"), folder / "images")
        embedding.embed(source, encoder, folder / out, sources.Views(number=2), arithmetic="fp32")
    (folder / "reference.yaml").write_text(yaml.safe_dump(TINY))
    return folder


@pytest.fixture
def study(mp16, tmp_path, monkeypatch):
    """A study on the 500 photos, with a cache of its own."""
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    reference = dataclasses.replace(as_config(mp16 / "reference.yaml"), data=str(mp16 / "features"))
    tests = runner.folder_tests({"random": mp16 / "test_features"}, reference)
    return runner.Study("photos", reference, tests, features.FeatureData(mp16 / "features").latlon)


@pytest.fixture
def fitted(monkeypatch):
    """Configurations that were really trained, in order."""
    trained, fit = [], runs.fit
    monkeypatch.setattr(runs, "fit", lambda run, *rest: (trained.append(run.config), fit(run, *rest)))
    return trained


@pytest.mark.slow
def test_models_trained_on_photos_answer_the_benchmarks_that_are_there(mp16, tmp_path, monkeypatch, capsys):
    """By every way that they have; a photo that is not there is a miss, and its benchmark is called a part."""
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("GEOCLIP_DATA", str(tmp_path))
    rows = pd.read_csv(mp16 / "mp16.csv").rename(columns={"IMG_FILE": "IMG_ID"}).assign(AUTHOR="", S3_Label=0)
    rows[:96].to_csv(tmp_path / "mp16_places365.csv", index=False)
    rows.loc[96, "IMG_ID"] = "gone.jpg"
    rows[96:108].to_csv(tmp_path / "im2gps3k_places365.csv", index=False)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "im2gps3k").symlink_to(mp16 / "images")
    photos = {"data": str(tmp_path / "mp16_places365.csv"), "images": str(mp16 / "images"), "batch_size": 32}
    reference = as_config(TINY | photos | {"epochs": 1})
    with pytest.raises(FileNotFoundError, match="has the photos of none of yfcc26k"):
        runner.open_photos(reference, ["yfcc26k"])
    study = runner.open_photos(reference, ["im2gps3k", "gws15k"])
    assert "no photos of it: gws15k" in capsys.readouterr().out
    assert study.label == "MP-16, 96 of 4,723,695" and list(study.photos) == ["Im2GPS3k, 12 of 2,997"]
    cells = {"model": "geocells", "img_min": 1, "img_max": [50, 20, 10]}
    table, errors = runner.run(study, {"GeoCLIP": {}, "cells": cells}, [0], 1, return_errors=True)
    ways = [f"cells, {way}" for way in ("coarse", "middle", "fine", "hierarchical")]
    assert table["setting"].tolist() == ["GeoCLIP", *ways] and set(table["n"]) == {12}
    km = np.stack(list(errors.values()))
    assert np.isnan(km[:, 0]).all() and np.isfinite(km[:, 1:]).all()
    truth, trained_on = (
        torch.from_numpy(part[["LAT", "LON"]].to_numpy()) for part in (rows[97:108], rows[:96])
    )
    assert (
        km[0, 1:] >= evaluation.ceiling(truth, trained_on).numpy() - 1e-3
    ).all()  # it answers with their places
    key = study.key()
    Image.new("RGB", (8, 8)).save(mp16 / "images" / "gone.jpg")
    assert study.key() != key  # the photo is there now, so its score is another
    (mp16 / "images" / "gone.jpg").unlink()


@pytest.mark.slow
def test_each_setting_and_seed_is_trained_once_and_a_changed_one_alone_again(study, fitted):
    settings = {"paper": {}, "no queue": {"queue": 0}}
    first = runner.run(study, settings, [0, 1], workers=1)
    assert [(config.queue, config.seed) for config in fitted] == [(64, 0), (64, 1), (0, 0), (0, 1)]
    again = runner.run(study, settings, [0, 1], workers=1)
    assert len(fitted) == 4
    pd.testing.assert_frame_equal(first, again)
    runner.run(study, {"paper": {}, "no queue": {"queue": 0, "noise_m": 0}}, [0, 1], workers=1)
    assert [(config.queue, config.noise_m) for config in fitted[4:]] == [(0, 0.0)] * 2
    assert list(first["setting"]) == ["paper", "paper", "no queue", "no queue"]
    assert first["steps"].eq(2 * (IMAGES // 64)).all() and first["samples"].eq(IMAGES).all()
    assert first["n"].eq(100).all()


def test_errors_are_those_of_a_search_by_hand(study):
    run = runs.train(runner.changed(study.reference, {"seed": 3}))
    module = run.load(with_tower=False)
    found = runner.errors_km(module, study)["", "random"]
    tests, latlon = study.tests["random"]
    with torch.inference_mode():
        places = torch.nn.functional.normalize(module.model.location_encoder(study.gallery), dim=-1)
        for row in range(0, 100, 7):
            views = torch.nn.functional.normalize(module.model.image_encoder.head(tests[row].float()), dim=-1)
            best = int((views @ places.T).mean(0).argmax())  # the mean of the views' similarities
            by_hand = float(earth.haversine_km(study.gallery[best], latlon[row]))
            assert found[row] == pytest.approx(by_hand, abs=1e-3)


def test_scores_follow_the_tests_and_the_gallery(study, fitted):
    whole = runner.run(study, {"paper": {}}, [0], workers=1)
    smaller = dataclasses.replace(study, gallery=study.gallery[400:])
    other = runner.run(smaller, {"paper": {}}, [0], workers=1)
    assert len(fitted) == 1  # another gallery asks for no other training
    assert other["mean_km"].iloc[0] != whole["mean_km"].iloc[0]
    run = runs.train(runner.changed(study.reference, {"seed": 0}))
    module = run.load(with_tower=False)
    errors_km = runner.errors_km(module, smaller)["", "random"]
    assert other["mean_km"].iloc[0] == pytest.approx(errors_km.mean(), rel=1e-5)
    assert study.key() != smaller.key()


@pytest.mark.slow
def test_two_workers_give_the_table_of_one(study, monkeypatch):
    settings = {"paper": {}, "σ 4": {"location": {"sigmas": [4.0]}}}
    alone = runner.run(study, settings, [0, 1], workers=1)
    for kept in (paths.CACHE / "runs").glob("*/errors-*.npz"):
        kept.unlink()  # so that the workers score again what was trained; training is tested above
    together = runner.run(study, settings, [0, 1], workers=2)
    pd.testing.assert_frame_equal(alone, together)
    assert alone["mean_km"].nunique() == 4


def test_changes_are_merged_into_what_they_change(study):
    changed = runner.changed(study.reference, {"location": {"projection": "sphere"}, "seed": 5})
    assert changed.location == dataclasses.replace(study.reference.location, projection="sphere")
    assert changed.seed == 5 and changed.image == study.reference.image
    with pytest.raises(ValueError, match="quque"):
        runner.changed(study.reference, {"quque": 0})
    with pytest.raises(ValueError, match="larger than the queue"):
        runner.changed(study.reference, {"queue": 3})


def test_a_fraction_trains_on_part_of_the_photos(study):
    runs = runner.run(study, {"20 %": {"fraction": 0.2}}, [0], workers=1)
    assert runs["samples"].tolist() == [100] and runs["steps"].tolist() == [2]


def test_a_part_of_a_set_is_called_a_part(mp16, tmp_path):
    (tmp_path / "mp16").mkdir()
    (tmp_path / "mp16/features").symlink_to(mp16 / "features")
    tests = {"Im2GPS3k": mp16 / "test_features", "mine": mp16 / "test_features"}
    study = runner.open_study(mp16 / "reference.yaml", tmp_path / "mp16/features", tests)
    assert study.label == "MP-16, 500 of 4,723,695" and list(study.tests) == [
        "Im2GPS3k, 100 of 2,997",
        "mine",
    ]
    (tmp_path / "REHEARSAL.txt").touch()
    study = runner.open_study(mp16 / "reference.yaml", tmp_path / "mp16/features", tests)
    assert study.label == "MP-16 rehearsal, 500 of 4,723,695"


def test_a_test_set_that_is_missing_is_named_and_the_rest_goes_on(mp16, tmp_path, capsys):
    tests = {"here": mp16 / "test_features", "lost": tmp_path / "lost"}
    study = runner.open_study(mp16 / "reference.yaml", mp16 / "features", tests)
    assert list(study.tests) == ["here"] and "features are missing: lost" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"no features to test on: .*lost"):
        runner.open_study(mp16 / "reference.yaml", mp16 / "features", {"lost": tmp_path / "lost"})


def test_features_of_another_tower_are_refused(mp16, tmp_path):
    encoder = ImageEncoder(ImageEncoderConfig(**TINY["image"]), torch.Generator().manual_seed(1))
    source = sources.open_source(str(mp16 / "test.csv"), mp16 / "images")
    embedding.embed(source, encoder, tmp_path / "other", sources.Views(number=1), arithmetic="fp32")
    reference = mp16 / "reference.yaml"
    with pytest.raises(ValueError, match=r"other \(random\) holds features of another tower"):
        runner.open_study(reference, mp16 / "features", {"random": tmp_path / "other"})
    with pytest.raises(ValueError, match="needs folders of test features too"):
        runner.open_study(reference, mp16 / "features")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        runner.open_study(reference, mp16 / "nowhere", {"random": mp16 / "test_features"})


@pytest.fixture(scope="module")
def tile_config(tmp_path_factory):
    """A configuration of tiles whose tower is kept in a checkpoint, with small splits."""
    image = ImageEncoderConfig("conv", None, frozen=False)
    encoder = ImageEncoder(image, torch.Generator().manual_seed(0))
    prefix = "model.image_encoder.tower."
    path = tmp_path_factory.mktemp("tower") / "last.ckpt"
    torch.save(
        {"state_dict": {prefix + name: value for name, value in encoder.tower.state_dict().items()}}, path
    )
    return as_config(
        {
            "image": dataclasses.asdict(dataclasses.replace(image, weights=str(path))),
            "splits": {"train": 500, "val": 10, "test": 20, "gallery": 1000},
        }
    )


def test_ten_crops_are_five_and_their_mirror_images(tile_config):
    one, five, ten = (runner.tile_tests(tile_config, crops)["random"] for crops in ("one", "five", "ten"))
    encoder = ImageEncoder(tile_config.image, with_tower=False)
    shapes = [tuple(tests.shape) for tests, _ in (one, five, ten)]
    assert shapes == [(20, views, encoder.feature_dim) for views in (1, 5, 10)]
    assert torch.equal(one[1], ten[1])
    torch.testing.assert_close(ten[0][:, :5], five[0])
    assert not torch.allclose(ten[0][:, 5:], five[0])
    # the centre of the five shows the same place as the tile, from a little nearer
    centre, tile = (torch.nn.functional.normalize(x, dim=-1) for x in (five[0][:, 4], one[0][:, 0]))
    assert (centre @ tile.T).argmax(1).eq(torch.arange(20)).sum() >= 18


def test_galleries_hold_the_smaller_ones(study, tile_config):
    tiles = runner.Study(runner.blue_marble.LABEL, tile_config, {}, torch.empty(0, 2))
    for some in (tiles, study):
        large, small = runner.gallery_of(some, 400), runner.gallery_of(some, 100)
        assert torch.equal(large[:100], small) and len(large.unique(dim=0)) == 400
    with pytest.raises(ValueError, match="a gallery of 501 places was asked for; there are 500"):
        runner.gallery_of(study, 501)


def test_blocked_tiles_are_divided_by_their_distance_from_training(tile_config):
    splits = dataclasses.replace(tile_config.splits, test=200, block_deg=3.0, gap_km=0.0)
    tests = runner.tile_tests(dataclasses.replace(tile_config, splits=splits))
    places = runner.blue_marble.splits(splits)
    assert list(tests) == ["random", "0 to 50 km", "50 to 100 km", "100 to 200 km", "beyond 200 km"]
    assert sum(len(latlon) for _, latlon in tests.values()) == 400
    for name, (low, high) in {"50 to 100 km": (50, 100), "beyond 200 km": (200, 20_016)}.items():
        features, latlon = tests[name]
        nearest_km = earth.haversine_km(latlon[:, None], places["train"]).amin(1)
        assert len(features) == len(latlon) and low <= nearest_km.min() and nearest_km.max() < high


def test_tiles_are_embedded_for_the_split_that_is_asked_for(tile_config):
    source = sources.Tiles("train", tile_config.tiles, sizes=tile_config.splits)
    assert torch.equal(source.latlon, runner.blue_marble.splits(tile_config.splits)["train"])
    assert source.hash != sources.Tiles("train", tile_config.tiles).hash


SMALL_TILES = {
    "image": {"tower": "conv", "weights": None, "frozen": False, "hidden": 32, "dim": 16},
    "splits": {"train": 300, "val": 20, "test": 60, "gallery": 500},
    "batch_size": 64,
    "epochs": 1,
    "location": {"frequencies": 8, "width": 16, "dim": 16},
    "queue": 64,
}


@pytest.mark.slow
def test_models_on_tiles_have_a_row_for_each_answer_and_are_trained_once(tmp_path, monkeypatch, tile_errors):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    study = runner.Study(runner.blue_marble.LABEL, baselines.as_config(SMALL_TILES))
    settings = {"GeoCLIP": {}, "cells": {"model": "geocells", "img_min": 3, "img_max": [60, 30, 15]}}
    table, errors = runner.run(study, settings, [0, 1], workers=1, return_errors=True)
    answers = ["GeoCLIP", *(f"cells, {way}" for way in (*geocells.LEVELS, "hierarchical"))]
    assert table["setting"].unique().tolist() == answers and len(table) == len(answers) * 2 * 2
    assert not table.duplicated(["setting", "split", "seed"]).any() and (table["n"] == 60).all()
    assert set(errors) == set(table[["setting", "split", "seed"]].itertuples(index=False, name=None))
    # "hierarchical" is what the trained classifier itself answers
    config = runner.changed(study.reference, {**settings["cells"], "seed": 1})
    module = runs.train(config, kind=geocells.GeocellsTraining).load()
    assert np.allclose(errors["cells, hierarchical", "blocked", 1], tile_errors(module, "blocked"))
    assert not np.allclose(errors["cells, fine", "random", 0], errors["cells, fine", "random", 1])
    monkeypatch.setattr(runs, "fit", None)  # a second training would call it
    pd.testing.assert_frame_equal(runner.run(study, settings, [0, 1], workers=1), table)


def test_another_model_keeps_the_fields_that_both_have():
    reference = baselines.as_config(SMALL_TILES)
    cells = runner.changed(reference, {"model": "geocells", "img_min": 3})
    assert isinstance(cells, geocells.GeocellsConfig) and (cells.img_min, cells.batch_size) == (3, 64)
    assert cells.image == reference.image and cells.splits == reference.splits
    with pytest.raises(ValueError, match="queue"):
        runner.changed(reference, {"model": "geocells", "queue": 64})


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path):
    """The parent of two training workers is killed; both are gone seconds later, long before training ends."""
    script = f"""
from geoclip import baselines
from geoclip.studies import runner

if __name__ == "__main__":
    config = baselines.as_config({SMALL_TILES | {"epochs": 100_000}!r})
    runner.run(runner.Study("tiles", config), {{"a": {{}}}}, [0, 1], workers=2)
"""
    (tmp_path / "grid.py").write_text(script)
    environment = os.environ | {"GEOCLIP_CACHE": str(tmp_path / "cache")}
    parent = subprocess.Popen([sys.executable, tmp_path / "grid.py"], env=environment)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("cache/runs/*/last.ckpt"))) < 2:  # both workers train
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        workers = [p for child in psutil.Process(parent.pid).children() for p in [child, *child.children()]]
        assert len(workers) >= 3  # the fork server, its workers and a tracker of resources
    finally:
        parent.kill()
        parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    for process in alive:
        process.kill()
    assert not alive


def test_the_papers_profile_is_planned_without_its_data(mp16):
    notebook, profile = notebooks.find("04"), Profile.load("paper")
    jobs = sweep.plan(notebook, profile, seeds=2)
    said = "\n".join(sweep.describe(notebook, profile, jobs))
    assert f"{len(jobs)} runs, 0 kept" in said and len(jobs) % 2 == 0
    assert "4,700,000 samples" in said and "25,600 samples" in said
    assert said.count("MISSING") == 3 and "python -m geoclip embed" in said
    tests = dict.fromkeys(("Im2GPS3k", "YFCC26k"), str(mp16 / "test_features"))
    jobs = sweep.plan(notebook, profile, seeds=2, changes={"DATA": str(mp16 / "features"), "TESTS": tests})
    assert "MISSING" not in "\n".join(sweep.describe(notebook, profile, jobs))
