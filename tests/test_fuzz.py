"""Three hundred damaged files of each format: each is read as a plain reader reads it, or refused by name.

Damage that makes another valid file, such as a changed digit of a CSV, cannot be noticed by any reader. Each
format therefore has a plain reader here, of a few lines and of the bytes alone; what a file is read as must be
what the plain reader finds in it.
"""

import csv
import dataclasses
import functools
import io
import json
import math
import random
import tarfile

import numpy as np
import pytest
import torch
import yaml

from geoclip.baselines.partition import COLUMNS, Partition, PartitionConfig, partition
from geoclip.datasets import benchmarks, folder, nus_wide, nus_wide_synthetic, shards, sources
from geoclip.image_encoder import ImageEncoderConfig
from geoclip.location_encoder import LocationEncoder, LocationEncoderConfig
from geoclip.photos import PhotoError
from geoclip.reproduce.profiles import Profile
from geoclip.training.checkpoints import read_checkpoint
from geoclip.training.config import TrainConfig, as_config, plain
from geoclip.training.runs import Run

HUGE = 200_000
ODD = ("nan", "inf", "-inf", "1e999", "", "None", "1_0", "91", "181", "0x10", "½", "TRUE", "48,5")


class Refused(Exception):
    """Raised by a plain reader for a file that must not be read."""


# --- damage ---


def binary_damage(whole: bytes, draw: random.Random) -> bytes:
    """The file cut off, with some bytes changed, inserted, lost, repeated or zeroed."""
    at, length = draw.randrange(len(whole)), draw.choice((1, 2, 8, 512, 4096))
    kind = draw.choice(("cut", "flip", "flip", "flip", "nul", "zeros", "lost", "twice", "huge"))
    if kind == "cut":
        return whole[:at]
    if kind == "flip":
        changed = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 5))):
            changed[draw.randrange(len(whole))] ^= draw.randrange(1, 256)
        return bytes(changed)
    if kind == "zeros":
        return whole[:at] + bytes(length) + whole[at + length :]
    if kind == "lost":
        return whole[:at] + whole[at + length :]
    inserted = {"nul": bytes(length), "twice": whole[at : at + length], "huge": b"9" * HUGE}[kind]
    return whole[:at] + inserted + whole[at:]


def text_damage(whole: bytes, draw: random.Random) -> bytes:
    """As binary_damage, or other encodings, line ends, quotes and odd numbers."""
    kind = draw.choice(
        ("binary", "binary", "byte", "encoding", "line ends", "quote", "quotes", "number", "number", "short")
    )
    at = draw.randrange(len(whole))
    if kind == "binary":
        return binary_damage(whole, draw)
    if kind == "byte":
        return (
            whole[:at] + bytes([draw.choice(b'",;\t\r\n0 9-#:{[%\x0b\x0c\x1c\x85\xe9\x00')]) + whole[at + 1 :]
        )
    if kind == "encoding":
        return whole.decode().encode(draw.choice(("utf-8-sig", "utf-16", "utf-16-le", "latin-1", "utf-32")))
    if kind == "line ends":
        return whole.replace(b"\n", draw.choice((b"\r\n", b"\r", b"\n\n", b"\n \n")))
    if kind in ("quote", "quotes"):
        after = draw.randrange(at, len(whole))
        return whole[:at] + b'"' + whole[at:after] + b'"' * (kind == "quotes") + whole[after:]
    lines = whole.split(b"\n")
    row = draw.randrange(len(lines))
    fields = lines[row].split(b",")
    if kind == "short":
        del fields[draw.randrange(len(fields))]
    else:
        fields[draw.randrange(len(fields))] = draw.choice(ODD).encode()
    lines[row] = b",".join(fields)
    return b"\n".join(lines)


