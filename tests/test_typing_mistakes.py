"""The README's commands, with a typing mistake each, end with one line that names the mistake."""

import shlex

import pytest

from geoclip import __main__ as command_line
from geoclip import paths

MISTAKES = {
    "predict nosuch.jpg": "nosuch.jpg: no such file",
    "predict photo.jpg --top-k five": "--top-k: must be a positive integer",
    "predict photo.jpg --top-k 0": "--top-k: must be a positive integer",
    "predict photo.jpg --decision disc": "--decision: choose from argmax, mode, median, geoscore and disc:KM",
    "predict photo.jpg --map map.xyz": "--map map.xyz: the name must end in .png",
    "predict photo.jpg --fromat json": "unrecognized arguments: --fromat",
    "predict": "give photos, or --text",
    "predct photo.jpg": "no command 'predct'; choose from",
    "dataset nosuch --out h.csv": "nosuch: no such folder",
    "dataset photos": "required: --out",
    "train --config train_embeded.yaml --out run": "train_embeded.yaml: No such file",
    "train --confg train_embedded --out run": "unrecognized arguments: --confg",
    "train --config PROFILES/train_embedded.yaml --out run --epochs three": "--epochs: Expected a",
    "train --config PROFILES/train_embedded.yaml --out run --holdout 2": "holdout must be in [0, 1)",
    "train --config PROFILES/train_own_photos.yaml --data nosuch.csv --out run": "nosuch.csv",
    "train --config PROFILES/train_paper.yaml --data features/nosuch --out run": "features/nosuch",
    "evaluate --checkpoint nosuch.ckpt": "no checkpoint at nosuch.ckpt",
    "evaluate --checkpoint places.csv": "places.csv is not a checkpoint",
    "evaluate --benchmark im2gps3 --gallery official": "unknown benchmark 'im2gps3'; choose from",
    "evaluate --benchmark im2gps3k --gallery official": "GEOCLIP_DATA, which is not set",
    "calibrate": "required: --checkpoint",
    "calibrate --checkpoint nosuch.ckpt": "no checkpoint at nosuch.ckpt",
    "gps-embed nosuch.csv --out p.npy": "nosuch.csv: no such file",
    "gps-embed places.csv --out p.xyz": "--out p.xyz: the name must end in",
    "gps-embed places.csv --out p.npy --levels all": "--levels: invalid choice: 'all'",
    "shards nosuch.csv --places places.csv --out shards": "nosuch.csv: no such file",
    "shards places.csv --places places.csv --out shards": "places.csv, line 1: 'lat,lon' is not an http address",
    "embed 'shards/{00000..00472}.tar' --out features/x": (
        "shards/00000.tar: no such tar on this machine; 473 of 473 are missing"
    ),
    "embed places.csv --out features/x": "places.csv: no column for file",
    "sweep nosuch.ipynb": "there is no notebook 'nosuch.ipynb'",
    "sweep 04 --shard 5/4 --dry-run": "not '5/4'",
    "sweep 04 --profile papr --dry-run": "there is no profile",
    "sweep 04 --seeds 0 --dry-run": "--seeds: must be a positive integer",
    "reproduce --only 77": "there is no notebook '77'",
    "accept 77": "there is no notebook '77'",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_typing_mistake_is_named_in_one_line(typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GEOCLIP_DATA", raising=False)
    (tmp_path / "places.csv").write_text("lat,lon\n48.8,2.3\n")
    (tmp_path / "photo.jpg").write_bytes(b"")
    profiles = str(paths.NOTEBOOKS / "profiles")
    arguments = [word.replace("PROFILES", profiles) for word in shlex.split(typed)]
    assert command_line.main(arguments) == 2
    said = capsys.readouterr().err
    assert MISTAKES[typed] in said and said.startswith("geoclip: error: ") and "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} <= {"places.csv", "photo.jpg"}  # nothing is left behind
