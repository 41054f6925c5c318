"""Run every numbered notebook and print the results beside those that the paper reports."""


def options(add) -> None:
    """Which notebooks, with which parameters."""
    add("--only", default=[], nargs="*", metavar="NN", help="default: all")
    add("--profile", help="a profile in notebooks/profiles, such as paper, or a YAML file")


def run(options) -> int:
    """Run them; 1 if one failed."""
    from geoclip.reproduce import notebooks
    from geoclip.reproduce.profiles import Profile

    profile = Profile.load(options.profile) if options.profile else Profile("defaults")
    return notebooks.reproduce(options.only, profile)
