"""Training: the loss by hand, order of samples, exact resume after SIGKILL, bad configurations."""

import dataclasses
import functools
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from geoclip import __main__ as command_line
from geoclip import earth
from geoclip.datasets.blue_marble import SplitConfig, TileConfig
from geoclip.datasets.folder import Geotagged
from geoclip.image_encoder import ImageEncoderConfig, tower_hash
from geoclip.location_encoder import LocationEncoderConfig
from geoclip.training import runs
from geoclip.training.checkpoints import load_checkpoint
from geoclip.training.config import TrainConfig, as_config, plain
from geoclip.training.data import EpochSampler, hold_out, seeded, training_set
from geoclip.training.module import GeoCLIPTraining, initial_queue

TINY = TrainConfig(
    image=ImageEncoderConfig(tower="conv", weights=None, frozen=False, hidden=16, dim=16),
    location=LocationEncoderConfig(sigmas=(1.0, 16.0), frequencies=16, width=16, hidden_layers=1, dim=16),
    tiles=TileConfig(pixels=16),
    splits=SplitConfig(train=320, val=32, test=100, gallery=500),
    queue=100,
    batch_size=32,
    epochs=3,
    learning_rate=1e-3,
)


def weights_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return runs.train(TINY, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_epochs")
    run = runs.train(TINY, folder / "run", epochs=2)
    return run, shutil.copytree(run.directory, folder / "kept")


@pytest.fixture
def stopped(two_epochs):
    """A run that was stopped after two of its three epochs; Lightning wants it where it was made."""
    run, kept = two_epochs
    shutil.rmtree(run.directory)
    shutil.copytree(kept, run.directory)
    return run


def test_loss_in_five_lines():
    config = dataclasses.replace(TINY, views=2)
    data = training_set(config)
    module = GeoCLIPTraining.build(config, data)
    batch = data.__getitems__([(0, i) for i in range(32)])
    values = module.loss(batch, seeded("test"))

    generator, total = seeded("test"), 0.0
    for view in range(2):
        places = torch.cat([batch["latlon"], initial_queue(config, data.latlon)])
        noise = [earth.draw_noise_km(32, 150, generator)]
        noise.append(earth.draw_noise_km(len(places) - 32, 1000, generator))
        places = earth.destination(places, *torch.cat(noise).unbind(-1))
        logits = module.model(batch["image"][:, view], places)
        total -= logits.log_softmax(1)[range(32), range(32)].mean() / 2
    assert values["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    assert values["scale"].item() == pytest.approx(1 / 0.07, rel=1e-5)


def test_all_that_should_learn_does_and_the_queue_follows_the_batch():
    data = training_set(TINY)
    module = GeoCLIPTraining.build(TINY, data)
    batch = data.__getitems__([(0, i) for i in range(32)])
    module.loss(batch, seeded(0))["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert torch.equal(module.queue.contents()[-32:], batch["latlon"])  # raw, without noise
    module.eval()
    module.loss(batch, seeded(1))
    assert torch.equal(module.queue.contents()[-64:-32], initial_queue(TINY, data.latlon)[-32:])


def test_the_queue_starts_with_training_places_or_at_the_origin():
    data = training_set(TINY)
    start = initial_queue(TINY, data.latlon)
    known = {tuple(place) for place in data.latlon.tolist()}
    assert len({tuple(p) for p in start.tolist()}) == 100 and all(tuple(p) in known for p in start.tolist())
    origin = initial_queue(dataclasses.replace(TINY, queue_start="origin"), data.latlon)
    assert torch.allclose(origin.norm(dim=1), torch.ones(100))  # within a degree of (0, 0)
    assert len(initial_queue(dataclasses.replace(TINY, queue=1000), data.latlon)) == 1000  # repeats


def test_each_epoch_sees_each_sample_once_in_another_order():
    sampler = EpochSampler(100, 25, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(i for _, i in first) == list(range(100)) == sorted(i for _, i in second)
    assert [i for _, i in first] != [i for _, i in second]
    assert {epoch for epoch, _ in second} == {1}


def test_tiles_do_not_depend_on_their_batch():
    data = training_set(TINY)
    one = data.__getitems__([(2, 7)])["image"][0]
    among = data.__getitems__([(2, 3), (2, 7), (2, 9)])["image"][1]
    assert torch.allclose(one, among, atol=1e-6)
    assert not torch.allclose(one, data.__getitems__([(1, 7)])["image"][0], atol=1e-2)  # anew in each epoch


def test_fractions_are_nested():
    parts = [training_set(dataclasses.replace(TINY, fraction=f)).latlon for f in (0.1, 0.5, 1)]
    assert [len(part) for part in parts] == [32, 160, 320]
    assert torch.equal(parts[2][:160], parts[1]) and torch.equal(parts[1][:32], parts[0])


def test_a_run_has_its_files_and_answers(unbroken, tile_errors):
    assert unbroken.result["steps"] == 30 and unbroken.result["samples"] == 320
    assert {"train/loss", "val/loss", "epoch", "step"} <= set(unbroken.metrics())
    assert list((unbroken.directory / "tensorboard").glob("events.*"))
    module = unbroken.load()
    errors = tile_errors(module, "random")
    assert errors.shape == (100,) and errors.isfinite().all()
    assert module.config == TINY


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_does_not(unbroken, tmp_path):
    again = weights_of(runs.train(TINY, tmp_path / "again").checkpoint)
    other = weights_of(runs.train(dataclasses.replace(TINY, seed=1), tmp_path / "other").checkpoint)
    kept = weights_of(unbroken.checkpoint)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert not torch.equal(
        kept["model.image_encoder.head.0.weight"], other["model.image_encoder.head.0.weight"]
    )


def test_a_run_that_ended_is_not_repeated(unbroken):
    before = unbroken.checkpoint.stat().st_mtime_ns
    assert runs.train(TINY, unbroken.directory).result == unbroken.result
    assert unbroken.checkpoint.stat().st_mtime_ns == before


@pytest.mark.slow
def test_stopped_early_and_resumed_is_the_same(unbroken, stopped):
    assert not stopped.result_file.exists()
    resumed = runs.train(TINY, stopped.directory)
    assert same_weights(unbroken, resumed)
    pd.testing.assert_frame_equal(resumed.metrics(), unbroken.metrics())  # the curves have no gap and no seam


def test_a_folder_with_another_configuration_is_refused(unbroken):
    with pytest.raises(ValueError, match=r"another configuration.*queue: 100 there, 64 here"):
        runs.train(dataclasses.replace(TINY, queue=64), unbroken.directory)
    assert runs.train(TINY, unbroken.directory).result == unbroken.result  # it was left as it was


def test_checkpoints_that_are_none(unbroken, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path / "none.ckpt")
    text = tmp_path / "text.ckpt"
    text.write_text("hello")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        load_checkpoint(text)
    kept = torch.load(unbroken.checkpoint, weights_only=True)
    kept["geoclip_config"]["location"]["width"] = 8
    torch.save(kept, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="do not fit its configuration"):
        load_checkpoint(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queue": 16}, "batch_size 32 is larger than the queue of 16"),
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\], got 0.0"),
        ({"holdout": 1.0}, r"holdout must be in \[0, 1\), got 1.0"),
        ({"epochs": 0}, "epochs must be at least 1 and finite, got 0"),
        ({"views": 0}, "views must be at least 1"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        ({"noise_m": float("inf")}, "noise_m must be at least 0 and finite, got inf"),
        ({"location": LocationEncoderConfig(dim=100)}, "location.dim 100 differs from image.dim 16"),
    ],
)
def test_configurations_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SplitConfig(train=-1), "splits.train must be at least 1 and finite, got -1"),
        (lambda: TileConfig(pixels=0), "tiles.pixels must be at least 1"),
        (lambda: TileConfig(scale=(-1.0, 2.0)), "tiles.scale must be at least 0"),
        (lambda: LocationEncoderConfig(sigmas=(1.0, -2.0)), "location.sigmas must be at least 0"),
        (lambda: ImageEncoderConfig(dim=0), "image.dim must be at least 1"),
    ],
)
def test_parts_of_configurations_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": "zero"}, "devices must be \"auto\" or a number of at least 1, got 'zero'"),
        ({"devices": 0}, "got 0"),
        ({"devices": 999}, "devices 999: this machine has"),
        ({"nodes": 0}, "nodes must be at least 1, got 0"),
        ({"nodes": 3, "devices": 1}, "batch_size 32 cannot be divided over 3 devices"),
        ({"accelerator": "quantum"}, "accelerator must be auto, cpu or gpu, got 'quantum'"),
    ],
)
def test_devices_that_are_not_there_are_refused_before_anything_starts(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        runs.train(TINY, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="accelerator gpu: no GPU was found"):
        runs.train(TINY, tmp_path / "run", accelerator="gpu")


@pytest.mark.parametrize(
    "text", ["queue: [1, 2", "!!python/object/apply:os.system ['true']", "- 1\n- 2\n", "queue: 1\n\x00"]
)
def test_files_that_are_no_configuration_are_named(text, tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"train\.yaml (is not a YAML file|must hold names and values)"):
        as_config(path)


# Values of the weights of TINY after three epochs. A change that moves them changes what is trained: then raise
# runs.RECIPE, so that kept runs are trained again, and write down the new values.
PINNED = {
    "recipe": 1,
    "model.logit_scale": [2.6405],
    "model.image_encoder.tower.layers.0.weight": [-0.0966, 0.1707, -0.1126, -0.0474],
    "model.image_encoder.head.2.weight": [-0.1491, 0.0878, 0.0802, -0.2235],
    "model.location_encoder.levels.0.frequencies": [1.0918, 0.4400, -1.3148, -0.0202],
    "model.location_encoder.levels.1.mlp.0.weight": [-0.1302, -0.0225, 0.0615, -0.0916],
    "queue.places": [41.8708, -87.6192, 49.2883, -123.1217],
}


def test_a_changed_arithmetic_raises_the_recipe(unbroken):
    assert runs.RECIPE == PINNED["recipe"]
    weights = weights_of(unbroken.checkpoint)
    for name, values in PINNED.items():
        if name != "recipe":
            found = weights[name].flatten()[: len(values)]
            assert torch.allclose(found, torch.tensor(values), atol=2e-4), f"{name}: {found.tolist()}"


def test_the_key_of_a_run_follows_configuration_data_and_recipe(monkeypatch, photo_csv):
    key = runs.run_key(TINY)
    assert runs.run_key(dataclasses.replace(TINY, decay=0.5)) != key
    on_photos = dataclasses.replace(TINY, data=str(photo_csv))
    before = runs.run_key(on_photos)
    photo_csv.write_text(photo_csv.read_text().replace("0.png,", "1.png,", 1))
    assert runs.run_key(on_photos) != before
    monkeypatch.setattr(runs, "RECIPE", 999)
    assert runs.run_key(TINY) != key


def test_a_checkpoint_brings_its_gallery_and_needs_no_training_data(unbroken, monkeypatch):
    monkeypatch.setattr("geoclip.datasets.blue_marble.splits", None)
    model = load_checkpoint(unbroken.checkpoint)
    assert len(model.gallery) == 500 and model.gallery.source == "500 MP-16 places" and not model.training
    kept = weights_of(unbroken.checkpoint)
    assert all(torch.equal(kept[f"model.{name}"], value) for name, value in model.state_dict().items())


def test_a_checkpoint_without_its_tower_knows_the_right_weights(unbroken, tmp_path):
    whole = load_checkpoint(unbroken.checkpoint)
    kept = torch.load(unbroken.checkpoint, weights_only=True)
    kept["state_dict"] = {name: value for name, value in kept["state_dict"].items() if ".tower." not in name}
    kept["geoclip_config"]["image"] |= {"frozen": True, "weights": "gone.ckpt"}
    kept["geoclip_tower"] = tower_hash(whole.image_encoder.tower)
    path = tmp_path / "on_features.ckpt"
    torch.save(kept, path)
    with pytest.raises(FileNotFoundError, match=r"gone\.ckpt"):
        load_checkpoint(path)
    images = torch.rand(2, 3, 32, 32)
    answers = [model.encode_images(images) for model in (whole, load_checkpoint(path, unbroken.checkpoint))]
    assert torch.equal(*answers)
    torch.save(kept | {"geoclip_tower": "0" * 16}, path)
    with pytest.raises(ValueError, match=r"on_features\.ckpt: weights .* are not those .* --clip-weights"):
        load_checkpoint(path, unbroken.checkpoint)


def test_a_checkpoint_of_nan_is_refused(unbroken, tmp_path):
    kept = torch.load(unbroken.checkpoint, weights_only=True)
    kept["state_dict"]["model.image_encoder.head.0.weight"][3, 2] = float("nan")
    torch.save(kept, tmp_path / "nan.ckpt")
    with pytest.raises(
        ValueError, match=r"nan\.ckpt: model\.image_encoder\.head\.0\.weight holds values that are"
    ):
        load_checkpoint(tmp_path / "nan.ckpt")


def test_a_loss_of_nan_ends_training_and_keeps_the_last_good_checkpoint(stopped, monkeypatch):
    before = stopped.checkpoint.read_bytes()
    view_loss = GeoCLIPTraining.view_loss
    monkeypatch.setattr(
        GeoCLIPTraining, "view_loss", lambda *args: tuple(value * float("nan") for value in view_loss(*args))
    )
    with pytest.raises(ValueError, match=r"the loss is nan in epoch 3, step 21: lower learning_rate"):
        runs.train(TINY, stopped.directory)
    assert stopped.checkpoint.read_bytes() == before and not stopped.result_file.exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["evil", "half", "empty", "text"])
