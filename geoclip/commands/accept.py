"""Run one notebook and make its results the expected ones."""


def options(add) -> None:
    """Add the number of the notebook."""
    add("number", metavar="NN", help="number of the notebook")


def run(options) -> None:
    """Accept, and name the files that were written."""
    from geoclip.reproduce import notebooks

    for path in notebooks.accept(options.number):
        print(f"wrote {notebooks.short(path)}")
    print("Review them with `git diff data/expected notebooks`, then commit.")
