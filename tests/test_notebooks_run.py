"""notebooks.py: small notebooks run, fail and are accepted in folders of their own."""

import nbformat
import pandas as pd
import pytest

from geoclip import paths
from geoclip.reproduce import notebooks

TABLE = """import pandas
from geoclip.reproduce import report
table = pandas.DataFrame({"model": ["full"], "acc_25km": [float(VALUE)], "n": [3]})
report.save_results(table, "NUMBER_table", report.provenance())
report.hold_to_expected(table, "NUMBER_table", keys=["model"])"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("RESULTS", "EXPECTED", "FIGURES", "CACHE"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
    monkeypatch.setenv("GEOCLIP_RESULTS", str(tmp_path / "results"))  # the kernel is another process
    monkeypatch.setenv("HOME", str(tmp_path / "no_home"))
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


def write(folder, name, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def outputs(path):
    return [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]


def test_reproduce_runs_all_lists_the_failure_and_goes_on(folder, capsys):
    write(
        folder,
        "00_bad",
        "VALUE = 1  # a number",
        "import os\nprint(os.getcwd())",
        "raise RuntimeError('no such luck')",
    )
    write(folder, "01_good", "VALUE = 1  # a number", TABLE.replace("NUMBER", "01").rsplit("\n", 1)[0])
    write(folder, "notes", "VALUE = 1", "raise RuntimeError('not numbered, not run')")
    assert notebooks.reproduce(parameters={"VALUE": 61.5}, folder=folder) == 1
    printed = capsys.readouterr().out
    assert "1 of 2  00_bad" in printed and "2 of 2  01_good" in printed
    assert "FAILED 00_bad.ipynb: RuntimeError: no such luck" in printed
    assert "Published (data/paper/benchmarks.csv)" in printed
    assert printed.index("1 of 2 notebooks ran") < printed.index("61.5")
    assert sorted(p.name for p in (paths.RESULTS / "runs").iterdir()) == [
        "00_bad.failed.ipynb",
        "01_good.ipynb",
    ]
    printed_there = [
        output["text"]
        for output in outputs(paths.RESULTS / "runs" / "00_bad.failed.ipynb")
        if "text" in output
    ]
    assert printed_there == [f"{folder}\n"]


def test_accept_makes_the_results_the_expectation_and_leaves_no_stamps(folder, monkeypatch):
    path = write(folder, "04_ours", "VALUE = 48.25  # a number", TABLE.replace("NUMBER", "04"))
    paths.EXPECTED.mkdir()
    (paths.EXPECTED / "04_old.csv").write_text("model\nfull\n")
    assert notebooks.accept("4", folder) == [paths.EXPECTED / "04_table.csv", path]
    assert pd.read_csv(paths.EXPECTED / "04_table.csv").acc_25km.tolist() == [48.25]
    assert not (paths.EXPECTED / "04_old.csv").exists()
    assert outputs(path)[0]["text"] == "04_table: 1 rows, as expected\n"
    text = path.read_text()
    assert "papermill" not in text and "start_time" not in text and str(folder) not in text
    before = path.read_bytes(), (paths.EXPECTED / "04_table.csv").read_bytes()
    notebooks.accept("4", folder)
    assert (path.read_bytes(), (paths.EXPECTED / "04_table.csv").read_bytes()) == before


def test_accept_changes_nothing_when_a_cell_fails(folder):
    path = write(
        folder, "05_ours", "VALUE = 1  # a number", TABLE.replace("NUMBER", "05"), "raise ValueError('late')"
    )
    before = path.read_bytes()
    with pytest.raises(Exception, match="late"):
        notebooks.accept("05", folder)
    assert path.read_bytes() == before
    assert not paths.EXPECTED.exists()


def test_unknown_numbers_and_parameters_are_named(folder):
    path = write(folder, "00_one", "VALUE = 1  # a number")
    with pytest.raises(ValueError, match="no parameter VALEU; it has VALUE"):
        notebooks.run(path, {"VALEU": 2})
    with pytest.raises(ValueError, match="VALEU"):
        notebooks.reproduce(parameters={"VALEU": 2}, folder=folder)
    with pytest.raises(ValueError, match="01_none"):
        notebooks.reproduce(parameters={"01_none": {"VALUE": 2}}, folder=folder)
    with pytest.raises(ValueError, match="'7'; there are 00_one"):
        notebooks.with_number("7", folder)


def test_a_section_of_a_profile_goes_to_its_notebook_alone(folder):
    one = write(folder, "00_one", "VALUE = 1\nOTHER = 2")
    two = write(folder, "01_two", "VALUE = 1")
    shared = notebooks._share({"VALUE": 5, "00_one": {"OTHER": 7}}, [one, two])
    assert shared == {one: {"VALUE": 5, "OTHER": 7}, two: {"VALUE": 5}}