def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_used(
    unbroken, stopped, tmp_path, damage, capfd
):
    assert runs.previous(stopped.checkpoint).is_file()
    content = stopped.checkpoint.read_bytes()
    evil = tmp_path / "evil.ckpt"
    torch.save({"state_dict": Evil(tmp_path / "executed")}, evil)
    bad = {"evil": evil.read_bytes(), "half": content[: len(content) // 2], "empty": b"", "text": b"hello"}
    stopped.checkpoint.write_bytes(bad[damage])
    resumed = runs.train(TINY, stopped.directory)
    said = capfd.readouterr().err
    assert "last.ckpt is not a checkpoint" in said and "it was renamed to last.ckpt.damaged" in said
    assert "weights_only" not in said and not (tmp_path / "executed").exists()
    assert same_weights(unbroken, resumed) and resumed.result["resumed"]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


def same_weights(one, other):
    one, other = weights_of(one.checkpoint), weights_of(other.checkpoint)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("step", ["torch.save", "os.replace", "os.fsync"])
def test_a_checkpoint_that_cannot_be_written_leaves_a_good_one(unbroken, tmp_path, monkeypatch, step):
    checkpoint, last = torch.load(unbroken.checkpoint, weights_only=True), tmp_path / "last.ckpt"
    runs.Checkpoints().save_checkpoint(checkpoint, last)
    calls = {"left": 1 if step == "os.replace" else 0}  # the first rename keeps the previous checkpoint

    def fail(*args, **options):
        if calls["left"]:
            calls["left"] -= 1
            return keep(*args, **options)
        raise OSError(28, "No space left on device")

    module, name = step.split(".")
    keep = getattr({"os": os, "torch": torch}[module], name)
    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match=r"last\.ckpt"):
        runs.Checkpoints().save_checkpoint(checkpoint, last)
    monkeypatch.undo()
    assert runs.last_good(last) is not None
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("name", "text"), [("config.yaml", "queue: ["), ("result.json", '{"steps": ')])
def test_a_broken_file_of_a_run_is_named(stopped, name, text):
    (stopped.directory / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        _ = runs.train(TINY, stopped.directory).result


def test_yaml_names_the_wrong_field(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("batchsize: 3\n")
    with pytest.raises(ValueError, match=r"config\.yaml.*batchsize"):
        as_config(path)
    path.write_text("location: {sigmas: [1, 2], width: 8}\nqueue: 7000\n")
    config = as_config(path)
    assert config.location.sigmas == (1, 2) and config.queue == 7000 and config.location.dim == 512
    assert as_config(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_too_few_samples_and_data_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="fewer than one batch"):
        runs.train(dataclasses.replace(TINY, fraction=0.05), tmp_path / "few")
    with pytest.raises(FileNotFoundError, match=r"mine\.csv"):
        runs.train(dataclasses.replace(TINY, data="mine.csv"), tmp_path / "none")


@pytest.mark.slow
def test_the_command_line_trains_and_says_where(unbroken, tmp_path, capsys):
    command = ["train", "--config", str(unbroken.directory / "config.yaml")]
    assert command_line.main([*command, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "10 steps" in said and str(tmp_path / "run" / "last.ckpt") in said
    assert command_line.main([*command, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    assert "ended before: --resume false trains it again" in capsys.readouterr().out
    assert command_line.main([*command, "--queue", "3"]) == 2
    assert "larger than the queue of 3" in capsys.readouterr().err


@pytest.fixture
def photo_csv(tmp_path):
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    rows = ["IMG_FILE,LAT,LON"]
    for i in range(40):
        pixels = generator.integers(0, 255, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{generator.uniform(-60, 70):.4f},{generator.uniform(-170, 170):.4f}")
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_photos_of_a_csv_train_like_any_other_data(photo_csv, tmp_path):
    config = dataclasses.replace(TINY, data=str(photo_csv), views=2, batch_size=20, epochs=2)
    run = runs.train(config, tmp_path / "run")
    assert run.result["steps"] == 4 and run.result["samples"] == 40
    data = training_set(config)
    batch = data.__getitems__([(0, 3), (0, 5)])
    assert batch["image"].shape == (2, 2, 3, 32, 32) and batch["image"].abs().max() <= 1.3
    assert torch.equal(batch["image"][1], data.__getitems__([(0, 5)])["image"][0])  # whatever the batch
    assert not torch.equal(batch["image"][0, 0], batch["image"][0, 1])  # two views
    assert not torch.equal(data.__getitems__([(1, 3)])["image"][0], batch["image"][0])  # two epochs
    assert torch.equal(run.load().queue.contents()[-20:], last_batch(data))


def last_batch(data):
    sampler = EpochSampler(40, 20, TINY.seed)
    sampler.set_epoch(1)
    return data.latlon[[index for _, index in sampler][-20:]]


def test_photos_that_are_missing_or_unreadable_are_left_out(photo_csv, monkeypatch):
    config = dataclasses.replace(TINY, data=str(photo_csv), batch_size=20, epochs=1)
    (photo_csv.parent / "7.png").write_bytes(b"no image")
    (photo_csv.parent / "6.png").unlink()
    data = training_set(config)
    assert len(data) == 39 and data.left_out == {"6.png": "no such file"}
    batch = data.__getitems__([(0, 5), (0, 6)])  # row 6 is photo 7
    assert batch["left_out"] == [("7.png", "not an image in a known format")]
    assert batch["index"].tolist() == [5, 7] and torch.equal(batch["latlon"], data.latlon[[5, 7]])
    assert "left_out" not in data.__getitems__([(0, 5)])
    monkeypatch.setattr("geoclip.training.data.TRIES", 1)
    with pytest.raises(ValueError, match=r"mine: 1 photos in a row cannot be read, the last is 7\.png"):
        data.__getitems__([(0, 6)])
    for path in photo_csv.parent.glob("*.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"mine: none of its 40 photos is in .*, not even 0\.png"):
        training_set(config)


def test_a_hold_out_is_nested_and_whole_by_photographer_or_place():
    places = torch.rand(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 60
    table = pd.DataFrame(places.numpy().round(1), columns=["lat", "lon"])
    table["file"], table["author"] = [f"{i}.jpg" for i in range(300)], [f"{i % 30}" for i in range(300)]
    photos = Geotagged("mine", table)
    kept, held = hold_out(photos, 0.1)
    assert len(held) == 30 and len(kept) == 270 and not set(held.authors) & set(kept.authors)
    assert set(held.table["file"]) < set(hold_out(photos, 0.3)[1].table["file"])
    assert len(hold_out(photos, 0)[1]) == 0
    few = Geotagged("mine", table.assign(author="me", lat=table["lat"].round(-1), lon=table["lon"].round(-1)))
    kept, held = hold_out(few, 0.1)
    assert 30 <= len(held) < 60
    assert not set(map(tuple, held.latlon.tolist())) & set(map(tuple, kept.latlon.tolist()))
    with pytest.raises(ValueError, match=r"mine: holdout 0\.9 of 300 photos leaves none"):
        hold_out(Geotagged("mine", table.assign(author=None, lat=1.0, lon=2.0)), 0.9)


def test_own_photos_are_trained_held_out_and_evaluated(photo_csv, tmp_path, capsys):
    config = dataclasses.replace(TINY, data=str(photo_csv), holdout=0.25, batch_size=16, epochs=1)
    yaml_file = tmp_path / "own.yaml"
    yaml_file.write_text(json.dumps(plain(config)))
    assert command_line.main(["train", "--config", str(yaml_file), "--out", str(tmp_path / "my run")]) == 0
    said = capsys.readouterr().out
    assert "each epoch leaves out 14 of 30 samples" in said and "epoch 1 of 1: " in said
    command = shlex.split(said.partition("evaluate it with: python -m geoclip ")[2].splitlines()[0])
    held = pd.read_csv(tmp_path / "my run" / "holdout.csv")
    assert list(held) == ["IMG_FILE", "LAT", "LON", "AUTHOR"] and len(held) == 10
    assert command_line.main([*command, "--out", str(tmp_path / "table.csv")]) == 0
    table = pd.read_csv(tmp_path / "table.csv").set_index("measure")
    assert table.loc["accuracy", "n"] == 10 and "30 training places of" in table.loc["accuracy", "gallery"]


def test_a_hold_out_needs_photos():
    with pytest.raises(ValueError, match="holdout needs a CSV of photos"):
        training_set(dataclasses.replace(TINY, holdout=0.1))


def train_command(directory, prepare):
    """`geoclip train` in a process of its own, which calls `prepare` first."""
    os.dup2(os.open(directory.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    prepare()
    sys.exit(command_line.main(["train", "--config", f"{directory}.yaml", "--out", str(directory)]))


def started(config, directory, prepare):
    """The process of such a command, once it has written a checkpoint."""
    directory.with_suffix(".yaml").write_text(json.dumps(plain(config)))
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=train_command, args=(directory, prepare))
    process.start()
    deadline = time.monotonic() + 120
    while not (directory / "last.ckpt").is_file() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def ended(process, directory):
    """Its exit status, and what it said on stderr."""
    process.join(120)
    return process.exitcode, directory.with_suffix(".txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_training_with_a_line_and_its_status(tmp_path, sent, status):
    config = dataclasses.replace(TINY, epochs=1000)
    # a process that a shell put into the background ignores SIGINT, and so would what it starts
    prepare = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = started(config, tmp_path / "run", prepare)
    os.kill(process.pid, sent)
    found, error = ended(process, tmp_path / "run")
    assert found == status, error
    assert "training stopped before its end" in error and "holds its last whole epoch" in error
    assert "Traceback" not in error and not (tmp_path / "run" / "result.json").exists()
    assert runs.last_good(tmp_path / "run" / "last.ckpt", set_aside=False) is not None


@pytest.mark.slow
def test_a_full_disk_names_the_file_and_loses_nothing(unbroken, stopped):
    limit = stopped.checkpoint.stat().st_size // 2
    prepare = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    status, error = ended(started(TINY, stopped.directory, prepare), stopped.directory)
    assert status == 2 and "last.ckpt" in error and "Traceback" not in error, error
    assert same_weights(unbroken, runs.train(TINY, stopped.directory))


def train_with(temporary, directory):
    """Train in a process whose temporary files lie in the folder `temporary`."""
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
    runs.train(TINY, directory)


@pytest.mark.slow
def test_twenty_kills_end_in_the_weights_of_the_unbroken_run(unbroken, tmp_path):
    # another file system than the run's
    temporary = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    context, draw = multiprocessing.get_context("forkserver"), random.Random(0)
    kills = runs_ended = 0
    while kills < 20:
        folder = tmp_path / str(runs_ended)
        process, began = context.Process(target=train_with, args=(temporary, folder)), time.monotonic()
        process.start()
        if runs_ended < 2:  # the first starts the server, the second shows how long a run takes
            process.join()
            duration = time.monotonic() - began
        process.join(draw.uniform(0, duration))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        if (folder / "result.json").is_file():
            assert same_weights(unbroken, runs.Run(folder, TINY))
            runs_ended += 1
    assert runs.train(TINY, folder).result["steps"] == 30 and same_weights(unbroken, runs.Run(folder, TINY))
    temporary.rmdir()  # nothing was left in it
