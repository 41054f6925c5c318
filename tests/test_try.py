"""The page of `make try`: what it answers is what `predict` answers. tests/test_try_browser.py opens it."""

import asyncio
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from browsing import PARIS, made_checkpoint, photo, predicted
from PIL import Image

from geoclip import app, paths, pretrained
from geoclip.photos import PhotoError, Upload


def talk(checkpoint, *messages, monkeypatch=None):
    """The page after these messages, (content, *buffers), and all that it sent."""
    sent = []

    async def run():
        page = app.Page(checkpoint)
        page.send = lambda content, buffers=(): sent.append((content, buffers))
        page._received(page, {"kind": "shown"}, [])
        await page.loading
        for content, *buffers in messages:
            page._received(page, content, [memoryview(data) for data in buffers])
        return page

    return asyncio.run(run()), sent


def file(name, data, number=0, part=0, parts=1, size=None):
    return {
        "kind": "file", "name": name, "size": size or len(data), "file": number, "part": part, "parts": parts
    }, data  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("decision", ["argmax", "mode", "disc:25"])
def test_a_click_is_answered_as_predict_answers_the_tile(checkpoint, decision, tmp_path, monkeypatch, capsys):
    settings = {"kind": "settings", "decision": decision, "top_k": 3}
    click = {"kind": "place", "lat": PARIS[0], "lon": PARIS[1]}
    downloads = [({"kind": "download", "style": style},) for style in ("json", "csv", "tile")]
    page, sent = talk(checkpoint, (click,), (settings,), *downloads)
    assert page.state["ready"], page.state["said"]
    assert not page.state["photos"] and page.state["decision"] == "argmax"
    [(first, [picture]), (answer, _), (_, [listed]), (_, [table]), (tile, [image])] = sent
    assert first["kind"] == answer["kind"] == "answer" and len(first["places"]) == 5
    monkeypatch.chdir(tmp_path)
    Path(tile["name"]).write_bytes(image)
    options = ["--decision", decision, "--top-k", "3", "--format"]
    assert listed.decode() == predicted(tile["name"], checkpoint, *options, "json", capsys=capsys)
    assert table.decode() == predicted(tile["name"], checkpoint, *options, "csv", capsys=capsys)
    [found] = json.loads(listed)["photos"]
    assert list(found["truth"].values()) == pytest.approx(PARIS, abs=1e-6)
    with Image.open(io.BytesIO(picture)) as seen, Image.open(io.BytesIO(image)) as drawn:
        assert np.array_equal(seen, drawn), "the picture is what the model sees"
    assert len(answer["places"]) == len(answer["near"]) == 3 and answer["notes"]


@pytest.mark.slow
def test_the_regions_hold_their_part_of_the_draws(checkpoint):
    _, [(answer, _)] = talk(checkpoint, ({"kind": "place", "lat": 10.0, "lon": 20.0},))
    level = np.array(answer["draws"])[:, 2]
    assert np.mean(level == 2) == pytest.approx(0.5, abs=0.01)
    assert np.mean(level >= 1) == pytest.approx(0.9, abs=0.01)
    half, most = answer["regions"]
    assert (half["probability"], most["probability"]) == (0.5, 0.9) and half["area_km2"] < most["area_km2"]
    for region in (half, most):
        assert region["geometry"]["type"] == "MultiPolygon" and region["geometry"]["coordinates"]


def test_each_file_that_cannot_be_used_gets_its_sentence(checkpoint):
    expected = [
        (file("letter.jpg", b"Dear Sir"), "letter.jpg: not an image in a known format."),
        (file("empty.jpg", b""), "empty.jpg: empty (0 bytes)."),
        (file("torn.jpg", photo()[:700]), "torn.jpg: cannot be decoded"),
        (file("film.jpg", b"", size=3_000_000_000), "film.jpg: 3,000 MB; a photo may have up to 25 MB."),
        (file("liar.jpg", b"x" * 26_000_000, size=9), "liar.jpg: larger than it said."),
        (file("ninth.jpg", photo(), number=8), "ninth.jpg: more than 8 photos at once."),
        (file("../good.jpg", photo(), number=1), "good.jpg: photos need CLIP's weights"),
    ]
    page, sent = talk(checkpoint, *(message for message, _ in expected))
    for (answer, _), (_, said) in zip(sent, expected, strict=True):
        assert answer["kind"] == "said" and answer["said"].startswith(said)
    assert page.answerer.asked == []
    failed = json.loads(page.answerer.written("json"))["failed"]
    assert [entry["file"] for entry in failed] == ["liar.jpg", "ninth.jpg", "good.jpg"], "since the last drop"


