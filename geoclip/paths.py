"""Folders of the project, and files that are written completely or not at all.

In a checkout everything lies below its root; an installed package carries data/ and notebooks/ inside itself.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import platformdirs

SAMPLE, SAMPLES = 1 << 20, 256  # bytes of a block, and how many blocks of a sealed file are hashed
VARIABLES = ("GEOCLIP_CACHE", "GEOCLIP_DATA", "GEOCLIP_FIGURES", "GEOCLIP_RESULTS")

_PACKAGE = Path(__file__).resolve().parent
CHECKOUT = (_PACKAGE.parent / "pyproject.toml").is_file()
ROOT = _PACKAGE.parent if CHECKOUT else _PACKAGE  # the wheel keeps data/ and notebooks/ below the package


def _folder(variable: str, default: Path) -> Path:
    return Path(os.environ.get(variable) or default).expanduser().absolute()


USER_CACHE = platformdirs.user_cache_path("geoclip-reproduced")
DATA = ROOT / "data"
CACHE = _folder("GEOCLIP_CACHE", DATA / "cache" if CHECKOUT else USER_CACHE)  # safe to delete
RESULTS = _folder("GEOCLIP_RESULTS", DATA / "results" if CHECKOUT else Path("geoclip_results"))
FIGURES = _folder("GEOCLIP_FIGURES", ROOT / "figures" if CHECKOUT else RESULTS / "figures")
EXPECTED = DATA / "expected"
PAPER = DATA / "paper"
NATURAL_EARTH = DATA / "natural_earth"
NOTEBOOKS = ROOT / "notebooks"


def make_variables_absolute() -> None:
    """Make the paths in GEOCLIP_* absolute, so that processes started in other folders read the same ones."""
    os.environ |= {name: str(_folder(name, ROOT)) for name in VARIABLES if os.environ.get(name)}


def geoclip_data() -> Path | None:
    """Return the folder of benchmark data that GEOCLIP_DATA names, or None if the variable is unset."""
    if not os.environ.get("GEOCLIP_DATA"):
        return None
    folder = _folder("GEOCLIP_DATA", DATA)
    if not folder.is_dir():
        raise FileNotFoundError(f"GEOCLIP_DATA names {folder}, which is not a folder; correct or unset it")
    return folder


def profile(name: str | Path) -> Path:
    """Return notebooks/profiles/NAME.yaml, or the YAML file at the path `name`."""
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = NOTEBOOKS / "profiles" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (NOTEBOOKS / "profiles").glob("*.yaml")))
        raise FileNotFoundError(f"there is no profile {path}; notebooks/profiles has {known}")
    return path


def make_folder(folder: Path) -> Path:
    """Create `folder` if needed and return it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except PermissionError as error:
        remedy = "set GEOCLIP_CACHE (caches) or GEOCLIP_RESULTS (results) to a folder you can write to"
        raise PermissionError(f"no permission to write to {folder}: {remedy}") from error
    return folder


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary file beside `path`; it replaces `path` if the block succeeds and is removed if not.

    Raises OSError that names `path` if it cannot be written. Temporary files that a killed process left more
    than an hour ago are removed.
    """
    path = Path(path)
    make_folder(path.parent)
    for left in path.parent.glob(f".{glob.escape(path.stem)}.????????{glob.escape(path.suffix)}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp creates private files
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a crash of the machine may leave the new name with empty contents
        os.replace(temporary, path)
    except OSError as error:
        ours = Path(error.filename or "").name.startswith(f".{path.stem}.")
        full = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if ours or full:
            raise OSError(error.errno, f"cannot be saved ({error.strerror})", str(path)) from error
        raise
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file, cached until its size or modification time changes."""
    path = Path(path).resolve()
    state = path.stat()
    stamp = [str(path), state.st_size, state.st_mtime_ns]
    note = CACHE / "sha256" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError):
        *seen, digest = json.loads(note.read_text())
        if seen == stamp:
            return digest
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OSError), atomic(note) as temporary:
        temporary.write_text(json.dumps([*stamp, digest]))
    return digest


def seal(path: Path, name: str) -> None:
    """Append to a file that will be called `name` the digest by which is_sealed recognises it."""
    digest = _digest(path, path.stat().st_size, name)
    with path.open("ab") as file:
        file.write(digest)


def is_sealed(path: Path) -> bool:
    """Return whether a file ends with the digest of its name and contents that `seal` appended."""
    size = path.stat().st_size - hashlib.sha256().digest_size
    with path.open("rb") as file:
        file.seek(max(0, size))
        return file.read() == _digest(path, size, path.name)


def _digest(path: Path, size: int, name: str) -> bytes:
    """SHA-256 of the name, the size and the contents; of files above 256 MB, of 256 evenly spaced blocks."""
    digest = hashlib.sha256(f"{name} {size}".encode())
    stride = SAMPLE * max(1, -(-size // (SAMPLE * SAMPLES)))
    with path.open("rb") as file:
        for start in range(0, size, stride):
            file.seek(start)
            digest.update(file.read(min(SAMPLE, size - start)))
    return digest.digest()
