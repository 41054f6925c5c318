"""A miniature world: every data set of the paper's path in its own layout, to rehearse that path in minutes.

The photos are Blue Marble tiles of real places, with EXIF; the faults are those of real sets: dead, slow and
cut-off addresses, files that are missing or truncated, photos and rows that come twice or not at all. Names and
tables say "rehearsal", and no number from here is a result.
"""

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import ExifTags, Image

from geoclip import earth, paths, pretrained
from geoclip.baselines import samples
from geoclip.config import TileConfig
from geoclip.datasets import benchmarks, blue_marble, nus_wide, nus_wide_synthetic, reverse_geocoding

BENCHMARKS = ("im2gps3k", "yfcc26k", "yfcc4k", "gws15k")
ADDRESSES, SERVER, NUS_WIDE_CSV = "mp16_urls.csv", "server", "nus-wide/photos.csv"
OSV_MINI, MAPS, STATIONS = "osv-mini", "segmentation", "climate/station_temperature.csv"
PORT = 8416  # of the addresses in the list: the list is the same each time, so that a download can resume
SLOW_S = 15.0  # after which a slow address answers
FAULTS = ("gone", "slow", "cut", "page", "truncated")  # of every 40 addresses, one each
PIXELS = (240, 180)
RENDERED = 80  # pixels of a tile before it is enlarged; the raster has 45 in its 3°


