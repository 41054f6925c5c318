"""Two ranks on a CPU do what one does with the same global batch."""

import dataclasses
import functools
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from geoclip import baselines
from geoclip.baselines.context import ContextTraining
from geoclip.datasets.embedding import embed
from geoclip.datasets.sources import Views, open_source
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig
from geoclip.location_encoder import LocationEncoderConfig
from geoclip.training import module as training_module
from geoclip.training import runs
from geoclip.training.config import TrainConfig, plain
from geoclip.training.data import EpochSampler, seeded, training_set
from geoclip.training.module import GeoCLIPTraining


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny model on the features of 640 tiles, whose batch holds the same place twice."""
    folder = tmp_path_factory.mktemp("features")
    encoder = ImageEncoder(ImageEncoderConfig("conv", None, frozen=False), torch.Generator().manual_seed(0))
    kept = {
        "state_dict": {f"model.image_encoder.tower.{n}": t for n, t in encoder.tower.state_dict().items()}
    }
    torch.save(kept, folder / "tower.ckpt")
    image = ImageEncoderConfig("conv", str(folder / "tower.ckpt"), frozen=True, hidden=16, dim=16)
    source = open_source("blue_marble:val")
    embed(source, ImageEncoder(image), folder / "features", Views(number=3), arithmetic="fp32")
    return TrainConfig(
        data=str(folder / "features"), image=image, queue=100, batch_size=64, epochs=2, learning_rate=1e-3,
        location=LocationEncoderConfig(sigmas=(1.0, 16.0), frequencies=16, width=32, hidden_layers=1, dim=16),
    )  # fmt: skip


RANKS = {
    "two on one machine": [["--devices", "2"]],
    "two machines": [["--devices", "1", "--nodes", "2"]] * 2,
}


def start(config, directory, ranks):
    """Start `python -m geoclip train` on these ranks; two machines are two torchrun on this one."""
    yaml_file = directory.parent / "train.yaml"
    yaml_file.write_text(yaml.safe_dump(plain(config)))
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("RANK", "WORLD", "LOCAL_RANK", "MASTER", "NODE"))
    }
    started = []
    for node, options in enumerate(RANKS[ranks]):
        command = [sys.executable]
        if "--nodes" in options:
            where = [
                "--nnodes=2",
                f"--node-rank={node}",
                "--nproc-per-node=1",
                f"--master-port={free_port()}",
            ]
            command += ["-m", "torch.distributed.run", "--master-addr=127.0.0.1", *where]
        command += [
            "-m",
            "geoclip",
            "train",
            "--config",
            yaml_file,
            "--out",
            directory,
            "--accelerator",
            "cpu",
            *options,
        ]
        started.append(subprocess.Popen(
            command, env=env | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ))  # fmt: skip
    return started


def trained(config, directory, ranks):
    """What `python -m geoclip train` leaves in `directory`."""
    started = start(config, directory, ranks)
    said = [process.communicate(timeout=180)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(said)[-3000:]
    assert "".join(said).count("evaluate it with") == 1  # one rank speaks for all
    return torch.load(directory / "last.ckpt", weights_only=True)["state_dict"]


def alone(config, directory):
    """What training in this process leaves in `directory`."""
    run = runs.train(config, directory, accelerator="cpu", devices=1)
    return torch.load(run.checkpoint, weights_only=True)["state_dict"]


@functools.cache
def free_port():
    """A port that nobody listens on, the same for both machines."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_two_ranks_give_the_weights_queue_and_loss_of_one(config, tmp_path, monkeypatch):
    one = alone(config, tmp_path / "one")
    others = [trained(config, tmp_path / ranks.replace(" ", "-"), ranks) for ranks in RANKS]
    new = GeoCLIPTraining.build(config, training_set(config)).state_dict()
    moved = [(one[name] - new[name]).abs().max().item() for name in one if name.endswith("weight")]
    assert min(moved) > 1e-3  # a hundred times more than they may differ
    monkeypatch.setattr(runs, "fit", None)
    for rank in range(2):  # given again, what has ended is left as it is, by all ranks
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        runs.train(config, tmp_path / "two-machines", devices=1, nodes=2)
    for two in others:
        assert one.keys() == two.keys()
        for name in one:
            assert torch.allclose(one[name].float(), two[name].float(), atol=1e-5), name
        for name in ("places", "oldest"):
            assert torch.equal(one[f"queue.{name}"], two[f"queue.{name}"])


