"""The page of `make try`: a globe, an image, and where the model thinks that it was taken.

notebooks/try/try.ipynb shows it, through Voilà or in JupyterLab; app.js draws it. If CLIP's weights are present, it
answers for photos and texts. Elsewhere it answers for tiles of the Blue Marble, around any place that is
clicked. Both go the way of `python -m geoclip predict`. Uploads stay in this process's memory.
"""

import asyncio
import contextlib
import io
import random
import re
import sys
import time
from argparse import Namespace
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from geoclip import paths
from geoclip.photos import PhotoError, Upload, open_photo

PROFILE = "train_embedded"  # notebook 03's model
MOST_MB, MOST_FILES, MOST_PLACES = 25, 8, 20  # of a photo, of photos at once, of an answer
DECISIONS = {
    "argmax": "largest cosine",
    "mode": "highest density",
    "disc:25": "most within 25 km",
    "median": "least expected distance",
    "geoscore": "largest expected geoscore",
}
# The page's state. progress: 0 to 1, or None; once it is ready, also decision.
LOADING = {"ready": False, "photos": False, "said": "Loading the model …", "progress": None}
FIXED = {"mb": MOST_MB, "files": MOST_FILES, "places": MOST_PLACES, "decisions": DECISIONS}
FAR_KM = 300.0  # from all training places: the gap around the blocks that training leaves out
NO_CLIP = (
    "photos need CLIP's weights, which are not on this computer; `python -m geoclip predict photo.jpg` "
    "downloads them once (1.7 GB). Until then, click on the globe"
)


