"""Write the README's first-screen table from the accepted results of notebook 07."""

from jsonargparse import ArgumentParser


def parser() -> ArgumentParser:
    """No options."""
    return ArgumentParser(prog="python -m geoclip readme", description=__doc__)


def run(options) -> int:
    """Rewrite the table between the README's two marks."""
    from geoclip.reproduce import readme

    print("README.md: " + ("written" if readme.write() else "its table was up to date"))
    return 0
