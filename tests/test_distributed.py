"""Two ranks on a CPU do what one does with the same global batch."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from geoclip import training
from geoclip.features import embed
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig
from geoclip.location_encoder import LocationEncoderConfig
from geoclip.sources import Views, open_source

# Lightning starts the second rank as this script again, so it is a script, as it is with `python -m geoclip train`.
SCRIPT = """
    import json, sys
    import torch
    from geoclip import training

    torch.set_num_threads(1)
    directory, devices, values = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    config = training.as_config(values)
    run = training.train(config, directory, devices=devices, accelerator="cpu")
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny model on the features of 640 tiles, whose batch holds the same place twice."""
    folder = tmp_path_factory.mktemp("features")
    encoder = ImageEncoder(ImageEncoderConfig("conv", None, frozen=False), torch.Generator().manual_seed(0))
    kept = {"state_dict": {f"model.image_encoder.tower.{n}": t for n, t in encoder.tower.state_dict().items()}}
    torch.save(kept, folder / "tower.ckpt")
    image = ImageEncoderConfig("conv", str(folder / "tower.ckpt"), frozen=True, hidden=16, dim=16)
    source = open_source("blue_marble:val")
    embed(source, ImageEncoder(image), folder / "features", Views(number=3), arithmetic="fp32")
    return training.TrainConfig(
        data=str(folder / "features"), image=image, queue=100, batch_size=64, epochs=2, learning_rate=1e-3,
        location=LocationEncoderConfig(sigmas=(1.0, 16.0), frequencies=16, width=32, hidden_layers=1, dim=16),
    )  # fmt: skip


def trained(config, directory, devices):
    script = directory.parent / "train_it.py"
    script.write_text(textwrap.dedent(SCRIPT))
    values = json.dumps(training.plain(dataclasses.asdict(config)))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "LOCAL_RANK", "MASTER", "NODE"))}
    done = subprocess.run(
        [sys.executable, script, directory, str(devices), values], env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(directory / "last.ckpt", weights_only=True)["state_dict"]


def test_two_ranks_give_the_weights_queue_and_loss_of_one(config, tmp_path):
    one, two = (trained(config, tmp_path / str(devices), devices) for devices in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name].float(), two[name].float(), atol=1e-5), name
    start = training.build(config, training.training_set(config)).state_dict()
    moved = [(one[name] - start[name]).abs().max().item() for name in one if name.endswith("weight")]
    assert min(moved) > 1e-3  # a hundred times more than the two may differ
    assert torch.equal(one["queue.places"], two["queue.places"]) and torch.equal(one["queue.oldest"], two["queue.oldest"])


def test_each_rank_sees_the_others_places_as_negatives(config, monkeypatch):
    """The mean of two ranks' losses is the loss of the whole batch, to 1e-5; without the others' places it is not."""
    data = training.training_set(config)
    module = training.build(config, data).eval()
    batch = data.__getitems__([(0, i) for i in range(64)])
    whole = module.loss(batch, training.seeded("step"))["loss"].item()
    halves = []
    for rank in range(2):
        half = {name: value[rank * 32 : rank * 32 + 32] for name, value in batch.items()}
        monkeypatch.setattr(training, "gather", lambda *_: batch["latlon"])
        monkeypatch.setattr(type(module), "global_rank", rank)
        halves.append(module.loss(half, training.seeded("step"))["loss"].item())
    assert sum(halves) / 2 == pytest.approx(whole, abs=1e-5)
    monkeypatch.setattr(training, "gather", lambda latlon, _: latlon)
    monkeypatch.setattr(type(module), "global_rank", 0)
    alone = module.loss({name: value[:32] for name, value in batch.items()}, training.seeded("step"))["loss"].item()
    assert abs(alone - halves[0]) > 1e-3


def test_ranks_divide_each_global_batch():
    whole = training.EpochSampler(130, 32, seed=4)
    parts = [training.EpochSampler(130, 32, seed=4, rank=rank, ranks=4) for rank in range(4)]
    for sampler in (whole, *parts):
        sampler.set_epoch(3)
    order, shares = list(whole), [list(part) for part in parts]
    assert len(order) == 128 and all(len(share) == 32 == len(parts[0]) for share in shares)
    for batch in range(4):
        together = [key for share in shares for key in share[batch * 8 : batch * 8 + 8]]
        assert together == order[batch * 32 : batch * 32 + 32]
    with pytest.raises(ValueError, match="cannot be divided over 3 devices"):
        training.EpochSampler(130, 32, seed=4, rank=0, ranks=3)
