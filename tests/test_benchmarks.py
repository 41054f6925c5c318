"""Benchmarks: what follows from coordinates alone, the metric against independent ones, and a whole evaluation."""

import argparse
import importlib.util

import numpy as np
import pandas as pd
import pyproj
import pytest
import torch
from PIL import Image

from geoclip import __main__ as command_line
from geoclip import commands, evaluation, paths, pretrained
from geoclip.baselines import geocells
from geoclip.datasets import benchmarks, blue_marble, folder
from geoclip.datasets.blue_marble import SplitConfig
from geoclip.image_encoder import ImageEncoderConfig
from geoclip.location_encoder import LocationEncoderConfig
from geoclip.studies import statistics
from geoclip.training import runs
from geoclip.training.checkpoints import read_checkpoint
from geoclip.training.config import TrainConfig
from geoclip.training.module import GeoCLIPTraining

GEOD = pyproj.Geod(ellps="WGS84")


@pytest.fixture(scope="module")
def official():
    return torch.from_numpy(pretrained.official_gallery())


@pytest.fixture(scope="module")
def answered(official):
    """(truth, index of the answer): 2,000 places and gallery places 0.1 to 10,000 km from them."""
    rng = np.random.default_rng(0)
    index = rng.integers(len(official), size=2000)
    places = official[index].numpy()
    azimuth, metres = rng.uniform(0, 360, 2000), 10 ** rng.uniform(2, 7, 2000)
    lon, lat, _ = GEOD.fwd(places[:, 1], places[:, 0], azimuth, metres)
    return torch.from_numpy(np.stack([lat, lon], 1)), torch.from_numpy(index)


