"""notebooks.py: small notebooks run, fail, are accepted and end with their processes."""

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest

from geoclip import paths
from geoclip.reproduce import notebooks
from geoclip.reproduce.profiles import Profile

TABLE = """import pandas
from geoclip.reproduce import report
table = pandas.DataFrame({"model": ["full"], "acc_25km": [float(VALUE)], "n": [3]})
report.save_results(table, "NUMBER_table", report.provenance())"""
HELD = TABLE + '\nreport.hold_to_expected(table, "NUMBER_table", keys=["model"])'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("RESULTS", "EXPECTED", "FIGURES", "CACHE"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
        monkeypatch.setenv(f"GEOCLIP_{name}", str(tmp_path / name.lower()))  # the kernel is another process
    monkeypatch.setenv("HOME", str(tmp_path / "no_home"))
    monkeypatch.setattr(paths, "NOTEBOOKS", paths.make_folder(tmp_path / "notebooks"))
    return paths.NOTEBOOKS


def write(folder, name, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebooks.without_stamps(nbformat.v4.new_notebook(cells=cells)), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def printed(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


@pytest.mark.slow
def test_reproduce_runs_all_lists_the_failure_and_goes_on(folder, capsys):
    write(
        folder,
        "90_bad",
        "VALUE = 1  # a number",
        "import os\nprint(os.getcwd())",
        "raise RuntimeError('no luck')",
    )
    write(folder, "91_good", "VALUE = 1  # a number", TABLE.replace("NUMBER", "91"))
    write(folder, "notes", "VALUE = 1", "raise RuntimeError('not numbered, not run')")
    assert notebooks.reproduce([], Profile("made", parameters={"VALUE": 61.5})) == 1
    said = capsys.readouterr().out
    assert "[1 of 2] 90_bad · failed" in said and "[2 of 2] 91_good · ran" in said
    assert "FAILED 90_bad.ipynb: RuntimeError: no luck" in said
    assert "Published (data/paper/benchmarks.csv)" in said
    assert said.index("1 of 2 notebooks ran") < said.index("61.5")
    runs = paths.RESULTS / "runs"
    assert sorted(path.name for path in runs.glob("*.ipynb")) == ["90_bad.failed.ipynb", "91_good.ipynb"]
    assert printed(runs / "90_bad.failed.ipynb") == f"{folder}\n"


@pytest.mark.slow
def test_accept_keeps_results_and_parameters_and_leaves_no_stamps(folder):
    path = write(folder, "94_ours", "VALUE = 48.25  # a number", HELD.replace("NUMBER", "94"))
    paths.EXPECTED.mkdir()
    (paths.EXPECTED / "94_old.csv").write_text("model\nfull\n")
    table, parameters = paths.EXPECTED / "94_table.csv", paths.EXPECTED / "94_parameters.json"
    assert notebooks.accept("94") == [table, parameters, path]
    assert pd.read_csv(table).acc_25km.tolist() == [48.25]
    assert json.loads(parameters.read_text()) == {"VALUE": 48.25}
    assert not (paths.EXPECTED / "94_old.csv").exists()
    assert printed(path) == "94_table: as expected\n"
    text = path.read_text()
    assert "papermill" not in text and "start_time" not in text and str(folder) not in text
    before = [file.read_bytes() for file in (path, table, parameters)]
    notebooks.accept("94")
    assert [file.read_bytes() for file in (path, table, parameters)] == before


@pytest.mark.slow
def test_accept_changes_nothing_when_a_cell_fails(folder):
    path = write(
        folder, "95_ours", "VALUE = 1  # a number", HELD.replace("NUMBER", "95"), "raise ValueError('late')"
    )
    before = path.read_bytes()
    with pytest.raises(Exception, match="late"):
        notebooks.accept("95")
    assert path.read_bytes() == before
    assert not paths.EXPECTED.exists()


def test_unknown_numbers_and_parameters_are_named(folder):
    path = write(folder, "90_one", "VALUE = 1  # a number")
    with pytest.raises(ValueError, match="no parameter VALEU; it has VALUE"):
        notebooks.run(path, {"VALEU": 2})
    with pytest.raises(ValueError, match="no notebook '7'; give a path or a number of 90_one"):
        notebooks.find("7")
    with pytest.raises(ValueError, match="VALUE is not a literal"):
        notebooks.declared(write(folder, "91_two", "VALUE = int('1')  # a number"))


def test_relative_data_folders_mean_the_callers_and_missing_ones_are_refused(folder, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEOCLIP_DATA", "data")
    notebooks.environment()
    assert os.environ["GEOCLIP_DATA"] == str(tmp_path / "data")
    monkeypatch.setenv("GEOCLIP_DATA", "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        notebooks.environment()


SLEEP = """
import multiprocessing, os, pathlib, time
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,))
worker.start()
pathlib.Path(os.environ["PIDS"]).write_text(f"{os.getpid()} {worker.pid}")
time.sleep(300)
"""


def ended(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition, seconds=300):
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.2)
    assert condition()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, "time-out"])
def test_no_kernel_or_worker_outlives_a_run(folder, tmp_path, monkeypatch, how):
    path, pids = write(folder, "90_sleep", "SEEDS = [0, 1, 2]  # a run for each", SLEEP), tmp_path / "pids"
    monkeypatch.setenv("PIDS", str(pids))
    if how == "time-out":
        with pytest.raises(TimeoutError):
            notebooks.run(path, cell_timeout_s=5)
    else:
        reproduce = [sys.executable, "-m", "geoclip", "reproduce", "--only", str(path)]
        with (
            (tmp_path / "log").open("w") as log,
            subprocess.Popen(reproduce, stdout=log, stderr=log) as process,
        ):
            try:
                wait_until(pids.exists)
                process.send_signal(how)
                status = process.wait(60)
            finally:
                process.kill()
        assert status == (143 if how == signal.SIGTERM else -9)
    wait_until(lambda: all(ended(int(pid)) for pid in pids.read_text().split()))
