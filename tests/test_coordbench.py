"""CoordBench's tables in a folder of the published layout: which tasks are found, and what is refused."""

import numpy as np
import pandas as pd
import pytest
import torch

from geoclip import earth
from geoclip.datasets import coordbench
from geoclip.studies import many_tasks, probes


def write(folder, table, kind="csv", **columns):
    """A table in CoordBench's format, of 200 places, the first 20 of them without country."""
    latlon = earth.sample_sphere(200, torch.Generator().manual_seed(0)).double().numpy()
    country = np.where(latlon[:, 1] < 0, 7, 8)
    country[:20] = 0
    data = pd.DataFrame(
        {"lon": latlon[:, 1], "lat": latlon[:, 0], "split": None, "id": None, "country": country}
    )
    data = data.assign(soc=latlon[:, 0], phh2o=np.nan).assign(**columns)
    path = folder / "coordbench/data" / table / f"data.{kind}"
    path.parent.mkdir(parents=True)
    data.to_csv(path, index=False) if kind == "csv" else data.to_parquet(path)


def test_without_data_every_task_has_a_reason(tmp_path, monkeypatch):
    names = list(coordbench.published().index)
    monkeypatch.delenv("GEOCLIP_DATA", raising=False)
    assert coordbench.tasks()[0] == {} and list(coordbench.tasks()[1]) == names
    monkeypatch.setenv("GEOCLIP_DATA", str(tmp_path))
    assert "holds coordbench/data/soilgrids/data.parquet" in coordbench.tasks()[1]["soil carbon"]


def test_tables_become_tasks_that_are_scored_as_all_others(tmp_path, monkeypatch):
    monkeypatch.setenv("GEOCLIP_DATA", str(tmp_path))
    write(tmp_path, "satclip_country")
    write(tmp_path, "soilgrids", phh2o=np.where(np.arange(200) < 50, np.nan, 6.5 + np.arange(200)))
    tasks, reasons = coordbench.tasks(most=170)
    assert set(tasks) == {"SatCLIP country", "soil carbon", "soil pH"} and not set(tasks) & set(reasons)
    assert [len(task) for task in tasks.values()] == [170, 170, 150]
    assert set(tasks["SatCLIP country"].target) == {"7", "8"} and tasks["soil carbon"].measure == "r2"
    rows = many_tasks.compare(tasks, {"sphere": earth.unit_sphere}, probes.ProbeConfig(seeds=1), 5)
    ridge = rows[(rows.probe == "ridge") & (rows.split == "random")].set_index("task").score
    assert ridge["SatCLIP country"] > 85 and ridge["soil carbon"] > 0.9


def test_a_parquet_file_is_preferred(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setenv("GEOCLIP_DATA", str(tmp_path))
    write(tmp_path, "satclip_country", "parquet")
    assert len(coordbench.tasks()[0]["SatCLIP country"]) == 180


def test_what_is_no_table_of_coordbench_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("GEOCLIP_DATA", str(tmp_path))
    write(tmp_path, "satclip_country", lat=95.0)
    with pytest.raises(ValueError, match=r"satclip_country/data.csv, row 0: \(95, "):
        coordbench.tasks()
    monkeypatch.setenv("GEOCLIP_DATA", str(tmp_path / "other"))
    write(tmp_path / "other", "satclip_population")
    with pytest.raises(ValueError, match="no column log_population; it has lon, lat, split"):
        coordbench.tasks()


def test_published_scores_name_their_source_and_empty_ones_their_reason():
    table = coordbench.published()
    scores = table.filter(regex="_random|_blocked")
    assert table["source"].notna().all() and (table["reason"].notna() == scores.isna().any(axis=1)).all()
    classes = table["measure"] == "accuracy"
    assert scores[classes].min(axis=None) > 20 and scores[classes].max(axis=None) < 100
    assert scores[~classes].max(axis=None) < 1
