"""Photos as people have them: every mode answered, every unusable file named with its reason, EXIF read strictly."""

import io
import os
import pickle
import sys
import warnings

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import IFDRational

from geoclip.photos import (
    PhotoError,
    Upload,
    exif_latlon,
    find_photos,
    open_photo,
    resize,
    ten_crop,
)


def gradient(height=24, width=32):
    """RGB whose red runs along the width and green along the height, so that turns and scales show."""
    red = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return np.stack([red, green, np.full((height, width), 128.0)], -1).astype(np.uint8)


def with_gps(path, lat=None, lon=None, lat_ref="N", lon_ref="E"):
    image = Image.fromarray(gradient())
    exif = image.getexif()
    tags = {"GPSLatitude": lat, "GPSLongitude": lon, "GPSLatitudeRef": lat_ref, "GPSLongitudeRef": lon_ref}
    gps = {getattr(ExifTags.GPS, name): value for name, value in tags.items() if value is not None}
    exif.get_ifd(ExifTags.IFD.GPSInfo).update(gps)
    image.save(path, exif=exif)
    return path


def r(*parts):
    return tuple(IFDRational(*part) if isinstance(part, tuple) else IFDRational(part) for part in parts)


# Opening


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr"])
@pytest.mark.parametrize("kind", ["jpg", "tif"])
def test_colour_modes_come_out_as_the_picture(tmp_path, mode, kind):
    original = Image.fromarray(gradient())
    path = tmp_path / f"photo.{kind}"
    original.convert(mode).save(path)
    opened = open_photo(path)
    assert opened.mode == "RGB" and opened.size == (32, 24)
    expected = original.convert(mode).convert("RGB")
    assert np.abs(np.asarray(opened, int) - np.asarray(expected, int)).mean() < 6  # JPEG's loss


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    values = np.tile(np.linspace(0, 65535, 32), (24, 1)).astype(np.uint16)
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(values).save(path)
    grey = np.asarray(open_photo(path))[0, :, 0]
    np.testing.assert_allclose(grey, values[0] / 257, atol=0.51)


def test_float_images_are_scaled(tmp_path):
    path = tmp_path / "photo.tif"
    Image.fromarray(np.tile(np.linspace(0, 1, 32, dtype=np.float32), (24, 1))).save(path)
    grey = np.asarray(open_photo(path))[0, :, 0]
    np.testing.assert_allclose(grey, np.linspace(0, 255, 32), atol=0.51)


def test_transparency_is_shown_on_white(tmp_path):
    rgba = np.dstack([gradient(), np.full((24, 32), 255, np.uint8)])
    rgba[:, :16, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    opened = np.asarray(open_photo(tmp_path / "rgba.png"))
    assert (opened[:, :16] == 255).all()
    np.testing.assert_array_equal(opened[:, 16:], rgba[:, 16:, :3])

    Image.fromarray(rgba).convert("LA").save(tmp_path / "la.png")
    assert (np.asarray(open_photo(tmp_path / "la.png"))[:, :16] == 255).all()


def test_palette_with_transparency_is_shown_on_white_without_a_warning(tmp_path):
    palette = Image.fromarray(gradient()).quantize(16)
    palette.save(tmp_path / "palette.png", transparency=bytes([0] + [255] * 15))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = np.asarray(open_photo(tmp_path / "palette.png"))
    hidden = np.asarray(palette) == 0
    assert hidden.any() and (opened[hidden] == 255).all()
    np.testing.assert_array_equal(opened[~hidden], np.asarray(palette.convert("RGB"))[~hidden])


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("red", "blue", "green")]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert np.asarray(open_photo(path)).reshape(-1, 3).mean(0) == pytest.approx([255, 0, 0], abs=4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_ends_upright(tmp_path, orientation):
    upright = Image.fromarray(gradient())
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],  # "turn 90° clockwise to view", so it is stored turned back
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for turn in undo.get(orientation, []):
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_photo(tmp_path / "photo.png")), gradient())


def test_garbage_in_exif_does_not_lose_the_photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(gradient()).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert open_photo(path).size == (32, 24)


def test_arrays_and_pil_images():
    np.testing.assert_array_equal(np.asarray(open_photo(gradient())), gradient())
    np.testing.assert_array_equal(np.asarray(open_photo(gradient() / 255.0)), gradient())
    np.testing.assert_array_equal(np.asarray(open_photo(Image.fromarray(gradient()))), gradient())
    assert open_photo(gradient()[..., 0]).mode == "RGB"


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((3, 24, 32), np.uint8), r"shape \(3, 24, 32\)"),
        (np.zeros((0, 24, 3), np.uint8), "shape"),
        (np.zeros((24, 32, 3), np.int64), "dtype int64"),
        (np.full((24, 32, 3), 200.0), r"floats within \[200, 200\]"),
        (np.full((24, 32, 3), np.nan), "floats within"),
    ],
)
def test_arrays_that_are_no_photo(array, reason):
    with pytest.raises(PhotoError, match=reason):
        open_photo(array)


