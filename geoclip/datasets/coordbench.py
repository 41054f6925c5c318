"""CoordBench's tables, if GEOCLIP_DATA has them: coordbench/data/TABLE/data.parquet, as published, or data.csv.

data/paper/coordbench.csv names the columns to predict, the value that marks a missing one, and published scores.
"""

import numpy as np
import pandas as pd

from geoclip import earth, paths
from geoclip.datasets import geography
from geoclip.datasets.geography import Task


def published() -> pd.DataFrame:
    """The tasks, where they are, and CoordBench's scores of GeoCLIP: accuracy in percent, or R²."""
    return pd.read_csv(paths.PAPER / "coordbench.csv").set_index("task")


def tasks(most: int = 10_000, seed: int = 0) -> tuple[dict[str, Task], dict[str, str]]:
    """Every task whose table is there, by name, and the reason for each other one.

    most: places of a task; of a larger table, as many are drawn. Rows without a target and classes of fewer
    than FEWEST places are left out. Raises ValueError, with file and row, for a table of another format.
    """
    found, reasons, data = {}, {}, paths.geoclip_data()
    for name, row in published().iterrows():
        stem = f"coordbench/data/{row['table']}/data"
        files = [data / f"{stem}.{kind}" for kind in ("parquet", "csv")] if data else []
        path = next((path for path in files if path.is_file()), None)
        if path is None:
            reasons[name] = f"set GEOCLIP_DATA to a folder that holds {stem}.parquet (or .csv)"
            continue
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
        if lacking := [column for column in ("lat", "lon", row["column"]) if column not in table]:
            raise ValueError(f"{path}: no column {', '.join(lacking)}; it has {', '.join(table.columns)}")
        earth.check_latlon(table[["lat", "lon"]].to_numpy(np.float64), str(path))
        table = table[table[row["column"]].notna() & (table[row["column"]] != row["missing"])]
        drawn = np.sort(np.random.default_rng(seed).permutation(len(table))[:most])
        about = (row["table"], "CoordBench", f"{len(drawn):,} of {len(table):,} places (seed {seed})")
        table = table.iloc[drawn]
        if row["measure"] == "accuracy":
            found[name] = geography.class_task(name, table, row["column"], *about)
        else:
            latlon, target = (table[part].to_numpy(np.float64) for part in (["lat", "lon"], row["column"]))
            found[name] = Task(name, latlon, target, "r2", *about)
    return found, reasons
