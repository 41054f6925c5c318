"""Run one notebook and make the results it finds the expected ones."""

from jsonargparse import ArgumentParser


def parser() -> ArgumentParser:
    options = ArgumentParser(prog="geoclip accept", description=__doc__)
    options.add_argument("number", type=str, metavar="NN", help="number of the notebook")
    return options


def run(options) -> int:
    from geoclip import paths
    from geoclip.reproduce import notebooks

    for path in notebooks.accept(options.number):
        print(f"wrote {path.relative_to(paths.ROOT)}")
    print("Review them with `git diff data/expected notebooks`, then commit.")
    return 0
