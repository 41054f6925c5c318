"""Shared by all tests: shapes checked at run time, few threads, and the user's benchmark data."""

import multiprocessing
import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Set before torch and numpy are imported: more threads only slow small tensors down.
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
os.environ["MPLBACKEND"] = "agg"

# Annotated shapes and types are checked in the tests only. Set before geoclip is imported.
install_import_hook("geoclip", "typechecker.checked")


def pytest_configure():
    from geoclip import paths

    # Tests that kill processes fork them from one server, which imports once what each of them would for seconds.
    multiprocessing.set_forkserver_preload(
        ["geoclip.studies.runner", "geoclip.datasets.shards", "webdataset"]
    )
    try:
        paths.make_variables_absolute()
        paths.geoclip_data()
    except FileNotFoundError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_collection_modifyitems(items):
    for item in items:
        if "geoclip_data" in getattr(item, "fixturenames", ()):
            item.add_marker("data")


@pytest.fixture(scope="session")
def geoclip_data() -> Path:
    """The folder that GEOCLIP_DATA names; tests that use it are marked `data`, and skipped without it."""
    from geoclip import paths

    folder = paths.geoclip_data()
    if folder is None:
        pytest.skip("GEOCLIP_DATA is not set: no benchmark data to test on")
    return folder


@pytest.fixture
def tiny_clip():
    """The name of a CLIP of 30 thousand parameters beside its token embedding, with a text tower."""
    return "tiny-clip"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A checkpoint of a model of tiles with random weights."""
    import browsing

    return browsing.made_checkpoint(tmp_path_factory.mktemp("model") / "made.ckpt", "conv")


@pytest.fixture
def tile_errors():
    """The error in km of a trained module on each tile of a split of the embedded data."""
    from geoclip import earth

    def errors(module, split):
        images, latlon = module.test_tiles(split)
        return earth.haversine_km(module.place(images), latlon)

    return errors


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium that saves downloads in `browser.downloads`."""
    import browsing

    opened = browsing.chromium(tmp_path_factory.mktemp("downloads"))
    if opened is None:
        pytest.skip("no Chromium with chromedriver: install the packages chromium and chromium-driver")
    yield opened
    opened.quit()
