"""Photos in, places out: the API on every kind of input, and the command on good and bad files."""

import io
import json
import os
import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import ExifTags, Image
from shapely.geometry import shape

from geoclip import earth, pretrained
from geoclip.__main__ import main
from geoclip.calibration import Calibration, NeighbourFit
from geoclip.datasets.blue_marble import SplitConfig
from geoclip.datasets.features import FeatureInfo
from geoclip.gallery import Gallery
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig, load_clip
from geoclip.location_encoder import LocationEncoder, LocationEncoderConfig
from geoclip.model import GeoCLIP
from geoclip.photos import PhotoError
from geoclip.training.checkpoints import load_checkpoint
from geoclip.training.config import TrainConfig
from geoclip.training.module import GeoCLIPTraining

CONV = ImageEncoderConfig(tower="conv", weights=None, frozen=False, hidden=24, dim=16)
SMALL = LocationEncoderConfig(sigmas=(1.0, 16.0), frequencies=8, width=16, dim=16)
PLACES = 60


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Embeddings kept by a test stay with it."""
    monkeypatch.setattr("geoclip.paths.CACHE", tmp_path / "cache")


def geoclip(image, generator, places):
    images, locations = ImageEncoder(image, generator), LocationEncoder(SMALL, generator)
    return GeoCLIP(images, locations, places).eval()


@pytest.fixture
def model():
    generator = torch.Generator().manual_seed(0)
    places = Gallery(earth.sample_sphere(PLACES, generator), "random places")
    return geoclip(CONV, generator, places)


@pytest.fixture
def tower(tiny_clip):
    return tiny_clip


def noise(seed, height=40, width=56):
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.kron(pixels, np.ones((8, 8, 1), np.uint8))


def save(path, seed=0, place=None):
    image = Image.fromarray(noise(seed))
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = "a test"  # Pillow leaves EXIF out of a PNG that has GPS tags alone
    if place:
        tags = {ExifTags.GPS.GPSLatitudeRef: "N", ExifTags.GPS.GPSLatitude: (float(place[0]), 0.0, 0.0)}
        tags |= {ExifTags.GPS.GPSLongitudeRef: "E", ExifTags.GPS.GPSLongitude: (float(place[1]), 0.0, 0.0)}
        exif.get_ifd(ExifTags.IFD.GPSInfo).update(tags)
    image.save(path, exif=exif)
    return path


# The API


def test_path_image_and_array_give_one_answer(model, tmp_path):
    path = save(tmp_path / "photo.png")
    latlon, probability = model.predict(path, top_k=5)
    assert latlon.shape == (5, 2) and probability.shape == (5,)
    assert (probability.diff() <= 0).all() and 0 < probability.sum() <= 1
    for other in (str(path), Image.fromarray(noise(0)), noise(0)):
        assert torch.equal(model.predict(other, top_k=5)[0], latlon)
        assert torch.equal(model.predict(other, top_k=5)[1], probability)


def test_all_places_share_the_whole_probability(model):
    latlon, probability = model.predict(noise(0), top_k=PLACES)
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    assert len(torch.unique(latlon, dim=0)) == PLACES


@pytest.mark.parametrize("ten_crop", [False, True])
def test_batches_lists_and_folders_give_what_single_photos_give(model, tmp_path, ten_crop):
    paths = [save(tmp_path / f"{name}.png", seed) for seed, name in enumerate("abcde")]
    single = [model.predict(path, top_k=3, ten_crop=ten_crop) for path in paths]
    for several in (paths, tmp_path, str(tmp_path)):
        latlon, probability = model.predict(several, top_k=3, ten_crop=ten_crop, batch_size=2)
        assert latlon.shape == (5, 3, 2) and probability.shape == (5, 3)
        for i, (one_latlon, one_probability) in enumerate(single):
            assert torch.equal(latlon[i], one_latlon)
            assert torch.allclose(probability[i], one_probability, atol=1e-6)
    assert len({tuple(probability.tolist()) for _, probability in single}) == 5, "the photos should differ"


def test_ten_crop_is_the_mean_of_ten_logits_by_hand(model):
    from torchvision.transforms import functional

    photo = Image.fromarray(noise(3, 64, 96))
    large = functional.resize(photo, 36, functional.InterpolationMode.BICUBIC)  # 32 × 256 / 224
    left, top = large.width - 32, large.height - 32
    corners = [(0, 0), (left, 0), (0, top), (left, top), (round(left / 2), round(top / 2))]
    crops = [large.crop((x, y, x + 32, y + 32)) for x, y in corners]
    crops += [crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for crop in crops]
    images = torch.stack([torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 127.5 - 1 for crop in crops])
    # torchvision mirrors the photo and crops it again, which orders the crops differently; the mean is the same
    expected = model(images, model.gallery.latlon).mean(0).softmax(0)
    latlon, probability = model.predict(photo, top_k=PLACES, ten_crop=True)
    best = expected.argsort(descending=True)
    assert torch.allclose(probability, expected[best], atol=1e-6)
    assert torch.equal(latlon, model.gallery.latlon[best])
    assert not torch.equal(latlon, model.predict(photo, top_k=PLACES)[0])


def test_the_gallery_is_embedded_once_and_kept_on_disk(model, tmp_path, monkeypatch):
    calls = []
    forward = LocationEncoder.forward
    monkeypatch.setattr(
        LocationEncoder, "forward", lambda self, latlon: calls.append(1) or forward(self, latlon)
    )
    first = model.predict(noise(0))
    model.predict(noise(1))
    assert len(calls) == 1
    again = geoclip(CONV, torch.Generator().manual_seed(0), model.gallery)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.predict(noise(0))[1], first[1])
    assert len(calls) == 1, "another model with the same weights and gallery reads it from disk"
    with torch.no_grad():
        again.location_encoder.levels[0].mlp[0].bias += 0.1
    again.use_gallery(model.gallery).predict(noise(0))
    assert len(calls) == 2, "other weights are another embedding"
    assert len(list((tmp_path / "cache/galleries").glob("*.npy"))) == 2


@pytest.mark.parametrize("top_k", [0, -1, PLACES + 1])
def test_top_k_must_fit_the_gallery(model, top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}, but the gallery has {PLACES} places"):
        model.predict(noise(0), top_k=top_k)


def test_what_cannot_be_predicted(model, tmp_path):
    with pytest.raises(ValueError, match="the list is empty"):
        model.predict([])
    with pytest.raises(FileNotFoundError, match="holds no photos"):
        model.predict(tmp_path)
    (tmp_path / "bad.jpg").write_text("no picture")
    with pytest.raises(PhotoError, match=r"bad\.jpg: not an image"):
        model.predict([save(tmp_path / "good.png"), tmp_path / "bad.jpg"])
    with pytest.raises(ValueError, match="no gallery"):
        model.use_gallery(None).predict(noise(0))


# Text


def test_text_is_located_like_an_image(model, tower):
    config = ImageEncoderConfig(tower=tower, weights=None, hidden=24, dim=16)
    reader = geoclip(config, torch.Generator().manual_seed(1), model.gallery)
    latlon, probability = reader.predict_text(["desert", "a snowy mountain"], top_k=4)
    assert latlon.shape == (2, 4, 2) and probability.shape == (2, 4)
    one_latlon, one_probability = reader.predict_text("a snowy mountain", top_k=4)
    assert torch.equal(one_latlon, latlon[1])
    assert torch.allclose(one_probability, probability[1], atol=1e-6)
    with torch.no_grad():
        embedded = reader.encode_text("a snowy mountain")
        logits = reader.logit_scale.exp() * embedded @ reader.encode_places(model.gallery.latlon).T
    assert torch.equal(one_latlon, model.gallery.latlon[logits[0].argsort(descending=True)[:4]])
    assert embedded.norm().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_texts_are_located_from_the_command_line(model, tower, tmp_path, capsys, monkeypatch):
    config = ImageEncoderConfig(tower=tower, weights=None, hidden=24, dim=16)
    reader = geoclip(config, torch.Generator().manual_seed(1), model.gallery)
    monkeypatch.setattr("geoclip.commands.predict.load_model", lambda options: reader)
    texts = ["a desert with cacti", "a snowy mountain"]
    assert main(["predict", "--text", *texts, "--top-k", "3", "--format", "json"]) == 0
    said = capsys.readouterr()
    expected, _ = reader.predict_text(texts, 3)
    found = json.loads(said.out)["photos"]
    assert [photo["file"] for photo in found] == texts and "truth" not in said.err
    places = [[(place["lat"], place["lon"]) for place in photo["places"]] for photo in found]
    assert torch.allclose(torch.tensor(places), expected, atol=1e-5)
    monkeypatch.chdir(tmp_path)
    for decision in ("argmax", "mode"):
        assert main(["predict", "--text", texts[0], "--decision", decision, "--map"]) == 0
        assert (tmp_path / "map.png").stat().st_size > 10_000
        (tmp_path / "map.png").unlink()
    for wrong in ([], ["photo.png", "--text", "desert"]):
        assert main(["predict", *wrong]) == 2
        assert "give photos, or --text" in capsys.readouterr().err


def test_the_small_tower_cannot_read_text(model):
    with pytest.raises(ValueError, match="cannot read text"):
        model.predict_text("desert")


# CLIP's weights


def test_a_local_clip_file_is_read_as_it_is(tower, tmp_path):
    from safetensors.torch import save_file

    source = load_clip(tower, None)
    tensors = {name: tensor.contiguous() for name, tensor in source.state_dict().items()}
    save_file(tensors, tmp_path / "clip.safetensors")
    torch.save(tensors, tmp_path / "clip.pt")
    for name in ("clip.safetensors", "clip.pt"):
        loaded = load_clip(tower, str(tmp_path / name))
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in loaded.state_dict().items())


def test_clip_files_that_are_refused(tower, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no CLIP weights at .*absent\.pt"):
        load_clip(tower, str(tmp_path / "absent.pt"))
    torch.save({"one": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt does not fit CLIP tiny-clip: .* tensors are missing"):
        load_clip(tower, str(tmp_path / "other.pt"))
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        load_clip(tower, str(tmp_path / "text.safetensors"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="does not hold a dictionary of tensors"):
        load_clip(tower, str(tmp_path / "list.pt"))


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_a_pickle_given_as_clip_is_not_executed(tower, tmp_path):
    with (tmp_path / "trap.pt").open("wb") as file:
        pickle.dump(Trap(), file)
    torch.save({"trap": Trap()}, tmp_path / "trap2.pt")
    for name in ("trap.pt", "trap2.pt"):
        with pytest.raises(ValueError, match="without executing it"):
            load_clip(tower, str(tmp_path / name))


def test_offline_says_what_is_missing_where_it_goes_and_what_still_works(monkeypatch, tmp_path, capsys):
    import huggingface_hub

    def unreachable():
        raise ConnectionError("no route to host")

    def nothing_kept(**_):
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", nothing_kept)
    monkeypatch.setattr(huggingface_hub, "get_session", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main(["predict", str(save(tmp_path / "photo.png"))]) == 2
    printed, errors = capsys.readouterr()
    assert printed == "" and errors.startswith("geoclip: error: CLIP ViT-L/14 (openai/clip-vit-large-patch14")
    assert str(tmp_path / "hub") in errors and "(no route to host)" in errors and "work without it" in errors


def test_a_changed_clip_file_is_refused_before_it_is_read(monkeypatch, tmp_path):
    import huggingface_hub

    kept = tmp_path / "model.safetensors"
    kept.write_bytes(b"something else")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **_: str(kept))
    monkeypatch.setattr(
        pretrained, "read_clip", lambda _: pytest.fail("the file was read before it was checked")
    )
    with pytest.raises(
        ValueError, match=f"its SHA-256 is [0-9a-f]{{64}}, expected {pretrained.CLIP_SHA256}"
    ) as error:
        load_clip(pretrained.CLIP_TOWER, "openai")
    assert str(kept) in str(error.value)


# The released model, without CLIP


def test_the_released_parts_are_put_together(monkeypatch, tmp_path, capsys):
    import geoclip.model

    class Encoder(ImageEncoder):
        def __init__(self, config, with_tower):
            torch.nn.Module.__init__(self)
            self.config, self.tower = config, None
            self.head = torch.nn.Sequential(
                torch.nn.Linear(768, 768), torch.nn.ReLU(), torch.nn.Linear(768, 512)
            )

        def use_precision(self, chosen):
            return self

    (tmp_path / "local.safetensors").write_text("other weights")
    monkeypatch.setattr(geoclip.model, "ImageEncoder", Encoder)
    model = GeoCLIP.pretrained(tmp_path / "local.safetensors")
    assert model.image_encoder.config.weights == str(tmp_path / "local.safetensors")
    assert "is not the released CLIP ViT-L/14" in capsys.readouterr().err
    assert model.logit_scale.item() == pytest.approx(3.681034803390503)
    assert torch.equal(model.image_encoder.head[2].bias, pretrained.head_state()["2.bias"])
    assert len(model.gallery) == 100_000 and not model.training


def test_the_second_example_of_the_authors_readme():
    from geoclip import LocationEncoder

    gps_encoder = LocationEncoder.pretrained()
    gps_data = torch.Tensor([[40.7128, -74.0060], [34.0522, -118.2437]])
    assert gps_encoder(gps_data).shape == (2, 512)


# The command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    sizes = SplitConfig(train=200, val=20, test=20, gallery=PLACES)
    config = TrainConfig(image=CONV, location=SMALL, splits=sizes, queue=16, batch_size=8, epochs=1)
    module = GeoCLIPTraining.build(config, GeoCLIPTraining.training_set(config))
    path = tmp_path_factory.mktemp("model") / "last.ckpt"
    path.with_name("result.json").write_text("{}")  # the run has ended
    kept = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(kept)
    torch.save(kept, path)
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Three photos that can be answered, one with EXIF, among five that cannot."""
    folder = tmp_path / "photos"
    folder.mkdir()
    save(folder / "a.png", 0)
    save(folder / "b.jpg", 1, place=(48, 2))
    Image.fromarray(noise(2)).convert("CMYK").save(folder / "c.jpg")
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(
        buffer, "JPEG"
    )
    (folder / "truncated.jpg").write_bytes(buffer.getvalue()[:5000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("dear diary")
    Image.new("1", (14_000, 14_000)).save(folder / "bomb.png")
    return folder


def test_bad_photos_are_named_and_the_others_answered(files, checkpoint, capsys):
    absent = str(files / "absent.jpg")
    status = main(
        ["predict", str(files), absent, "--checkpoint", checkpoint, "--top-k", "2", "--format", "json"]
    )
    printed, errors = capsys.readouterr()
    assert status == 1 and "Traceback" not in errors
    found = json.loads(printed)
    assert [photo["file"] for photo in found["photos"]] == [
        str(files / name) for name in ("a.png", "b.jpg", "c.jpg")
    ]
    reasons = {failure["file"]: failure["reason"] for failure in found["failed"]}
    expected = {
        "truncated.jpg": "cannot be decoded",
        "empty.jpg": "empty",
        "text.jpg": "not an image",
        "bomb.png": "decompression bomb",
        "absent.jpg": "no such file",
    }
    assert len(reasons) == len(expected)
    for name, reason in expected.items():
        assert reason in reasons[str(files / name)]
        assert f"geoclip: {files / name}: " in errors
    assert "5 of 8 photos could not be used" in errors


def test_exif_is_the_truth_beside_the_answer_and_never_the_answer(files, checkpoint, capsys, tmp_path):
    plain = save(tmp_path / "plain.png", 1)
    tagged = save(tmp_path / "tagged.png", 1, place=(48, 2))
    assert main(["predict", str(plain), str(tagged), "--checkpoint", checkpoint, "--format", "json"]) == 0
    without, with_truth = json.loads(capsys.readouterr().out)["photos"]
    assert without["truth"] is None and with_truth["truth"] == {"lat": 48.0, "lon": 2.0}
    for one, other in zip(without["places"], with_truth["places"], strict=True):
        assert "error_km" not in one
        here = torch.tensor([other["lat"], other["lon"]], dtype=torch.float64)
        error_km = earth.haversine_km(here, torch.tensor([48.0, 2.0], dtype=torch.float64)).item()
        assert other.pop("error_km") == pytest.approx(error_km)
        assert one == other, "EXIF changed the answer"


def test_unusable_exif_is_named_and_the_photo_answered(checkpoint, capsys, tmp_path):
    path = save(tmp_path / "nofix.jpg", 1, place=(0.0, 0.0))
    assert main(["predict", str(path), "--checkpoint", checkpoint, "--top-k", "1"]) == 0
    printed, errors = capsys.readouterr()
    assert "no fix" in errors and "answered without a truth" in errors
    assert "error km" not in printed


def test_csv_has_a_row_for_each_photo_and_rank(files, checkpoint, capsys):
    main(["predict", str(files), "--checkpoint", checkpoint, "--top-k", "3", "--format", "csv"])
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert len(table) == 9 and list(table["rank"]) == [1, 2, 3] * 3
    assert (
        table["map"][0]
        == f"https://www.google.com/maps/search/?api=1&query={table.lat[0]:.6f},{table.lon[0]:.6f}"
    )
    assert table["country"].notna().all() and (table["town_km"] >= 0).all()
    assert table.groupby("file")["error_km"].count().tolist() == [0, 3, 0]


def test_table_names_place_probability_and_truth(files, checkpoint, capsys):
    assert main(["predict", str(files / "b.jpg"), "--checkpoint", checkpoint, "--top-k", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{files / 'b.jpg'}\n")
    assert "EXIF says 48.0000, 2.0000" in printed and "error km" in printed and "%" in printed
    assert "not calibrated" in printed


@pytest.mark.slow
@pytest.mark.parametrize("decision", ["mode", "disc:25", "median", "geoscore"])
def test_a_decision_answers_with_distinct_places_regions_and_countries(files, checkpoint, capsys, decision):
    options = ["--checkpoint", checkpoint, "--decision", decision, "--top-k", "3", "--format", "json"]
    assert main(["predict", str(files), *options]) == 1
    photos = json.loads(capsys.readouterr().out)["photos"]
    assert [photo["file"] for photo in photos] == [str(files / name) for name in ("a.png", "b.jpg", "c.jpg")]
    for photo in photos:
        places = torch.tensor([[place["lat"], place["lon"]] for place in photo["places"]]).double()
        apart = earth.haversine_km(places[:, None], places[None]) + 1e6 * torch.eye(len(places))
        assert 1 <= len(places) <= 3 and apart.min() >= 24.9
        assert all(0 <= place["probability"] <= 1 for place in photo["places"])
        half, most = photo["regions"]
        assert (half["probability"], most["probability"]) == (0.5, 0.9)
        assert 0 < half["area_km2"] < most["area_km2"]
        assert shape(half["geometry"]).area < shape(most["geometry"]).area
        assert sum(found["probability"] for found in photo["countries"]) <= 1 and photo["countries"]


def test_geojson_has_regions_and_places_in_lon_lat(files, checkpoint, capsys):
    options = ["--checkpoint", checkpoint, "--top-k", "2", "--format", "geojson"]
    assert main(["predict", str(files / "b.jpg"), *options, "--decision", "mode"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["type"] == "FeatureCollection"
    half, most, first, _ = found["features"]
    assert [f["properties"]["probability"] for f in (half, most)] == [0.5, 0.9]
    assert half["geometry"]["type"] == "MultiPolygon" and half["properties"]["file"] == str(files / "b.jpg")
    assert first["geometry"]["coordinates"] == [first["properties"]["lon"], first["properties"]["lat"]]
    assert shape(most["geometry"]).contains(shape(first["geometry"]))
    assert main(["predict", str(files / "b.jpg"), *options]) == 0  # argmax has no regions
    assert [f["geometry"]["type"] for f in json.loads(capsys.readouterr().out)["features"]] == ["Point"] * 2


@pytest.mark.slow
def test_a_calibrated_checkpoint_answers_by_its_posterior(files, checkpoint, capsys, tmp_path):
    own = tmp_path / "run" / "last.ckpt"
    own.parent.mkdir()
    shutil.copy(checkpoint, own)
    (own.parent / "result.json").write_text("{}")
    rows = ["file,lat,lon"]
    for i in range(60):
        save(tmp_path / f"{i}.png", i)
        rows.append(f"{i}.png,{i - 30},{2 * i}")
    (tmp_path / "mine.csv").write_text("\n".join([*rows, "absent.png,1,2"]))
    assert main(["calibrate", "--checkpoint", str(own), "--csv", str(tmp_path / "mine.csv")]) == 0
    printed = capsys.readouterr().out
    assert "1 photos could not be read" in printed and "on 60 images of mine.csv" in printed
    assert main(["predict", str(files / "b.jpg"), "--checkpoint", str(own)]) == 0
    printed = capsys.readouterr().out
    assert (
        "those of being within 25 km, calibrated on mine.csv" in printed and "90% within a region" in printed
    )
    assert main(["predict", str(files / "b.jpg"), "--checkpoint", str(own), "--decision", "argmax"]) == 0
    assert "shares of the gallery" in capsys.readouterr().out
    (own.parent / "last.calibration.json").write_text("{")
    assert main(["predict", str(files / "b.jpg"), "--checkpoint", str(own)]) == 2
    assert "last.calibration.json is not a calibration" in capsys.readouterr().err


def test_a_part_of_the_gallery_is_not_calibrated_and_the_checkpoint_is_read_once(
    checkpoint, capsys, tmp_path, monkeypatch
):
    own, reads, load = tmp_path / "last.ckpt", [], torch.load
    shutil.copy(checkpoint, own)
    Calibration(fitted_on="some tiles").save(own)
    monkeypatch.setattr(torch, "load", lambda *a, **b: reads.append(a) or load(*a, **b))
    options = ["--checkpoint", str(own), "--split", "random", "--out", str(tmp_path / "table.csv")]
    assert main(["evaluate", *options]) == 0
    assert len(reads) == 1
    assert pd.read_csv(tmp_path / "table.csv")["model"][0].endswith(", mode")
    capsys.readouterr()
    assert main(["evaluate", *options, "--gallery-size", "30"]) == 0
    assert "not calibrated: the calibration is of the whole gallery" in capsys.readouterr().err
    assert not pd.read_csv(tmp_path / "table.csv")["model"][0].endswith(", mode")


@pytest.mark.slow
def test_training_features_enter_the_posterior_and_tell_unfamiliar_photos(
    files, checkpoint, capsys, tmp_path
):
    own = tmp_path / "last.ckpt"
    shutil.copy(checkpoint, own)
    (tmp_path / "result.json").write_text("{}")
    for name, start in (("train", 0), ("mine", 100)):
        for i in range(start, start + 60):
            save(tmp_path / f"{i}.png", i)
        rows = [f"{i}.png,{i % 60 - 30},{2 * (i % 60)}" for i in range(start, start + 60)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["file,lat,lon", *rows]))
    train, features = str(tmp_path / "train.csv"), str(tmp_path / "features")
    options = ["--checkpoint", str(own), "--neighbours", features]
    asked = ["predict", str(files / "b.jpg"), "--format", "json"]
    assert (
        main(["embed", train, "--out", features, "--checkpoint", str(own), "--views", "1", "--workers", "0"])
        == 0
    )
    assert main([*asked, *options]) == 2
    assert "fit them first, with `calibrate --neighbours`" in capsys.readouterr().err
    assert main(["calibrate", *options, "--csv", str(tmp_path / "mine.csv")]) == 0
    assert "last.neighbours.json" in capsys.readouterr().out
    assert main([*asked, *options]) == 0
    [photo] = json.loads(capsys.readouterr().out)["photos"]
    assert photo["unfamiliar"] is False
    fitted = json.loads((tmp_path / "last.neighbours.json").read_text())
    fitted["neighbours"]["least"] = 101.0  # more than any cosine
    (tmp_path / "last.neighbours.json").write_text(json.dumps(fitted))
    assert main([*asked[:2], *options]) == 0
    printed = capsys.readouterr().out
    assert "far from anything it was trained on" in printed and "5% of photos like those" in printed
    assert main([*asked[:2], "--checkpoint", str(own)]) == 0
    assert "is not known without --neighbours" in capsys.readouterr().out
    fitted["neighbours"]["features"] = "other, 0"
    (tmp_path / "last.neighbours.json").write_text(json.dumps(fitted))
    assert main([*asked, *options]) == 2
    assert "but `calibrate` was given other, 0" in capsys.readouterr().err


@pytest.mark.slow
def test_neighbours_by_the_photographer_of_the_photo_are_left_out(checkpoint, capsys, tmp_path):
    own, csv, features = tmp_path / "last.ckpt", tmp_path / "train.csv", str(tmp_path / "features")
    shutil.copy(checkpoint, own)
    (tmp_path / "result.json").write_text("{}")
    places = load_checkpoint(own).gallery.latlon[:12].tolist()
    rows = [f"{save(tmp_path / f'{i}.png', i).name},{lat},{lon}" for i, (lat, lon) in enumerate(places)]
    written = [f"{row},mine" for row in rows]
    csv.write_text("\n".join(["file,lat,lon,author", *written]))
    # the photos of the training again: half of them are said to be by somebody else
    asked = [row.replace("mine", "other") if i % 2 else row for i, row in enumerate(written)]
    (tmp_path / "asked.csv").write_text("\n".join(["file,lat,lon,author", *asked, "gone.png,0,0,mine"]))
    embed = ["embed", str(csv), "--out", features, "--checkpoint", str(own), "--views", "1", "--workers", "0"]
    assert main(embed) == 0
    info = FeatureInfo.read(tmp_path / "features" / "features.json")
    fit = NeighbourFit(f"{info.source}, {info.data}", 1e4, 0.5, 1.0, 0.0)
    Calibration(1.0, 1.0, 0.0, "synthetic", 60, neighbours=fit).save(own)
    options = ["--checkpoint", str(own), "--neighbours", features, "--out", str(tmp_path / "table.csv")]
    options += [
        "--csv",
        str(tmp_path / "asked.csv"),
        "--workers",
        "0",
        "--batch-size",
        "5",
        "--decision",
        "mode",
    ]
    assert main(["evaluate", *options, "--photographer-disjoint", str(csv)]) == 1  # one photo is missing
    capsys.readouterr()
    found = pd.read_csv(tmp_path / "table.csv").set_index("measure")["acc_1km"]
    assert found["accuracy"] == pytest.approx(100 * 12 / 13, abs=0.01)
    assert found["accuracy, neighbours by others"] == pytest.approx(100 * 6 / 13, abs=0.01)
    csv.write_text("\n".join(["file,lat,lon,author", *written[1:]]))
    assert main(["evaluate", *options, "--photographer-disjoint", str(csv)]) == 2
    assert "names no photographer of 1 of the images" in capsys.readouterr().err
    (tmp_path / "asked.csv").write_text("\n".join(["file,lat,lon", *rows]))
    assert main(["evaluate", *options, "--photographer-disjoint", str(csv)]) == 2
    assert "asked does not name the photographer of each photo" in capsys.readouterr().err


def test_too_few_images_to_calibrate_on(checkpoint, capsys):
    assert main(["calibrate", "--checkpoint", checkpoint]) == 2
    assert "20 images are too few to fit a calibration on" in capsys.readouterr().err


@pytest.mark.slow
def test_maps_are_written(files, checkpoint, tmp_path, capsys):
    one, many, dense = (tmp_path / f"{name}.png" for name in ("one", "many", "dense"))
    assert main(["predict", str(files / "b.jpg"), "--checkpoint", checkpoint, "--map", str(one)]) == 0
    options = ["--checkpoint", checkpoint, "--decision", "mode", "--map", str(dense)]
    assert main(["predict", str(files / "b.jpg"), *options]) == 0
    assert main(["predict", str(files), "--checkpoint", checkpoint, "--map", str(many)]) == 1
    for path in (one, many, dense):
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 20)) > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k", str(PLACES + 1)], f"--top-k {PLACES + 1}: the gallery has {PLACES} places"),
        (["--map", "map.txt"], "--map map.txt"),
        (["--decision", "best"], "--decision"),
        (["--decision", "mode", "--index"], "--index: a decision needs the scores of all places"),
        (["--gallery", "absent.csv"], "absent.csv"),
        (["--checkpoint", "absent.ckpt"], "no checkpoint at absent.ckpt"),
    ],
)
def test_wrong_options_are_one_sentence_and_status_2(files, checkpoint, capsys, options, message):
    options = options if "--checkpoint" in options else [*options, "--checkpoint", checkpoint]
    assert main(["predict", str(files / "a.png"), *options]) == 2
    printed, errors = capsys.readouterr()
    assert printed == "" and errors.startswith("geoclip: error: ") and message in errors


def test_a_gallery_of_ones_own(files, checkpoint, capsys, tmp_path):
    pd.DataFrame({"LAT": [10.0, -20.0], "LON": [30.0, 40.0]}).to_csv(tmp_path / "two.csv", index=False)
    arguments = [
        "--checkpoint",
        checkpoint,
        "--gallery",
        str(tmp_path / "two.csv"),
        "--top-k",
        "2",
        "--format",
        "json",
    ]
    assert main(["predict", str(files / "a.png"), *arguments]) == 0
    [photo] = json.loads(capsys.readouterr().out)["photos"]
    assert {(place["lat"], place["lon"]) for place in photo["places"]} == {(10.0, 30.0), (-20.0, 40.0)}
    assert sum(place["probability"] for place in photo["places"]) == pytest.approx(1, abs=1e-5)


def test_a_gallery_s_errors_name_file_line_and_column(files, checkpoint, capsys, tmp_path):
    options = [
        "predict",
        str(files / "a.png"),
        "--checkpoint",
        checkpoint,
        "--gallery",
        str(tmp_path / "g.csv"),
    ]
    for text, message in (
        ("x,y\n1,2\n", "no column for lat"),
        ("latitude,longitude\n1,2\n3,far\n", "line 3: longitude is 'far', not a number of degrees"),
        ("lat,lng\n1,2\n95,182\n", "line 3: lat is 95, beyond ±90"),
        ("lat,lng\n", "there are no rows"),
    ):
        (tmp_path / "g.csv").write_text(text)
        assert main(options) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'g.csv'}" in error and message in error
    (tmp_path / "g.csv").write_text("Latitude,Lng\n1,2\n")  # names that `evaluate --gallery` recognises too
    assert main([*options, "--top-k", "1"]) == 0


