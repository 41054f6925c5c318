"""Run one notebook and make its results the expected ones."""

from jsonargparse import ArgumentParser


def parser() -> ArgumentParser:
    """The number of the notebook."""
    parser = ArgumentParser(prog="python -m geoclip accept", description=__doc__)
    parser.add_argument("number", type=str, metavar="NN", help="number of the notebook")
    return parser


def run(options) -> int:
    """Accept, and name the files that were written."""
    from geoclip.reproduce import notebooks

    for path in notebooks.accept(options.number):
        print(f"wrote {notebooks.short(path)}")
    print("Review them with `git diff data/expected notebooks`, then commit.")
    return 0
