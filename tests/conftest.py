"""What all tests share: shapes checked at run time, few threads, and the benchmark data of a user."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before torch and numpy are imported: more threads than this only slow small tensors down.
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
os.environ["MPLBACKEND"] = "agg"

# Annotated shapes and types are checked here, and cost a user nothing. To be set before geoclip is imported.
install_import_hook("geoclip", "typechecker.checked")


@pytest.fixture(scope="session")
def geoclip_data() -> Path:
    """The folder that GEOCLIP_DATA names; a test that needs it is skipped where it is not set."""
    from geoclip import paths

    folder = paths.geoclip_data()
    if folder is None:
        pytest.skip("GEOCLIP_DATA is not set: no benchmark data to test on")
    return folder