# Unusable files


def jpeg(size=(640, 480)):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def write(path, content):
    path.write_bytes(content)
    return path


BROKEN = {
    "empty.jpg": (b"", "empty"),
    "text.jpg": (b"dear diary, no picture here\n" * 10, "not an image"),
    "page.png": (b"<!doctype html><html><body>404</body></html>", "not an image"),
    "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40, "HEIC"),
    "drawing.jpg": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage",
        "not an image",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_no_photo_are_named_with_the_reason(tmp_path, name):
    content, reason = BROKEN[name]
    path = write(tmp_path / name, content)
    with pytest.raises(PhotoError, match=reason) as error:
        open_photo(path)
    assert str(error.value).startswith(f"{path}: ") and error.value.reason in str(error.value)


def test_a_file_in_memory_is_opened_as_one_on_disk(tmp_path):
    path = with_gps(tmp_path / "photo.jpg", r(48, 30, 0), r(2, 15, 0))
    held = Upload("photo.jpg", path.read_bytes())
    assert np.array_equal(open_photo(held), open_photo(path))
    assert exif_latlon(held) == exif_latlon(path) == (48.5, 2.25)
    for data, reason in [(b"", "empty"), (b"text", "not an image"), (held.data[:700], "cannot be decoded")]:
        with pytest.raises(PhotoError, match=rf"bad\.jpg: {reason}"):
            open_photo(Upload("bad.jpg", data))


@pytest.mark.parametrize("kept", [100, 700, 20_000])
def test_truncated_files(tmp_path, kept):
    path = write(tmp_path / "cut.jpg", jpeg()[:kept])
    with pytest.raises(PhotoError, match=r"cut\.jpg: (cannot be decoded|not an image)"):
        open_photo(path)


def test_truncated_png(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    path = write(tmp_path / "cut.png", buffer.getvalue()[:3000])
    with pytest.raises(PhotoError, match="cannot be decoded"):
        open_photo(path)


def test_heic_is_read_by_an_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "phone.heic", BROKEN["phone.heic"][0])
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(PhotoError, match=r"phone\.heic: a HEIC photo: install pillow-heif"):
        open_photo(path)

    class Opener:
        @staticmethod
        def register_heif_opener():
            def factory(file, name):
                return Image.fromarray(gradient())

            monkeypatch.setitem(Image.OPEN, "HEIF", (factory, lambda start: start[4:12] == b"ftypheic"))

    monkeypatch.setitem(sys.modules, "pillow_heif", Opener)
    assert open_photo(path).size == (32, 24)


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_photos_with_far_more_pixels_than_needed_are_reduced(tmp_path, monkeypatch, kind, orientation):
    import geoclip.photos

    original = Image.fromarray(gradient(480, 640))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    original.save(tmp_path / f"photo.{kind}", exif=exif)
    whole = open_photo(tmp_path / f"photo.{kind}")
    assert open_photo(tmp_path / f"photo.{kind}", side=10).size == whole.size  # not above 32 megapixels
    monkeypatch.setattr(geoclip.photos, "LARGE_PIXELS", 100_000)
    reduced = open_photo(tmp_path / f"photo.{kind}", side=10)
    assert 40 <= min(reduced.size) <= 60
    assert reduced.mode == "RGB" and (reduced.width > reduced.height) == (whole.width > whole.height)
    small, expected = (np.asarray(resize(photo, 10), float) for photo in (reduced, whole))
    assert np.abs(small - expected).max() < 4
    assert open_photo(tmp_path / f"photo.{kind}", side=400).size == whole.size  # needed as it is


def test_crops_are_those_of_torchvision():
    from torchvision.transforms import InterpolationMode, functional

    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (45, 71, 3), dtype=np.uint8))
    for image in (photo, photo.transpose(Image.Transpose.ROTATE_90)):
        resized = functional.resize(image, 36, InterpolationMode.BICUBIC)
        assert resize(image, 36) == resized
        for ours, theirs in zip(ten_crop(image, 32), functional.ten_crop(resized, 32), strict=True):
            assert ours == theirs


