"""Training: the loss by hand, order of samples, exact resume after SIGKILL, bad configurations."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch

from geoclip import earth
from geoclip.datasets.blue_marble import SplitConfig, TileConfig
from geoclip.image_encoder import ImageEncoderConfig
from geoclip.location_encoder import LocationEncoderConfig
from geoclip.training import runs
from geoclip.training.config import TrainConfig, as_config
from geoclip.training.data import EpochSampler, seeded, training_set
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


def test_loss_in_five_lines():
    config = dataclasses.replace(TINY, views=2)
    data = training_set(config)
    module = GeoCLIPTraining.build(config, data)
    batch = data.__getitems__([(0, i) for i in range(32)])
    values = module.loss(batch, seeded("test"))

    generator, total = seeded("test"), 0.0
    for view in range(2):
        places = earth.add_noise_m(batch["latlon"], 150, generator)
        places = torch.cat([places, earth.add_noise_m(initial_queue(config, data.latlon), 1000, generator)])
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


def test_ranks_share_out_each_global_batch():
    alone = [i for _, i in EpochSampler(110, 20, seed=3)]
    ranks = [[i for _, i in EpochSampler(110, 20, 3, rank, ranks=2)] for rank in range(2)]
    assert len(alone) == 100 and len(ranks[0]) == 50
    for b in range(5):
        assert alone[20 * b : 20 * b + 20] == ranks[0][10 * b : 10 * b + 10] + ranks[1][10 * b : 10 * b + 10]


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


def test_a_run_has_its_files_and_answers(unbroken):
    assert unbroken.result["steps"] == 30 and unbroken.result["samples"] == 320
    assert {"train/loss", "val/loss", "epoch", "step"} <= set(unbroken.metrics())
    assert list((unbroken.directory / "tensorboard").glob("events.*"))
    module = unbroken.load()
    errors = runs.tile_errors(module, "random")
    assert errors.shape == (100,) and errors.isfinite().all()
    assert module.config == TINY


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


def test_killed_and_resumed_ends_with_the_weights_of_the_unbroken_run(unbroken, tmp_path):
    directory = tmp_path / "killed"
    config = tmp_path / "config.yaml"
    config.write_text((unbroken.directory / "config.yaml").read_text())
    command = [sys.executable, "-m", "geoclip", "train", "--config", str(config), "--out", str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (directory / "last.ckpt").is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (directory / "last.ckpt").is_file()
    assert not (directory / "result.json").exists(), "it ended before it was killed: make the run longer"
    reached = torch.load(directory / "last.ckpt", weights_only=True)["epoch"]
    assert reached < TINY.epochs - 1

    resumed = runs.train(TINY, directory)
    assert resumed.result["resumed"]
    kept, ours = weights_of(unbroken.checkpoint), weights_of(resumed.checkpoint)
    assert all(torch.equal(kept[name], ours[name]) for name in kept)


def test_stopped_early_and_resumed_is_the_same(unbroken, tmp_path):
    stopped = runs.train(TINY, tmp_path / "stopped", epochs=1)
    assert not (stopped.directory / "result.json").exists()
    resumed = runs.train(TINY, stopped.directory)
    kept, ours = weights_of(unbroken.checkpoint), weights_of(resumed.checkpoint)
    assert all(torch.equal(kept[name], ours[name]) for name in kept)
    pd.testing.assert_frame_equal(resumed.metrics(), unbroken.metrics())  # the curves have no gap and no seam


def test_a_folder_with_another_configuration_is_refused(unbroken):
    with pytest.raises(ValueError, match=r"another configuration.*queue: 100 there, 64 here"):
        runs.train(dataclasses.replace(TINY, queue=64), unbroken.directory)
    assert runs.train(TINY, unbroken.directory).result == unbroken.result  # it was left as it was


def test_checkpoints_that_are_none(unbroken, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        runs.load(tmp_path / "none.ckpt")
    text = tmp_path / "text.ckpt"
    text.write_text("hello")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        runs.load(text)
    kept = torch.load(unbroken.checkpoint, weights_only=True)
    kept["geoclip_config"]["location"]["width"] = 8
    torch.save(kept, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="do not fit its configuration"):
        runs.load(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queue": 16}, "batch_size 32 is larger than the queue of 16"),
        ({"fraction": 0.0}, "fraction"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"views": 0}, "views"),
    ],
)
def test_configurations_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


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


def test_the_command_line_trains_and_says_where(unbroken, tmp_path):
    command = [sys.executable, "-m", "geoclip", "train", "--config", str(unbroken.directory / "config.yaml")]
    done = subprocess.run(
        [*command, "--epochs", "1", "--out", str(tmp_path / "run")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "10 steps" in done.stdout and str(tmp_path / "run" / "last.ckpt") in done.stdout
    wrong = subprocess.run([*command, "--queue", "3"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "larger than the queue of 3" in wrong.stderr
    assert "Traceback" not in wrong.stderr


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


def test_a_photo_that_is_missing_or_unreadable_is_named(photo_csv, tmp_path):
    config = dataclasses.replace(TINY, data=str(photo_csv), batch_size=20, epochs=1)
    (photo_csv.parent / "7.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"7\.png"):
        runs.train(config, tmp_path / "unreadable")
    (photo_csv.parent / "7.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"mine\.csv: 1 of 40 photos.*7\.png"):
        runs.train(config, tmp_path / "missing")
