"""Where things lie: the repository's folders, the cache, and writing without leaving half a file behind."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
# The cache may be put on another disk; everything in it can be made again.
CACHE = Path(os.environ.get("GEOCLIP_CACHE", DATA / "cache"))
RAW = DATA / "raw"
RESULTS = Path(os.environ.get("GEOCLIP_RESULTS", DATA / "results"))
EXPECTED = DATA / "expected"
PAPER = DATA / "paper"
NATURAL_EARTH = DATA / "natural_earth"
FIGURES = Path(os.environ.get("GEOCLIP_FIGURES", ROOT / "figures"))
NOTEBOOKS = ROOT / "notebooks"


def geoclip_data() -> Path | None:
    """The folder of benchmark data that the user brings, from the environment variable GEOCLIP_DATA.

    Returns None where the variable is not set. Raises FileNotFoundError where it names no folder.
    """
    name = os.environ.get("GEOCLIP_DATA")
    if not name:
        return None
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"GEOCLIP_DATA names {folder}, which is not a folder; correct or unset it")
    return folder


def make_folder(folder: Path) -> Path:
    """`folder`, made where it does not exist; PermissionError says which folder may not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except PermissionError as error:
        raise PermissionError(
            f"{folder} may not be written; give yourself permission, or set GEOCLIP_CACHE (caches) or "
            f"GEOCLIP_RESULTS (results) to a folder that may"
        ) from error
    return folder


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """A temporary file beside `path`, moved over it when the block ends well and removed when it does not.

    Raises PermissionError that names the folder where it may not be written.
    """
    path = Path(path)
    make_folder(path.parent)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    except PermissionError as error:
        raise PermissionError(f"{path.parent} may not be written: {path.name} was not saved") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; results are not
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
