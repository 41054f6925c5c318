"""Photos as people have them: opened upright and in RGB whatever their format, and where EXIF says they were taken."""

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

# Formats that hold photos. EPS is left out on purpose: Pillow hands it to Ghostscript, which runs programs.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "QOI", "TGA")
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .mpo .png .webp .avif .tif .tiff .gif .bmp .ppm .pgm .pnm .jp2 .j2k .qoi .tga .heic .heif".split()
)
# Resizing makes the short side 224 px; a strip of 1 × 60,000 px would become gigabytes.
LONGEST_SIDES = 50
# Pillow's own limit, twice 89 megapixels, kept here because a package that is only imported may lift Pillow's.
MOST_PIXELS = 178_956_970


BOMB = f"more than {MOST_PIXELS:,} pixels, a decompression bomb or not a photo"


class PhotoError(ValueError):
    """A photo that cannot be used; its message names the file and the reason, `reason` is the reason alone."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


def open_photo(photo) -> Image.Image:
    """A photo upright (EXIF orientation applied), in 8-bit RGB, decoded whole.

    photo: a path, a PIL image, or an array (h, w), (h, w, 3) or (h, w, 4), uint8 or floats in [0, 1].
    Transparency is shown on white; of an animation it is the first frame; 16 bits are scaled to 8.
    Raises PhotoError that names the file and the reason: missing, empty, not an image, truncated, a
    decompression bomb, or a strip too narrow to be a photo.
    """
    if isinstance(photo, str | Path):
        name = str(photo)
        with _reasons(name), _open_file(Path(photo)) as image:
            return _upright_rgb(image, name)
    if isinstance(photo, Image.Image):
        name = getattr(photo, "filename", "") or "image"
        with _reasons(name):
            return _upright_rgb(photo, name)
    return _upright_rgb(_from_array(photo), "array")


def centre_crop(image: Image.Image, side: int) -> Image.Image:
    """The central side × side pixels; where the margin is odd, half a pixel towards the upper left.

    As the authors' processor cuts. torchvision rounds to even, which moves the crop of many photos by a pixel:
    a mean difference of 10 grey levels, and of 7 % in CLIP's feature, for scikit-learn's china.jpg.
    """
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def ten_crop(image: Image.Image, side: int) -> list[Image.Image]:
    """The ten views of the paper's evaluation: four corners and the centre, each also mirrored, side × side.

    The photo's short side is resized to 256 where a view has 224 pixels.
    """
    from torchvision.transforms import functional

    image = functional.resize(image, side * 256 // 224, functional.InterpolationMode.BICUBIC)
    return list(functional.ten_crop(image, side))


def exif_latlon(photo: str | Path | Image.Image) -> tuple[float, float] | None:
    """Where EXIF says that the photo was taken, (lat, lon) in degrees; None where it says nothing.

    Raises PhotoError where it says something unusable: a coordinate or its hemisphere is missing, a fraction
    has no denominator, a value is out of range, or the position is 0° N 0° E, which means "no fix".
    """
    if isinstance(photo, Image.Image):
        name = getattr(photo, "filename", "") or "image"
        with _reasons(name):
            gps = photo.getexif().get_ifd(ExifTags.IFD.GPSInfo)
    else:
        name = str(photo)
        with _reasons(name), _open_file(Path(photo)) as image:
            gps = image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
    tags = ExifTags.GPS
    values = [gps.get(tag) for tag in (tags.GPSLatitude, tags.GPSLongitude)]
    if values == [None, None]:
        return None
    lat = _degrees(values[0], gps.get(tags.GPSLatitudeRef), "NS", 90, f"{name}: EXIF latitude")
    lon = _degrees(values[1], gps.get(tags.GPSLongitudeRef), "EW", 180, f"{name}: EXIF longitude")
    if lat == lon == 0:
        raise PhotoError(f"{name}: EXIF position", "0° N 0° E, which cameras write when they have no fix")
    return lat, -180.0 if lon == 180 else lon


def find_photos(sources: Iterable[str | Path]) -> list[Path]:
    """The photos that `sources` name, in order: files as they are, folders searched (also below) by suffix.

    Raises FileNotFoundError for a folder without photos; a file that is missing is found out when it is opened.
    """
    found = []
    for source in map(Path, sources):
        if not source.is_dir():
            found.append(source)
            continue
        inside = sorted(
            path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
        )
        if not inside:
            raise FileNotFoundError(f"{source} holds no photos ({', '.join(sorted(SUFFIXES))})")
        found += inside
    return found


@contextlib.contextmanager
def _reasons(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises into a PhotoError with the file's name; decoders raise almost anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # corrupt EXIF and large photos are judged here, not warned about
        try:
            yield
        except PhotoError:
            raise
        except Image.DecompressionBombError as error:
            raise PhotoError(name, BOMB) from error
        except PermissionError as error:
            raise PhotoError(name, "may not be read") from error
        except Exception as error:
            raise PhotoError(name, f"cannot be decoded ({str(error) or type(error).__name__})") from error


def _open_file(path: Path) -> Image.Image:
    if not path.is_file():
        raise PhotoError(str(path), "not a file" if path.exists() else "no such file")
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        raise PhotoError(str(path), "empty (0 bytes)")
    Image.init()
    try:
        image = Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
        if image.width * image.height > MOST_PIXELS:  # known from the header, before a pixel is decoded
            image.close()
            raise PhotoError(str(path), BOMB)
        return image
    except Image.UnidentifiedImageError as error:
        heic = start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"mif1", b"msf1")
        reason = "a HEIC photo; convert it to JPEG first" if heic else "not an image in a known format"
        raise PhotoError(str(path), reason) from error


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    short, long = sorted(image.size)
    if short == 0 or long > LONGEST_SIDES * short:
        raise PhotoError(name, f"{image.width} × {image.height} px, too narrow to be a photo")
    image.load()  # a truncated file shows here
    with contextlib.suppress(Exception):  # garbage in EXIF does not make the picture unusable
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        # The authors drop the alpha channel, which brings out whatever colours lie hidden under it.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit values at 255, which makes a photo white; scale them by their range instead."""
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
            raise PhotoError(
                "array", f"floats within [{array.min():g}, {array.max():g}]; expected [0, 1] or uint8"
            )
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise PhotoError("array", f"dtype {array.dtype}; expected uint8, or floats within [0, 1]")
    return Image.fromarray(array)


def _degrees(value, hemisphere, letters: str, limit: int, what: str) -> float:
    """One EXIF coordinate (degrees, minutes, seconds) and its hemisphere letter as signed degrees."""
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
    # 60 is let through: some writers round 59.9999 up
    if not (min(degrees, minutes, seconds) >= 0 and max(minutes, seconds) <= 60 and total <= limit):
        raise PhotoError(what, f"{degrees:g}° {minutes:g}′ {seconds:g}″ is out of range")
    if not math.isfinite(total):
        raise PhotoError(what, "not a number")
    return -total if letter == letters[1] else total