def make(out: Path | str, images: int = 120, seed: int = 0, port: int = PORT) -> Path:
    """Write the world to `out`, in the layout of GEOCLIP_DATA, and return it; the same world is kept.

    images: photos of each set, twice as many addresses of MP-16. port: of the loopback server behind the
    addresses. Raises ValueError for fewer than 20 images, and if `out` holds anything else.
    """
    out = Path(out).absolute()
    about = {"what": "a rehearsal, no data set", "images": images, "seed": seed, "port": port}
    text, mark = json.dumps(about) + "\n", out / benchmarks.REHEARSAL
    if images < 20:
        raise ValueError(f"a rehearsal needs at least 20 images, so that every fault occurs, not {images}")
    if mark.is_file() and mark.read_text() == text:
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something else than this rehearsal; name another folder")
    part = paths.make_folder(out.parent) / f".{out.name}.part"
    shutil.rmtree(part, ignore_errors=True)  # of a killed run
    rng = np.random.default_rng(seed)
    gallery = np.unique(pretrained.official_gallery(), axis=0)
    places = gallery[rng.choice(len(gallery), min(len(gallery), max(2, images // 4)), replace=False)]
    _mp16(part, _photos(places, 2 * images, rng), port, rng)
    for name in BENCHMARKS:
        _benchmark(part, name, _photos(places, images, rng), rng)
    root = nus_wide_synthetic.write(part / "nus-wide", images, seed=seed, with_features=False)
    data = nus_wide.read(root)
    photos = data.table.rename(columns={"file": "IMG_ID", "lat": "LAT", "lon": "LON"})
    _write_photos(part / "images" / "nus-wide", photos.assign(AUTHOR="unknown"), rng)
    nus_wide.write_csv(data, part / NUS_WIDE_CSV)
    for split in ("train", "test"):
        _osv_mini(part / OSV_MINI, split, _photos(places, images, rng), rng)
    stations = gallery[rng.choice(len(gallery), 400, replace=False)]
    degrees = (27 - stations[:, 0] ** 2 / 120 + rng.normal(scale=2, size=400)).round(2)
    paths.make_folder((part / STATIONS).parent)
    table = {"Lat": stations[:, 0], "Lon": stations[:, 1], "meanT": degrees}
    pd.DataFrame(table).to_csv(part / STATIONS, index=False)
    (part / benchmarks.REHEARSAL).write_text(text)
    os.replace(part, out)
    return out


@contextlib.contextmanager
def serving(handler, port: int = 0) -> Iterator[str]:
    """Yield the address of a loopback server that answers with `handler` (http.server) until the block ends.

    Raises OSError if `port` is taken.
    """
    try:
        server = _Server(("127.0.0.1", port), handler)
    except OSError as error:
        raise OSError(error.errno, f"port {port} is taken ({error.strerror}); choose another") from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # connections that wait: with the default of 5, those of a download time out


def addresses(world: Path):
    """A context in which the addresses of the world's MP-16 list answer, each as its fault says."""

    class Answers(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(world / SERVER))

        def do_GET(self):
            self.fault, _, name = self.path[1:].partition("/")
            self.path = "/page.html" if self.fault == "page" else f"/{name}"
            if self.fault == "gone":
                self.send_error(404)
                return
            time.sleep(SLOW_S if self.fault == "slow" else 0)
            with contextlib.suppress(OSError):  # the client has gone
                super().do_GET()

        def copyfile(self, source, outputfile):
            body = source.read()
            outputfile.write(body[: len(body) // 2] if self.fault == "cut" else body)

        def log_message(self, *_):
            pass

    return serving(Answers, json.loads((world / benchmarks.REHEARSAL).read_text())["port"])


def _photos(places: np.ndarray, n: int, rng: np.random.Generator) -> pd.DataFrame:
    """The rows of n photos in the columns of PLACES365: several of a place, by three photographers each."""
    where = rng.integers(len(places), size=n)
    latlon = earth.check_latlon(torch.from_numpy(places[where]), "places").numpy()
    latlon = (latlon + rng.normal(scale=2e-3, size=(n, 2))).clip([-90, -180], [90, 179.999999]).round(6)
    number = rng.choice(10**9, n, replace=False) + 10**9
    folders = [hashlib.md5(str(k).encode()).hexdigest() for k in number]
    scores = rng.dirichlet(np.ones(3), n).round(4)
    table = {
        "IMG_ID": [f"{h[:2]}/{h[2:4]}/{k}.jpg" for h, k in zip(folders, number, strict=True)],
        "AUTHOR": [f"{10**7 + k}@N00" for k in (where + rng.integers(3, size=n)) % len(places)],
        **dict(zip(("LAT", "LON"), latlon.T, strict=True)),
        "S3_Label": scores.argmax(1),
        **{f"S{classes}_Label": rng.integers(classes, size=n) for classes in (16, 365)},
        **{f"Prob_{scene}": scores[:, k] for k, scene in enumerate(benchmarks.SCENES)},
    }
    return pd.DataFrame(table)[benchmarks.PLACES365.split(",")]


def _mp16(out: Path, rows: pd.DataFrame, port: int, rng: np.random.Generator) -> None:
    """The list of addresses, without a header as MP-16's, the photos behind it, and the places by the same ids.

    The folder mp16 holds those photos that are whole, as the copies of MP-16 do that come as images.
    """
    fault = np.array([FAULTS[i % 40] if i % 40 < len(FAULTS) else "photo" for i in range(len(rows))])
    name = rows["IMG_ID"].str.replace("/", "_")
    name[10::40] = name[9::40][: len(name[10::40])].to_numpy()  # another id of the photo before it
    served = rows.assign(IMG_ID=name).drop_duplicates("IMG_ID")
    _write_photos(out / SERVER, served, rng, out / MAPS / "mp16")
    (out / SERVER / "page.html").write_text("<html>This photo is private</html>")
    whole = rows.assign(IMG_ID=name)[fault == "photo"].drop_duplicates("IMG_ID")
    paths.make_folder(out / "mp16/images")
    for file in whole["IMG_ID"]:
        shutil.copy(out / SERVER / file, out / "mp16/images")
    whole.to_csv(out / "mp16" / benchmarks.card("mp16").csv, index=False)
    for broken in name[fault == "truncated"]:
        _truncate(out / SERVER / broken)
    urls = [f"http://127.0.0.1:{port}/{kind}/{file}" for kind, file in zip(fault, name, strict=True)]
    listed = pd.DataFrame({"id": rows["IMG_ID"], "url": urls})
    listed.iloc[:-1].to_csv(out / ADDRESSES, header=False, index=False)  # one place has no address
    known = rows.drop(index=rows.index[20])  # and one address no place
    lines = known.to_csv(index=False).splitlines()
    lines.insert(len(lines) // 2, "," * (known.shape[1] - 1))  # an empty row
    (out / benchmarks.card("mp16").csv).write_text("\n".join(lines) + "\n")


def _benchmark(out: Path, name: str, photos: pd.DataFrame, rng: np.random.Generator) -> None:
    """The CSV of a card and its images, of which one is missing and one truncated, with segmentation maps."""
    csv, folder = benchmarks.card(name).csv, out / "images" / name
    stored = photos["IMG_ID"].str.replace("/", "_")  # as public copies do
    if name != "yfcc4k":  # which keeps the folders in its names
        photos = photos.assign(IMG_ID=stored)
    _write_photos(folder, photos.assign(IMG_ID=stored), rng, out / MAPS / name)
    (folder / stored[5]).unlink()
    _truncate(folder / stored[3])
    if not csv.endswith("_places365.csv"):
        photos = photos[["IMG_ID", "LAT", "LON"]].rename(columns={"IMG_ID": "IMG_FILE"})
    photos.to_csv(out / csv, index=False)


def _osv_mini(root: Path, split: str, photos: pd.DataFrame, rng: np.random.Generator) -> None:
    """A split of OSV-Mini: the test split lacks one image, and both lack some labels."""
    latlon = torch.from_numpy(photos[["LAT", "LON"]].to_numpy(float, copy=True))
    near = reverse_geocoding.nearest_town(latlon, states=True)
    moment = pd.Series(rng.integers(1_400_000_000, 1_700_000_000, len(photos)) * 1000, dtype="Int64")
    table = pd.DataFrame({
        "id": photos["IMG_ID"].str.extract(r"(\d+)\.jpg$")[0],
        "latitude": photos["LAT"],
        "longitude": photos["LON"],
        "region": near["state"].fillna("unknown").str.replace("/", "-"),
        "sub-region": near["country"],
        "city": near["town"].where(near["town_km"] < 50),
        "climate": samples.tile_context(latlon, ["climate"])["climate"].astype("Int64"),
        "captured_at": moment.mask(rng.random(len(photos)) < 0.1),
    })  # fmt: skip
    folder, names = root / f"{split}_images", table["region"] + "/" + table["id"] + ".jpg"
    _write_photos(folder, photos.assign(IMG_ID=names), rng)
    if split == "test":
        (folder / names[5]).unlink()
    table.to_csv(root / f"{split}_mini.csv", index=False)


def _write_photos(
    folder: Path, photos: pd.DataFrame, rng: np.random.Generator, maps: Path | None = None
) -> None:
    """Render a JPEG for each row; every fifth is taken upright, as its EXIF orientation says.

    maps: where to write its segmentation map, four colours in a PNG.
    """
    latlon = torch.from_numpy(photos[["LAT", "LON"]].to_numpy(float, copy=True))
    config, band = TileConfig(pixels=RENDERED), (0, RENDERED / 8, RENDERED, RENDERED * 7 / 8)
    draw = torch.Generator().manual_seed(int(rng.integers(2**31)))
    rows = list(photos[["IMG_ID", "AUTHOR", "LAT", "LON"]].itertuples(index=False))
    for start in range(0, len(rows), 64):
        places = latlon[start : start + 64]
        tiles = blue_marble.render(places, config, blue_marble.augmentation(len(places), draw))
        pixels = ((tiles + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for k, row in enumerate(rows[start : start + 64]):
            image = Image.fromarray(pixels[k]).resize(PIXELS, box=band)
            path = folder / row.IMG_ID
            if maps:
                image.quantize(4).save(paths.make_folder(maps) / Path(row.IMG_ID).with_suffix(".png"))
            if upright := (start + k) % 5 == 0:
                image = image.transpose(Image.Transpose.ROTATE_90)
            paths.make_folder(path.parent)
            image.save(path, "JPEG", quality=85, exif=_exif(row, 6 if upright else 1))


def _exif(row, orientation: int) -> Image.Exif:
    exif, tags = Image.Exif(), ExifTags.GPS
    exif[ExifTags.Base.ImageDescription] = "rehearsal: Blue Marble, no photo"
    exif[ExifTags.Base.Artist], exif[ExifTags.Base.Orientation] = row.AUTHOR, orientation
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    gps[tags.GPSLatitudeRef], gps[tags.GPSLatitude] = "NS"[row.LAT < 0], _dms(row.LAT)
    gps[tags.GPSLongitudeRef], gps[tags.GPSLongitude] = "EW"[row.LON < 0], _dms(row.LON)
    return exif


def _dms(degrees: float) -> tuple[float, float, float]:
    minutes, seconds = divmod(round(abs(degrees) * 3600, 3), 60)
    return *divmod(minutes, 60), round(seconds, 3)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