def test_an_empty_folder_is_listed_and_the_photos_are_answered(files, checkpoint, capsys, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    options = ["--checkpoint", checkpoint, "--format", "json"]
    assert main(["predict", str(files / "a.png"), str(empty), *options]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [photo["file"] for photo in found["photos"]] == [str(files / "a.png")]
    [failure] = found["failed"]
    assert failure["file"] == str(empty) and "holds no photos" in failure["reason"]
    assert main(["predict", str(empty), *options]) == 2
    assert f"no photos: {empty}: the folder holds no photos" in capsys.readouterr().err


@pytest.mark.slow
def test_any_file_name_is_answered_and_drawn(checkpoint, capsys, tmp_path):
    for name in ("a $\\frac{ b$.png", os.fsdecode(b"caf\xe9.png"), "two\nlines.png"):
        folder = tmp_path / str(len(name))
        folder.mkdir()
        path = folder / name
        save(path, 0)
        drawn = str(folder / "map.png")
        assert main(["predict", str(path), "--checkpoint", checkpoint, "--map", drawn]) == 0
        assert "Traceback" not in capsys.readouterr().err and os.path.getsize(drawn) > 10_000


def test_a_full_disk_names_the_map(checkpoint, capsys, tmp_path, monkeypatch):
    import errno

    from matplotlib.figure import Figure

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    options = ["--checkpoint", checkpoint, "--map", str(tmp_path / "map.png")]
    assert main(["predict", str(save(tmp_path / "a.png")), *options]) == 2
    assert f"{tmp_path / 'map.png'}: cannot be saved" in capsys.readouterr().err


def test_an_unfinished_run_is_said_and_options_are_refused_by_name(checkpoint, capsys, tmp_path):
    photo = str(save(tmp_path / "a.png"))
    (tmp_path / "run").mkdir()
    unfinished = shutil.copy(checkpoint, tmp_path / "run")
    assert main(["predict", photo, "--checkpoint", unfinished, "--top-k", "1"]) == 0
    assert f"the training run in {tmp_path / 'run'} has not finished" in capsys.readouterr().err
    for typed in (["--top-k", "0"], ["--top-k=0"]):
        assert main(["predict", photo, "--checkpoint", checkpoint, *typed]) == 2
        assert capsys.readouterr().err.startswith("geoclip: error: --top-k: must be a positive integer")


def test_workers_give_what_one_process_gives(model, files):
    from geoclip import predictor

    paths = [files / name for name in ("a.png", "text.jpg", "b.jpg", "absent.jpg", "c.jpg")]
    here = predictor.answer(model, paths, 2)
    there = predictor.answer(model, paths, 2, workers=2, batch_size=2)
    assert here.unreadable == there.unreadable == {1: "not an image in a known format", 3: "no such file"}
    assert torch.equal(here.latlon.nan_to_num(), there.latlon.nan_to_num())
    assert here.latlon.isnan().any(-1).any(-1).tolist() == [False, True, False, True, False]
    with pytest.raises(PhotoError, match=r"text\.jpg"):
        predictor.answer(model, paths, strict=True)


def test_the_loop_leaves_the_global_random_state_alone(model):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model.predict([noise(0), noise(1)])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_a_baseline_answers_with_one_place_and_no_probability(tmp_path, capsys):
    from geoclip.baselines.geocells import GeocellsConfig, GeocellsTraining
    from geoclip.training import runs

    config = GeocellsConfig(
        image=ImageEncoderConfig("conv", None, frozen=False),
        splits=SplitConfig(train=600, val=50, test=100, gallery=1000),
        img_min=3,
        img_max=(100, 40, 15),
        batch_size=64,
        epochs=1,
    )
    checkpoint = str(runs.train(config, tmp_path / "run", GeocellsTraining).checkpoint)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40), (10, 90, 60)).save(tmp_path / name)
    names = [str(tmp_path / name) for name in ("a.png", "b.png")]
    assert (
        main(
            [
                "predict",
                *names,
                "--checkpoint",
                checkpoint,
                "--format",
                "json",
                "--map",
                str(tmp_path / "m.png"),
            ]
        )
        == 0
    )
    said = capsys.readouterr()
    found = json.loads(said.out)["photos"]
    assert [photo["file"] for photo in found] == names
    assert [len(photo["places"]) for photo in found] == [1, 1]
    assert found[0]["places"][0]["probability"] is None and abs(found[0]["places"][0]["lat"]) <= 90
    assert "one place, without probability" in said.err and (tmp_path / "m.png").stat().st_size > 10_000
    for option in (["--gallery", "official"], ["--index"]):
        assert main(["predict", names[0], "--checkpoint", checkpoint, *option]) == 2
        assert "answers from no gallery" in capsys.readouterr().err


def test_an_index_is_searched_and_tells_its_recall(files, checkpoint, capsys, tmp_path, monkeypatch):
    options = ["--checkpoint", checkpoint, "--top-k", "3", "--format", "csv", "--precision", "fp32"]
    assert main(["predict", str(files / "b.jpg"), *options]) == 0
    exact = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert main(["predict", str(files / "b.jpg"), *options, "--index"]) == 0
    said = capsys.readouterr()
    found = pd.read_csv(io.StringIO(said.out))
    assert "the index finds 100.0 % of the five best places" in said.err  # it probes all lists
    assert found[["lat", "lon"]].equals(exact[["lat", "lon"]])
    assert (found["probability"] >= exact["probability"] - 1e-6).all()
    assert len(list((tmp_path / "cache" / "galleries").glob("*.faiss"))) == 1
    monkeypatch.setattr("geoclip.engines.place_index.WORTH_IT", 50)
    main(["predict", str(files / "b.jpg"), *options])
    assert "60 places; --index searches it faster" in capsys.readouterr().err