@pytest.mark.slow
def test_photos_and_texts_where_there_is_clip(tiny_clip, tmp_path, monkeypatch, capsys):
    checkpoint = made_checkpoint(tmp_path / "clip.ckpt", tiny_clip)
    data, again = photo(PARIS), {"kind": "settings", "decision": "mode", "top_k": 2}
    parts = [file("a.jpg", data[:99], 0, 0, 2, len(data)), file("a.jpg", data[99:], 0, 1, 2, len(data))]
    messages = [*parts, file("b.png", photo(kind="PNG"), 1), file("c.png", b"no", 2), (again,)]
    page, sent = talk(checkpoint, *messages, ({"kind": "download", "style": "json"},))
    assert page.state["photos"]
    assert [content.get("index", content["kind"]) for content, _ in sent] == [0, 1, "said", 0, 1, "download"]
    monkeypatch.chdir(tmp_path)
    Path("a.jpg").write_bytes(data)
    found = json.loads(sent[-1][1][0])
    options = ["--decision", "mode", "--top-k", "2", "--format", "json"]
    assert (
        found["photos"][:1] == json.loads(predicted("a.jpg", checkpoint, *options, capsys=capsys))["photos"]
    )
    assert found["photos"][0]["places"][0]["error_km"] > 0 and found["photos"][1]["truth"] is None
    assert [photo["file"] for photo in found["photos"]] == ["a.jpg", "b.png"]
    assert [failed["file"] for failed in found["failed"]] == ["c.png"]
    _, [(answer, [picture])] = talk(checkpoint, ({"kind": "text", "text": "a desert"},))
    assert answer["file"] == "a desert" and len(answer["places"]) == 5 and not picture


@pytest.mark.slow
def test_a_failure_is_said_on_the_page(checkpoint):
    page, sent = talk(Path("nosuch.ckpt"), ({"kind": "place", "lat": 0.0, "lon": 0.0},))
    assert page.state["said"] == "The model could not be loaded: no checkpoint at nosuch.ckpt."
    assert not page.state["ready"] and sent == []
    _, sent = talk(checkpoint, ({"kind": "place", "lat": 91.0, "lon": 0.0},), ({"kind": "nosuch"},))
    assert [content["said"].split(":")[0] for content, _ in sent] == ["This failed"] * 2


def test_the_first_call_trains_and_calibrates_and_shows_progress(checkpoint, tmp_path, monkeypatch):
    called, shown = [], []

    async def command(*arguments):
        called.append(arguments[0])
        yield "epoch 3 of 9: train/loss 1.0"
        yield f"1053 steps in 60 s; checkpoint {checkpoint}"

    say = app.Page.say
    monkeypatch.setattr(app, "command", command)
    monkeypatch.setattr(app.Page, "say", lambda page, *a, **b: (shown.append(a[1:]), say(page, *a, **b)))
    monkeypatch.setattr(pretrained, "has_clip_file", lambda: False)
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    page, _ = talk(None)
    assert called == ["train", "calibrate"] and shown == [(0.0,), (3 / 9,), (), ()]
    assert page.checkpoint == checkpoint and page.state["ready"]


def test_a_command_that_fails_ends_with_its_last_line():
    async def run():
        return [line async for line in app.command("nosuch")]

    with pytest.raises(RuntimeError, match="no command 'nosuch'"):
        asyncio.run(run())


@pytest.mark.slow
def test_an_example_is_a_tile_of_the_test_places_or_a_photo(checkpoint, tiny_clip, tmp_path):
    answerer = app.Answerer(checkpoint)
    answer, _ = answerer.ask(answerer.example())
    lat, lon = answer["truth"]
    known = torch.cat([answerer.tiles.splits()[split] for split in ("random", "blocked")])
    assert (known - torch.tensor([lat, lon])).abs().amax(1).min() < 1e-5
    assert "not calibrated" in answer["notes"][-1]
    mirrored, _ = answerer.ask(answerer.tile(-lat, -lon))
    assert mirrored["truth"] == pytest.approx((-lat, -lon), abs=1e-6)
    with pytest.raises(PhotoError, match="not an image"):
        answerer.ask(Upload("text", b"text"))
    answerer = app.Answerer(made_checkpoint(tmp_path / "clip.ckpt", tiny_clip))
    answer, _ = answerer.ask(answerer.example())
    assert (answer["file"], answer["truth"], len(answer["places"])) == ("china.jpg", None, 5)
