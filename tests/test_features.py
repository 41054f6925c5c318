"""Features: what is embedded is right and whole, whatever ends a run; a training set reads it without loss."""

import dataclasses
import errno
import http.server
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from geoclip.__main__ import main
from geoclip.datasets import benchmarks, embedding, features, sources
from geoclip.datasets.embedding import embed
from geoclip.datasets.features import FeatureData
from geoclip.datasets.sources import Views, open_source
from geoclip.gallery import Gallery
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig, Preprocessing, load_clip
from geoclip.location_encoder import LocationEncoder, LocationEncoderConfig
from geoclip.model import GeoCLIP
from geoclip.reproduce import rehearsal
from geoclip.training.config import TrainConfig
from geoclip.training.runs import train

CONV = ImageEncoderConfig("conv", None, frozen=False, hidden=8, dim=4)
PHOTOS = 24


@pytest.fixture(scope="module")
def encoder():
    return ImageEncoder(CONV, torch.Generator().manual_seed(1))


def picture(number: int) -> Image.Image:
    """A smooth picture that differs from all others, 96 × 64."""
    x, y = np.meshgrid(np.linspace(0, 1, 96), np.linspace(0, 1, 64))
    waves = [np.sin(number + 7 * x + k * y) for k in range(3)]
    return Image.fromarray(((np.stack(waves, -1) + 1) * 127).astype(np.uint8))


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "JPEG", quality=92)
    return file.getvalue()


