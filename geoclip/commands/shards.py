"""Download photos known by URL (such as MP-16's list) into tar shards, ready to embed.

URLS is a CSV of `image id, url`; PLACES, such as mp16_places365.csv, gives the coordinates by the same ids.
Rerun the command to resume from the first incomplete shard. Failed links are listed with the reason in
OUT/unavailable.csv, and the exit status is then 1. Embed the shards as they are: python -m geoclip embed
'OUT/{00000..00472}.tar' --out FEATURES. Under torchrun or SLURM, every process downloads its own shards.
"""

from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt


def options(add) -> None:
    """Lists, folder and limits."""
    add("urls", help="CSV of image id and URL, with or without a header")
    add("--places", required=True, help="CSV with the places of these images")
    add("--out", required=True, help="folder of the shards; an unfinished one is completed")
    add("--shard-size", type=PositiveInt, default=10_000, help="URLs per shard")
    add("--processes", type=PositiveInt, default=1, help="processes, each with its own shard")
    add("--threads", type=PositiveInt, default=64, help="simultaneous downloads per process")
    add("--timeout", type=PositiveFloat, default=30, help="seconds per photo, redirects included")
    add("--max-mb", type=PositiveFloat, default=50, help="megabytes per photo")
    add("--retries", type=NonNegativeInt, default=2, help="further attempts after a temporary failure")
    private = "also contact private and loopback addresses, and use the environment's proxy"
    add("--allow-private", action="store_true", help=private)


def run(options) -> int:
    """Downloads, and reports how many photos were saved and why the others were not; 1 if any failed."""
    from geoclip.datasets import benchmarks, embedding, shards

    urls = shards.read_urls(options.urls)
    listed = shards.join_places(urls, benchmarks.read_csv(options.places).table)
    if left := len(urls) - len(listed):
        print(f"{left:,} of {len(urls):,} URLs are skipped: {options.places} has no place for them")
    asked = options.threads, options.timeout, options.max_mb, options.retries, options.allow_private
    rank, world, _ = embedding.rank_and_world()
    limits = shards.Limits(*asked)
    done = shards.download(listed, options.out, options.shard_size, options.processes, limits, rank, world)
    print(f"{done.photos:,} of {len(listed):,} photos in {done.pattern}")
    for reason, count in done.failed.items():
        print(f"  {count:,} failed: {reason}")
    if done.failed:
        print(f"all failures are listed in {Path(options.out) / shards.UNAVAILABLE}")
    return 1 if done.failed and world == 1 else 0
