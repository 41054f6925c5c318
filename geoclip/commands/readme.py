"""Write the README's first-screen table from the accepted results of notebook 07."""


def options(add) -> None:
    """There are none."""


def run(options) -> None:
    """Rewrite the table between the README's two marks."""
    from geoclip.reproduce import readme

    print("README.md: " + ("written" if readme.write() else "its table was up to date"))
