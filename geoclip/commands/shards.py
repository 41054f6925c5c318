"""Download photos known by address (MP-16's list of URLs) into tar shards, with img2dataset."""

from jsonargparse import ArgumentParser

EPILOG = """
URLS is a CSV of `image id, url`; PLACES, such as mp16_places365.csv, gives the images their coordinates by the
same ids. Given again, the command goes on at the first shard that is not whole. Links that are dead are listed
in OUT/unavailable.csv with the reason, and the exit status is then 1. The shards are embedded as they are:
python -m geoclip embed 'OUT/{00000..00472}.tar' --out FEATURES. On a cluster: img2dataset --distributor pyspark
or ray with the list OUT/list.jsonl.
"""


def parser() -> ArgumentParser:
    """The options."""
    parser = ArgumentParser(prog="python -m geoclip shards", description=__doc__, epilog=EPILOG)
    parser.add_argument("urls", type=str, help="CSV of image id and url, with a header or without")
    parser.add_argument("--places", type=str, required=True, help="CSV with the places of these images")
    parser.add_argument(
        "--out", type=str, required=True, help="folder of the shards; an unfinished one is completed"
    )
    parser.add_argument("--shard-size", type=int, default=10_000, help="addresses a shard")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes that download, each its own shard"
    )
    parser.add_argument("--threads", type=int, default=64, help="downloads at a time of each process")
    parser.add_argument("--timeout", type=int, default=10, help="seconds to wait for an answer")
    parser.add_argument("--retries", type=int, default=2, help="more tries of an address that failed")
    parser.add_argument(
        "--python",
        type=str | None,
        default=None,
        help="a Python that has img2dataset; default: installed at first use",
    )
    return parser


def run(options) -> int:
    """Download, and say how many photos came and why the others did not; 1 where some did not."""
    from geoclip.datasets import benchmarks, shards

    if (
        min(options.shard_size, options.processes, options.threads, options.timeout) < 1
        or options.retries < 0
    ):
        raise ValueError(
            "--shard-size, --processes, --threads and --timeout must be at least 1, --retries at least 0"
        )
    urls = shards.read_urls(options.urls)
    listed = shards.join_places(urls, benchmarks.read_csv(options.places).table)
    if len(listed) < len(urls):
        print(
            f"{len(urls) - len(listed):,} of {len(urls):,} addresses are left out: {options.places} has no place for them"
        )
    done = shards.download(
        listed, options.out, options.shard_size, options.processes, options.threads, options.timeout, options.retries,
        options.python,
    )  # fmt: skip
    print(f"{done.photos:,} of {done.listed:,} photos in {done.pattern}")
    for reason, count in done.failed.items():
        print(f"  {count:,} failed: {reason}")
    if done.failed:
        print(f"all of them are in {done.folder / shards.UNAVAILABLE}")
    return 1 if done.failed else 0