@pytest.mark.slow
def test_models_with_captions_train_on_two_ranks(tmp_path):
    """The text tower is unused after the caption epochs and the heads are unused before."""
    settings = {"image": {"tower": "conv", "weights": None, "frozen": False}, "tiles": {"pixels": 16}}
    settings |= {"epochs": 2, "caption_epochs": 1, "batch_size": 32, "hidden": 16, "caption_dim": 16}
    settings |= {"heads": ["climate", "country"], "caption": "a photo in {country}, {climate} climate"}
    settings["splits"] = {"train": 128, "val": 32, "test": 32, "gallery": 500}
    config = baselines.as_config({"model": "context"} | settings)
    state = trained(config, tmp_path / "run", "two on one machine")
    one = runs.train(config, tmp_path / "one", ContextTraining, accelerator="cpu", devices=1)
    weights = torch.load(one.checkpoint, weights_only=True)["state_dict"]
    new = ContextTraining.build(config, ContextTraining.training_set(config)).state_dict()
    # single weights with a gradient near 0 may go either way with Adam
    for name in (name for name in new if name.endswith("weight")):
        moved, apart = (weights[name] - new[name]).abs().mean(), (weights[name] - state[name]).abs().mean()
        assert apart < 0.05 * moved, name


@pytest.mark.slow
def test_sigterm_ends_both_ranks_and_a_rerun_resumes(config, tmp_path):
    long = dataclasses.replace(config, epochs=20)
    [process] = start(long, tmp_path / "run", "two on one machine")
    while not (tmp_path / "run" / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 143 and "rerun the command to resume" in said
    assert psutil.wait_procs(ranks, timeout=10)[1] == []
    assert not (tmp_path / "run" / "result.json").exists()
    resumed = trained(long, tmp_path / "run", "two on one machine")
    for name, weight in alone(long, tmp_path / "one").items():
        assert torch.allclose(weight.float(), resumed[name].float(), atol=1e-3), name


def test_each_rank_sees_the_others_places_as_negatives(config, monkeypatch):
    """The mean of two ranks' losses is the loss of the whole batch, to 1e-5; without the others' places it is not."""
    data = training_set(config)
    module = GeoCLIPTraining.build(config, data).eval()
    batch = data.__getitems__([(0, i) for i in range(64)])
    whole = module.loss(batch, seeded("step"))["loss"].item()
    halves = []
    for rank in range(2):
        half = {name: value[rank * 32 : rank * 32 + 32] for name, value in batch.items()}
        monkeypatch.setattr(training_module, "gather", lambda *_: batch["latlon"])
        monkeypatch.setattr(type(module), "global_rank", rank)
        halves.append(module.loss(half, seeded("step"))["loss"].item())
    assert sum(halves) / 2 == pytest.approx(whole, abs=1e-5)
    monkeypatch.setattr(training_module, "gather", lambda latlon, _: latlon)
    monkeypatch.setattr(type(module), "global_rank", 0)
    alone = module.loss({name: value[:32] for name, value in batch.items()}, seeded("step"))["loss"].item()
    assert abs(alone - halves[0]) > 1e-3


def test_ranks_divide_each_global_batch():
    whole = EpochSampler(130, 32, seed=4)
    parts = [EpochSampler(130, 32, seed=4, rank=rank, ranks=4) for rank in range(4)]
    for sampler in (whole, *parts):
        sampler.set_epoch(3)
    order, shares = list(whole), [list(part) for part in parts]
    assert len(order) == 128 and all(len(share) == 32 == len(parts[0]) for share in shares)
    for batch in range(4):
        together = [key for share in shares for key in share[batch * 8 : batch * 8 + 8]]
        assert together == order[batch * 32 : batch * 32 + 32]
    with pytest.raises(ValueError, match="cannot be divided over 3 devices"):
        EpochSampler(130, 32, seed=4, rank=0, ranks=3)
