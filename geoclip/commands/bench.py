"""Measure speed beside the machine's limits and the authors' package."""

from jsonargparse import ArgumentParser


def parser() -> ArgumentParser:
    """The options of `python -m geoclip bench`."""
    parser = ArgumentParser(prog="python -m geoclip bench", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="what to measure")
    parser.add_argument(
        "--sizes", type=str | None, default=None, help="cpu, gpu or tiny; default by the device"
    )
    parser.add_argument(
        "--out", type=str | None, default=None, help="default data/results/11_bench.csv, …_gpu.csv"
    )
    parser.add_argument(
        "--only", type=str | None, default=None, help="one task of geoclip.studies.bench, such as places"
    )
    return parser


def run(options) -> int:
    """Measure, say each number when it is known, and write the table."""
    from functools import partial
    from pathlib import Path

    import torch

    from geoclip import paths
    from geoclip.studies import bench

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU that PyTorch can use: leave --device out to measure the CPU")
    sizes = options.sizes or {"cuda": "gpu", "cpu": "cpu"}[options.device]
    if sizes not in bench.SIZES:
        raise ValueError(f"no sizes {sizes!r}: there are {', '.join(bench.SIZES)}")
    default = "11_bench_gpu.csv" if options.device == "cuda" else "11_bench.csv"
    out = Path(options.out) if options.out else paths.RESULTS / default
    measured = bench.Bench(options.device, bench.SIZES[sizes], partial(print, flush=True))
    try:
        if options.only:
            bench.limits(measured)
            getattr(bench, options.only)(measured)
        else:
            getattr(bench, "gpu" if options.device == "cuda" else "cpu")(measured)
    finally:  # what was measured before an interruption is kept
        with paths.atomic(out) as temporary:
            bench.table(measured).to_csv(temporary, index=False, float_format="%.6g")
    print(f"{out}: {len(measured.rows)} rows")
    return 0
