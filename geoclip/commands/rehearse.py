"""Rehearse the paper's path on a miniature world, or check a folder of real data before the first run.

--out FOLDER writes a world of Blue Marble "photos" in the layouts of MP-16, Im2GPS3k, YFCC26k, YFCC4k, GWS15k,
OSV-Mini and NUS-WIDE, with the faults of real sets; --run then goes from its addresses to the tables of the
notebooks, with tiny random towers in place of CLIP's. FOLDER/rehearsal_log.csv lists each step, its images and
seconds, and what was dropped or failed and why; the exit status is 1 if a step failed. Rerun the command to resume.
None of its numbers is a result. --check FOLDER reads a folder such as GEOCLIP_DATA instead and changes nothing; the
exit status is 1 if something in it is damaged.
"""

import shutil
import time
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt


def options(add) -> None:
    """Of a rehearsal, then of a check."""
    add("--out", help="folder of the world to write, or to go on with")
    add("--run", action="store_true", help="also run every step of the paper's path over it")
    add("--images", type=PositiveInt, default=120, help="photos of a set; MP-16 has twice as many addresses")
    add("--seed", type=NonNegativeInt, default=0, help="seed of the world")
    add("--port", type=PositiveInt, default=8416, help="port of the loopback server behind the addresses")
    add("--jobs", type=PositiveInt, default=1, help="steps at a time, which share the cores")
    add("--devices", type=PositiveInt, default=1, help="ranks that embed and train, one per GPU")
    add("--only", nargs="*", metavar="NN", help="numbers of the notebooks to run (default: all that can)")
    add("--check", help="folder of data sets: what is there, missing, damaged, and what it will cost")
    strict = "with --check: a set with another number of rows than published is an error"
    add("--strict", action="store_true", help=strict)
    add("--tower", help="with --check: also embed images with this open_clip model (default: CLIP, if here)")
    add("--weights", type=str | None, help="of the tower: open_clip tag or file; null for random weights")


def run(options) -> int:
    """Make the world and, with --run, go through all steps; or check a folder, 1 if something is damaged."""
    if bool(options.out) == bool(options.check):
        raise ValueError("give either --out, the folder of a rehearsal, or --check, a folder of data sets")
    if options.check:
        return check(options)
    from geoclip.reproduce import rehearsal, stages

    world = rehearsal.make(options.out, options.images, options.seed, options.port)
    print(f"a rehearsal of {options.images:,} images of each set: {world}", flush=True)
    if not options.run:
        print(f"GEOCLIP_DATA={world} makes every command read it")
        return 0
    began = time.monotonic()
    table = stages.run(world, options.only, options.jobs, options.devices)
    print(f"\nRehearsal: no number of it is a result\n{table.to_string(index=False)}\n{stages.LEFT_OUT}")
    print(f"{(time.monotonic() - began) / 60:.1f} min; the table is {world / stages.LOG}")
    return int(table["why"].str.startswith(stages.FAILED).any())


def check(options) -> int:
    """Print what the folder holds, what each notebook reads of it, and what the paper's size costs."""
    from geoclip import pretrained
    from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig
    from geoclip.reproduce import preflight

    data = Path(options.check).absolute()
    if not data.is_dir():
        raise FileNotFoundError(f"{data}: no such folder")
    encoder = None
    if options.tower or pretrained.has_clip_file():
        config = ImageEncoderConfig(options.tower, options.weights) if options.tower else None
        encoder = ImageEncoder(config).eval()
    table, costs = preflight.check(data, encoder, options.strict), preflight.cost()
    print(table.drop(columns="problems").to_string(index=False))
    if encoder is None:
        print("nothing was embedded: CLIP's weights are not here, and no --tower is named")
    print("", *preflight.uses(data), sep="\n")
    print(f"\nAt the paper's size, with {preflight.PER_SECOND} views a second (one H200) and 1 Gbit/s:")
    print(costs.round(1).to_string(index=False, na_rep=""))
    free, needed = shutil.disk_usage(data).free / 1e9, costs["GB"].sum()
    print(f"{needed:,.1f} GB are needed, {free:,.0f} GB are free{': NOT ENOUGH' * bool(free <= needed)}")
    problems = table[table["problems"] != ""]
    for row in problems.itertuples():
        print(f"PROBLEM {row.set}: {row.problems}")
    return int(len(problems) > 0)
