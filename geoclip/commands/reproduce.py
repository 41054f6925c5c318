"""Run every numbered notebook and print the results beside those that the paper reports."""

from jsonargparse import ArgumentParser


def parser() -> ArgumentParser:
    """Which notebooks, with which parameters."""
    parser = ArgumentParser(prog="python -m geoclip reproduce", description=__doc__)
    parser.add_argument("--only", type=str, default=[], nargs="*", metavar="NN", help="default: all")
    parser.add_argument("--profile", help="a profile in notebooks/profiles, such as paper, or a YAML file")
    return parser


def run(options) -> int:
    """Run them; 1 if one failed."""
    from geoclip.reproduce import batch
    from geoclip.reproduce.profiles import Profile

    return batch.reproduce(options.only, Profile.load(options.profile) if options.profile else None)