class Answerer:
    """Answers images and texts, and keeps the embeddings of the last ones, so that another decision is quick.

    checkpoint: None stands for the authors' released weights. A model with the small tower of the embedded
    profile takes tiles, any other one photos. Raises what commands.load_model and commands.decide raise.
    """

    def __init__(self, checkpoint: Path | str | None = None, clip_weights: Path | str | None = None):
        from geoclip import commands
        from geoclip.commands import predict
        from geoclip.datasets import blue_marble

        options = Namespace(
            checkpoint=checkpoint and str(checkpoint), clip_weights=clip_weights, precision="auto", top_k=1,
            gallery=None, index=False, decision="mode", neighbours=None,
        )  # fmt: skip
        self.model = commands.load_model(options)
        predict.prepare_gallery(self.model, options)
        self.decider = commands.decide(self.model, options)
        self.decision = "mode" if self.decider.calibration.fitted_on else "argmax"
        self.top_k = 5
        self.clear()
        self.tiles: Any = blue_marble if self.model.image_encoder.config.tower == "conv" else None
        self.known = blue_marble.splits()["train"] if self.tiles else self.model.gallery.latlon

    def clear(self) -> None:
        """Forget what was asked."""
        self.asked: list[tuple] = []  # (Upload or text, its embedding)
        self.found: list[dict] = []  # the answers of `predict`
        self.failed: dict[str, str] = {}

    def tile(self, lat: float, lon: float) -> Upload:
        """The tile around a place, in degrees, as the model sees it: a PNG whose EXIF records the place."""
        import torch
        from PIL import ExifTags, Image

        seed = round((lat + 90) * 1e4) * 3_600_000 + round((lon + 180) * 1e4)
        draws = self.tiles.augmentation(1, torch.Generator().manual_seed(seed))
        pixels = self.tiles.render(torch.tensor([[lat, lon]]), draws=draws)[0]
        pixels = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0)
        tags, exif = ExifTags.GPS, Image.Exif()
        exif[ExifTags.Base.Software] = "geoclip"  # Pillow leaves EXIF out of a PNG that has GPS tags alone
        exif.get_ifd(ExifTags.IFD.GPSInfo).update({
            tags.GPSLatitudeRef: "NS"[lat < 0], tags.GPSLatitude: (abs(lat), 0.0, 0.0),
            tags.GPSLongitudeRef: "EW"[lon < 0], tags.GPSLongitude: (abs(lon), 0.0, 0.0),
        })  # fmt: skip
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "PNG", exif=exif)
        return Upload(f"tile_{lat:.4f}_{lon:.4f}.png", file.getvalue())

    def example(self) -> Upload:
        """A tile of a test split, near training places or far from them; with CLIP, scikit-learn's china.jpg."""
        from importlib import resources

        if self.tiles:
            places = self.tiles.splits()[random.choice(("random", "blocked"))]
            return self.tile(*random.choice(places.tolist()))
        china = resources.files("sklearn.datasets.images") / "china.jpg"
        return Upload(china.name, china.read_bytes())

    def ask(self, query: Upload | str) -> tuple[dict, bytes]:
        """The answer for an image or a text, see `answer`, and the pixels that the model sees, as a PNG.

        Raises PhotoError for a file that is no photo, and ValueError for a text where there is no CLIP.
        """
        import torch

        file, seen = io.BytesIO(), self.model.image_encoder.preprocess
        with torch.inference_mode():
            if isinstance(query, str):
                embedded = self.model.encode_text(query)
            else:
                embedded = self.model.encode_views(self.model.views(query)[None])
                seen.crop(open_photo(query, seen.pixels)).save(file, "PNG")
        self.asked.append((query, embedded))
        return self.answer(len(self.asked) - 1), file.getvalue()

    def answer(self, index: int) -> dict:
        """The answer for what was asked at `index`, as `predict --format json` gives it, and what the page shows.

        near: names of the places. draws: (lat, lon, level) of places drawn from the posterior; level 2 is inside
        the region of 50 %, 1 inside that of 90 %, 0 outside. notes: sentences.
        """
        import torch

        from geoclip.commands import predict
        from geoclip.datasets.reverse_geocoding import describe
        from geoclip.predictor import Answers

        (query, embedded), decider = self.asked[index], self.decider
        with torch.inference_mode():
            posterior = decider.posterior(embedded)
        asked, decider.decision = self.model if self.decision == "argmax" else decider, self.decision
        latlon, mass = asked.locate(embedded, self.top_k)
        photo = query if isinstance(query, Upload) else Upload(query, b"")
        [found] = predict.describe_all([photo], Answers(latlon.cpu(), mass.cpu(), {}))
        described = predict.describe_posteriors(posterior, outlined=True)[0]
        if asked is decider:
            found |= described
        self.found[index : index + 1] = [found]
        places, density = posterior.drawn
        level = sum((density >= posterior.region(level)[0][:, None]).int() for level in predict.LEVELS)[0]
        near = [describe(p["town"], p["country"], p["town_km"]) for p in found["places"]]
        draws = torch.cat([places[0], level[:, None]], 1).round(decimals=3).tolist()
        truth = found["truth"] and predict.degrees(found["truth"])
        about = {"truth": truth, "near": near, "draws": draws, "notes": self.notes(truth)}
        return found | described | about

    def notes(self, truth: tuple[float, float] | None) -> list[str]:
        """What to know about an answer: what its probabilities are, and whether the model knows such places."""
        import torch

        from geoclip import evaluation

        what = f"of being within 25 km, {self.decider.calibration.status}"
        if self.decision == "argmax":
            what = f"shares of the gallery's {len(self.model.gallery):,} places, not calibrated"
        what = f"Probabilities: {what}."
        away = evaluation.ceiling(torch.tensor([truth]), self.known).item() if truth else 0
        far = f"Far from anything it was trained on: {away:,.0f} km from the nearest place that it knows."
        return [far, what] if away > FAR_KM else [what]

    def written(self, style: str) -> str:
        """The answers as `predict --format` writes them: "json" or "csv"."""
        from geoclip.commands import predict

        with contextlib.redirect_stdout(io.StringIO()) as text:
            predict.print_answers(self.found, self.failed, style)
        return text.getvalue()


