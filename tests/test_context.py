"""Regression through context: distances on the sphere, unknown labels, switches, captions."""

import dataclasses
import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn import functional

from geoclip import earth
from geoclip.__main__ import main
from geoclip.baselines import labels, samples
from geoclip.baselines.context import ContextConfig, ContextTraining, distance, score_context
from geoclip.datasets import blue_marble
from geoclip.datasets.blue_marble import SplitConfig, TileConfig
from geoclip.image_encoder import ImageEncoderConfig, Preprocessing, load_clip
from geoclip.training import runs
from geoclip.training.data import seeded

SMALL = ContextConfig(
    image=ImageEncoderConfig("conv", None, frozen=False),
    splits=SplitConfig(train=400, val=50, test=100, gallery=1000),
    heads=("climate", "continent", "country", "state"),
    caption="an image of {state}, {country}, {continent}, {climate} climate",
    batch_size=64,
    epochs=2,
    learning_rate=1e-3,
)


def changed(**fields) -> ContextConfig:
    return dataclasses.replace(SMALL, **fields)


def batch_of(config: ContextConfig, n: int = 32):
    data = ContextTraining.training_set(config)
    return ContextTraining.build(config, data), data.__getitems__([(0, row) for row in range(n)])


@pytest.mark.parametrize("kind", ["chord", "great_circle"])
def test_distances_on_the_sphere_agree_with_the_haversine(kind):
    generator = torch.Generator().manual_seed(0)
    a, b = earth.sample_sphere(64, generator).double(), earth.sample_sphere(64, generator).double()
    angle = earth.haversine_km(a, b) / earth.EARTH_RADIUS_KM
    expected = angle if kind == "great_circle" else 2 * (angle / 2).sin()
    lengths = torch.rand(64, 1, generator=generator, dtype=torch.float64) + 0.5  # only the direction counts
    found = [distance((lengths * earth.unit_sphere(a))[i : i + 1], b[i : i + 1], kind) for i in range(64)]
    assert torch.allclose(torch.stack(found).double(), expected, atol=1e-5)


def test_the_degree_loss_tears_at_the_date_line_and_the_sphere_does_not():
    fiji = torch.tensor([[-17.0, -179.9]])
    across = torch.tensor([[-17.0, 179.9]])
    assert distance(across / torch.tensor([90.0, 180.0]), fiji, "degrees") > 0.9
    assert distance(earth.unit_sphere(across), fiji, "chord") < 0.004
    assert distance(earth.unit_sphere(across), fiji, "great_circle") < 0.004


@pytest.mark.parametrize("kind", ["chord", "great_circle"])
def test_gradients_are_finite_where_the_answer_is_right_and_where_it_is_opposite(kind):
    place = torch.tensor([[30.0, 60.0]])
    for sign in (1.0, -1.0):
        output = (sign * earth.unit_sphere(place)).requires_grad_()
        distance(output, place, kind).backward()
        assert output.grad.isfinite().all()


@pytest.mark.slow
def test_loss_is_distance_and_the_mean_of_the_heads():
    module, batch = batch_of(SMALL)
    output, logits = module.model(batch["image"][:, 0])
    by_hand = distance(output, batch["latlon"], "chord")
    heads = []
    for head in SMALL.heads:
        known = batch[head] >= 0
        heads.append(functional.cross_entropy(logits[head][known], batch[head][known]))
    found = module.loss(batch, seeded(0))
    assert torch.allclose(found["loss"], by_hand + torch.stack(heads).mean())
    assert set(found) == {"loss", "distance", *SMALL.heads}


@pytest.mark.slow
def test_unknown_labels_are_left_out_and_are_not_class_0():
    module, batch = batch_of(SMALL)
    blank = dict(batch, country=torch.full_like(batch["country"], labels.UNKNOWN))
    found = module.loss(blank, seeded(0))
    assert found["country"] == 0
    found["loss"].backward()
    # neither probability nor bias of any class is pushed by the head's own loss; the coordinates still use it
    alone = module.model.heads["country"](torch.zeros(1, module.model.tower.dim))
    assert alone.isfinite().all() and all(
        p.grad is None or p.grad.isfinite().all() for p in module.parameters()
    )
    half = dict(batch, country=batch["country"].clone())
    half["country"][16:] = labels.UNKNOWN
    first = {name: value[:16] for name, value in batch.items()}
    assert torch.allclose(module.loss(half, seeded(0))["country"], module.loss(first, seeded(0))["country"])


def test_probabilities_of_the_heads_reach_the_coordinates():
    module, batch = batch_of(SMALL)
    output, _ = module.model(batch["image"][:, 0])
    distance(output, batch["latlon"], "chord").backward()
    assert module.model.heads["climate"].weight.grad.abs().max() > 0