@pytest.fixture
def photos(tmp_path):
    """A CSV of 24 photos, of which one is truncated, one is text, one is empty and one is missing."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(PHOTOS):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    (folder / "3.jpg").write_bytes(jpeg(3)[:700])
    (folder / "7.jpg").write_text("not a photo")
    (folder / "11.jpg").write_bytes(b"")
    (folder / "15.jpg").unlink()
    table = pd.DataFrame({"IMG_FILE": [f"{n}.jpg" for n in range(PHOTOS)]})
    table["LAT"], table["LON"] = np.linspace(-50, 60, PHOTOS), np.linspace(-170, 175, PHOTOS)
    table.to_csv(folder / "photos.csv", index=False)
    return folder / "photos.csv"


def tar_of(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def shard(path, numbers, about=None):
    samples = []
    for number in numbers:
        place = {"LAT": number, "LON": -number, "IMG_ID": f"photo{number}"} | (about or {})
        samples += [(f"{number:05d}.jpg", jpeg(number)), (f"{number:05d}.json", json.dumps(place).encode())]
    tar_of(path, samples)


def whole(folder) -> dict[str, bytes]:
    """Everything in a folder of features that must be the same however it was made."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("shard-*/*"))}


def keys(data, epoch=0):
    return [(epoch, index) for index in range(len(data))]


def test_photos_become_features_and_the_others_are_listed(photos, tmp_path, encoder):
    out = tmp_path / "out"
    report = embed(
        open_source(str(photos), photos_a_part=10), encoder, out, Views(number=3), arithmetic="fp32"
    )
    assert (report.embedded, report.unreadable, report.failed) == (20, 4, ())
    data = FeatureData(out, CONV)
    assert data.ids() == [f"{n}.jpg" for n in range(PHOTOS) if n not in (3, 7, 11, 15)]
    assert data.latlon[0].tolist() == pytest.approx([-50, -170])
    assert (len(data), data.views, data.dim) == (20, 3, encoder.feature_dim)
    listed = pd.read_csv(out / "unreadable.csv")
    assert listed["id"].tolist() == ["3.jpg", "7.jpg", "11.jpg", "15.jpg"]
    reasons = listed["reason"].tolist()
    assert "truncated" in reasons[0] and "not an image" in reasons[1]
    assert reasons[2:] == ["empty (0 bytes)", "no such file"]

    # view 0 is what the tower says of the photo as prediction prepares it: short side 32, centre cut out
    image = (
        Image.open(photos.parent / "5.jpg").resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = encoder.features(pixels)[0]
    row = data.ids().index("5.jpg")
    assert torch.allclose(data.tensor()[row, 0].float(), expected, atol=2e-3)
    assert not torch.allclose(data.tensor()[row, 1].float(), expected, atol=2e-3)  # another crop


def test_number_of_workers_and_ranks_does_not_change_the_features(photos, tmp_path, encoder):
    source = open_source(str(photos), photos_a_part=5)
    embed(source, encoder, tmp_path / "one", Views(number=2))
    embed(source, encoder, tmp_path / "workers", Views(number=2), workers=2)
    for rank in (1, 0, 2):  # in any order, one after the other or together
        embed(source, encoder, tmp_path / "ranks", Views(number=2), rank=rank, world=3)
    assert len(whole(tmp_path / "one")) == 5 * 5
    assert whole(tmp_path / "one") == whole(tmp_path / "workers") == whole(tmp_path / "ranks")
    listed = [(tmp_path / name / "unreadable.csv").read_text() for name in ("one", "workers", "ranks")]
    assert listed[0].count("\n") == 5 and len(set(listed)) == 1


@pytest.mark.slow
def test_tars_local_and_over_http(tmp_path, encoder):
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(3):
        shard(folder / f"{number:03d}.tar", range(number * 4, number * 4 + 4))
    pattern = str(folder / "{000..002}.tar")
    report = embed(open_source(pattern), encoder, tmp_path / "local")
    assert (report.embedded, report.unreadable) == (12, 0)
    data = FeatureData(tmp_path / "local")
    assert data.ids() == [f"photo{n}" for n in range(12)]
    assert data.latlon.tolist() == [[n, -n] for n in range(12)]
    with rehearsal.serving(files_of(folder)) as address:
        report = embed(open_source(f"{address}/{{000..003}}.tar"), encoder, tmp_path / "http")
    assert report.embedded == 12 and [part for part, _ in report.failed] == [3]  # 003.tar is a 404
    with pytest.raises(ValueError, match=r"incomplete: 1 of 4 shards are missing, the first is 3"):
        FeatureData(tmp_path / "http")
    one, other = whole(tmp_path / "local"), whole(tmp_path / "http")
    assert [other[name] for name in one if name.endswith("npy")] == [one[n] for n in one if n.endswith("npy")]


def files_of(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *request):
            super().__init__(*request, directory=str(folder))

        def log_message(self, *_):
            pass

    return Quiet


@pytest.mark.parametrize("cut", [100, 512 + 700, -1024 - 512])
def test_a_tar_that_was_cut_short_makes_no_shard(tmp_path, encoder, cut):
    shard(tmp_path / "0.tar", range(4))
    tar_bytes = (tmp_path / "0.tar").read_bytes().rstrip(b"\0")
    tar_bytes += b"\0" * (-len(tar_bytes) % 512) + b"\0" * 1024
    (tmp_path / "0.tar").write_bytes(tar_bytes[:cut])
    report = embed(open_source(str(tmp_path / "0.tar")), encoder, tmp_path / "out")
    assert [part for part, _ in report.failed] == [0] and "0.tar" in report.failed[0][1]
    assert not list((tmp_path / "out").glob("shard-*"))


def test_samples_without_a_place_are_listed(tmp_path, encoder):
    bad = [
        (b"{}", "no coordinates"),
        (b'{"LAT": 95, "LON": 3}', "95"),
        (b'{"LAT": "x", "LON": 3}', "no coordinates"),
    ]
    samples = [("0.jpg", jpeg(0)), ("0.json", b'{"latitude": 1.5, "longitude": 180}')]
    for number, (about, _) in enumerate(bad, 1):
        samples += [(f"{number}.jpg", jpeg(number)), (f"{number}.json", about)]
    tar_of(tmp_path / "0.tar", [*samples, ("9.json", b'{"LAT": 1, "LON": 1}')])
    report = embed(open_source(str(tmp_path / "0.tar")), encoder, tmp_path / "out")
    assert (report.embedded, report.unreadable) == (1, 4)
    assert FeatureData(tmp_path / "out").latlon.tolist() == [[1.5, -180.0]]
    reasons = pd.read_csv(tmp_path / "out" / "unreadable.csv")["reason"].tolist()
    assert all(part in reason for (_, part), reason in zip(bad, reasons, strict=False)), reasons
    assert "no photo" in reasons[3]


def test_odd_members_of_a_tar_are_listed_and_the_others_embedded(tmp_path, encoder):
    place = b'{"LAT": 1, "LON": 2}'
    tar_of(tmp_path / "0.tar", [
        ("a.jpg", jpeg(1)), ("a.json", place),
        ("twice.jpg", jpeg(2)), ("twice.jpg", jpeg(3)), ("twice.json", place),
        ("deep.jpg", jpeg(4)), ("deep.json", b"[" * 100_000),
        ("huge.jpg", jpeg(5)), ("huge.json", b'{"LAT": ' + b"9" * 400 + b', "LON": 2}'),
        ("two\nlines.jpg", jpeg(6)), ("two\nlines.json", place),
        ("caf\udce9.jpg", jpeg(7)), ("caf\udce9.json", place),
        ("README", b"text"),
        ("z.jpg", jpeg(8)), ("z.json", place),
    ])  # fmt: skip
    report = embed(open_source(str(tmp_path / "0.tar")), encoder, tmp_path / "out")
    assert report.failed == ()
    assert FeatureData(tmp_path / "out").ids() == ["a", "twice", "z"]
    listed = pd.read_csv(tmp_path / "out/unreadable.csv").set_index("id")["reason"]
    assert set(listed.index) == {"deep", "huge", "two\\nlines", "caf\\udce9", "twice.jpg"}
    assert listed["twice.jpg"].startswith("twice.jpg: duplicate file name")
    assert listed["two\\nlines"] == "its name contains a line break; rename it"
    assert listed["caf\\udce9"] == "its name is not UTF-8; rename it"


def test_odd_names_in_a_csv_are_listed(photos, tmp_path, encoder):
    with photos.open("a") as file:
        file.write('"two\nlines.jpg",1,2\n' + "x" * 400 + ".jpg,1,2\n0.jpg\0,1,2\n")
    report = embed(open_source(str(photos)), encoder, tmp_path / "out")
    assert (report.embedded, report.unreadable) == (20, 7)
    assert "File name too long" in (tmp_path / "out/unreadable.csv").read_text()


def test_a_pipe_runs_a_command_only_if_it_is_allowed(tmp_path, encoder, capsys):
    shard(tmp_path / "0.tar", range(2))
    for pipe in (
        f"pipe:cat {tmp_path}/0.tar",
        f" PIPE:cat {tmp_path}/0.tar",
        f"pipe:touch {tmp_path}/ran; curl a://b.tar",
    ):
        assert (
            main(["embed", pipe, "--out", str(tmp_path / "out"), "--tower", "conv", "--weights", "null"]) == 2
        )
        assert "--allow-pipe" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    source = open_source(f"pipe:cat {tmp_path}/0.tar", allow_pipe=True)
    assert embed(source, encoder, tmp_path / "out").embedded == 2


def test_options_below_their_least_value_are_refused_by_name(tmp_path, capsys):
    for option, value in (
        ("views", 0),
        ("batch-size", 0),
        ("shard-size", -1),
        ("workers", -1),
        ("devices", 0),
        ("seed", -1),
    ):
        assert main(["embed", "none.csv", "--out", str(tmp_path), f"--{option}", str(value)]) == 2
        assert f"error: --{option}: must be " in capsys.readouterr().err


@pytest.mark.slow
def test_random_weights_are_the_same_each_time():
    torch.manual_seed(1)
    towers = [load_clip("ViT-S-32-alt", None) for _ in range(2)]
    assert features.tower_hash(towers[0]) == features.tower_hash(towers[1])
    assert torch.initial_seed() == 1


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped byte": ("features.npy", lambda path: flip(path, -1), "features.npy has changed"),
    "a flipped byte of the header": ("features.npy", lambda path: flip(path, 3), "features.npy has changed"),
    "truncated": ("features.npy", lambda path: os.truncate(path, path.stat().st_size // 2), "features.npy has changed"),
    "empty features": ("features.npy", lambda path: path.write_bytes(b""), "features.npy has changed"),
    "no features": ("features.npy", lambda path: path.unlink(), "No such file"),
    "another shape": (
        "features.npy", lambda path: np.save(path, np.zeros((5, 3, 2), np.float16)), "features.npy has changed"
    ),
    "places": ("latlon.npy", lambda path: flip(path, -1), "latlon.npy has changed"),
    "names": ("ids.txt", lambda path: flip(path, 0), "ids.txt has changed"),
    "half a description": ("shard.json", lambda path: os.truncate(path, 40), "shard.json does not describe"),
    "another description": ("shard.json", lambda path: path.write_text("[]"), "does not describe features"),
    "another number": (
        "shard.json", lambda path: path.write_text(path.read_text().replace('"n": 11', '"n": 12')), "has shape",
    ),
    "no description": ("shard.json", lambda path: path.unlink(), "shard.json does not describe"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_shard_is_named_and_made_again(photos, tmp_path, encoder, what, capsys):
    source, out = open_source(str(photos), photos_a_part=12), tmp_path / "out"
    embed(source, encoder, out)
    before = whole(out)
    name, damage, message = DAMAGE[what]
    damage(out / "shard-000001" / name)
    with pytest.raises(ValueError, match=f"shard-000001 is damaged: .*({message})|{message}"):
        FeatureData(out, CONV)
    report = embed(source, encoder, out)
    assert "shard-000001" in capsys.readouterr().err
    assert (report.embedded, report.found, report.failed) == (11, 9, ())
    assert whole(out) == before
    FeatureData(out, CONV)


@pytest.mark.slow
def test_three_hundred_damaged_feature_folders_are_named_or_read_unchanged(photos, tmp_path, encoder):
    embed(open_source(str(photos)), encoder, tmp_path)
    good, draw = FeatureData(tmp_path), random.Random(0)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.suffix in (".npy", ".json", ".txt")]
    for _ in range(300):
        path = draw.choice(files)
        content = path.read_bytes()
        if draw.random() < 0.3:
            path.write_bytes(content[: draw.randrange(len(content))])
        else:
            flip(path, draw.randrange(len(content)))
        try:
            data = FeatureData(tmp_path)
            assert data.ids() == good.ids() and torch.equal(data.latlon, good.latlon)
            assert torch.equal(data.tensor(), good.tensor())
        except ValueError as error:
            assert str(tmp_path) in str(error)
        path.write_bytes(content)


def test_a_damaged_description_of_the_folder_is_named(photos, tmp_path, encoder):
    out = tmp_path / "out"
    embed(open_source(str(photos)), encoder, out)
    described = (out / "features.json").read_text()
    for text, message in (
        ("{", "features.json does not describe"),
        (described.replace("recipe", "code"), "this version"),
    ):
        (out / "features.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            FeatureData(out)
    (out / "unreadable.csv").write_bytes(b"\xff\0\n")  # a report, which is written again
    (out / "features.json").write_text(described)
    embed(open_source(str(photos)), encoder, out)
    assert len(pd.read_csv(out / "unreadable.csv")) == 4


def test_large_shards_are_sampled_and_verified_in_full_on_request(photos, tmp_path, encoder, monkeypatch):
    embed(open_source(str(photos)), encoder, tmp_path)
    path = tmp_path / "shard-000000" / "features.npy"
    monkeypatch.setattr(features, "SMALL_BYTES", 1000)
    monkeypatch.setattr(features, "BLOCKS", 2)
    monkeypatch.setattr(features, "BLOCK_BYTES", 512)
    about = path.with_name("shard.json")
    known = json.loads(about.read_text()) | {"sampled_sha256": features.file_hash(path, 2)}
    about.write_text(json.dumps(known))
    FeatureData(tmp_path)
    flip(path, path.stat().st_size // 2)  # between the two blocks
    FeatureData(tmp_path)
    with pytest.raises(ValueError, match=r"features\.npy has changed"):
        FeatureData(tmp_path, full=True)
    flip(path, path.stat().st_size // 2)
    flip(path, -1)
    with pytest.raises(ValueError, match=r"features\.npy has changed"):
        FeatureData(tmp_path)


def test_features_that_are_not_finite_are_neither_written_nor_read(photos, tmp_path, encoder):
    embed(open_source(str(photos)), encoder, tmp_path / "out")
    data = FeatureData(tmp_path / "out")
    stored = np.load(tmp_path / "out/shard-000000/features.npy", mmap_mode="r+")
    for value in (np.nan, np.inf):
        stored[7, 0, 3] = value
        stored.flush()
        with pytest.raises(
            ValueError, match=r"shard-000000 is damaged: features\.npy has values that are not finite"
        ):
            data.__getitems__(keys(data))
    broken = ImageEncoder(CONV, torch.Generator().manual_seed(1))
    next(broken.tower.parameters()).data[0] = np.nan
    with pytest.raises(ValueError, match=r"shard 0: the features of 0\.jpg are not finite"):
        embed(open_source(str(photos)), broken, tmp_path / "broken")
    assert not list((tmp_path / "broken").glob("*shard*"))


def test_a_killed_run_leaves_no_temporary_folder_behind(photos, tmp_path, encoder):
    (tmp_path / ".shard-000000.123").mkdir()
    (tmp_path / ".shard-000000.123" / "features.npy").write_bytes(b"half")
    embed(open_source(str(photos)), encoder, tmp_path)
    assert not list(tmp_path.glob(".shard*"))


def test_the_recipe_is_raised_when_features_change(tmp_path):
    """Raise features.RECIPE whenever these numbers change: cached features are then made again."""
    encoder = ImageEncoder(ImageEncoderConfig("conv", None, False, 8, 4), torch.Generator().manual_seed(0))
    picture(1).save(tmp_path / "a.png")
    picture(2).rotate(90, expand=True).save(tmp_path / "b.png")
    (tmp_path / "two.csv").write_text("IMG_FILE,LAT,LON\na.png,1,2\nb.png,3,4\n")
    found = []
    for name in (str(tmp_path / "two.csv"), "blue_marble:val"):
        source = open_source(name)
        if name.startswith("blue"):
            source.latlon = source.latlon[:2]
        embed(source, encoder, tmp_path / name[-3:], Views(number=2), arithmetic="fp32")
        values = FeatureData(tmp_path / name[-3:]).tensor().float()
        found += [values.mean(), values.std(), *values[:, 1, :400].mean(-1)]
    assert features.RECIPE == 1
    np.testing.assert_allclose(found, PINNED, rtol=2e-3)


PINNED = [0.387248, 0.593597, 0.403306, 0.398849, 0.385253, 0.577636, 0.414457, 0.419626]


KILLED = """
    import json, os, signal, sys, time
    import torch
    import torchvision.transforms.functional  # imported once here, and not in every process to be killed
    from geoclip.datasets import embedding, sources
    from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig

    csv = sys.argv[1]
    torch.set_num_threads(1)
    source = sources.open_source(csv, photos_a_part=4)
    for line in sys.stdin:  # a folder, and how many seconds the next process may live
        out, seconds = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            encoder = ImageEncoder(ImageEncoderConfig("conv", None, False, 8, 4), torch.Generator().manual_seed(1))
            embedding.embed(source, encoder, out, sources.Views(number=2), arithmetic="fp32")
            os._exit(0)
        done = False
        while time.monotonic() < began + seconds and not done:
            done = os.waitpid(child, os.WNOHANG)[0] == child
            time.sleep(0.0005)
        if not done:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        print(json.dumps([done, time.monotonic() - began]), flush=True)
"""


@pytest.mark.slow
def test_sigkill_at_random_moments_loses_and_repeats_nothing(photos, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), photos],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def embedding(folder, seconds):
        process.stdin.write(json.dumps([str(folder), seconds]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    embedding(tmp_path / "warm", 60)
    ended, takes = embedding(tmp_path / "unbroken", 60)
    unbroken, out = whole(tmp_path / "unbroken"), tmp_path / "killed"
    assert ended and len(unbroken) == 6 * 5

    draw, counts, halfway = random.Random(0), [], set()
    while len(counts) < 20 or (len(halfway) < 3 and len(counts) < 200):
        # moments anywhere in a run: starting, decoding, writing a shard, between two, gathering the unreadable
        embedding(out, draw.uniform(0.1, 1.1) * takes)
        there = whole(out)
        assert there.items() <= unbroken.items()  # what is there is already what it will be
        counts.append(len(there))
        if len(there) == len(unbroken):  # done although killed so often: once more from the start
            out = tmp_path / f"killed{len(counts)}"
        elif there:
            halfway.add(len(there))
    assert len(halfway) >= 3, counts

    ended, _ = embedding(out, 60)
    process.stdin.close()
    process.stdout.close()
    process.wait(10)
    assert ended and whole(out) == unbroken
    assert (out / "unreadable.csv").read_text() == (tmp_path / "unbroken" / "unreadable.csv").read_text()
    assert not list(out.glob(".shard-*"))


def test_full_disk_stops_with_a_clear_error_and_keeps_what_was_whole(photos, tmp_path, encoder, monkeypatch):
    source, out = open_source(str(photos), photos_a_part=4), tmp_path / "out"
    written = embedding._write
    budget = iter(range(12))  # a shard has five files

    def full(path, content):
        if next(budget, None) is None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written(path, content)

    monkeypatch.setattr(embedding, "_write", full)
    with pytest.raises(
        OSError, match=r"disk is full: shard 2 was not written .*, 2 complete shards are kept"
    ) as error:
        embed(source, encoder, out)
    assert error.value.errno == errno.ENOSPC
    assert sorted(path.name for path in out.glob("*shard*")) == ["shard-000000", "shard-000001"]
    monkeypatch.undo()
    report = embed(source, encoder, out)
    assert report.found == 6 and report.embedded == 14
    embed(source, encoder, tmp_path / "unbroken")
    assert whole(out) == whole(tmp_path / "unbroken")


@pytest.mark.slow
def test_really_full_disk(photos, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    # a disk of 300 KB of its own, where the kernel lets users have one; features take 37 KB a shard
    script = (
        f"mount -t tmpfs -o size=300k none {small} && exec '{sys.executable}' -m geoclip embed {photos} "
        + (f"--out {small}/out --tower conv --weights null --views 24 --shard-size 3 --workers 0")
    )
    allowed = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
    if not allowed:
        pytest.skip("users may not mount here (unshare -rm)")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "the disk is full: shard" in done.stderr and "complete shards are kept" in done.stderr
    assert "Traceback" not in done.stderr


def test_features_made_otherwise_are_refused(photos, tmp_path, encoder):
    source, out = open_source(str(photos)), tmp_path / "out"
    embed(source, encoder, out, Views(number=2))
    FeatureData(out, CONV)
    with pytest.raises(ValueError, match=r"features of tower conv, but the model has ViT-B-32"):
        FeatureData(out, ImageEncoderConfig("ViT-B-32"))
    with pytest.raises(ValueError, match=r"features of weights None, but the model has other\.pt"):
        FeatureData(out, ImageEncoderConfig("conv", "other.pt", frozen=False))
    about = json.loads((out / "features.json").read_text())
    about["preprocessing"]["mean"] = [0.485, 0.456, 0.406]  # ImageNet's, as the released data loader has it
    (out / "features.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="features of preprocessing"):
        FeatureData(out, CONV)
    with pytest.raises(ValueError, match="made differently: preprocessing"):  # the shard itself says so too
        FeatureData(out)
    with pytest.raises(ValueError, match=r"holds other features \(preprocessing"):
        embed(source, encoder, out, Views(number=2))


def test_another_tower_or_source_does_not_join_a_folder(photos, tmp_path, encoder):
    out = tmp_path / "out"
    embed(open_source(str(photos)), encoder, out)
    other = ImageEncoder(CONV, torch.Generator().manual_seed(2))
    with pytest.raises(ValueError, match=r"holds other features.*tower_hash"):
        embed(open_source(str(photos)), other, out)
    with pytest.raises(ValueError, match=r"holds other features.*data"):
        embed(open_source(str(photos), photos_a_part=2), encoder, out)
    with pytest.raises(ValueError, match=r"holds other features.*views"):
        embed(open_source(str(photos)), encoder, out, Views(number=3))


def test_wrong_folder_of_images_is_an_error(photos, tmp_path, encoder):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"none of the first 24 photos can be read \(0\.jpg: no such file\)"):
        embed(open_source(str(photos), images=empty), encoder, tmp_path / "out")
    with pytest.raises(ValueError, match="is not a source"):
        open_source("photos.zip")
    with pytest.raises(FileNotFoundError, match=r"1\.tar: no such tar .*; 2 of 2"):
        open_source(str(tmp_path / "{1..2}.tar"))


def test_embed_does_not_change_the_encoder(photos, tmp_path, encoder):
    before = features.tower_hash(encoder.tower)
    for arithmetic in ("bf16", "fp32"):
        embed(open_source(str(photos)), encoder, tmp_path / arithmetic, arithmetic=arithmetic)
        assert features.tower_hash(encoder.tower) == before
    # the small tower computes in fp32 whatever is asked for
    assert torch.equal(*(FeatureData(tmp_path / name).tensor() for name in ("bf16", "fp32")))


def test_training_set_gives_each_image_once_an_epoch_with_a_random_view(photos, tmp_path, encoder):
    embed(open_source(str(photos), photos_a_part=7), encoder, tmp_path, Views(number=6))
    data = FeatureData(tmp_path, CONV, seed=5)
    all_views = data.tensor().float()
    seen = []
    for epoch in range(40):
        order = np.random.default_rng(epoch).permutation(len(data))
        for part in np.split(order, [3, 11]):  # over the shards in any order
            batch = data.__getitems__([(epoch, int(index)) for index in part])
            assert batch["index"].tolist() == part.tolist()
            assert torch.equal(batch["latlon"], data.latlon[part])
            match = (batch["feature"] == all_views[part]).all(-1)
            assert match.sum(1).eq(1).all()  # one of this image's own views
            seen.append(match.int().argmax(1))
    counts = torch.bincount(torch.cat(seen), minlength=6) / (40 * len(data))
    assert counts.min() > 0.11 and counts.max() < 0.23  # uniform is 0.167; σ is 0.013
    again = data.__getitems__(keys(data, epoch=3))["feature"]
    assert torch.equal(
        again, FeatureData(tmp_path, CONV, seed=5).__getitems__(keys(data, epoch=3))["feature"]
    )
    assert not torch.equal(
        again, FeatureData(tmp_path, CONV, seed=6).__getitems__(keys(data, epoch=3))["feature"]
    )
    several = FeatureData(tmp_path, CONV, views_a_step=4).__getitems__([(0, 2)])["feature"][0]
    assert len(several.unique(dim=0)) == 4
    with pytest.raises(ValueError, match="stores 6 views of each image, not 7"):
        FeatureData(tmp_path, CONV, views_a_step=7)


def test_train_command_trains_on_features_without_the_tower(photos, tmp_path, encoder):
    """What is trained on features answers like what is trained on the images they were made of."""
    location = LocationEncoderConfig(sigmas=(1.0,), frequencies=8, width=16, hidden_layers=1, dim=4)
    # a tower that a checkpoint keeps, as a run on tiles leaves it
    kept = {
        "state_dict": {f"model.image_encoder.tower.{n}": t for n, t in encoder.tower.state_dict().items()}
    }
    torch.save(kept, tmp_path / "tower.ckpt")
    image = ImageEncoderConfig("conv", str(tmp_path / "tower.ckpt"), frozen=True, hidden=8, dim=4)
    embed(open_source(str(photos)), ImageEncoder(image), tmp_path / "features", Views(number=2))
    config = TrainConfig(
        data=str(tmp_path / "features"), image=image, location=location, batch_size=4, queue=8, epochs=3,
        learning_rate=0.01,
    )  # fmt: skip
    run = train(config, tmp_path / "run")
    assert run.result["steps"] == 15 and run.result["samples"] == 20
    state = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    assert not any("tower" in name for name in state)  # the tower neither loaded nor kept

    model = run.load().model  # which loads it, to answer
    model.use_gallery(Gallery(torch.tensor([[0.0, 0.0], [10.0, 20.0], [-30.0, 100.0]])))
    data = FeatureData(tmp_path / "features")
    images = [model.image_encoder.preprocess(Image.open(photos.parent / name)) for name in data.ids()]
    with torch.no_grad():
        by_image = model.encode_images(torch.stack(images))
        by_feature = model.encode_features(data.tensor()[:, 0].float())
    assert torch.cosine_similarity(by_image, by_feature).min() > 0.999
    with pytest.raises(ValueError, match="features of tower conv"):
        train(
            dataclasses.replace(config, image=ImageEncoderConfig("ViT-B-32", None, dim=4)), tmp_path / "other"
        )


def test_smaller_fractions_lie_within_larger_ones(photos, tmp_path, encoder):
    embed(open_source(str(photos)), encoder, tmp_path)
    sets = [set(FeatureData(tmp_path, fraction=part).ids()) for part in (0.1, 0.5, 1.0)]
    assert [len(names) for names in sets] == [2, 10, 20]
    assert sets[0] < sets[1] < sets[2]


def test_random_crops_stay_inside_and_cover_the_stated_area():
    draw, views = np.random.default_rng(0), Views(number=2)
    for size in ((640, 480), (100, 3000), (4000, 90)):
        for _ in range(300):
            left, top, right, bottom = sources.random_box(size, views, draw)
            assert 0 <= left < right <= size[0] + 1e-9 and 0 <= top < bottom <= size[1] + 1e-9
            if size == (640, 480):
                area, ratio = (right - left) * (bottom - top) / (640 * 480), (right - left) / (bottom - top)
                assert 0.6 - 1e-9 <= area <= 1 + 1e-9 and 3 / 4 - 1e-9 <= ratio <= 4 / 3 + 1e-9


def test_ten_crops_are_those_of_prediction(photos, tmp_path, encoder):
    out = tmp_path / "out"
    command = [
        "embed", str(photos), "--out", str(out), "--ten-crop", "--tower", "conv", "--weights", "null", "--workers", "0",
        "--precision", "fp32",
    ]  # fmt: skip
    assert main(command) == 1  # four photos are unreadable
    data = FeatureData(out)
    assert (data.views, data.info.views.ten_crop) == (10, True)
    encoder = ImageEncoder(ImageEncoderConfig("conv", None, frozen=False), torch.Generator().manual_seed(0))
    model = GeoCLIP(encoder, LocationEncoder(LocationEncoderConfig(frequencies=2, width=2)))
    for row in (0, 4, 19):
        views = model.views(photos.parent / data.ids()[row], ten_crop=True)
        with torch.no_grad():
            assert torch.allclose(encoder.features(views), data.tensor()[row].float(), atol=4e-3)
    with pytest.raises(ValueError, match="ten crops are 10 views of a photo, not 8"):
        Views(number=8, ten_crop=True)


@pytest.mark.slow
def test_a_benchmark_is_embedded_by_its_name(tmp_path, monkeypatch, capsys):
    """Im2GPS's metadata with a photo for each of its rows, as GEOCLIP_DATA holds them."""
    columns = "IMG_ID,AUTHOR,LAT,LON,S3_Label,S16_Label,S365_Label,Prob_indoor,Prob_natural,Prob_urban"
    n = benchmarks.card("im2gps").n
    rows = [f"{i}.jpg,a,{40 + i / 50:.4f},{-100 + i / 10:.4f},1,1,1,0,1,0" for i in range(n)]
    images = tmp_path / "images" / "im2gps"
    images.mkdir(parents=True)
    (tmp_path / benchmarks.card("im2gps").csv).write_text("\n".join([columns, *rows]) + "\n")
    for i in range(n):
        (images / f"{i}.jpg").write_bytes(jpeg(i))
    monkeypatch.setenv("GEOCLIP_DATA", str(tmp_path))
    source = open_source("im2gps", photos_a_part=100)
    assert source.name == "Im2GPS" and source.parts == -(-n // 100)
    assert source.hash == open_source("im2gps", photos_a_part=100).hash != open_source("im2gps").hash
    report = embed(source, ImageEncoder(CONV, torch.Generator().manual_seed(1)), tmp_path / "out")
    assert (report.embedded, report.unreadable) == (n, 0)

    # an incomplete set is used as it is and counted, unless it has to be complete
    csv = tmp_path / benchmarks.card("im2gps").csv
    csv.write_text("\n".join([columns, *rows[:-7]]) + "\n")
    command = [
        "embed",
        "im2gps",
        "--out",
        str(tmp_path / "part"),
        "--tower",
        "conv",
        "--weights",
        "null",
        "--workers",
        "0",
    ]
    assert main([*command, "--strict"]) == 2
    assert main(command) == 0
    assert f"Im2GPS: {n - 7} of {n} expected" in capsys.readouterr().out


@pytest.mark.slow
def test_draft_decoding_changes_less_than_a_level(tmp_path):
    x, y = np.meshgrid(np.linspace(0, 40, 2400), np.linspace(0, 25, 1600))
    large = Image.fromarray(
        ((np.stack([np.sin(x), np.sin(y), np.sin(x + y)], -1) + 1) * 127).astype(np.uint8)
    )
    large.save(tmp_path / "large.jpg", quality=95)
    draw = np.random.default_rng(0)  # a single view draws nothing
    drafted = sources.decode(tmp_path / "large.jpg", 448)
    assert drafted.size == (1200, 800)  # half: a quarter would be 600 × 400, below 448
    one = sources.photo_views(drafted, Views(), Preprocessing(), draw).float()
    other = sources.photo_views(Image.open(tmp_path / "large.jpg"), Views(), Preprocessing(), draw).float()
    assert (one - other).abs().mean() < 1


def test_command_goes_on_where_it_stopped(photos, tmp_path, capfd):
    options = ["--tower", "conv", "--weights", "null", "--views", "2", "--shard-size", "6", "--workers", "0"]
    assert main(["embed", str(photos), "--out", str(tmp_path / "one"), *options]) == 1  # 4 unreadable
    assert "20 images embedded" in capfd.readouterr().out
    assert main(["embed", str(photos), "--out", str(tmp_path / "one"), *options]) == 0
    assert "0 images embedded" in (out := capfd.readouterr().out) and "20 found" in out


def test_torchrun_and_slurm_are_recognised(monkeypatch):
    assert embedding.rank_and_world() == (0, 1, 0)
    with monkeypatch.context() as torchrun:
        for name, value in {
            "TORCHELASTIC_RUN_ID": "1", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "GROUP_RANK": "1",
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
        }.items():  # fmt: skip
            torchrun.setenv(name, value)
        assert embedding.rank_and_world() == (3, 8, 1)
    for name, value in {
        "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
        "SLURM_JOB_NAME": "embed", "SLURM_NODEID": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert embedding.rank_and_world() == (9, 16, 1)


@pytest.mark.slow
def test_torchrun_divides_the_shards_among_processes(photos, tmp_path):
    """Two processes, as on one machine with two GPUs, leave what one leaves."""
    options = ["--tower", "conv", "--weights", "null", "--views", "2", "--shard-size", "5", "--workers", "0"]
    for name, devices in (("one", "1"), ("two", "2")):
        command = ["embed", str(photos), "--out", str(tmp_path / name), *options, "--devices", devices]
        done = subprocess.run(
            [sys.executable, "-m", "geoclip", *command], capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 1, done.stderr  # four photos are unreadable
    assert whole(tmp_path / "one") == whole(tmp_path / "two")
    assert (tmp_path / "one/unreadable.csv").read_text() == (tmp_path / "two/unreadable.csv").read_text()
