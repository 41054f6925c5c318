"""Opening photos of any common format, cropping them, and reading the position that their EXIF records."""

import contextlib
import io
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from PIL import ExifTags, Image, ImageOps

# EPS is excluded on purpose: Pillow passes it to Ghostscript, which executes programs.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "QOI", "TGA")
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .mpo .png .webp .avif .heic .heif .tif .tiff .gif .bmp .ppm .pgm .pnm".split()
    + ".jp2 .j2k .qoi .tga".split()
)
HEIC_BRANDS = (b"heic", b"heix", b"mif1", b"msf1")
LONGEST_SIDES = 50  # resizing the short side of a 1 × 60,000 px strip to 224 px would take gigabytes
MOST_PIXELS = 178_956_970  # Pillow's own limit, which a package that is merely imported may have lifted
BOMB = f"more than {MOST_PIXELS:,} pixels, a decompression bomb or not a photo"
LARGE_PIXELS = 32_000_000  # larger photos are decoded one at a time, and reduced if few pixels are needed
OVERSAMPLED = 4  # a reduced photo keeps at least this many times the needed side


class PhotoError(ValueError):
    """A photo that cannot be used. The message is `name`, the file, and `reason`."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # these arguments let it be pickled, to leave a worker process
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Upload(NamedTuple):
    """A photo that is held in memory: its name, and the bytes of its file."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


def open_photo(photo, side: int | None = None) -> Image.Image:
    """The photo upright (EXIF orientation applied), in 8-bit RGB.

    photo: a path, an Upload, a PIL image, or an array (h, w), (h, w, 3) or (h, w, 4), uint8 or float in [0, 1].
    side: the pixels that the short side will be resized to; a photo of more than 32 megapixels may then be
    returned at a reduced size, at least four times as large, which saves memory. Transparent pixels become
    white, animations give their first frame, and 16 bits are scaled to 8. Raises PhotoError with the reason.
    """
    if isinstance(photo, str | Path | Upload):
        with opened(photo) as image:
            return _upright_rgb(image, str(photo), side)
    image = photo if isinstance(photo, Image.Image) else _from_array(photo)
    name = getattr(photo, "filename", "") or ("image" if image is photo else "array")
    with _reasons(name):
        return _upright_rgb(image, name, side)


