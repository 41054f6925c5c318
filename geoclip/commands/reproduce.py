"""Run every numbered notebook and print what they found beside what the paper reports."""

from jsonargparse import ArgumentParser


def parser() -> ArgumentParser:
    options = ArgumentParser(prog="geoclip reproduce", description=__doc__)
    options.add_argument("--only", type=str, default=[], nargs="*", metavar="NN", help="numbers of notebooks")
    options.add_argument("--profile", help="name of a profile of notebooks/profiles (paper), or a YAML file")
    return options


def run(options) -> int:
    from geoclip.reproduce import notebooks

    parameters = {}
    if options.profile:
        from geoclip.reproduce import sweep

        profile = sweep.load_profile(options.profile)
        own = {name: part["parameters"] for name, part in profile.notebooks.items() if "parameters" in part}
        parameters = profile.parameters | own
    return notebooks.reproduce(options.only, parameters)