class Page(anywidget.AnyWidget):
    """The page. Its model is loaded, and trained if there is none, while the page is already shown.

    checkpoint, clip_weights: as of `predict`. Without either, the authors' released weights answer if CLIP's
    are in the cache, and else notebook 03's model, which is trained at the first call.
    """

    _esm = Path(__file__).with_name("app.js")
    _css = Path(__file__).with_name("app.css")
    state: traitlets.Dict = traitlets.Dict(LOADING).tag(sync=True)
    fixed = traitlets.Dict(FIXED).tag(sync=True)
    outlines: traitlets.List = traitlets.List().tag(sync=True)  # lines of [lon, lat]
    earth = traitlets.Bytes().tag(sync=True)  # JPEG, equirectangular
    answerer: Answerer  # once the state is ready

    def __init__(self, checkpoint: Path | str | None = None, clip_weights: Path | str | None = None):
        super().__init__()
        self.checkpoint, self.clip_weights = checkpoint, clip_weights
        self.parts: dict[str, list[bytes]] = {}
        self.on_msg(self._received)
        self.loading: asyncio.Future | None = None

    def say(self, said: str, progress: float | None = None, **changes) -> None:
        """Show a sentence in place of the answer, and a progress bar if progress is from 0 to 1."""
        self.state = self.state | {"said": said, "progress": progress} | changes

    async def _draw(self) -> None:
        self.outlines = await asyncio.to_thread(outlines)
        self.earth = await asyncio.to_thread(texture)

    async def _load(self) -> None:
        try:
            if not self.checkpoint and not self.clip_weights:
                self.checkpoint = await self._kept_or_trained()
            self.answerer = await asyncio.to_thread(self._opened)
            photos = self.answerer.tiles is None
            what = "Drop photos, or write a text." if photos else "Click anywhere on the globe."
            self.say(what, ready=True, photos=photos, decision=self.answerer.decision)
        except Exception as error:  # there is nobody else to tell
            self.say(f"The model could not be loaded: {error}.")

    def _opened(self) -> Answerer:
        answerer = Answerer(self.checkpoint, self.clip_weights)
        if answerer.tiles:  # the tables of towns and countries are read once, before the first click
            answerer.ask(answerer.tile(48.86, 2.35))
            answerer.clear()
        return answerer

    async def _kept_or_trained(self) -> Path | None:
        from geoclip import pretrained

        if await asyncio.to_thread(pretrained.has_clip_file):
            return None
        if not (checkpoint := await asyncio.to_thread(kept)):
            said = "Training the model of notebook 03, once: about two minutes on two cores …"
            self.say(said, 0.0)
            async for line in command("train", "--config", str(paths.profile(PROFILE))):
                if epoch := re.match(r"epoch (\d+) of (\d+)", line):
                    self.say(said, int(epoch[1]) / int(epoch[2]))
            checkpoint = Path(line.rpartition("checkpoint ")[2])
        from geoclip import calibration  # quick only now that a thread has imported torch

        if not calibration.beside(checkpoint).is_file():
            self.say("Fitting the model's probabilities, once: about half a minute …")
            async for _ in command("calibrate", "--checkpoint", str(checkpoint)):
                pass
        return checkpoint

    def _received(self, _, content: dict, buffers: list) -> None:
        try:
            if content["kind"] == "shown":  # not before: a busy kernel does not answer the page
                self.loading = self.loading or asyncio.gather(self._load(), self._draw())
            elif self.state["ready"]:
                getattr(self, f"_on_{content['kind']}")(content, buffers)
        except PhotoError as error:
            self.answerer.failed[error.name] = error.reason
            self.send({"kind": "said", "said": f"{error}."})
        except Exception as error:  # the page would wait for ever
            self.send({"kind": "said", "said": f"This failed: {error}"})

    def _ask(self, query: Upload | str, alone: bool = True) -> None:
        start = time.monotonic()
        if alone:
            self.answerer.clear()
        answer, picture = self.answerer.ask(query)
        answer |= {"kind": "answer", "index": len(self.answerer.asked) - 1}
        self.send(answer | {"seconds": time.monotonic() - start}, [picture])

    def _on_place(self, content: dict, _) -> None:
        self._ask(self.answerer.tile(content["lat"], content["lon"]))

    def _on_random(self, *_) -> None:
        self._ask(self.answerer.example())

    def _on_text(self, content: dict, _) -> None:
        self._ask(content["text"].strip()[:300])

    def _on_file(self, content: dict, buffers: list) -> None:
        """A part of a file; the first part of the first file of several forgets what was asked before."""
        name, size = Path(content["name"]).name, content["size"]
        if content["part"] == 0:
            self.parts = {name: []}
            if content["file"] == 0:
                self.answerer.clear()
        if content["file"] >= MOST_FILES:
            raise PhotoError(name, f"more than {MOST_FILES} photos at once")
        if size > MOST_MB * 1e6:
            raise PhotoError(name, f"{size / 1e6:,.0f} MB; a photo may have up to {MOST_MB} MB")
        held = self.parts[name]
        held.append(bytes(buffers[0]))
        if sum(map(len, held)) > MOST_MB * 1e6:
            raise PhotoError(name, "larger than it said")
        if len(held) < content["parts"]:
            return
        photo = Upload(name, b"".join(self.parts.pop(name)))
        if self.answerer.tiles:
            open_photo(photo)
            raise PhotoError(name, NO_CLIP)
        self._ask(photo, alone=False)

    def _on_settings(self, content: dict, _) -> None:
        self.answerer.decision = content["decision"]
        self.answerer.top_k = max(1, min(MOST_PLACES, int(content["top_k"])))
        for index in range(len(self.answerer.asked)):
            self.send(self.answerer.answer(index) | {"kind": "answer", "index": index}, [b""])

    def _on_download(self, content: dict, _) -> None:
        style, file = content["style"], self.answerer.asked[0][0]
        if style != "tile":
            file = Upload(f"geoclip.{style}", self.answerer.written(style).encode())
        self.send({"kind": "download", "name": file.name}, [file.data])


