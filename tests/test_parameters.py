"""A changed parameter runs through every notebook, started by plain papermill from any folder."""

import os
import subprocess
import sys

import papermill
import pytest

from geoclip import paths
from geoclip.reproduce import notebooks, report

ONE = {"SEEDS": [0]}
CHANGES = {
    "00": {"PLACE": [31.2, 31.3], "EPOCHS": 1},  # the Nile delta
    "01": {"N_GALLERY": 20_000},
    "02": {"CITIES": {"Berlin": [52.52, 13.40], "Quito": [-0.18, -78.47]}, "SHOWN": "Berlin", "COLUMNS": 60},
    "03": {"CHANGES": {"epochs": 2, "fraction": 0.25}, "SEEDS": [0], "STOP_AFTER": 1},
    "04": {"SETTINGS": {"σ 2⁰": {"location": {"sigmas": [1]}}}} | ONE,
    "05": {"SETTINGS": {"queue 0": {"queue": 0}}} | ONE,
    "06": {"SETTINGS": {"5 %, same epochs": {"fraction": 0.05}}} | ONE,
    "07": {"GALLERIES": 2},
    "08": {"PLACES": 3_000, "COLUMNS": 60},
    "09": {"GALLERIES": [1_000], "VIEWS": []} | ONE,
    "10": {
        "PLACES": 2_500,
        "ELSEWHERE": 1_500,
        "SEEDS": 1,
        "HIDDEN_SEEDS": 1,
        "HIDDEN_EPOCHS": 1,
        "MAP_COLUMNS": 90,
    },
    "11": {"VIEWS": 4},
    "12": {"TRAIN": 1_000, "EPOCHS": 1} | ONE,
    "13": {"GAPS_KM": [100.0], "IMAGES": 40, "DECISIONS": ["mode"]} | ONE,
    "14": {"IMAGES": 60},
    "15": {"PLACES": 1_000},
    "16": {"PHOTOS": 1_500, "SEEDS": 1, "CHOICES": {"3 epochs": {"epochs": 3}}, "EMBEDDINGS": ["length 1"]},
    "17": {"PLACES": 500, "SEEDS": 1},
    "18": {"TOWERS": {"small CNN, trained on tiles": {}}} | ONE,
}


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """Results of their own, and nothing set for the kernel that a reader's shell has not."""
    monkeypatch.setenv("GEOCLIP_RESULTS", str(tmp_path / "results"))
    for name in ("MPLBACKEND", report.ACCEPT_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_every_notebook_is_tried():
    assert list(CHANGES) == [path.name[:2] for path in notebooks.numbered()]


@pytest.mark.slow
@pytest.mark.parametrize("path", notebooks.numbered(), ids=lambda path: path.stem)
def test_a_changed_parameter_runs_through(path, tmp_path, monkeypatch):
    changes, picture = CHANGES[path.name[:2]], paths.ROOT / "figures" / "02_cities.png"
    before = picture.read_bytes()
    cwd = (paths.ROOT, paths.NOTEBOOKS, tmp_path)[int(path.name[:2]) % 3]
    monkeypatch.chdir(cwd)
    limits = {"start_timeout": notebooks.KERNEL_TIMEOUT_S, "execution_timeout": notebooks.CELL_TIMEOUT_S}
    executed = papermill.execute_notebook(
        os.path.relpath(path, cwd), tmp_path / "out.ipynb", changes, progress_bar=False, **limits
    )
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert (
        f"not compared: {', '.join(name for name in notebooks.declared(path) if name in changes)} differ"
        in printed
    )
    assert ": as expected" not in printed
    assert picture.read_bytes() == before


@pytest.mark.slow
def test_an_unknown_city_is_answered_with_those_that_are_known(tmp_path):
    command = [
        sys.executable,
        "-m",
        "papermill",
        notebooks.find("02"),
        tmp_path / "out.ipynb",
        "-p",
        "SHOWN",
        "Berlin",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "SHOWN is 'Berlin', which CITIES does not have: choose from New York, Paris" in done.stderr
