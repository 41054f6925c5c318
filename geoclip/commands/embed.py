"""Embed images once with the frozen tower and keep the features for training."""

import subprocess
import sys

from jsonargparse import ArgumentParser


def parser() -> ArgumentParser:
    """The options of `python -m geoclip embed`."""
    parser = ArgumentParser(prog="python -m geoclip embed", description=__doc__)
    parser.add_argument(
        "source",
        type=str,
        help="a CSV, tar shards (path or address, braces for many), a benchmark, or blue_marble:SPLIT",
    )
    parser.add_argument(
        "--out", type=str, required=True, help="folder of features; an unfinished one is completed"
    )
    parser.add_argument(
        "--images", type=str | None, default=None, help="folder of a CSV's photos, default its own"
    )
    parser.add_argument(
        "--views", type=int, default=8, help="views of each photo: the whole, then random crops"
    )
    parser.add_argument(
        "--ten-crop", action="store_true", help="instead the ten crops of the paper's evaluation"
    )
    parser.add_argument("--tower", type=str, default="ViT-L-14-quickgelu", help="an open_clip model")
    parser.add_argument(
        "--weights", type=str | None, default="openai", help="open_clip tag or file; null for random weights"
    )
    parser.add_argument(
        "--checkpoint", type=str | None, default=None, help="take the tower of a trained model"
    )
    parser.add_argument("--batch-size", type=int, default=256, help="views through the tower at once")
    parser.add_argument(
        "--shard-size", type=int, default=4096, help="photos a shard (a tar is always one shard)"
    )
    parser.add_argument(
        "--workers", type=int | None, default=None, help="decoding processes, default one a core"
    )
    parser.add_argument("--devices", type=int, default=1, help="processes on this machine, each with a GPU")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="arithmetic of the tower; auto: the fastest that this machine computes well",
    )
    parser.add_argument(
        "--compile", type=bool, default=False, help="torch.compile the tower (a minute at the start)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random crops")
    return parser


def run(options) -> int:
    """Embed, or start one process a device; says what was embedded, found, unreadable and failed."""
    if options.devices > 1:
        return _launch(options, sys.argv[sys.argv.index("embed") :])
    import joblib
    import torch

    from geoclip.datasets import features
    from geoclip.datasets.sources import Views, open_source
    from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig
    from geoclip.model import load_checkpoint

    if min(options.views, options.batch_size, options.shard_size) < 1:
        raise ValueError("--views, --batch-size and --shard-size must be at least 1")
    rank, world, local_rank = features.rank_and_world()
    source = open_source(options.source, options.images, options.shard_size)
    if options.checkpoint:
        encoder = load_checkpoint(options.checkpoint).image_encoder
    else:
        # random weights are the same in every process and every run
        generator = torch.Generator().manual_seed(0)
        trained = options.weights is not None
        encoder = ImageEncoder(ImageEncoderConfig(options.tower, options.weights, frozen=trained), generator)
    if torch.cuda.is_available():
        encoder.to(f"cuda:{local_rank}")
    workers = options.workers
    if workers is None:
        workers = max(1, joblib.cpu_count() // max(1, torch.cuda.device_count()))
    number = 10 if options.ten_crop else options.views
    report = features.embed(
        source, encoder, options.out, Views(number=number, seed=options.seed, ten_crop=options.ten_crop),
        options.batch_size, workers, options.precision, rank, world, options.compile, progress=sys.stderr.isatty(),
    )  # fmt: skip
    rate = report.embedded / report.seconds if report.embedded else 0
    print(
        f"{options.out}: {report.embedded:,} images embedded ({rate:,.1f} a second), {report.found:,} were there, "
        f"{report.unreadable:,} unreadable (listed in {features.UNREADABLE})"
    )
    for part, reason in report.failed:
        print(f"geoclip: shard {part} was not made: {reason}", file=sys.stderr)
    # torchrun ends all processes when one fails, and a photo that cannot be read is no reason for that
    return 1 if world == 1 and (report.failed or report.unreadable) else 0


def _launch(options, arguments: list[str]) -> int:
    """The same command as --devices processes under torchrun; the status is that of one process doing it all."""
    from pathlib import Path

    from geoclip.datasets import features

    out = Path(options.out)
    before = features.count_unreadable(out)
    at = arguments.index("--devices") if "--devices" in arguments else None
    kept = arguments[:at] + arguments[at + 2 :] if at is not None else [
        argument for argument in arguments if not argument.startswith("--devices=")
    ]  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={options.devices}",
    ]
    status = subprocess.run([*command, "-m", "geoclip", *kept], check=False).returncode
    if status:
        return status
    shards = features.FeatureInfo.read(out / features.INFO).shards
    failed = features.missing_shards(out, range(shards))
    return 1 if failed or features.count_unreadable(out) != before else 0