def kept() -> Path | None:
    """The checkpoint of notebook 03's model, if it has been trained. Found without Lightning, which takes seconds."""
    from geoclip.training import config

    wanted = config.plain(config.as_config(paths.profile(PROFILE)))
    runs = [result.parent for result in (paths.CACHE / "runs").glob("*/result.json")]
    return next((r / "last.ckpt" for r in runs if config.read_yaml(r / "config.yaml") == wanted), None)


async def command(*arguments: str) -> AsyncIterator[str]:
    """Run a command of `python -m geoclip` and yield the lines that it prints.

    Raises RuntimeError, with the last of them, if it fails.
    """
    arguments, pipe = (sys.executable, "-u", "-m", "geoclip", *arguments), asyncio.subprocess
    run = await asyncio.create_subprocess_exec(*arguments, stdout=pipe.PIPE, stderr=pipe.STDOUT)
    assert run.stdout, "a pipe"
    line = ""
    async for raw in run.stdout:
        line = raw.decode(errors="replace").strip()
        yield line
    if await run.wait():
        raise RuntimeError(line or f"`{arguments[4]}` ended with {run.returncode}")


def outlines() -> list[list[list[float]]]:
    """Coasts and borders as lines of [lon, lat]."""
    import shapely

    [land], [borders] = (
        shapely.get_parts(shapely.from_geojson((paths.NATURAL_EARTH / f"{name}.geojson").read_text("utf-8")))
        for name in ("land_50m", "borders_50m")
    )
    lines = (*shapely.get_parts(shapely.boundary(land)), *shapely.get_parts(borders))
    return [shapely.get_coordinates(line).round(2).tolist() for line in lines]


def texture() -> bytes:
    """The Blue Marble, small enough for a browser."""
    from PIL import Image

    from geoclip.datasets import blue_marble

    file = io.BytesIO()
    with Image.open(blue_marble.raster_file()[0]) as image:
        small = image.convert("RGB").resize((2160, 1080), Image.Resampling.BILINEAR, reducing_gap=1.0)
        small.save(file, "JPEG")
    return file.getvalue()
