"""Embed the places of a CSV, for use in another task.

PLACES needs columns of latitude and longitude in degrees. OUT has one row for each row of PLACES, in the same order:
.npy holds the embeddings alone; .csv and .parquet keep all columns of PLACES and add gps_0, gps_1, … (with --levels
concat: gps_sigma1_0, …). Rows without valid coordinates have NaN for an embedding; they are
listed in NAME_refused.csv beside OUT, and the exit status is then 1. PLACES is read twice and in parts, so that memory
does not grow with its length. An interrupted run leaves no file.
"""

import contextlib
from pathlib import Path

ROWS = 1 << 16  # read, embedded and written at once


def options(add) -> None:
    """The places, the file to write, and the encoder."""
    add("places", help="the CSV of places, such as places.csv")
    add("--out", required=True, help="file to write: .parquet, .npy or .csv")
    levels = "the sum of the levels, as the model uses it, or the levels side by side"
    add("--levels", default="sum", choices=["sum", "concat"], help=levels)
    add("--encoder", default="released", help="released, or a checkpoint of a trained model")


def run(options) -> int:
    """Write the embeddings and the list of refused rows; return 1 if that list is not empty."""
    import numpy as np
    import pandas as pd
    from tqdm import tqdm

    from geoclip import gps_embedding, paths
    from geoclip.datasets import folder

    out = Path(options.out)
    if out.suffix not in WRITERS:
        raise ValueError(f"--out {out}: the name must end in {', '.join(WRITERS)}")
    if out.suffix == ".parquet":
        _pyarrow(out)
    n, refused = folder.count_rows(options.places, ROWS)
    if refused == n:
        raise ValueError(f"{options.places}: no row has valid coordinates; {out} was not written")
    encoder = gps_embedding.load_encoder(options.encoder)
    names = gps_embedding.column_names(encoder, options.levels)
    if twice := [name for name in folder.header(options.places) if name in names]:
        raise ValueError(f"{options.places}: the column {twice[0]} would be written twice; rename it")
    listed, start = out.with_name(f"{out.stem}_refused.csv"), 0
    with (
        paths.atomic(listed) as temporary_list,
        paths.atomic(out) as temporary,
        tqdm(total=n, unit="place", disable=None) as bar,
        WRITERS[out.suffix](temporary, n, names) as write,
    ):
        for rows, latlon, bad in folder.read_rows(options.places, ROWS):
            valid = latlon.notna().all(axis=1).to_numpy()
            embedding = np.full((len(rows), len(names)), np.nan, np.float32)
            embedding[valid] = gps_embedding.embed_places(
                latlon.to_numpy()[valid], levels=options.levels, encoder=encoder
            )
            write(start, rows, latlon, embedding)
            table = pd.DataFrame(bad, columns=["file", "line", "column", "value"])
            table.to_csv(temporary_list, mode="a", index=False, header=start == 0)
            start += len(rows)
            bar.update(len(rows))
    print(f"{out}: {n:,} rows, {len(names):,} columns of embeddings")
    if not refused:
        listed.unlink()
        return 0
    for row in pd.read_csv(listed, nrows=10, dtype=str, keep_default_na=False).to_dict("records"):
        print(f"refused: {options.places}, line {row['line']}: {row['column']} is {row['value']!r}")
    print(f"{refused:,} rows have no valid coordinates and NaN for an embedding; all are in {listed}")
    return 1


@contextlib.contextmanager
def _npy(path: Path, n: int, names: list[str]):
    import numpy as np

    array = np.lib.format.open_memmap(path, "w+", np.float32, (n, len(names)))

    def write(start, rows, latlon, embedding):
        array[start : start + len(embedding)] = embedding

    yield write
    array.flush()


@contextlib.contextmanager
def _csv(path: Path, n: int, names: list[str]):
    import pandas as pd

    with path.open("w", encoding="utf-8", newline="") as file:

        def write(start, rows, latlon, embedding):
            table = pd.concat([rows, pd.DataFrame(embedding, rows.index, names)], axis=1)
            table.to_csv(file, index=False, header=start == 0, float_format="%.9g")

        yield write


@contextlib.contextmanager
def _parquet(path: Path, n: int, names: list[str]):
    import pandas as pd

    pyarrow, writer = _pyarrow(path), None

    def write(start, rows, latlon, embedding):
        nonlocal writer
        rows = rows.assign(**latlon)  # numbers; the other columns stay text
        table = pd.concat([rows, pd.DataFrame(embedding, rows.index, names)], axis=1)
        table = pyarrow.Table.from_pandas(table, preserve_index=False)
        writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)

    try:
        yield write
    finally:
        if writer:
            writer.close()


def _pyarrow(out: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"--out {out}: writing .parquet needs pyarrow (pip install pyarrow); .csv and .npy do not"
        ) from error
    return pyarrow


WRITERS = {".parquet": _parquet, ".npy": _npy, ".csv": _csv}
