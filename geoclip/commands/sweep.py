"""Run a notebook over a grid of settings and seeds, and assemble the paper's table.

Rerun the command to resume an interrupted sweep: finished runs are kept. Exit status 1 if some runs failed.
Everything is in data/results: runs/NOTEBOOK/ (executed notebooks), NOTEBOOK_sweep.csv (a row for each setting, seed
and threshold), NOTEBOOK_table.csv|md|tex.
"""

from jsonargparse.typing import PositiveInt


def options(add) -> None:
    """Which part of the profile's grid, and on what."""
    add("notebooks", nargs="*", help="paths or numbers (04) (default: all with a grid in the profile)")
    add("--profile", default="paper", help="a profile in notebooks/profiles, or a YAML file")
    add("--seeds", type=PositiveInt, help="train with the seeds 0 to N - 1 (default: the profile's number)")
    add("--jobs", type=PositiveInt, default=1, help="runs at a time, which share the cores")
    add("--devices", default="", help="GPUs that the runs take in turn, such as 0,1")
    add("--shard", default="1/1", help="run a part of the grid: 3/16 is the third of sixteen")
    overrides = "a notebook parameter as YAML, which overrides the profile"
    add("--set", action="append", default=[], metavar="NAME=VALUE", dest="changes", help=overrides)
    add("--dry-run", action="store_true", help="print what would run and which data are missing")


def run(options) -> int:
    """Plan, run what is not there yet, write the tables; 1 if a run failed."""
    import yaml

    from geoclip.reproduce import notebooks, sweep
    from geoclip.reproduce.profiles import Profile

    changes = {}
    for change in options.changes:
        name, equals, value = change.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set takes NAME=VALUE, not {change!r}")
        changes[name] = yaml.safe_load(value)
    profile = Profile.load(options.profile)
    with_grid = [stem for stem, own in profile.notebooks.items() if "grid" in own or options.dry_run]
    names = options.notebooks or with_grid
    plans = {path: sweep.plan(path, profile, options.seeds, changes) for path in map(notebooks.find, names)}
    if options.dry_run:
        for notebook, jobs in plans.items():
            print("\n".join(sweep.describe(notebook, profile, sweep.shard(jobs, options.shard))))
        return 0
    for notebook, jobs in plans.items():
        if missing := profile.missing(notebooks.declared(notebook) | jobs[0].parameters):
            raise FileNotFoundError(f"{notebook.stem}: {'; '.join(missing)}")
    jobs = sweep.shard([job for planned in plans.values() for job in planned], options.shard)
    devices = [device for device in options.devices.split(",") if device]
    failed = notebooks.run_jobs(jobs, options.jobs, devices)
    for notebook, planned in plans.items():
        done = [job for job in planned if job.out.exists()]
        for path in sweep.write_tables(sweep.collect(done), notebook.stem) if done else ():
            print(path)
        if 0 < len(done) < len(planned):
            print(f"{notebook.name}: {len(done)} of {len(planned)} runs are in these tables")
    for job, reason in failed:
        print(f"failed: {job.notebook.name}, {job.label}: {reason}")
    return 1 if failed else 0