def csv_damage(whole: bytes, draw: random.Random) -> bytes:
    """As text_damage, or two columns exchanged: with their names, or without."""
    if draw.random() > 0.1:
        return text_damage(whole, draw)
    rows = [line.split(",") for line in whole.decode().splitlines()]
    one, other = draw.sample(range(len(rows[0])), 2)
    for row in rows[draw.randrange(2) :]:
        row[one], row[other] = row[other], row[one]
    return "\n".join(map(",".join, rows)).encode() + b"\n"


# --- plain readers ---


def plain_text(path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused from error


def plain_csv(path) -> list[dict[str, str]]:
    """The rows by column, each with its line."""
    csv.field_size_limit(10 * HUGE)
    reader = csv.reader(io.StringIO(plain_text(path), newline=""))
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise Refused from error
    rows = [(line, [field for field in row]) for line, row in rows if any(field.strip() for field in row)]
    if len(rows) < 2 or any(len(row) != len(rows[0][1]) for _, row in rows):
        raise Refused
    header = [name.strip() for name in rows[0][1]]
    return [{"line": line, **dict(zip(header, row, strict=True))} for line, row in rows[1:]]


def number(text: str, limit: float = math.inf) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise Refused from error
    if not abs(value) <= limit or math.isinf(value) or "_" in text:
        raise Refused
    return value


def pick(row: dict, *names: str) -> str:
    for name in names:
        if name in row:
            return row[name]
    raise Refused


def plain_places(rows, lat, lon):
    found = [(number(pick(row, *lat), 90), number(pick(row, *lon), 180)) for row in rows]
    return [(lat, -180.0 if lon == 180 else lon) for lat, lon in found]


# --- formats: what is written, how it is read, and what a plain reader makes of it ---


@dataclasses.dataclass
class Format:
    """One format.

    make: writes a whole file below a folder and returns the paths that are damaged in turn. read: the answer.
    plain: the answer of the plain reader, or Refused. named: what an error must contain, of the damaged path.
    """

    make: object
    read: object
    plain: object
    damage: object = csv_damage
    named: object = staticmethod(lambda path: path.name)


def rows_of_photos(n=12):
    draw = random.Random(1)
    places = [(round(draw.uniform(-80, 80), 5), round(draw.uniform(-170, 170), 5)) for _ in range(n)]
    places[0] = (12.5, 150.25)  # so that swapped columns show
    return [(f"a/{i:02d}/{i * 7919}.jpg", f"{i % 5}@N0{i}", *place) for i, place in enumerate(places)]


def write(path, header, rows):
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return [path]


def make_benchmark(where):
    rows = [(*row, i % 3, i % 16, i, 0.1, 0.2, 0.7) for i, row in enumerate(rows_of_photos())]
    return write(where / "made_places365.csv", benchmarks.PLACES365, rows)


def read_benchmark(path):
    table = benchmarks.read_csv(path).table
    return table[["file", "author", "lat", "lon", "scene", "line"]].to_numpy().tolist()


def plain_benchmark(path):
    rows = plain_csv(path)
    places = plain_places(rows, ["LAT"], ["LON"])
    scenes = [benchmarks.SCENES[int(number(pick(row, "S3_Label"), 2))] for row in rows]
    return [
        [pick(row, "IMG_ID"), pick(row, "AUTHOR") or None, *place, scene, row["line"]]
        for row, place, scene in zip(rows, places, scenes, strict=True)
    ]


def make_photos(where):
    return write(where / "photos.csv", "IMG_FILE,AUTHOR,LAT,LON", rows_of_photos())


def read_photos(path):
    return folder.read(path).table[["file", "lat", "lon", "line"]].to_numpy().tolist()


def plain_photos(path):
    rows = plain_csv(path)
    places = plain_places(rows, ["LAT"], ["LON"])
    files = [pick(row, "IMG_FILE") for row in rows]
    return [[file, *place, row["line"]] for file, place, row in zip(files, places, rows, strict=True)]


def make_gallery(where):
    return write(where / "gallery.csv", "latitude,longitude", [row[2:] for row in rows_of_photos()])


def plain_gallery(path):
    return plain_places(plain_csv(path), ["latitude", "lat"], ["longitude", "lon", "lng"])


def make_addresses(where):
    rows = [(f"{i:03d}", f"http://photos.example/{i}.jpg") for i in range(12)]
    return write(where / "urls.csv", "id,url", rows)


def read_addresses(path):
    return shards.read_urls(path).to_numpy().tolist()


def plain_addresses(path):
    return [[pick(row, *shards.ID_COLUMNS), pick(row, "url")] for row in plain_csv(path)]


def make_cells(where):
    places = np.random.default_rng(0).uniform([-60, -170], [60, 170], (300, 2))
    partition(places, PartitionConfig(10, 40)).write(where / "cells.csv")
    return [where / "cells.csv"]


def read_cells(path):
    cells = Partition.read(path)
    return [[*row] for row in zip(cells.tokens, cells.images.tolist(), cells.latlon.tolist(), strict=True)]


def plain_cells(path):
    rows = sorted(plain_csv(path), key=lambda row: number(row[COLUMNS[0]]))
    if [number(row[COLUMNS[0]]) for row in rows] != [*range(len(rows))]:
        raise Refused
    places = plain_places(rows, [COLUMNS[3]], [COLUMNS[4]])
    return [
        [row[COLUMNS[1]].strip().lower(), int(row[COLUMNS[2]]), [*place]]
        for row, place in zip(rows, places, strict=True)
    ]


def make_nus_wide(where):
    root = nus_wide_synthetic.write(where / "nus", n=40, concepts=2)
    return sorted(path for path in root.rglob("*") if path.is_file() and "features" not in path.parts)


def root_of(path):
    return next(parent for parent in path.parents if parent.name == "nus")


def read_nus_wide(path):
    data = nus_wide.read(root_of(path))
    return [
        [row[:-1], row[-1], label]
        for row, label in zip(data.table.to_numpy().tolist(), data.labels.tolist(), strict=True)
    ]


def plain_nus_wide(path):
    root = root_of(path)

    def lines(name):
        return plain_text(root / name).rstrip().replace("\r\n", "\n").replace("\r", "\n").split("\n")

    places, found = {}, []
    for row in plain_csv(root / "geotags.csv"):
        [place] = plain_places([row], ["latitude"], ["longitude"])
        places[pick(row, "id")] = list(place)
    tags = {}
    for line in filter(str.strip, lines("NUS_WID_Tags/All_Tags.txt")):
        tags[line.split()[0]] = line.strip().partition(" ")[2].strip()
    concepts = lines("ConceptsList/Concepts81.txt")
    for part in ("Train", "Test"):
        files = [name.strip().replace("\\", "/") for name in lines(f"ImageList/{part}Imagelist.txt")]
        try:
            labels = [
                lines(f"Groundtruth/TrainTestLabels/Labels_{concept.strip()}_{part}.txt")
                for concept in concepts
            ]
        except OSError as error:
            raise Refused from error
        for row, file in enumerate(files):
            photo = file.rpartition("_")[2].partition(".")[0]
            if photo in places:
                label = [int(number(column[row])) for column in labels]
                found.append([[part.lower(), photo, file, *places[photo]], tags.get(photo, math.nan), label])
    return found


def make_tar(where):
    path = where / "00000.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (_, _, lat, lon) in enumerate(rows_of_photos(8)):
            about = json.dumps({"id": f"p{i}", "LAT": lat, "LON": lon}).encode()
            for name, content in (
                (f"{i:04d}.jpg", bytes([255, 216, 255, i]) * 300),
                (f"{i:04d}.json", about),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return [path]


def read_tar(path):
    found = sources.TarShards(str(path)).samples(0)
    return [
        [name, list(place), photo.data]
        for name, place, photo, _ in found
        if not isinstance(place, PhotoError)
    ]


def plain_tar(path):
    whole, at, members = path.read_bytes(), 0, []
    while any(block := whole[at : at + 512]):
        try:
            stated, size = int(block[148:156].strip(b"\0 "), 8), int(block[124:136].strip(b"\0 "), 8)
        except ValueError:
            break
        if stated != sum(block[:148]) + 8 * 32 + sum(block[156:]):
            break
        if at + 512 + size > len(whole):
            raise Refused
        members.append((block[:100].rstrip(b"\0").decode(), whole[at + 512 : at + 512 + size]))
        at += 512 + -(-size // 512) * 512
    if any(whole[at + 512 :]) or len(whole) - at < 1024:
        raise Refused
    samples = {}
    for name, content in members:
        samples.setdefault(name.partition(".")[0], {}).setdefault(name.partition(".")[2], content)
    found = []
    for parts in samples.values():
        try:
            about = json.loads(parts["json"])
            place = [number(str(about["LAT"]), 90), number(str(about["LON"]), 180)]
            found.append([about["id"], place, parts["jpg"]])
        except (KeyError, TypeError, ValueError, Refused):
            pass  # one sample that is listed as unreadable
    return found


TINY = TrainConfig(
    image=ImageEncoderConfig("conv", None, frozen=False, hidden=8, dim=8),
    location=LocationEncoderConfig(sigmas=(1.0,), frequencies=8, width=8, hidden_layers=1, dim=8),
)


@functools.cache
def tiny_checkpoint() -> bytes:
    encoder = LocationEncoder(TINY.location, torch.Generator().manual_seed(0))
    file = io.BytesIO()
    gallery = {"latlon": torch.rand(50, 2), "source": "made"}
    weights = {f"model.location_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    config = plain(TINY) | {"model": "geoclip"}
    torch.save({"state_dict": weights, "geoclip_config": config, "geoclip_gallery": gallery}, file)
    return file.getvalue()


def make_checkpoint(where):
    (where / "last.ckpt").write_bytes(tiny_checkpoint())
    return [where / "last.ckpt"]


def plain_checkpoint(path):
    return torch.load(io.BytesIO(tiny_checkpoint()), weights_only=True)


def make_config(where):
    path = where / "train.yaml"
    path.write_text(yaml.safe_dump(plain(TINY), sort_keys=False))
    return [path]


def read_config(path):
    return plain(as_config(path))


def plain_config(path):
    try:
        values = yaml.safe_load(plain_text(path))
    except yaml.YAMLError as error:
        raise Refused from error
    if not isinstance(values or {}, dict):
        raise Refused

    def merged(default, given):
        if not isinstance(default, dict) or not isinstance(given, dict):
            return given
        if not given.keys() <= default.keys():
            raise Refused
        return {key: merged(value, given[key]) if key in given else value for key, value in default.items()}

    return merged(plain(TrainConfig()), values or {})


def make_profile(where):
    content = {
        "seeds": 2,
        "parameters": {"EPOCHS": 3},
        "notebooks": {
            "90_made": {
                "parameters": {"DATA": "features/a"},
                "grid": {"SETTINGS": {"plain": {}, "big": {"dim": 9}}},
            }
        },
        "data": {"training": {"parameter": "DATA", "samples": 1000, "source": "MP-16", "make": "embed"}},
    }
    path = where / "profile.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return [path]


def read_profile(path):
    profile = Profile.load(path)
    found = {key: value for key, value in dataclasses.asdict(profile).items() if key != "name"}
    known = {"EPOCHS": 1, "DATA": "x", "SETTINGS": {}, "SEEDS": [0]}
    try:
        given = profile.whole(path.with_name("90_made.ipynb"), known)
    except ValueError as error:  # of a parameter that the notebook lacks
        raise ValueError(f"{path}: {error}") from error
    profile.missing(known | given)
    return found


def plain_profile(path):
    try:
        values = yaml.safe_load(plain_text(path)) or {}
    except yaml.YAMLError as error:
        raise Refused from error
    if not isinstance(values, dict):
        raise Refused
    return {"parameters": {}, "notebooks": {}, "seeds": 3, "data": {}} | values


def make_counts(where):
    (where / "00000.tar").write_bytes(b"")
    counts = {"successes": 9, "failed": [["1", "http://a/1", "HTTP 404 Not Found"]] * 3}
    (where / "00000_stats.json").write_text(json.dumps(counts))
    return [where / "00000_stats.json"]


def read_counts(path):
    found = shards.statistics(path.parent, 0, 12)
    if found is None:
        raise ValueError(f"the shard of {path} is downloaded again")
    return found


def make_result(where):
    (where / "result.json").write_text(json.dumps({"steps": 10, "epochs": 2, "seconds": 1.5}, indent=1))
    return [where / "result.json"]


def plain_json(path):
    try:
        return json.loads(plain_text(path))
    except ValueError as error:
        raise Refused from error


def same(one, other) -> bool:
    """Whether two answers are equal: numbers to 1e-12, NaN equal to NaN, True not equal to 1."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(one[k], other[k]) for k in one)
        )
    if isinstance(one, list | tuple):
        alike = isinstance(other, list | tuple) and len(one) == len(other)
        return alike and all(map(same, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, float) and isinstance(other, str):  # YAML reads 1e-4 as text
        other = float(other)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-12) or (one != one and other != other)
    return one == other


FORMATS = {
    "benchmark": Format(make_benchmark, read_benchmark, plain_benchmark),
    "photos": Format(make_photos, read_photos, plain_photos),
    "gallery": Format(make_gallery, lambda path: folder.read_places(path).tolist(), plain_gallery),
    "addresses": Format(make_addresses, read_addresses, plain_addresses),
    "cells": Format(make_cells, read_cells, plain_cells),
    "nus-wide": Format(
        make_nus_wide, read_nus_wide, plain_nus_wide, text_damage, lambda path: str(root_of(path))
    ),
    "tar": Format(make_tar, read_tar, plain_tar, binary_damage),
    "checkpoint": Format(make_checkpoint, read_checkpoint, plain_checkpoint, binary_damage),
    "config": Format(make_config, read_config, plain_config, text_damage),
    "counts": Format(make_counts, read_counts, plain_json, text_damage),
    "result": Format(make_result, lambda path: Run(path.parent, TINY).result, plain_json, text_damage),
    "profile": Format(make_profile, read_profile, plain_profile, text_damage),
}


@pytest.mark.parametrize("files", [20, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_as_it_stands_or_refused_by_name(name, files, tmp_path):
    kind, draw, problems, answered = FORMATS[name], random.Random(name), [], 0
    made = kind.make(tmp_path)
    for path in made:
        assert same(kind.read(path), kind.plain(path)), path
    for i in range(files):
        path = made[i % len(made)]
        whole = path.read_bytes()
        damaged = kind.damage(whole, draw)
        path.write_bytes(damaged)
        about = f"file {i}, {path.name}, {changed(whole, damaged)}"
        try:
            answer = kind.read(path)
        except (ValueError, OSError) as error:
            if kind.named(path) not in str(error):
                problems.append(f"{about}: {type(error).__name__} without the name: {error}"[:500])
        except Exception as error:
            problems.append(f"{about}: {type(error).__name__}: {error}"[:500])
        else:
            answered += 1
            try:
                if not same(answer, kind.plain(path)):
                    problems.append(f"{about}: another answer")
            except Refused:
                problems.append(f"{about}: an answer")
        path.write_bytes(whole)
    assert not problems, f"{len(problems)} of {files}:\n" + "\n".join(problems)
    assert answered < files


def changed(whole: bytes, damaged: bytes) -> str:
    """The first bytes that differ, before and after."""
    pairs = zip(whole, damaged, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(whole), len(damaged)))
    around = slice(at - 20, at + 20)
    return f"{len(whole)} → {len(damaged)} bytes, at {at}: {whole[around]!r} → {damaged[around]!r}"
