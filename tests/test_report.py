"""report.py: what is saved can be traced and compared, and the comparison can fail."""

import configparser
import dataclasses
import json
import re
import types

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from geoclip import paths
from geoclip.reproduce import report

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for name in ("RESULTS", "EXPECTED", "FIGURES"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
    monkeypatch.delenv(report.ACCEPT_VARIABLE, raising=False)
    return tmp_path


@pytest.fixture
def table():
    return pd.DataFrame(
        {
            "model": ["full", "no queue"],
            "split": ["random", "random"],
            "acc_25km": [51.5, 48.25],
            "seconds": [3.0, 4.0],
        }
    )


def accepted(table, name="03_training"):
    paths.EXPECTED.mkdir(exist_ok=True)
    table.to_csv(paths.EXPECTED / f"{name}.csv", index=False)


def accepted_parameters(**values):
    paths.EXPECTED.mkdir(exist_ok=True)
    report.accepted_parameters("02_any").write_text(json.dumps(values))


def figure(text="12.3 km", shift=0.0):
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4, 3))
    axes = drawn.add_subplot()
    axes.plot([0, 1, 2], [0, 1 + shift, 0.5])
    axes.set_title(text)
    return drawn


@pytest.mark.slow
def test_figure_is_written_twice_the_same_and_carries_no_date():
    report.save_figure(figure(), "02_similarity")
    first = (paths.FIGURES / "02_similarity.png").read_bytes()
    pdf = (paths.FIGURES / "02_similarity.pdf").read_bytes()
    for path in paths.FIGURES.iterdir():
        path.unlink()
    report.save_figure(figure(), "02_similarity")
    assert (paths.FIGURES / "02_similarity.png").read_bytes() == first
    assert (paths.FIGURES / "02_similarity.pdf").read_bytes() == pdf
    assert b"CreationDate" not in pdf


@pytest.mark.slow
def test_a_picture_is_replaced_if_it_looks_different():
    path = paths.FIGURES / "02_similarity.png"
    report.save_figure(figure(), "02_similarity")
    made = path.read_bytes()
    for levels, replaced in ((1, False), (2, True)):
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
        pixels[5, 5, 0] -= levels  # of the white margin
        Image.fromarray(pixels).save(path)
        changed = path.read_bytes()
        report.save_figure(figure(), "02_similarity")
        assert path.read_bytes() == (made if replaced else changed)
        path.write_bytes(made)
    path.write_bytes(made[:200])
    report.save_figure(figure(), "02_similarity")
    assert path.read_bytes() == made


@pytest.mark.slow
def test_figures_of_other_parameters_leave_the_accepted_ones_alone(monkeypatch):
    accepted_parameters(CITIES={"Paris": [48.9, 2.4]})
    shell = types.SimpleNamespace(user_ns={"CITIES": {"Paris": (48.9, 2.4)}})
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    report.save_figure(figure(), "02_cities")
    accepted = (paths.FIGURES / "02_cities.png").read_bytes()
    shell.user_ns = {"CITIES": {}}
    report.save_figure(figure("other"), "02_cities")
    assert (paths.FIGURES / "02_cities.png").read_bytes() == accepted
    assert (paths.RESULTS / "figures" / "02_cities.png").read_bytes() != accepted


def test_results_have_their_provenance_beside_them(table):
    @dataclasses.dataclass(frozen=True)
    class Config:
        sigma: float = 256.0

    origin = report.provenance(Config(), data_hash="abc")
    report.save_results(table, "03_training", origin)
    path = paths.RESULTS / "03_training.csv"
    pd.testing.assert_frame_equal(pd.read_csv(path), table, check_dtype=False)
    saved = json.loads(path.with_suffix(".json").read_text())
    assert saved["config"] == {"sigma": 256.0}
    assert saved["data_hash"] == "abc"
    assert saved["versions"]["torch"]
    assert sorted(file.name for file in paths.RESULTS.iterdir()) == ["03_training.csv", "03_training.json"]


def test_names_without_a_number_and_empty_tables_are_refused(table):
    with pytest.raises(ValueError, match="NN_name"):
        report.save_results(table, "training", {})
    with pytest.raises(ValueError, match="no row"):
        report.save_results(table.iloc[:0], "03_training", {})
    with pytest.raises(ValueError, match=r"must end in \.csv"):
        report.save_table(table, paths.RESULTS / "mine.json", {})
    assert not paths.RESULTS.exists()


def test_agreement_is_one_line(table, capsys):
    accepted(table)
    report.hold_to_expected(table, "03_training", keys=["model", "split"])
    assert capsys.readouterr().out == "03_training: as expected\n"


def test_agreement_survives_the_rounding_of_the_file(capsys):
    table = pd.DataFrame({"model": ["a", "b"], "median_km": [1234.56789, np.nan]})
    report.save_results(table, "03_training", {})
    accepted(pd.read_csv(paths.RESULTS / "03_training.csv"))
    report.hold_to_expected(table, "03_training", keys=["model"])


def test_a_difference_names_row_column_and_both_values(table):
    accepted(table)
    table.loc[1, "acc_25km"] = 50.25
    report.hold_to_expected(table, "03_training", keys=["model"], tolerance={"acc_*": 2.0})
    with pytest.raises(
        AssertionError, match=r"model=no queue, column acc_25km: found 50.25, expected 48.25 \(± 1.9"
    ):
        report.hold_to_expected(table, "03_training", keys=["model"], tolerance={"acc_*": 1.9})


