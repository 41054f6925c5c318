"""Make a CSV of photos and places (IMG_FILE,LAT,LON) from a folder of geotagged photos.

Every photo below FOLDER with a GPS position in its EXIF data becomes a row; names are relative to FOLDER. The
other photos are listed with the reason in NAME_unused.csv beside the CSV, and the exit status is then 1. Use the
CSV like any other: python -m geoclip embed my.csv --images FOLDER --out FEATURES, then python -m geoclip
train --data FEATURES …; python -m geoclip evaluate --csv my.csv --images FOLDER
"""

from pathlib import Path

CHECKED_AT = 224  # px: decoding a JPEG at this size shows whether it is complete, in a fraction of the time


def options(add) -> None:
    """The folder and the CSV."""
    add("folder", help="folder of photos, searched with its subfolders")
    add("--out", required=True, help="the CSV to write, such as my.csv")


def run(options) -> int:
    """Write the CSV and the list of unused photos; return 1 if that list is not empty."""
    import pandas as pd
    from tqdm import tqdm

    from geoclip import paths, photos
    from geoclip.datasets import sources

    folder, out = Path(options.folder), Path(options.out)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    used, unused = [], []
    for path in tqdm(photos.find_photos([folder]), unit="photo", disable=None):
        name = path.relative_to(folder).as_posix()
        try:
            sources.check_name(name)
            if place := photos.exif_latlon(path):
                sources.decode(path, CHECKED_AT)  # notices a truncated photo now, not in training
                used.append((name, *place))
            else:
                unused.append((name, "no GPS position in its EXIF"))
        except photos.PhotoError as error:
            # for a wrong EXIF value, the error also names the value
            name = sources.printable(name)
            what = error.name.removeprefix(str(path)).removeprefix(name).lstrip(": ")
            unused.append((name, f"{what}: {error.reason}" if what else error.reason))
    listed = out.with_name(f"{out.stem}_unused.csv")
    listed.unlink(missing_ok=True)  # of an earlier run
    if unused:
        with paths.atomic(listed) as temporary:
            pd.DataFrame(unused, columns=["file", "reason"]).to_csv(temporary, index=False)
        for name, reason in unused[:10]:
            print(f"not used: {name}: {reason}")
        if len(unused) > 10:
            print(f"… and {len(unused) - 10:,} more")
        print(f"{len(unused):,} of {len(used) + len(unused):,} photos could not be used; all are in {listed}")
    if not used:
        raise ValueError(f"{folder}: no photo has a usable GPS position; {out} was not written")
    with paths.atomic(out) as temporary:
        table = pd.DataFrame(used, columns=["IMG_FILE", "LAT", "LON"])
        table.to_csv(temporary, index=False, float_format="%.7f")  # 1 cm
    print(f"{len(used):,} photos in {out}")
    return 1 if unused else 0
