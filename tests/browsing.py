"""What the tests of the page and its pictures share: a server, a headless Chromium, and what a reader does and sees."""

import contextlib
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
import torch
from PIL import ExifTags, Image

from geoclip import paths
from geoclip.__main__ import main
from geoclip.datasets.blue_marble import SplitConfig
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig
from geoclip.location_encoder import LocationEncoder, LocationEncoderConfig
from geoclip.model import GeoCLIP
from geoclip.training.config import TrainConfig

LOCATION = LocationEncoderConfig(sigmas=(1.0,), frequencies=16, width=32, hidden_layers=1, dim=32)
MAKEFILE = (paths.ROOT / "Makefile").read_text(encoding="utf-8")
JUPYTERLAB = """jupyterlab --allow-root --no-browser --IdentityProvider.token= --LabApp.expose_app_in_browser=True
--LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"""
PARIS = (48.8566, 2.3522)
BAY, FAR = (37.77, -122.42), (-48.88, -123.39)  # San Francisco, and a place with ocean all around
MARKS = [*bytes.fromhex("F0E44256B4E9D55E00CC79A7FFFFFF")]  # 50 %, 90 %, truth, guess, white
WIDE, NARROW = (1200, 1000), (400, 1700)


def made_checkpoint(path, tower):
    """A checkpoint with random weights and a gallery of 300 random places. tower: "conv" of tiles, or a CLIP."""
    image = ImageEncoderConfig(tower=tower, weights=None, frozen=tower != "conv", hidden=32, dim=32)
    generator = torch.Generator().manual_seed(0)
    model = GeoCLIP(ImageEncoder(image, generator), LocationEncoder(LOCATION, generator))
    config = TrainConfig(image=image, location=LOCATION, splits=SplitConfig(train=300, val=50, test=50))
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    gallery = {"latlon": torch.rand(300, 2, generator=generator) * 120 - 60, "source": "made"}
    config = dataclasses.asdict(config)
    torch.save({"state_dict": weights, "geoclip_config": config, "geoclip_gallery": gallery}, path)
    return path


def photo(place=None, kind="JPEG"):
    """An image file of random squares whose EXIF records `place`, (lat, lon) in the north-east."""
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


