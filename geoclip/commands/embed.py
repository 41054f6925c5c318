"""Embed images once with the frozen tower and store the features for training.

Rerun the command to complete an unfinished folder and to replace damaged shards. Photos that cannot be read
are listed in OUT/unreadable.csv with the reason, and the exit status is then 1.
"""

import subprocess
import sys
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt

from geoclip.commands import say


def options(add) -> None:
    """What is embedded, by which tower, and where to."""
    add("source", help="a CSV, tar shards (path or address), a benchmark, or blue_marble:SPLIT")
    add("--out", required=True, help="folder of features; an unfinished one is completed")
    add("--images", help="image folder of a CSV (default: that of the CSV)")
    add("--views", type=PositiveInt, default=8, help="views per photo: the centre crop, then random crops")
    add("--ten-crop", action="store_true", help="the ten crops of the paper's evaluation instead")
    add("--tower", default="ViT-L-14-quickgelu", help="an open_clip model, timm/NAME, or conv")
    weights = "open_clip tag or file; for timm, pretrained; null: random"
    add("--weights", type=str | None, default="openai", help=weights)
    add("--checkpoint", help="use the tower of a trained model")
    add("--batch-size", type=PositiveInt, default=256, help="views that the tower computes at once")
    add("--shard-size", type=PositiveInt, default=4096, help="photos per shard (a tar is always one shard)")
    add("--workers", type=NonNegativeInt, help="decoding processes (default: one per core)")
    add("--devices", type=PositiveInt, default=1, help="processes on this machine, one per GPU")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="arithmetic of the tower")
    add("--compile", type=bool, default=False, help="compile the tower (takes a minute at the start)")
    add("--seed", type=NonNegativeInt, default=0, help="seed of the random crops")
    add("--strict", action="store_true", help="refuse a benchmark with another number of rows than published")
    add("--allow-pipe", action="store_true", help="accept pipe:COMMAND, which runs a shell command")
    how = "check of shards that exist: hashes of small files and sampled blocks, or every byte"
    add("--verify", choices=["quick", "full"], default="quick", help=how)


def run(options) -> int:
    """Embed, or start one process per device, and report what was embedded, found, unreadable and failed."""
    import joblib
    import torch

    from geoclip.datasets import benchmarks, embedding, features
    from geoclip.datasets.sources import Views, open_source
    from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig
    from geoclip.training.checkpoints import load_checkpoint

    gpus = torch.cuda.device_count()
    if gpus and options.devices > gpus:
        raise ValueError(f"--devices {options.devices}: this machine has {gpus} GPUs")
    how = {"photos_a_part": options.shard_size, "strict": options.strict, "allow_pipe": options.allow_pipe}
    source = open_source(options.source, options.images, **how)
    rank, world, local_rank = embedding.rank_and_world()
    if options.devices > 1 and world == 1:
        return _launch(options)
    if options.source in benchmarks.CARDS and rank == 0:
        wanted = benchmarks.CARDS[options.source]
        print(f"{wanted.title}: {benchmarks.expected(wanted, source.data)} expected")
    if options.checkpoint:
        encoder = load_checkpoint(options.checkpoint).image_encoder
    else:  # random weights are the same in every process and every run
        image = ImageEncoderConfig(options.tower, options.weights, frozen=options.weights is not None)
        encoder = ImageEncoder(image, torch.Generator().manual_seed(0))
    if gpus:
        encoder.to(f"cuda:{local_rank}")
    workers = options.workers
    if workers is None:
        workers = max(1, joblib.cpu_count() // max(1, gpus))
    views = Views(10 if options.ten_crop else options.views, seed=options.seed, ten_crop=options.ten_crop)
    how = {"batch_size": options.batch_size, "workers": workers, "arithmetic": options.precision}
    how |= {"rank": rank, "world": world, "compiled": options.compile, "full": options.verify == "full"}
    report = embedding.embed(source, encoder, options.out, views, **how, progress=sys.stderr.isatty())
    rate = report.embedded / report.seconds if report.embedded else 0
    print(
        f"{options.out}: {report.embedded:,} images embedded ({rate:,.1f} per second), {report.found:,} found, "
        f"{report.unreadable:,} unreadable (listed in {features.UNREADABLE})"
    )
    for part, reason in report.failed:
        say(f"shard {part} was not made: {reason}")
    # torchrun ends all processes when one fails, which an unreadable photo does not justify
    return 1 if world == 1 and (report.failed or report.unreadable) else 0


def _launch(options) -> int:
    """Run the same command in --devices processes under torchrun; return the status that one process would."""
    from geoclip.datasets import embedding, features

    out = Path(options.out)
    before = embedding.merge_unreadable(out) if out.is_dir() else 0
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={options.devices}"]
    command = [sys.executable, "-m", *torchrun, "-m", "geoclip", *sys.argv[sys.argv.index("embed") :]]
    with subprocess.Popen(command) as process:
        try:
            status = process.wait()
        finally:
            process.terminate()  # lets torchrun end its workers when this process is interrupted
    if status:
        return status
    shards = features.FeatureInfo.read(out / features.INFO).shards
    failed = features.missing_shards(out, range(shards))
    return 1 if failed or embedding.merge_unreadable(out) != before else 0