def test_a_column_may_be_left_uncompared_but_only_by_name(table):
    accepted(table)
    table["seconds"] = [30.0, 40.0]
    report.hold_to_expected(table, "03_training", keys=["model"], tolerance={"seconds": None})
    with pytest.raises(AssertionError, match="column seconds"):
        report.hold_to_expected(table, "03_training", keys=["model"], tolerance={"acc_*": 5.0})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_became_nan_or_infinite_is_a_difference(table, value):
    accepted(table)
    table.loc[0, "acc_25km"] = value
    with pytest.raises(AssertionError, match="model=full, column acc_25km"):
        report.hold_to_expected(table, "03_training", keys=["model"], tolerance={"acc_*": 5.0})


def test_missing_and_new_rows_and_columns_are_differences(table):
    accepted(table)
    with pytest.raises(AssertionError, match="row model=no queue is expected and missing"):
        report.hold_to_expected(table.iloc[:1], "03_training", keys=["model"])
    with pytest.raises(AssertionError, match="row model=other is new"):
        report.hold_to_expected(table.assign(model=["full", "other"]), "03_training", keys=["model"])
    with pytest.raises(AssertionError, match="column 'n' is new"):
        report.hold_to_expected(table.assign(n=3), "03_training", keys=["model"])
    with pytest.raises(AssertionError, match="column 'seconds' is expected and missing"):
        report.hold_to_expected(table.drop(columns="seconds"), "03_training", keys=["model"])


def test_only_rows_marked_optional_may_be_absent(table):
    accepted(table)
    report.hold_to_expected(table.iloc[:1], "03_training", keys=["model"], optional={"model": ["no queue"]})
    with pytest.raises(AssertionError, match="model=full"):
        report.hold_to_expected(
            table.iloc[1:], "03_training", keys=["model"], optional={"model": ["no queue"]}
        )
    table.loc[1, "acc_25km"] = 0.0
    with pytest.raises(AssertionError, match="model=no queue, column acc_25km"):
        report.hold_to_expected(table, "03_training", keys=["model"], optional=True)
    with pytest.raises(AssertionError, match="no row is in both"):
        report.hold_to_expected(table.assign(model=["x", "y"]), "03_training", keys=["model"], optional=True)


def test_keys_must_tell_rows_apart(table):
    with pytest.raises(ValueError, match="split=random"):
        report.hold_to_expected(table, "03_training", keys=["split"])
    with pytest.raises(KeyError, match="seed"):
        report.hold_to_expected(table, "03_training", keys=["seed"])


def test_without_an_expected_table_the_error_says_so(table):
    with pytest.raises(FileNotFoundError, match="no results of 03_training have been accepted"):
        report.hold_to_expected(table, "03_training", keys=["model"])


def test_nothing_is_compared_at_other_parameters_than_the_accepted_ones(table, capsys, monkeypatch):
    accepted(table, "02_table")
    accepted_parameters(PLACE=[37.8, -122.4], SEEDS=[0, 1], VIEWS={"1": "a"})
    same = {"PLACE": (37.8, -122.4), "SEEDS": [0, 1], "VIEWS": {1: "a"}, "OTHER": 1}
    changed, shell = table.assign(acc_25km=0.0), types.SimpleNamespace(user_ns=same)
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    with pytest.raises(AssertionError, match="The parameters are those of the accepted run"):
        report.hold_to_expected(changed, "02_table", keys=["model"])
    for other in ({"PLACE": (31.0, 31.0)}, {"PLACE": 0, "SEEDS": [0]}):
        shell.user_ns = same | other
        report.hold_to_expected(changed, "02_table", ["model"])
    assert capsys.readouterr().out == (
        "02_table: not compared: PLACE differs from the accepted run\n"
        "02_table: not compared: PLACE, SEEDS differ from the accepted run\n"
    )


def test_a_student_is_never_told_to_accept(table):
    accepted(table)
    with pytest.raises(AssertionError) as told:
        report.hold_to_expected(table.assign(acc_25km=0.0), "03_training", keys=["model"])
    assert "accept " not in str(told.value)


def test_nbval_leaves_the_digits_of_a_compared_table_to_its_comparison(table, capsys):
    config = configparser.RawConfigParser()
    config.read(paths.ROOT / "tests" / "nbval.cfg")
    report.show(table, compared_as="03_training")
    report.show(table.assign(acc_25km=[9.5, 100.0]).iloc[:1], compared_as="03_training")
    one, other = re.findall(r"(?s).*?as 03_training\.\n", capsys.readouterr().out)
    assert one != other
    clean = [re.sub(config["tables"]["regex"], config["tables"]["replace"], text) for text in (one, other)]
    assert clean[0] == clean[1] == "Last digits vary between machines; they are compared as 03_training."
    plain = "  model  ≤ 25 km\n   full     51.5\n"
    assert re.sub(config["tables"]["regex"], "", plain) == plain


def test_accepting_prints_the_line_of_an_agreement_and_keeps_optional_rows(
    table, tmp_path, monkeypatch, capsys
):
    accepted(table)
    monkeypatch.setenv(report.ACCEPT_VARIABLE, str(tmp_path / "put_up"))
    new = table.iloc[:1].assign(acc_25km=60.0)
    report.hold_to_expected(new, "03_training", keys=["model"], optional={"model": ["no queue"]})
    put_up = pd.read_csv(tmp_path / "put_up" / "03_training.csv")
    assert list(put_up.acc_25km) == [60.0, 48.25]
    assert capsys.readouterr().out == "03_training: as expected\n"
    assert pd.read_csv(paths.EXPECTED / "03_training.csv").equals(table)


def test_show_rounds_for_reading(table, capsys):
    report.show(table.assign(median_km=[12.345, 1234.5], n=[3, 4]))
    printed = capsys.readouterr().out
    assert "51.5" in printed and "48.2" in printed
    assert "12.3" in printed and "1234" in printed and "1234.5" not in printed
