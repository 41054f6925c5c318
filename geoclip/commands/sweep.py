"""Run a notebook over a grid of settings and seeds, and put the paper's table together."""

from jsonargparse import ArgumentParser

EPILOG = """
An interrupted sweep goes on where it stopped; what was run is found by the hash of notebook, parameters,
package and data. Exit status 1 where some runs failed. Everything lies in data/results: runs/NOTEBOOK/ (the
executed notebooks), NOTEBOOK_sweep.csv (a row per setting, seed and threshold), NOTEBOOK_table.csv|md|tex.
"""


def parser() -> ArgumentParser:
    """The options; the grid itself is in the profile."""
    parser = ArgumentParser(prog="python -m geoclip sweep", description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "notebooks",
        nargs="*",
        help="paths or numbers (04) of notebooks; none: all that the profile has a grid for",
    )
    parser.add_argument(
        "--profile", default="paper", help="of notebooks/profiles, or the path of a YAML file"
    )
    parser.add_argument("--seeds", type=int, help="seeds 0 to N - 1; default: the profile's")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; the cores are divided among them"
    )
    parser.add_argument("--devices", default="", help="GPUs to give to the runs in turn, such as 0,1")
    parser.add_argument("--shard", default="1/1", help="3/16: the third of sixteen parts of the grid")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
        help="a notebook parameter, as YAML; goes over the profile's",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what would run and what is missing")
    return parser


def run(options) -> int:
    """Plan, run what is missing, write the tables; 1 where a run failed."""
    import yaml

    from geoclip.reproduce import sweep

    profile = sweep.load_profile(options.profile)
    changes = {}
    for change in options.changes:
        name, equals, value = change.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set takes NAME=VALUE, not {change!r}")
        changes[name] = yaml.safe_load(value)
    names = options.notebooks or [
        stem for stem, own in profile.notebooks.items() if "grid" in own or options.dry_run
    ]
    plans = {}
    for name in names:
        notebook = sweep.find_notebook(name)
        plans[notebook] = sweep.plan(notebook, profile, options.seeds, changes)
    if options.dry_run:
        for notebook, jobs in plans.items():
            mine = sweep.shard(jobs, options.shard)
            print("\n".join(sweep.describe(notebook, profile, mine)))
        return 0
    mine = sweep.shard([job for jobs in plans.values() for job in jobs], options.shard)
    devices = [device for device in options.devices.split(",") if device]
    outcomes = sweep.sweep(mine, options.jobs, devices)
    for notebook, jobs in plans.items():
        done = [job for job in jobs if job.output.exists()]
        if not done:
            continue
        for path in sweep.write_tables(sweep.collect(done), notebook.stem):
            print(path)
        if len(done) < len(jobs):
            print(f"{notebook.name}: {len(done)} of {len(jobs)} runs are in these tables")
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    for outcome in failed:
        kept = outcome.job.failed if outcome.job.failed.exists() else outcome.job.log
        print(f"failed: {outcome.job.notebook.name}, {outcome.job.label}: {outcome.reason}\n    see {kept}")
    return 1 if failed else 0
