"""Run every numbered notebook and print what they found beside what the paper reports."""

from jsonargparse import ArgumentParser


def parser() -> ArgumentParser:
    options = ArgumentParser(prog="geoclip reproduce", description=__doc__)
    options.add_argument("--only", nargs="*", default=[], metavar="NN", help="numbers of the notebooks to run")
    options.add_argument("--profile", help="YAML of papermill parameters, such as notebooks/profiles/paper.yaml")
    return options


def run(options) -> int:
    import yaml

    from geoclip import notebooks

    parameters = {}
    if options.profile:
        with open(options.profile, encoding="utf-8") as file:
            parameters = yaml.safe_load(file) or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"{options.profile} holds no mapping of parameter names to values")
    return notebooks.reproduce([str(number) for number in options.only], parameters)
