"""Shared by all tests: shapes checked at run time, few threads, and the user's benchmark data."""

import json
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


TINY_CLIP = {  # an open_clip model of 30 thousand parameters, with a text tower
    "embed_dim": 8,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 28, "layers": 1, "width": 64, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}


@pytest.fixture
def tiny_clip(tmp_path):
    """The name of a tiny CLIP that open_clip knows for this test."""
    import open_clip

    path = tmp_path / "tiny-test-clip.json"
    path.write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(path)
    yield "tiny-test-clip"
    open_clip.factory._MODEL_CONFIGS.pop("tiny-test-clip")
