"""Divide the Earth into S2 geo-cells from the LAT and LON columns of a CSV."""

from jsonargparse import ArgumentParser


def parser() -> ArgumentParser:
    """The options, named as in the geo-cell literature."""
    parser = ArgumentParser(prog="python -m geoclip cells", description=__doc__)
    parser.add_argument("csv", type=str, help="any CSV with the columns LAT and LON, degrees")
    parser.add_argument("--img_min", type=int, default=50, help="cells with fewer images are dropped")
    parser.add_argument("--img_max", type=int, default=1000, help="cells with more images are divided")
    parser.add_argument("--lvl_min", type=int, default=2, help="S2 level of the largest cells")
    parser.add_argument("--lvl_max", type=int, default=30, help="S2 level of the smallest cells")
    parser.add_argument("--out", type=str, default="cells.csv", help="where the partition is written")
    return parser


def run(options) -> int:
    """Write the partition and say how much of the coordinates it covers."""
    import pandas as pd

    from geoclip.baselines.partition import PartitionConfig, partition

    config = PartitionConfig(options.img_min, options.img_max, options.lvl_min, options.lvl_max)
    try:
        table = pd.read_csv(options.csv, usecols=["LAT", "LON"])
    except ValueError as error:
        raise ValueError(f"{options.csv}: the columns LAT and LON are needed ({error})") from error
    cells = partition(table[["LAT", "LON"]].to_numpy(), config, source=options.csv)
    cells.write(options.out)
    kept, largest = int(cells.images.sum()), int(cells.images.max())
    print(
        f"{options.out}: {len(cells):,} cells of {cells.images.min():,} to {largest:,} images; they hold {kept:,} of "
        f"{len(table):,} ({100 * kept / len(table):.1f} %), the rest lie in cells with fewer than {config.img_min}"
    )
    if largest > config.img_max:
        crowded = int((cells.images > config.img_max).sum())
        print(
            f"{crowded:,} cells of level lvl_max {config.lvl_max} hold more than img_max {config.img_max} images"
        )
    return 0