@contextlib.contextmanager
def serve(folder, checkpoint=None, server=None):
    """The address and the process of the page, served as `make try` does, or by another server.

    checkpoint: that of the page; None: as for a reader. folder: where the notebook is copied to.
    """
    folder = shutil.copytree(paths.NOTEBOOKS / "try", folder / "try")
    notebook = (folder / "try.ipynb").read_text(encoding="utf-8")
    assert "CHECKPOINT = None" in notebook
    if checkpoint:
        notebook = notebook.replace("CHECKPOINT = None", f"CHECKPOINT = '{checkpoint}'")
    (folder / "try.ipynb").write_text(notebook, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipe = re.search(
        r"^try:.*\n\tcd notebooks/try && ([^$]*) \$\S+ \$\S+ -m (.*)$", MAKEFILE, flags=re.MULTILINE
    )
    settings = dict(setting.split("=") for setting in recipe[1].split())
    settings |= {f"JUPYTERLAB_{name}_DIR": str(folder / name) for name in ("SETTINGS", "WORKSPACES")}
    arguments = [sys.executable, "-m", *(server or f"{recipe[2]} --no-browser").split(), f"--port={port}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            arguments, cwd=folder, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait(lambda: "is running at" in (folder / "log").read_text())
        yield f"http://127.0.0.1:{port}/", process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def chromium(downloads):
    """A headless Chromium that saves downloads in `downloads`, or None where there is none."""
    from selenium import webdriver

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not found or not driver:
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.downloads = downloads
    behaviour = {"behavior": "allow", "downloadPath": str(downloads)}
    opened.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    resize(opened, *WIDE)
    return opened


def resize(browser, width, height):
    """Give the page this many pixels."""
    about = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", about)


def wait(until, seconds=300):
    """The first true value of until(); a slow machine is no failure."""
    end = time.monotonic() + seconds
    while not (found := until()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


class Shown:
    """What a reader of the page does and sees. address: None for a page that is open already."""

    def __init__(self, browser, address=None):
        self.browser = browser
        if address:
            browser.get(address)
        wait(lambda: self.js("return document.querySelector('.geoclip .new:not([disabled])')"))

    def js(self, code, *arguments):
        return self.browser.execute_script(code, *arguments)

    def one(self, css):
        return self.browser.find_element("css selector", f".geoclip {css}")

    @property
    def said(self):
        return self.one(".said").text

    def select(self, css, value):
        from selenium.webdriver.support.select import Select

        Select(self.one(css)).select_by_value(value)

    def click_globe(self):
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).move_to_element(self.one(".globe")).click().perform()

    def answered(self):
        """The first row of the answers, once they are there."""
        wait(lambda: "Answered in" in self.said or self.said.startswith("This failed"))
        assert "Answered in" in self.said
        return self.one(".answers tbody tr").text

    def choose(self, lat, lon):
        for css, value in ((".lat", lat), (".lon", lon)):
            self.js("arguments[0].value = arguments[1]", self.one(css), value)
        self.one(".place button").click()
        return self.answered()

    def drop(self, path):
        """Drop a file on the page, as from a window of files."""
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            where = {"type": kind, "x": 600, "y": 300, "data": data}
            self.browser.execute_cdp_cmd("Input.dispatchDragEvent", where)

    def download(self, style, name):
        path = self.browser.downloads / name
        path.unlink(missing_ok=True)
        self.one(f"[data-style={style}]").click()
        wait(lambda: path.is_file() and path.stat().st_size)
        return path

    def pixels(self, red, green, blue):
        """Number of pixels of the globe in this colour: (213, 94, 0) of the truth's ring, (240, 228, 66) of 50 %."""
        self.settle()
        return self.js(
            """
            const c = document.querySelector('.geoclip .globe'), {width, height} = c;
            const d = c.getContext('2d').getImageData(0, 0, width, height).data;
            let n = 0;
            for (let i = 0; i < d.length; i += 4)
              n += d[i] === arguments[0] && d[i + 1] === arguments[1] && d[i + 2] === arguments[2];
            return n;""",
            red, green, blue,
        )  # fmt: skip

    def settle(self):
        """Wait until the globe stands still."""
        before = None
        while before != (before := self.js("return document.querySelector('.geoclip .globe').toDataURL()")):
            time.sleep(0.3)

    def tops(self):
        """Where things stand, from the top."""
        return [self.one(css).location["y"] for css in (".globe", ".answers", ".regions", ".downloads")]


def states(page, folder):
    """Lead the page, which takes tiles, through its states; the name of each while it is shown. folder: for a file."""
    yield "first"
    page.choose(*BAY)
    page.one(".near").click()
    page.settle()
    yield "answer"
    page.one(".far").click()
    page.choose(*FAR)
    page.settle()
    yield "far"
    (folder / "torn.jpg").write_bytes(photo()[:700])
    page.drop(folder / "torn.jpg")
    wait(lambda: page.said.startswith("torn.jpg"))
    yield "refused"
    page.select(".mode", "guess")
    page.one(".new").click()
    wait(lambda: page.said.startswith("Where is this?"))
    page.click_globe()
    wait(lambda: page.one(".score").text)
    page.settle()
    yield "guess"
    page.select(".mode", "explore")
    resize(page.browser, *NARROW)
    page.choose(*BAY)
    page.settle()
    yield "narrow"
    resize(page.browser, *WIDE)


def screenshot(browser, path=None):
    """The whole page as a picture, kept as a PNG of 128 colours, those of the marks among them, if `path` is given."""
    import base64

    [width, height] = browser.execute_script(
        "const page = document.querySelector('#rendered_cells').getBoundingClientRect();"
        "return [document.documentElement.clientWidth, Math.ceil(page.bottom + window.scrollY)]"
    )
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    if path:
        palette = Image.new("P", (1, 1))
        palette.putpalette(MARKS + image.quantize(123).getpalette()[: 3 * 123])
        image.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)
    return image


def fetched(browser):
    """Addresses of all that the browser has asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}


def complaints(browser):
    """What the browser's console has reported as an error since the last call."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def memory_mb(process):
    """For each kernel below a server: its share of the memory in MB (PSS), as Linux counts it."""
    import psutil

    used = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):  # it ends meanwhile, or has ended
            if "ipykernel" in " ".join(child.cmdline()):
                rollup = Path(f"/proc/{child.pid}/smaps_rollup").read_text().split("Pss:")[1]
                used.append(int(rollup.split()[0]) / 1024)
    return used
