"""Divide the Earth into S2 geo-cells from the LAT and LON columns of a CSV."""


def options(add) -> None:
    """The options, named as in the literature on geo-cells."""
    add("csv", help="CSV with the columns LAT and LON in degrees")
    add("--img_min", type=int, default=50, help="cells with fewer images are dropped")
    add("--img_max", type=int, default=1000, help="cells with more images are divided")
    add("--lvl_min", type=int, default=2, help="S2 level of the largest cells")
    add("--lvl_max", type=int, default=30, help="S2 level of the smallest cells")
    add("--out", default="cells.csv", help="CSV to write the partition to")


def run(options) -> None:
    """Write the partition and print how many of the coordinates it covers."""
    from geoclip.baselines.partition import PartitionConfig, partition
    from geoclip.datasets import folder

    config = PartitionConfig(options.img_min, options.img_max, options.lvl_min, options.lvl_max)
    latlon = folder.read_places(options.csv)
    cells = partition(latlon, config, source=options.csv)
    cells.write(options.out)
    kept, largest = int(cells.images.sum()), int(cells.images.max())
    print(
        f"{options.out}: {len(cells):,} cells of {cells.images.min():,} to {largest:,} images; they hold "
        f"{kept:,} of {len(latlon):,} ({100 * kept / len(latlon):.1f} %), the rest are in cells with fewer "
        f"than {config.img_min}"
    )
    if largest > config.img_max:
        crowded = int((cells.images > config.img_max).sum())
        print(f"{crowded:,} cells of level {config.lvl_max} (lvl_max) hold more than {config.img_max} images")