def test_heads_pass_on_probabilities_or_logits():
    module, batch = batch_of(SMALL)
    other, _ = batch_of(changed(context_input="logits"))
    images, seen = batch["image"][:, 0], []
    for model in (module.model, other.model):
        model.coordinates.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    (_, logits), (_, same) = module.model(images), other.model(images)
    feature = module.model.tower(images)
    assert torch.equal(seen[0], torch.cat([feature, *(v.softmax(-1) for v in logits.values())], 1))
    assert torch.equal(seen[1], torch.cat([feature, *same.values()], 1))


def test_captions_of_a_clip_tower_start_in_its_own_space(tiny_clip):
    image = ImageEncoderConfig(tiny_clip, None, frozen=False)
    config = changed(image=image, caption_epochs=1, tiles=TileConfig(pixels=Preprocessing.of(image).pixels))
    module, batch = batch_of(config, 4)
    clip = load_clip(tiny_clip, None)
    images, tokens = batch["image"][:, 0], batch["caption"]
    with torch.no_grad():
        seen, read = (
            functional.normalize(f, dim=-1) for f in (clip.encode_image(images), clip.encode_text(tokens))
        )
        logits = clip.logit_scale.exp() * seen @ read.T
        same = (tokens[:, None] == tokens[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        by_hand = sum(functional.cross_entropy(each, target) for each in (logits, logits.T)) / 2
        assert torch.allclose(module.model.caption_loss(images, tokens), by_hand, atol=1e-5)


@pytest.mark.slow
def test_context_is_answered_and_scored(tmp_path, capsys):
    module, _ = batch_of(SMALL)
    module.eval()
    images, latlon = module.test_tiles("random")
    (tmp_path / "photo.png").write_bytes(blue_marble_png(images[0]))
    views = module.views(tmp_path / "photo.png")
    module.locate(views[None])
    first, logits = module.described.pop()["context"], module.model(views)[1]
    module.locate(images[:, None])
    best = logits["state"][0].softmax(-1).topk(5)
    assert list(first) == list(SMALL.heads) and all(len(likely) == 5 for likely in first.values())
    assert list(first["state"]) == [module.encoding.classes["state"][i] for i in best.indices]
    assert list(first["state"].values()) == pytest.approx(best.values.tolist(), abs=1e-5)
    kept = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(kept)
    torch.save(kept, tmp_path / "context.ckpt")
    checkpoint = ["--checkpoint", str(tmp_path / "context.ckpt")]
    assert main(["predict", str(tmp_path / "photo.png"), *checkpoint]) == 0
    assert f"\n  state: {next(iter(first['state']))} " in capsys.readouterr().out
    assert main(["predict", str(tmp_path / "photo.png"), *checkpoint, "--format", "csv"]) == 0
    row = pd.read_csv(io.StringIO(capsys.readouterr().out)).iloc[0]
    assert row["climate"] == next(iter(first["climate"])) and row["state"] == next(iter(first["state"]))
    assert (
        main(
            [
                "evaluate",
                *checkpoint,
                "--split",
                "random",
                "--gallery-size",
                "50",
                "--out",
                str(tmp_path / "t.csv"),
            ]
        )
        == 0
    )
    scored = pd.read_csv(tmp_path / "t_context.csv").set_index("head")
    truth = labels.named(samples.tile_context(latlon, SMALL.heads))["country"]
    first = [next(iter(photo["context"]["country"])) for photo in module.described]
    right = [found == name for found, name in zip(first, truth, strict=True) if not pd.isna(name)]
    assert scored.loc["country", "n"] == len(right) > 50
    assert scored.loc["country", "top1"] == pytest.approx(100 * np.mean(right), abs=1e-4)
    assert (scored["top1"] <= scored["top5"]).all() and list(scored.index) == list(SMALL.heads)


def blue_marble_png(tile) -> bytes:
    file = io.BytesIO()
    Image.fromarray(((tile + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def test_unread_photos_are_misses_of_the_heads_and_unknown_classes_do_not_count():
    truth = pd.DataFrame({"month": [0, 0, np.nan, 1], "city": ["Nice", None, None, "Rome"]})
    likely = {"month": {"March": 0.5, "January": 0.3}}
    scored = score_context([{"context": likely}, {}, {"context": likely}, {"context": likely}], truth)
    assert scored.to_dict("records") == [
        {"head": "month", "n": 3, "top1": 0.0, "top5": pytest.approx(100 / 3)}
    ]


def test_use_context_off_is_the_feature_alone():
    off, batch = batch_of(changed(use_context=False))
    assert len(off.model.heads) == 0 and set(off.loss(batch, seeded(0))) == {"loss", "distance"}
    assert off.model.coordinates[0].in_features == off.model.tower.dim
    on, _ = batch_of(SMALL)
    assert on.model.coordinates[0].in_features == on.model.tower.dim + sum(
        h.out_features for h in on.model.heads.values()
    )
    # both start from one tower
    assert all(
        torch.equal(*pair)
        for pair in zip(off.model.tower.parameters(), on.model.tower.parameters(), strict=True)
    )


def test_places_of_what_the_model_gives():
    module, _ = batch_of(changed(use_context=False))
    places = torch.tensor([[10.0, 20.0], [-60.0, -179.0]])
    assert torch.allclose(module.model.places(3 * earth.unit_sphere(places)), places, atol=1e-4)
    degrees, _ = batch_of(changed(use_context=False, distance="degrees"))
    assert torch.allclose(
        degrees.model.places(torch.tensor([[2.0, 1.5], [0.5, -0.5]])), torch.tensor([[90.0, -90], [45, -90]])
    )
    image = torch.zeros(3, 3, 32, 32)
    assert degrees.model(image)[0].shape == (3, 2) and module.place(image).shape == (3, 2)


def test_captions_leave_out_what_is_not_known():
    table = pd.DataFrame(
        {
            "city": ["Nice", None, None],
            "county": ["Alpes-Maritimes", None, None],
            "state": ["Provence", "California", None],
            "climate": [7, np.nan, 14],
            "month": [5, 0, np.nan],
        }
    )
    assert labels.captions(table, ContextConfig.caption) == [
        "a photo in Nice, Alpes-Maritimes, Provence, temperate, dry hot summer climate, in June",
        "a photo in California, in January",
        "a photo in temperate, humid, warm summer climate",
    ]


def test_caption_epochs_train_tower_and_text_and_then_the_heads():
    config = changed(caption_epochs=1)
    module, batch = batch_of(config)
    assert module.current_epoch == 0
    values = module.loss(batch, seeded(0))
    assert set(values) == {"loss", "caption"}
    values["loss"].backward()
    moved = {
        name for name, p in module.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    assert {
        "text.words.weight",
        "image_projection.weight",
        "tower.body.layers.0.weight",
        "logit_scale",
    } <= moved
    assert not any(name.startswith(("heads", "coordinates")) for name in moved)
    assert all(
        torch.equal(mine, other)
        for mine, other in zip(
            module.model.tower.parameters(), batch_of(SMALL)[0].model.tower.parameters(), strict=True
        )
    )


def test_equal_captions_are_all_right_answers():
    module, batch = batch_of(changed(caption_epochs=1))
    images = batch["image"][:2, 0]
    same = batch["caption"][:1].repeat(2, 1)
    # two images, one caption: each row's target is half and half, and so are the similarities
    assert module.model.caption_loss(images[:1].repeat(2, 1, 1, 1), same).item() == pytest.approx(
        np.log(2), abs=1e-5
    )
    different = torch.stack([batch["caption"][0], batch["caption"][0].flip(0) * 0 + 1])
    assert module.model.caption_loss(images, different) != module.model.caption_loss(images, same)


@pytest.mark.slow
def test_training_with_captions_stops_resumes_and_answers(tmp_path, tile_errors):
    config = changed(caption_epochs=1)
    whole = runs.train(config, tmp_path / "whole", ContextTraining)
    runs.train(config, tmp_path / "parts", ContextTraining, epochs=1)
    parts = runs.train(config, tmp_path / "parts", ContextTraining)
    one, other = whole.load(), parts.load()
    assert parts.result["resumed"]
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert one.encoding == other.encoding and len(one.encoding.words) > 20
    assert {"val/caption", "val/distance", "val/country"} <= set(whole.metrics())
    assert tile_errors(one, "random").isfinite().all()


def test_embedded_context_is_what_maps_say():
    places = torch.tensor([[48.8566, 2.3522], [-23.5505, -46.6333], [0.0, -140.0]])
    table = samples.tile_context(places, samples.TILE_COLUMNS)
    assert table.iloc[2].isna().all()
    table = table[:2]
    assert table["country"].tolist() == ["France", "Brazil"]
    assert table["continent"].tolist() == ["Europe", "South America"]
    assert table["state"].tolist() == ["Île-de-France, FR", "São Paulo, BR"]
    assert [list(labels.CLIMATES)[int(c)] for c in table["climate"]] == ["Cfb", "Cfa"]
    assert table["scene"].tolist() == [2, 2]
    with pytest.raises(ValueError, match="have no label 'month'"):
        samples.tile_context(places, ("month",))


def test_what_a_list_of_photos_does_not_say_is_looked_up_on_maps(tmp_path):
    csv = tmp_path / "photos.csv"
    csv.write_text("IMG_FILE,LAT,LON\na.jpg,48.8566,2.3522\nb.jpg,-23.5505,-46.6333\n")
    found = samples.Samples.of(changed(data=str(csv)), ("country", "climate"))
    assert found.context["country"].tolist() == ["France", "Brazil"]
    assert [list(labels.CLIMATES)[int(c)] for c in found.context["climate"]] == ["Cfb", "Cfa"]
    with pytest.raises(ValueError, match="no label 'month'"):
        samples.Samples.of(changed(data=str(csv)), ("country", "month"))


def test_labels_not_seen_in_training_are_unknown_and_wrong_ones_are_refused():
    classes = labels.classes_of(pd.DataFrame({"climate": [3.0], "city": ["Nice"]}), ("climate", "city"))
    assert len(classes["climate"]) == 30  # fixed, however few occur
    found = labels.encode(pd.DataFrame({"climate": [29.0, np.nan], "city": ["Nowhere", "Nice"]}), classes)
    assert found["climate"].tolist() == [29, labels.UNKNOWN] and found["city"].tolist() == [labels.UNKNOWN, 0]
    with pytest.raises(ValueError, match="climate, row 1: label 30 is outside 0 … 29"):
        labels.encode(pd.DataFrame({"climate": [3.0, 30.0], "city": ["Nice", "Nice"]}), classes)
    with pytest.raises(ValueError, match="known for no image"):
        labels.classes_of(pd.DataFrame({"city": [None]}), ("city",))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"caption_epochs": 2}, "leaves none of the 2 epochs"),
        ({"heads": ()}, "use_context needs heads"),
        ({"image": ImageEncoderConfig(), "caption_epochs": 1}, "cannot train a frozen tower"),
        ({"heads": ("month",)}, "have no label .month."),
    ],
)
def test_wrong_options(wrong, message):
    with pytest.raises(ValueError, match=message):
        ContextTraining.training_set(changed(**wrong))


def test_osv_mini_in_its_own_columns(tmp_path):
    """Made rows in the public layout: months from captured_at (ms), climate from 0, empty names unknown."""
    rows = []
    for row in range(8):
        region = ["Bavaria", "Tyrol"][row % 2]
        (tmp_path / "train_images" / region).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40), (row * 30, 0, 0)).save(tmp_path / "train_images" / region / f"{row}.jpg")
        rows.append(
            {
                "id": row, "latitude": 47 + row / 10, "longitude": 11.0, "region": region, "sub-region": "",
                "city": "Town" if row < 4 else "", "unique_city": "", "unique_sub-region": "", "climate": row,
                "captured_at": pd.Timestamp(2019, row + 1, 15).value // 10**6,
            }
        )  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "train_mini.csv", index=False)
    config = changed(
        data=str(tmp_path / "train_mini.csv"), heads=("climate", "month", "state", "city"), batch_size=4,
        caption_epochs=1, caption=ContextConfig.caption,
    )  # fmt: skip
    data = ContextTraining.training_set(config)
    assert data.labels["month"].tolist() == list(range(8)) == data.labels["climate"].tolist()
    assert data.labels["state"].tolist() == [0, 1] * 4 and data.encode.classes["state"] == (
        "Bavaria",
        "Tyrol",
    )
    unknown = samples.context_of(pd.DataFrame({
        "captured_at": [pd.NaT], "climate": [-1], "region": [""], "sub-region": [""], "city": ["x"],
    }))  # fmt: skip
    assert labels.captions(unknown.astype(object), "in {city}, {climate} climate") == ["in x"]
    assert data.labels["city"].tolist() == [0] * 4 + [labels.UNKNOWN] * 4
    assert {"bavaria", "town", "january", "desert"} <= set(data.encode.words)
    batch = data.__getitems__([(0, 3), (0, 0)])
    ContextTraining.build(config, data).loss(batch, seeded(0))["loss"].backward()
    assert batch["image"].shape == (2, 1, 3, 32, 32)
    with pytest.raises(ValueError, match="'county' is known for no image"):
        ContextTraining.training_set(dataclasses.replace(config, heads=("county",)))


def test_tiles_asked_are_those_of_every_table():
    module, _ = batch_of(changed(use_context=False))
    images, latlon = module.test_tiles("random")
    assert (
        torch.equal(images, blue_marble.test_tiles("random", SMALL.tiles, SMALL.splits)[0])
        and len(latlon) == 100
    )
