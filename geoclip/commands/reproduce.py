"""Run every numbered notebook and print the results beside those that the paper reports."""

from jsonargparse import ArgumentParser


def parser() -> ArgumentParser:
    options = ArgumentParser(prog="geoclip reproduce", description=__doc__)
    options.add_argument(
        "--only",
        type=str,
        default=[],
        nargs="*",
        metavar="NN",
        help="numbers of the notebooks to run (default: all)",
    )
    options.add_argument("--profile", help="a profile in notebooks/profiles, such as paper, or a YAML file")
    return options


def run(options) -> int:
    from geoclip.reproduce import batch
    from geoclip.reproduce.profiles import Profile

    return batch.reproduce(options.only, Profile.load(options.profile) if options.profile else None)
