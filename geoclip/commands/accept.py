"""Run one notebook and make its results the expected ones."""

from jsonargparse import ArgumentParser


def parser() -> ArgumentParser:
    options = ArgumentParser(prog="geoclip accept", description=__doc__)
    options.add_argument("number", type=str, metavar="NN", help="number of the notebook")
    return options


def run(options) -> int:
    from geoclip.reproduce import notebooks

    for path in notebooks.accept(options.number):
        print(f"wrote {notebooks.short(path)}")
    print("Review them with `git diff data/expected notebooks`, then commit.")
    return 0