# What the published coordinates give with the official gallery: ceiling and random floor (a mean of draws, held
# to 0.2 point) at 1, 25, 200, 750 and 2,500 km, percent of points leaked.
PUBLISHED = {
    "im2gps3k": ([63.5, 95.2, 99.8, 100, 100], [0.03, 0.37, 1.2, 6.0, 21.7], 0.27),
    "yfcc26k": ([65.0, 97.2, 99.9, 100, 100], None, 7.6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_ceilings_floors_and_leaks_follow_from_the_coordinates(name, official, geoclip_data):
    photos = benchmarks.load(name, geoclip_data)
    truth = torch.from_numpy(photos.latlon)
    table = evaluation.benchmark(truth, official, authors=photos.authors).set_index("measure")
    assert list(table.index) == ["ceiling", "random floor", "constant floor"]
    ceiling, random, leaked = PUBLISHED[name]
    accuracy = table[evaluation.ACCURACY_COLUMNS]
    assert accuracy.loc["ceiling"].tolist() == pytest.approx(ceiling, abs=0.05)
    if random is not None:
        assert accuracy.loc["random floor"].tolist() == pytest.approx(random, abs=0.2)
    assert 100 * table["n_leaked"].iloc[0] / len(photos) == pytest.approx(leaked, abs=0.05)
    assert table["gallery_unique"].tolist() == [94_123] * 3
    assert table["n"].tolist() == [len(photos)] * 3
    assert table["authors"].iloc[0] == len(set(photos.authors))
    # the most crowded place of the gallery is a better guess than a random one
    assert (accuracy.loc["constant floor"].iloc[1:] > accuracy.loc["random floor"].iloc[1:]).all()


def test_the_ceiling_is_the_nearest_place_by_brute_force(official):
    rng = np.random.default_rng(1)
    truth = torch.from_numpy(np.stack([rng.uniform(-90, 90, 40), rng.uniform(-180, 180, 40)], 1))
    places = official[:3000]
    brute = torch.stack(
        [evaluation.earth.haversine_km(place.expand_as(places), places).min() for place in truth]
    )
    torch.testing.assert_close(evaluation.ceiling(truth, places), brute)


def test_the_metric_agrees_with_the_geodesic(answered, official):
    truth, index = answered
    ours = evaluation.earth.haversine_km(official[index], truth)
    lat, lon = official[index].numpy().T
    _, _, metres = GEOD.inv(lon, lat, truth[:, 1].numpy(), truth[:, 0].numpy())
    geodesic = torch.from_numpy(metres / 1000)
    assert ((ours - geodesic).abs() / geodesic).max() < 0.006
    ours, geodesic = evaluation.summarize(ours), evaluation.summarize(geodesic)
    for column in evaluation.ACCURACY_COLUMNS:
        assert ours[column] == pytest.approx(geodesic[column], abs=0.2)  # 4 of 2,000
    assert ours["mean_km"] == pytest.approx(geodesic["mean_km"], rel=0.003)
    assert ours["geoscore"] == pytest.approx(geodesic["geoscore"], abs=10)


@pytest.mark.slow
def test_the_metric_agrees_with_the_authors_own_function(answered, official):
    pytest.importorskip("geopy", reason="the authors' evaluation measures with geopy")
    file = pretrained.authors_package() / "geoclip" / "train" / "eval.py"
    spec = importlib.util.spec_from_file_location("authors_eval", file)  # that one file, not their package
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    truth, index = answered[0][:400], answered[1][:400]
    lat, lon = official[index].numpy().T
    _, _, metres = GEOD.inv(lon, lat, truth[:, 1].numpy(), truth[:, 0].numpy())
    geodesic = evaluation.summarize(torch.from_numpy(metres / 1000))
    sphere = evaluation.summarize(evaluation.earth.haversine_km(official[index], truth))
    for column, km in evaluation.named_thresholds():
        accuracy, mean_km = theirs.distance_accuracy(truth.numpy(), index.numpy(), km, official.numpy())
        assert 100 * accuracy == pytest.approx(geodesic[column], abs=1e-9)
        assert 100 * accuracy == pytest.approx(sphere[column], abs=0.25)  # one of 400
    assert mean_km == pytest.approx(geodesic["mean_km"], rel=1e-9)
    assert mean_km == pytest.approx(sphere["mean_km"], rel=0.003)


def test_benchmark_counts_misses_leaks_and_photographers():
    truth = torch.tensor([[0.0, 0.0], [10.0, 10.0], [20.0, 20.0], [30.0, 30.0]])
    places = torch.tensor([[0.0, 0.0], [10.0, 10.1], [20.0, 20.1], [30.0, 30.1]])
    predicted = places.clone()
    predicted[3] = float("nan")
    authors = np.array(["a", "a", "b", "b"])
    table = evaluation.benchmark(truth, places, predicted, authors, {"data": "made"}).set_index("measure")
    assert (table["data"] == "made").all()
    accuracy = table.loc["accuracy"]
    # (0, 0) is found exactly and leaks; the next two are off by 11 km; the last could not be read
    assert [accuracy[column] for column in evaluation.ACCURACY_COLUMNS] == [25, 75, 75, 75, 75]
    assert (accuracy["n"], accuracy["n_expected"], accuracy["n_readable"], accuracy["n_leaked"]) == (
        4,
        4,
        3,
        1,
    )
    assert (accuracy["authors"], accuracy["interval_over"]) == (2, "photographers")
    clean = table.loc["not leaked"]
    assert (clean["acc_1km"], clean["acc_25km"], clean["n"]) == (0, pytest.approx(200 / 3), 3)
    assert table.loc["ceiling", "acc_25km"] == 100
    # by photographers, a draw is all of a, all of b or both: 100, 50 or 75 percent within 25 km
    assert (table.loc["low", "acc_25km"], table.loc["high", "acc_25km"]) == (50, 100)
    by_image = evaluation.benchmark(truth, places, predicted).set_index("measure")
    assert by_image.loc["low", "acc_25km"] == 25
    assert by_image["interval_over"].iloc[0] == "images"


def test_benchmark_refuses_what_does_not_fit():
    truth, places = torch.zeros(3, 2), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="2 answers for 3 images"):
        evaluation.benchmark(truth, places, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"answers, row 1: \(95, 0\)"):
        evaluation.benchmark(truth, places, torch.tensor([[0.0, 0], [95.0, 0], [0.0, 0]]))
    with pytest.raises(ValueError, match="the set is empty"):
        evaluation.benchmark(torch.zeros(0, 2), places)


def test_a_sampled_gallery_is_seeded_unique_and_bounded(tmp_path):
    (tmp_path / "g.csv").write_text("lat,lon\n1,1\n1,1\n2,2\n3,3\n4,4\n")

    def drawn(size, seed):
        asked = {"gallery": str(tmp_path / "g.csv"), "gallery_size": size, "seed": seed}
        return commands.choose_gallery(None, argparse.Namespace(**asked)).given

    assert torch.equal(drawn(3, 0), drawn(3, 0))
    assert any(not torch.equal(drawn(3, 0), drawn(3, seed)) for seed in range(1, 5))
    assert len(torch.unique(drawn(4, 1), dim=0)) == 4
    with pytest.raises(ValueError, match="the gallery has 4 distinct places"):
        drawn(5, 0)


def test_larger_galleries_have_higher_ceilings(official):
    truth = official[::500] + 0.05
    table = statistics.ceiling_by_size(truth, official, [100, 1000, 94_123], galleries=3)
    assert table["galleries"].tolist() == [3, 3, 1]  # all of them is one gallery
    for column in evaluation.ACCURACY_COLUMNS:
        assert table[column].is_monotonic_increasing
        assert (table[f"{column}_low"] <= table[column]).all() and (
            table[column] <= table[f"{column}_high"]
        ).all()
    whole = evaluation.summarize(evaluation.ceiling(truth, official))
    assert table["acc_25km"].iloc[-1] == whole["acc_25km"]
    assert table["acc_25km"].iloc[0] < table["acc_25km"].iloc[1] < whole["acc_25km"]
    with pytest.raises(ValueError, match="94,124 was requested; there are 94,123"):
        statistics.ceiling_by_size(truth, official, [94_124])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of the embedded profile's shape with small, random weights that tell images apart."""
    config = TrainConfig(
        image=ImageEncoderConfig(tower="conv", weights=None, frozen=False, hidden=32, dim=32),
        location=LocationEncoderConfig(sigmas=(1.0,), frequencies=16, width=32, hidden_layers=1, dim=32),
        splits=SplitConfig(train=1000, val=100, test=300, gallery=2000),
        queue=512,
    )
    path = tmp_path_factory.mktemp("model") / "small.ckpt"
    module = GeoCLIPTraining.build(config, GeoCLIPTraining.training_set(config))
    with torch.no_grad():  # random features are all alike: without their mean, answers differ
        noise = torch.rand(256, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        module.model.image_encoder.head[-1].bias -= module.model.image_encoder(noise).mean(0)
    kept = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(kept)
    torch.save(kept, path)
    return path


@pytest.fixture(scope="module")
def made_benchmark(tmp_path_factory, official):
    """A folder in Im2GPS3k's format: 2,997 rows, one image missing, one truncated, one that is no image."""
    data = tmp_path_factory.mktemp("data")
    images = data / "images" / "im2gps3k"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    places = official[rng.integers(len(official), size=2997)].numpy() + rng.normal(0, 0.1, (2997, 2))
    lines = [benchmarks.PLACES365]
    for i, (lat, lon) in enumerate(places):
        name, author = f"{i}_0a1b_{i % 198}@N00.jpg", f"{i % 198}@N00"
        lines.append(f"{name},{author},{lat:.6f},{(lon + 180) % 360 - 180:.6f},{i % 3},1,2,.1,.2,.7")
        if i != 17:
            pixels = rng.integers(0, 255, (6, 8, 3), np.uint8)
            Image.fromarray(pixels).resize((48, 36)).save(images / name, quality=70)
    truncated, text = images / "18_0a1b_18@N00.jpg", images / "2000_0a1b_20@N00.jpg"
    truncated.write_bytes(truncated.read_bytes()[:400])
    text.write_text("404: the photo is gone")
    (data / "im2gps3k_places365.csv").write_text("\n".join(lines) + "\n")
    return data


@pytest.mark.slow
def test_a_whole_benchmark_with_three_unreadable_photos(
    made_benchmark, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("GEOCLIP_DATA", str(made_benchmark))
    out = tmp_path / "result.csv"
    status = command_line.main([
        "evaluate", "--benchmark", "im2gps3k", "--checkpoint", str(checkpoint), "--gallery", "official",
        "--gallery-size", "5000", "--out", str(out), "--batch-size", "256",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 1, printed
    assert "2,997 expected, 2,994 readable, 198 photographers" in printed
    assert "3 photos could not be read and are misses" in printed
    assert "im2gps3k_places365.csv: not the pinned file" in printed

    table = pd.read_csv(out)
    assert set(table["split"]) == {"test", "test, indoor", "test, natural", "test, urban"}
    table = table[table["split"] == "test"].set_index("measure")
    assert list(table.index) == [
        "accuracy",
        "low",
        "high",
        "not leaked",
        "ceiling",
        "random floor",
        "constant floor",
    ]
    accuracy = table.loc["accuracy"]
    assert (accuracy["n_expected"], accuracy["n_readable"], accuracy["n"]) == (2997, 2994, 2997)
    assert (accuracy["gallery_n"], accuracy["gallery_unique"]) == (5000, 5000)

    unreadable = pd.read_csv(tmp_path / "result_unreadable.csv").set_index("line")
    assert sorted(unreadable.index) == [19, 20, 2002]
    assert unreadable.loc[19, "reason"] == "no such file"
    assert "cannot be decoded" in unreadable.loc[20, "reason"]
    assert unreadable.loc[2002, "reason"] == "not an image in a known format"

    answers = pd.read_csv(tmp_path / "result_answers.csv")
    assert answers["predicted_lat"].nunique() > 20
    assert (len(answers), answers["error_km"].isna().sum()) == (2997, 3)
    for km in evaluation.THRESHOLDS_KM:
        assert accuracy[f"acc_{km}km"] == pytest.approx(
            100 * (answers["error_km"] <= km).sum() / 2997, abs=1e-3
        )
    assert accuracy["median_km"] == pytest.approx(answers["error_km"].median(), rel=1e-4)
    assert (tmp_path / "result.json").is_file()


def test_your_own_photos_with_ten_crops(made_benchmark, checkpoint, tmp_path):
    photos = folder.read(made_benchmark / "im2gps3k_places365.csv")
    csv = tmp_path / "mine.csv"
    rows = photos.table.iloc[:12][["file", "lat", "lon"]]
    rows.to_csv(csv, index=False)
    results = []
    for more in ([], ["--ten-crop"]):
        out = tmp_path / f"{len(more)}.csv"
        status = command_line.main([
            "evaluate", "--csv", str(csv), "--images", str(made_benchmark / "images/im2gps3k"),
            "--checkpoint", str(checkpoint), "--out", str(out), *more,
        ])  # fmt: skip
        assert status == 0
        table = pd.read_csv(out)
        assert table["gallery"].iloc[0] == "2,000 MP-16 places"  # the checkpoint's own
        assert table["interval_over"].iloc[0] == "images"
        results.append((table["crops"].iloc[0], pd.read_csv(out.with_name(f"{out.stem}_answers.csv"))))
    assert [crops for crops, _ in results] == [1, 10]
    assert not results[0][1]["predicted_lat"].equals(results[1][1]["predicted_lat"])


@pytest.mark.slow
def test_the_embedded_tiles(checkpoint, tmp_path, tile_errors):
    out = tmp_path / "tiles.csv"
    assert command_line.main(["evaluate", "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    table = pd.read_csv(out).set_index(["split", "measure"])
    assert (table["n_expected"] == 300).all() and (table["n_leaked"] == 0).all()
    trained = runs.restore(read_checkpoint(checkpoint), GeoCLIPTraining, checkpoint)
    for split in ("random", "blocked"):
        expected = evaluation.summarize(tile_errors(trained, split))
        found = table.loc[(split, "accuracy"), evaluation.ACCURACY_COLUMNS].tolist()
        assert found == pytest.approx([expected[name] for name in evaluation.ACCURACY_COLUMNS], abs=1e-3)


@pytest.mark.slow
def test_a_classifier_over_cells_is_scored_on_photos_and_tiles_without_a_gallery(
    made_benchmark, tmp_path, monkeypatch, capsys
):
    config = geocells.GeocellsConfig(
        image=ImageEncoderConfig(tower="conv", weights=None, frozen=False),
        splits=SplitConfig(train=1000, val=100, test=300, gallery=2000),
        img_min=1, img_max=(300, 200, 100),
    )  # fmt: skip
    module = geocells.GeocellsTraining(
        config, geocells.partitions(config, blue_marble.splits(config.splits)["train"])
    )
    kept = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(kept)
    torch.save(kept, tmp_path / "cells.ckpt")
    monkeypatch.setenv("GEOCLIP_DATA", str(made_benchmark))
    model = ["--checkpoint", str(tmp_path / "cells.ckpt"), "--out", str(tmp_path / "cells.csv")]
    for what, status, n in ([["--benchmark", "im2gps3k"], 1, 2997], [["--split", "random"], 0, 300]):
        assert command_line.main(["evaluate", *what, *model]) == status
        table = pd.read_csv(tmp_path / "cells.csv")
        table = table[table["split"].isin(["test", "random"])].set_index("measure")
        assert table.loc["accuracy", "n"] == n
        assert "ceiling" not in table.index  # its answers are cells, which no gallery bounds
    assert command_line.main(["evaluate", "--benchmark", "im2gps3k", "--ten-crop", *model]) == 2
    assert "a baseline has no ten-crop answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --benchmark, --csv and --data"),
        (["--checkpoint", "none.ckpt", "--ten-crop"], "ten crops cannot be cut"),
        (["--benchmark", "im2gps3k", "--csv", "x.csv"], "give one of"),
        (["--benchmark", "nowhere", "--coordinates-only"], "unknown benchmark 'nowhere'"),
        (["--data", "blue_marble"], "give --checkpoint"),
        (["--csv", "none.csv"], "none.csv: no such file"),
        (["--benchmark", "im2gps", "--coordinates-only"], "get it from"),
        (["--benchmark", "im2gps3k", "--images", "none"], "none: no such image folder"),
        (
            ["--benchmark", "im2gps3k", "--coordinates-only", "--gallery", "own"],
            "there is no checkpoint with a gallery",
        ),
        (
            ["--benchmark", "im2gps3k", "--coordinates-only", "--gallery-size", "100000"],
            "94,123 distinct places",
        ),
        (["--benchmark", "im2gps3k", "--checkpoint", "none.ckpt"], "no checkpoint at none.ckpt"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_a_sentence(
    arguments, message, made_benchmark, monkeypatch, capsys
):
    monkeypatch.setenv("GEOCLIP_DATA", str(made_benchmark))
    assert command_line.main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("geoclip: error: ") and message in error
    assert "Traceback" not in error


def test_a_calibration_is_fitted_on_a_benchmark(made_benchmark, checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("GEOCLIP_DATA", str(made_benchmark))
    asked = ["--checkpoint", str(checkpoint), "--benchmark", "im2gps3k", "--limit", "9"]
    assert command_line.main(["calibrate", *asked]) == 2
    assert "Im2GPS3k: 9 images are too few to fit a calibration on" in capsys.readouterr().err


@pytest.mark.slow
def test_a_benchmark_without_its_images_says_where_to_put_them(made_benchmark, tmp_path, monkeypatch, capsys):
    (tmp_path / "im2gps3k_places365.csv").write_bytes(
        (made_benchmark / "im2gps3k_places365.csv").read_bytes()
    )
    monkeypatch.setenv("GEOCLIP_DATA", str(tmp_path))
    assert command_line.main(["evaluate", "--benchmark", "im2gps3k"]) == 2
    assert f"images are not in {tmp_path / 'images' / 'im2gps3k'}" in capsys.readouterr().err
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    assert command_line.main(["evaluate", "--benchmark", "im2gps3k", "--coordinates-only"]) == 0
    written = list((tmp_path / "results/evaluate").glob("*.csv"))
    assert len(written) == 1
    table = pd.read_csv(written[0])
    assert table["measure"].tolist() == ["ceiling", "random floor", "constant floor"]
    assert table["n_readable"].isna().all()