def centre_crop(image: Image.Image, side: int) -> Image.Image:
    """The central side × side pixels; if the margin is odd, half a pixel towards the upper left.

    This is how the authors' processor crops; torchvision rounds to even.
    """
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def ten_crop(
    image: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> list[Image.Image]:
    """The ten views of the paper's evaluation, side × side: four corners and the centre, each also mirrored.

    The short side of the photo is first resized to side × 256 / 224.
    """
    whole = resize(image, side * 256 // 224, resample)
    views = []
    for photo in (whole, whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
        x, y = photo.width - side, photo.height - side
        for left, top in ((0, 0), (x, 0), (0, y), (x, y), (round(x / 2), round(y / 2))):
            views.append(photo.crop((left, top, left + side, top + side)))
    return views


def resize(image: Image.Image, side: int, resample=Image.Resampling.BICUBIC) -> Image.Image:
    """The image with its short side resized to `side` pixels; its aspect ratio is kept."""
    short, long = sorted(image.size)
    long = int(side * long / short)
    return image.resize((side, long) if image.width <= image.height else (long, side), resample)


def exif_latlon(photo: str | Path | Upload) -> tuple[float, float] | None:
    """The position that EXIF records, (lat, lon) in degrees, or None. Raises PhotoError if it is unusable."""
    with opened(photo) as image:
        gps = image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
    tags = ExifTags.GPS
    values = [gps.get(tag) for tag in (tags.GPSLatitude, tags.GPSLongitude)]
    if values == [None, None]:
        return None
    lat = _degrees(values[0], gps.get(tags.GPSLatitudeRef), "NS", 90, f"{photo}: EXIF latitude")
    lon = _degrees(values[1], gps.get(tags.GPSLongitudeRef), "EW", 180, f"{photo}: EXIF longitude")
    if lat == lon == 0:
        raise PhotoError(f"{photo}: EXIF position", "0° N 0° E, which cameras write when they have no fix")
    return lat, -180.0 if lon == 180 else lon


def find_photos(sources: Iterable[str | Path]) -> list[Path]:
    """The photos in `sources`, in order: files as given, folders searched recursively by file suffix."""
    found = []
    for source in map(Path, sources):
        if not source.is_dir():
            found.append(source)
            continue
        files = (path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
        inside = sorted(path for path in files if path.is_file())
        if not inside:
            raise FileNotFoundError(f"{source}: the folder holds no photos ({', '.join(sorted(SUFFIXES))})")
        found += inside
    return found


@contextlib.contextmanager
def _reasons(name: str) -> Iterator[None]:
    """Turns any exception of a decoder, which may be of almost any type, into a PhotoError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # corrupt EXIF and large photos are handled here
        try:
            yield
        except PhotoError:
            raise
        except Image.DecompressionBombError as error:
            raise PhotoError(name, BOMB) from error
        except Image.UnidentifiedImageError as error:
            raise PhotoError(name, "not an image in a known format") from error
        except PermissionError as error:
            raise PhotoError(name, "no permission to read it") from error
        except Exception as error:
            raise PhotoError(name, f"cannot be decoded ({str(error) or type(error).__name__})") from error


@contextlib.contextmanager
def opened(photo: str | Path | Upload) -> Iterator[Image.Image]:
    """The image in a file, before it is decoded. Raises PhotoError, also for what the block raises."""
    name = str(photo)
    with _reasons(name):
        if not isinstance(photo, Upload) and not Path(photo).is_file():
            raise PhotoError(name, "not a file" if Path(photo).exists() else "no such file")
        with io.BytesIO(photo.data) if isinstance(photo, Upload) else Path(photo).open("rb") as file:
            start = file.read(32)
            file.seek(0)
            if not start:
                raise PhotoError(name, "empty (0 bytes)")
            Image.init()
            if start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS and "HEIF" not in Image.OPEN:
                try:
                    import pillow_heif
                except ImportError as error:
                    reason = "a HEIC photo: install pillow-heif (the extra `heic`), or convert it to JPEG"
                    raise PhotoError(name, reason) from error
                pillow_heif.register_heif_opener()
            with Image.open(file, formats=[known for known in FORMATS if known in Image.OPEN]) as image:
                if image.width * image.height > MOST_PIXELS:  # in the header, before anything is decoded
                    raise PhotoError(name, BOMB)
                yield image


def _upright_rgb(image: Image.Image, name: str, side: int | None) -> Image.Image:
    short, long = sorted(image.size)
    if short == 0 or long > LONGEST_SIDES * short:
        raise PhotoError(name, f"{image.width} × {image.height} px, too narrow to be a photo")
    large = image.width * image.height > LARGE_PIXELS
    kept = OVERSAMPLED * side if side and large else short  # least pixels to keep of the short side
    # several processes that decode large photos at once would need gigabytes
    lock = FileLock(Path(tempfile.gettempdir()) / f"geoclip-large-photo-{os.getuid()}.lock")
    with lock if large else contextlib.nullcontext():
        return _decoded(image, kept)


def _decoded(image: Image.Image, kept: int) -> Image.Image:
    if (times := min(image.size) // kept) > 1:  # JPEG only: decodes 1/2, 1/4 or 1/8
        image.draft(None, (image.width // times, image.height // times))
    image.load()  # raises if the file is truncated
    with contextlib.suppress(Exception):  # a photo with garbage in its EXIF is still usable
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else a copy, of gigabytes if it is large
            image = ImageOps.exif_transpose(image)
    times = min(image.size) // kept
    if times > 1 and image.mode in ("RGB", "RGBA", "L", "LA", "CMYK", "YCbCr"):
        image = image.reduce(times)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        # The authors drop the alpha channel, which exposes whatever colours are hidden under it.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scales by the range of the values: Pillow clips 16-bit values at 255, which turns a photo white."""
    values = np.nan_to_num(np.asarray(image, np.float64))
    top = values.max()
    ranges = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    scale = next((limit for limit in ranges if top <= limit), top)
    return Image.fromarray((np.clip(values / scale, 0, 1) * 255).round().astype(np.uint8))


def _from_array(array) -> Image.Image:
    array = np.asarray(array)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or 0 in array.shape:
        raise PhotoError("array", f"shape {array.shape}; expected (h, w), (h, w, 3) or (h, w, 4)")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # negated, so that NaN is refused
            found = f"floats within [{array.min():g}, {array.max():g}]"
            raise PhotoError("array", f"{found}; expected [0, 1] or uint8")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise PhotoError("array", f"dtype {array.dtype}; expected uint8, or floats within [0, 1]")
    return Image.fromarray(array)


def _degrees(value, hemisphere, letters: str, limit: int, what: str) -> float:
    """Signed degrees from an EXIF coordinate (degrees, minutes, seconds) and its hemisphere letter."""
    if value is None:
        raise PhotoError(what, "missing, although the other coordinate is there")
    parts = list(value) if isinstance(value, tuple | list) else [value]
    if not 1 <= len(parts) <= 3:
        raise PhotoError(what, f"{len(parts)} numbers instead of degrees, minutes and seconds")
    if any(getattr(part, "denominator", 1) == 0 for part in parts):
        raise PhotoError(what, "a fraction with the denominator 0")
    try:
        degrees, minutes, seconds = [float(part) for part in parts] + [0.0] * (3 - len(parts))
    except (TypeError, ValueError) as error:
        raise PhotoError(what, f"{parts} instead of numbers") from error
    if isinstance(hemisphere, bytes):
        hemisphere = hemisphere.decode("ascii", "replace")
    letter = str(hemisphere or "").strip("\0 ").upper()[:1]
    if letter not in letters or not letter:
        raise PhotoError(what, f"hemisphere {hemisphere!r} instead of {letters[0]} or {letters[1]}")
    total = degrees + minutes / 60 + seconds / 3600
    # 60 is accepted: some programs round 59.9999 up
    if not (min(degrees, minutes, seconds) >= 0 and max(minutes, seconds) <= 60 and total <= limit):
        raise PhotoError(what, f"{degrees:g}° {minutes:g}′ {seconds:g}″ is out of range")
    if not math.isfinite(total):
        raise PhotoError(what, "not a number")
    return -total if letter == letters[1] else total
