"""Embed the places of a CSV, for use in another task.

PLACES needs columns of latitude and longitude in degrees. OUT has one row for each row of PLACES, in the same order:
.npy holds the embeddings alone; .csv and .parquet keep all columns of PLACES and add gps_0, gps_1, … (with --levels
concat: gps_sigma1_0, …; best: gps_best_0, …). Rows without valid coordinates have NaN for an embedding; they are
listed in NAME_refused.csv beside OUT, and the exit status is then 1. PLACES is read in parts, so that memory does not
grow with its length. Embeddings collect in OUT.….partial; run the command again to finish what an interrupted run left.
"""

import contextlib
import glob
import hashlib
import io
import os
import sys
from pathlib import Path

ROWS = 1 << 16  # read, embedded and written at once


def options(add) -> None:
    """The places, the file to write, and the encoder."""
    add("places", help="the CSV of places, such as places.csv")
    add("--out", required=True, help="file to write: .parquet, .npy or .csv")
    levels = "the sum of the levels, as the model uses it, the levels side by side, or what a linear model reads best"
    add("--levels", default="sum", choices=["sum", "concat", "best"], help=levels)
    add("--encoder", default="released", help="released, or a checkpoint of a trained model")


def run(options) -> int:
    """Write the embeddings and the list of refused rows; return 1 if that list is not empty."""
    import numpy as np
    import pandas as pd

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
    partial, listed = _partial(out, options, encoder), out.with_name(f"{out.stem}_refused.csv")
    with paths.atomic(listed) as temporary:
        _embed(partial, temporary, options, encoder, (n, len(names)))
    if WRITERS[out.suffix] is None:
        os.replace(partial, out)
    else:
        with paths.atomic(out) as temporary, WRITERS[out.suffix](temporary) as write:
            start = 0
            for rows, latlon, _ in folder.read_rows(options.places, ROWS):
                embedding = np.load(partial, mmap_mode="r")[start : start + len(rows)]
                write(rows, latlon, pd.DataFrame(embedding, rows.index, names))
                start += len(rows)
        partial.unlink()
    print(f"{out}: {n:,} rows, {len(names):,} columns of embeddings")
    if not refused:
        listed.unlink()
        return 0
    for row in pd.read_csv(listed, nrows=10, dtype=str, keep_default_na=False).to_dict("records"):
        print(f"refused: {options.places}, line {row['line']}: {row['column']} is {row['value']!r}")
    print(f"{refused:,} rows have no valid coordinates and NaN for an embedding; all are in {listed}")
    return 1


def _partial(out: Path, options, encoder) -> Path:
    """The file in which embeddings collect. Its name holds a hash of all that they depend on."""
    import torch

    from geoclip import paths

    about = [paths.sha256(options.places), options.levels, ROWS, encoder.config, torch.__version__]
    digest = hashlib.sha256(repr([*about, next(encoder.parameters()).device]).encode())
    for weights in encoder.state_dict().values():
        digest.update(weights.cpu().numpy().tobytes())
    partial = out.with_name(f"{out.name}.{digest.hexdigest()[:12]}.partial")
    for other in set(out.parent.glob(f"{glob.escape(out.name)}.*.partial")) - {partial}:
        why = "is from other places or options and is not continued; delete it if you do not need it"
        print(f"geoclip: {other} {why}", file=sys.stderr)
    return partial


def _embed(partial: Path, listed: Path, options, encoder, shape: tuple[int, int]) -> None:
    """Write or complete `partial`, a .npy file of this shape, and write the refused rows to `listed`."""
    import numpy as np
    import pandas as pd
    from tqdm import tqdm

    from geoclip import gps_embedding
    from geoclip.datasets import folder

    head, start, row_bytes = io.BytesIO(), 0, 4 * shape[1]
    np.lib.format.write_array_header_1_0(head, {"shape": shape, "fortran_order": False, "descr": "<f4"})
    with (
        partial.open("r+b" if partial.exists() else "w+b") as file,
        tqdm(total=shape[0], disable=None) as bar,
    ):
        # Each part is on the disk before the next is begun, so that only the last ROWS rows may be damaged.
        done = (file.seek(0, os.SEEK_END) - len(head.getvalue())) // row_bytes - ROWS
        file.seek(0)
        file.write(head.getvalue())
        for rows, latlon, bad in folder.read_rows(options.places, ROWS):
            table = pd.DataFrame(bad, columns=["file", "line", "column", "value"])
            table.to_csv(listed, mode="a", index=False, header=start == 0)
            start += len(rows)
            bar.update(len(rows))
            if start <= done:
                file.seek(row_bytes * len(rows), os.SEEK_CUR)
                continue
            valid = latlon.notna().all(axis=1).to_numpy()
            embedding = np.full((len(rows), shape[1]), np.nan, "<f4")
            embedding[valid] = gps_embedding.embed_places(
                latlon.to_numpy()[valid], levels=options.levels, encoder=encoder
            )
            file.write(embedding.data)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def _csv(path: Path):
    import pandas as pd

    with path.open("w", encoding="utf-8", newline="") as file:

        def write(rows, latlon, embedding):
            table = pd.concat([rows, embedding], axis=1)
            table.to_csv(file, index=False, header=file.tell() == 0, float_format="%.9g")

        yield write


@contextlib.contextmanager
def _parquet(path: Path):
    import pandas as pd

    pyarrow, writer = _pyarrow(path), None

    def write(rows, latlon, embedding):
        nonlocal writer
        rows = rows.assign(**latlon)  # numbers; the other columns stay text
        table = pyarrow.Table.from_pandas(pd.concat([rows, embedding], axis=1), preserve_index=False)
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


WRITERS = {".parquet": _parquet, ".npy": None, ".csv": _csv}  # of tables that also hold the columns of PLACES
