"""The page of `make try`: what it answers is what `predict` answers, and it works in a real browser."""

import asyncio
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from geoclip import app, paths, pretrained
from geoclip.__main__ import main
from geoclip.datasets.blue_marble import SplitConfig
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig
from geoclip.location_encoder import LocationEncoder, LocationEncoderConfig
from geoclip.model import GeoCLIP
from geoclip.photos import PhotoError, Upload
from geoclip.training.config import TrainConfig

CONV = ImageEncoderConfig(tower="conv", weights=None, frozen=False, hidden=32, dim=32)
LOCATION = LocationEncoderConfig(sigmas=(1.0,), frequencies=16, width=32, hidden_layers=1, dim=32)
PARIS = (48.8566, 2.3522)
MAKEFILE = (paths.ROOT / "Makefile").read_text(encoding="utf-8")


def made_checkpoint(path, image):
    """A checkpoint with random weights and a gallery of 300 random places."""
    generator = torch.Generator().manual_seed(0)
    model = GeoCLIP(ImageEncoder(image, generator), LocationEncoder(LOCATION, generator))
    config = TrainConfig(image=image, location=LOCATION, splits=SplitConfig(train=300, val=50, test=50))
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    gallery = {"latlon": torch.rand(300, 2, generator=generator) * 120 - 60, "source": "made"}
    config = dataclasses.asdict(config)
    torch.save({"state_dict": weights, "geoclip_config": config, "geoclip_gallery": gallery}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return made_checkpoint(tmp_path_factory.mktemp("model") / "made.ckpt", CONV)


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


def photo(place=None, kind="JPEG"):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    if place:
        tags = {ExifTags.GPS.GPSLatitudeRef: "N", ExifTags.GPS.GPSLatitude: (place[0], 0.0, 0.0)}
        tags |= {ExifTags.GPS.GPSLongitudeRef: "E", ExifTags.GPS.GPSLongitude: (place[1], 0.0, 0.0)}
        exif.get_ifd(ExifTags.IFD.GPSInfo).update(tags)
    held = io.BytesIO()
    Image.fromarray(np.kron(pixels, np.ones((8, 8, 1), np.uint8))).save(held, kind, exif=exif)
    return held.getvalue()


def predicted(path, checkpoint, *options, capsys):
    """What `python -m geoclip predict` prints for a file."""
    capsys.readouterr()
    assert main(["predict", str(path), "--checkpoint", str(checkpoint), *options]) == 0
    return capsys.readouterr().out


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


def test_photos_and_texts_where_there_is_clip(tiny_clip, tmp_path, monkeypatch, capsys):
    image = ImageEncoderConfig(tower=tiny_clip, weights=None, hidden=32, dim=32)
    checkpoint = made_checkpoint(tmp_path / "clip.ckpt", image)
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


# In a browser


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory):
    """The address of the page, served as `make try` serves it, with the made checkpoint."""
    folder = shutil.copytree(paths.NOTEBOOKS / "try", tmp_path_factory.mktemp("served") / "try")
    notebook = (folder / "try.ipynb").read_text(encoding="utf-8")
    assert "CHECKPOINT = None" in notebook
    notebook = notebook.replace("CHECKPOINT = None", f"CHECKPOINT = '{checkpoint}'")
    (folder / "try.ipynb").write_text(notebook, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipe = re.search(
        r"^try:.*\n\tcd notebooks/try && ([^$]*) \$\S+ \$\S+ (.*)$", MAKEFILE, flags=re.MULTILINE
    )
    settings = dict(setting.split("=") for setting in recipe[1].split())
    arguments = [sys.executable, *recipe[2].split(), "--no-browser", f"--port={port}"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            arguments, cwd=folder, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait(lambda: "is running at" in (folder / "log").read_text())
        yield f"http://127.0.0.1:{port}/"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium that saves downloads in `browser.downloads`."""
    from selenium import webdriver

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not found or not driver:
        pytest.skip("no Chromium with chromedriver: install the packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.downloads = tmp_path_factory.mktemp("downloads")
    behaviour = {"behavior": "allow", "downloadPath": str(opened.downloads)}
    opened.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    opened.set_window_size(1200, 1100)
    yield opened
    opened.quit()


def wait(until, seconds=300):
    """The first true value of until(); a slow machine is no failure."""
    end = time.monotonic() + seconds
    while not (found := until()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


class Shown:
    """What a reader of the page does and sees."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        wait(lambda: self.js("return document.querySelector('.geoclip .new:not([disabled])')"))

    def js(self, code, *arguments):
        return self.browser.execute_script(code, *arguments)

    def one(self, css):
        return self.browser.find_element("css selector", f".geoclip {css}")

    @property
    def said(self):
        return self.one(".said").text

    def answered(self):
        wait(lambda: "Answered in" in self.said or self.said.startswith("This failed"))
        assert "Answered in" in self.said
        return self.one(".answers tbody tr").text

    def choose(self, lat, lon):
        for css, value in ((".lat", lat), (".lon", lon)):
            self.js("arguments[0].value = arguments[1]", self.one(css), value)
        self.one(".place button").click()
        return self.answered()

    def download(self, style, name):
        path = self.browser.downloads / name
        path.unlink(missing_ok=True)
        self.one(f"[data-style={style}]").click()
        wait(lambda: path.is_file() and path.stat().st_size)
        return path

    def orange(self):
        """Pixels of the globe in the colour of the truth's ring."""
        return self.js("""
            const c = document.querySelector('.geoclip .globe'), {width, height} = c;
            const d = c.getContext('2d').getImageData(0, 0, width, height).data;
            let n = 0;
            for (let i = 0; i < d.length; i += 4) n += d[i] === 213 && d[i + 1] === 94 && d[i + 2] === 0;
            return n;""")

    def tops(self):
        """Where things stand, from the top."""
        return [self.one(css).location["y"] for css in (".globe", ".answers", ".regions", ".downloads")]


@pytest.mark.slow
def test_the_page_in_a_browser(served, browser, checkpoint, tmp_path, monkeypatch, capsys):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    page = Shown(browser, served)
    assert page.said == "Click anywhere on the globe." and page.orange() == 0
    before = page.tops()
    ActionChains(browser).move_to_element(page.one(".globe")).click().perform()
    row = page.answered()
    wait(lambda: page.orange() > 20)
    assert page.tops() == before, "nothing has jumped"
    seen = page.one(".seen")
    assert page.js("return arguments[0].naturalWidth", seen) == 32 and seen.get_attribute("alt")

    # the downloads are what `predict` says of the downloaded tile
    listed = page.download("json", "geoclip.json").read_text(encoding="utf-8")
    [found] = json.loads(listed)["photos"]
    monkeypatch.chdir(tmp_path)
    shutil.copy(page.download("tile", found["file"]), found["file"])
    assert listed == predicted(found["file"], checkpoint, "--format", "json", capsys=capsys)
    table = page.download("csv", "geoclip.csv").read_text(encoding="utf-8")
    assert table == predicted(found["file"], checkpoint, "--format", "csv", capsys=capsys)
    assert found["places"][0]["town"] in row and list(found["truth"].values()) == pytest.approx(
        [20, 0], abs=0.5
    )
    with Image.open(page.download("png", "geoclip.png")) as drawn:
        assert drawn.width < drawn.height and len(np.unique(drawn.convert("L"))) > 50

    # controls, and the keyboard
    Select(page.one(".decision")).select_by_value("disc:25")
    wait(lambda: "within 25 km" in page.one(".notes").text)
    page.one(".globe").send_keys(Keys.ARROW_LEFT, Keys.ENTER)
    wait(lambda: page.said.startswith("Looking") or page.one(".lon").get_attribute("value") != "0.000")
    page.answered()

    # files that cannot be used
    files = {
        "letter.jpg": b"Dear Sir",
        "torn.jpg": photo()[:700],
        "huge.jpg": b"x" * 26_000_000,
        "good.jpg": photo(),
    }
    sentences = [
        "not an image in a known format",
        "cannot be decoded",
        "26 MB; a photo may have",
        "need CLIP's weights",
    ]
    for (name, data), sentence in zip(files.items(), sentences, strict=True):
        Path(name).write_bytes(data)
        page.one(".files").send_keys(str(tmp_path / name))
        wait(lambda name=name: page.said.startswith(name))
        assert sentence in page.said

    # guess before the model
    Select(page.one(".mode")).select_by_value("guess")
    page.one(".new").click()
    wait(lambda: page.said.startswith("Where is this?"))
    assert page.one(".answers tbody tr").text.strip() == "1" and page.orange() == 0, (
        "the answer is not shown yet"
    )
    ActionChains(browser).move_to_element(page.one(".globe")).click().perform()
    wait(lambda: page.one(".score").text.startswith("Points after 1: you"))
    assert "wins." in page.said or "you win." in page.said

    # a narrow screen
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    assert page.js("return document.documentElement.scrollWidth") <= 400
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert [url for url in asked if not url.startswith((served, "data:", "blob:"))] == [], (
        "nothing is fetched"
    )


@pytest.mark.slow
def test_sessions_at_once_do_not_meet(served, browser):
    places, pages = [(48.9, 2.4), (-33.9, 151.2), (35.7, 139.7)], []
    first = browser.current_window_handle
    for place in places:
        browser.switch_to.new_window("tab")
        browser.get(served)
        pages.append((browser.current_window_handle, place))
    for handle, place in pages:
        browser.switch_to.window(handle)
        page = object.__new__(Shown)
        page.browser = browser
        wait(lambda page=page: page.js("return document.querySelector('.geoclip .new:not([disabled])')"))
        page.choose(*place)
    for handle, place in pages:
        browser.switch_to.window(handle)
        [found] = json.loads(page.download("json", "geoclip.json").read_text(encoding="utf-8"))["photos"]
        assert list(found["truth"].values()) == pytest.approx(place, abs=1e-6)
        browser.close()
    browser.switch_to.window(first)


def test_a_random_tile_is_one_of_the_test_places(checkpoint):
    answerer = app.Answerer(checkpoint)
    lat, lon = answerer.random_place()
    known = torch.cat([answerer.tiles.splits()[split] for split in ("random", "blocked")])
    assert (known == torch.tensor([lat, lon])).all(1).any()
    for upload in (answerer.tile(lat, lon), answerer.tile(-lat, -lon)):
        answer, _ = answerer.ask(upload)
        assert abs(answer["truth"][0]) == pytest.approx(abs(lat), abs=1e-6)
    with pytest.raises(PhotoError, match="not an image"):
        answerer.ask(Upload("text", b"text"))