def test_an_error_survives_a_process_border():
    error = pickle.loads(pickle.dumps(PhotoError("a.jpg", "empty")))
    assert (str(error), error.name, error.reason) == ("a.jpg: empty", "a.jpg", "empty")


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])  # None: a package has lifted Pillow's own
def test_decompression_bomb(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    path = tmp_path / "bomb.png"
    Image.new("1", (14_000, 14_000)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(PhotoError, match="decompression bomb"):
        open_photo(path)


@pytest.mark.slow
def test_a_large_photo_is_no_bomb_and_no_warning(tmp_path):
    path = tmp_path / "large.png"
    Image.new("L", (10_000, 9_500)).save(path)  # 95 megapixels: Pillow warns, phones make them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_photo(path).size == (10_000, 9_500)


def test_a_strip_would_become_gigabytes_when_resized(tmp_path):
    path = tmp_path / "strip.png"
    Image.new("RGB", (60_000, 1)).save(path)
    with pytest.raises(PhotoError, match="too narrow"):
        open_photo(path)


def test_missing_files_folders_and_pipes(tmp_path):
    with pytest.raises(PhotoError, match="no such file"):
        open_photo(tmp_path / "absent.jpg")
    with pytest.raises(PhotoError, match="not a file"):
        open_photo(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(PhotoError, match="not a file"):
        open_photo(tmp_path / "pipe.jpg")


# EXIF GPS


@pytest.mark.parametrize(
    ("refs", "expected"),
    [
        (("N", "E"), (33.8568, 151.2153)),
        (("S", "E"), (-33.8568, 151.2153)),
        (("N", "W"), (33.8568, -151.2153)),
        (("s", "w\0"), (-33.8568, -151.2153)),
    ],
)
def test_hemispheres(tmp_path, refs, expected):
    lat, lon = r(33, 51, (2448, 100)), r(151, 12, (5508, 100))
    path = with_gps(tmp_path / "photo.jpg", lat, lon, *refs)
    assert exif_latlon(path) == pytest.approx(expected, abs=1e-9)


def test_decimal_degrees_and_minutes(tmp_path):
    path = with_gps(tmp_path / "photo.jpg", r((338568, 10000), 0, 0), r(151, (12918, 1000), 0))
    assert exif_latlon(path) == pytest.approx((33.8568, 151.2153), abs=1e-9)


def test_the_date_line_is_one_meridian(tmp_path):
    assert exif_latlon(with_gps(tmp_path / "photo.jpg", r(10, 0, 0), r(180, 0, 0))) == (10, -180)


def test_photos_without_gps(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "plain.jpg")
    assert exif_latlon(tmp_path / "plain.jpg") is None
    Image.fromarray(gradient()).save(tmp_path / "plain.bmp")
    assert exif_latlon(tmp_path / "plain.bmp") is None
    assert exif_latlon(with_gps(tmp_path / "refs_only.jpg")) is None  # hemispheres, but no position


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"lat": r((0, 0), (0, 0), (0, 0)), "lon": r((0, 0), (0, 0), (0, 0))}, "denominator 0"),
        ({"lat": r(33, 51, (2448, 0)), "lon": r(151, 12, 55)}, "latitude: a fraction with the denominator 0"),
        ({"lat": r(0, 0, 0), "lon": r(0, 0, 0)}, "no fix"),
        ({"lat": r(91, 0, 0), "lon": r(12, 0, 0)}, "latitude: 91° 0′ 0″ is out of range"),
        ({"lat": r(12, 0, 0), "lon": r(180, 0, 1)}, "longitude: .* out of range"),
        ({"lat": r(12, 75, 0), "lon": r(12, 0, 0)}, "out of range"),
        ({"lat": r(12, 0, 0)}, "longitude: missing"),
        ({"lon": r(12, 0, 0)}, "latitude: missing"),
        ({"lat": r(12, 0, 0), "lon": r(12, 0, 0), "lat_ref": None}, "latitude: hemisphere None"),
        (
            {"lat": r(12, 0, 0), "lon": r(12, 0, 0), "lon_ref": "N"},
            "longitude: hemisphere 'N' instead of E or W",
        ),
    ],
)
def test_unusable_positions_are_refused_with_the_reason(tmp_path, tags, reason):
    path = with_gps(tmp_path / "photo.jpg", **tags)
    with pytest.raises(PhotoError, match=reason) as error:
        exif_latlon(path)
    assert "photo.jpg" in str(error.value)


def test_exif_of_broken_files(tmp_path):
    with pytest.raises(PhotoError, match="empty"):
        exif_latlon(write(tmp_path / "empty.jpg", b""))


def test_real_cameras(geoclip_data):
    import pandas as pd

    table = pd.read_csv(geoclip_data / "photos/photos.csv")
    for row in table.itertuples():
        path = geoclip_data / "photos" / row.file
        place = exif_latlon(path)
        if row.coordinates == "EXIF":
            assert place == pytest.approx((row.lat, row.lon), abs=1e-5)
        else:
            assert place is None
        assert open_photo(path).mode == "RGB"


# Finding


def test_folders_are_searched_below_and_files_kept_in_order(tmp_path):
    (tmp_path / "trip/day").mkdir(parents=True)
    for name in ("trip/b.JPG", "trip/day/a.png", "trip/notes.txt", "last.webp"):
        write(tmp_path / name, b"x")
    found = find_photos([tmp_path / "last.webp", tmp_path / "trip", tmp_path / "absent.jpg"])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "last.webp",
        "trip/b.JPG",
        "trip/day/a.png",
        "absent.jpg",
    ]


def test_a_folder_without_photos_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no photos"):
        find_photos([tmp_path])
