"""The README's table is that of the accepted results, cell by cell."""

import pandas as pd
import pytest

from geoclip import evaluation, paths
from geoclip.datasets import blue_marble
from geoclip.reproduce import readme

README = paths.ROOT / "README.md"


def results(rows):
    columns = ["data", "split", "model", "measure", *evaluation.ACCURACY_COLUMNS]
    return pd.DataFrame(rows, columns=columns)


def test_the_readmes_table_has_not_drifted():
    text = README.read_text(encoding="utf-8")
    assert readme.replaced(text) == text, "run `python -m geoclip readme` and commit README.md"


def test_the_readmes_paper_column_is_what_data_paper_says():
    published = (
        pd.read_csv(paths.PAPER / "benchmarks.csv").query("protocol == 'paper'").set_index("benchmark")
    )
    lines = [
        line.split("|") for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    cells = {line[1].strip(): line[2].strip() for line in lines if len(line) > 5}
    for name in ("Im2GPS3k", "YFCC26k", "GWS15k"):
        expected = " / ".join(f"{value:.1f}" for value in published.loc[name, evaluation.ACCURACY_COLUMNS])
        assert cells[name] == expected
    assert cells["YFCC4k"] == "not in the paper; 1.21 / 9.08 / 21.94 / 44.44 / 67.77 ³"


def test_side_by_side_fills_what_is_there_and_says_what_is_not():
    table = results([
        ("Im2GPS3k", "test", "paper", "accuracy", 14.1, 34.5, 50.7, 69.7, 83.8),
        ("Im2GPS3k", "test", "gallery", "ceiling", 63.53, 95.23, 99.83, 100, 100),
        (blue_marble.LABEL, "random", "ours", "accuracy", 20.04, 50.06, 92, 97, 98),
        (blue_marble.LABEL, "random", "ours", "low", 1, 1, 1, 1, 1),
    ])  # fmt: skip
    wide = readme.side_by_side(table).set_index("percent within 1 / 25 / 200 / 750 / 2500 km")
    assert list(wide.columns) == ["paper", "authors' weights", "ours", "ceiling", "floor"]
    first = wide.loc["Im2GPS3k"]
    assert first["paper"] == "14.1 / 34.5 / 50.7 / 69.7 / 83.8"
    assert first["ceiling"] == "63.5 / 95.2 / 99.8 / 100.0 / 100.0"
    assert first["authors' weights"] == first["ours"] == readme.NEEDS_PHOTOS
    assert first["floor"] == readme.NEEDS_COORDINATES
    tiles = wide.loc["Blue Marble tiles ¹, random split"]
    assert (tiles["ours"], tiles["paper"]) == ("20.0 / 50.1 / 92.0 / 97.0 / 98.0", "–")
    assert wide.loc["YFCC4k", "paper"] == "not in the paper; 1.21 / 9.08 / 21.94 / 44.44 / 67.77 ³"
    assert wide.loc["GWS15k", "paper"] == readme.NOT_PUBLISHED
    part = results([("Im2GPS3k, 2,990 of 2,997", "test", "ours", "accuracy", 1, 2, 3, 4, 5)])
    wide = readme.side_by_side(pd.concat([table, part]))
    assert wide.iloc[-1].tolist() == [
        "Im2GPS3k, 2,990 of 2,997",
        "–",
        "–",
        "1.0 / 2.0 / 3.0 / 4.0 / 5.0",
        "–",
        "–",
    ]
    with pytest.raises(ValueError, match="two rows"):
        readme.side_by_side(pd.concat([table, table]))


def test_the_table_is_replaced_between_its_marks_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "EXPECTED", tmp_path)
    with pytest.raises(FileNotFoundError, match="make accept NB=07"):
        readme.first_screen()
    row = ("YFCC26k", "test", "paper", "accuracy", 11.6, 22.2, 36.7, 57.5, 76.0)
    results([row]).to_csv(tmp_path / "07_benchmarks.csv", index=False)
    text = f"above\n{readme.START}\nstale numbers\n{readme.END}\nbelow\n"
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    assert readme.write(path)
    new = path.read_text(encoding="utf-8")
    assert new.startswith("above\n") and new.endswith("\nbelow\n")
    assert "11.6 / 22.2 / 36.7 / 57.5 / 76.0" in new and "stale numbers" not in new
    assert not readme.write(path)  # a second time changes nothing
    with pytest.raises(ValueError, match="put these two lines into it"):
        readme.replaced("a README without marks")
