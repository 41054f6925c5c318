"""The command line: `python -m geoclip COMMAND …`, where each command is a module of geoclip.commands."""

import argparse
import ast
import contextlib
import importlib
import importlib.resources
import os
import re
import shlex
import signal
import sys
import traceback
from pathlib import Path

from geoclip import paths

USAGE = """usage: python -m geoclip COMMAND [options]     (or: geoclip-reproduced COMMAND [options])

COMMAND --help lists the options of a command. Exit status: 0 success, 1 some items failed, 2 nothing could be
done, 130 interrupted, 143 terminated. GEOCLIP_TRACEBACK=1 shows where an error comes from. The package of the
paper's authors is imported as `geoclip` too: `geoclip-reproduced` always runs this one.
"""


def commands() -> dict[str, str]:
    """Map each command to the first line of its module's docstring, without importing the module."""
    found = {}
    for file in sorted(importlib.resources.files("geoclip.commands").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".py") and file.name != "__init__.py":
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            found[file.name.removesuffix(".py").replace("_", "-")] = text.partition("\n")[0]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; errors are printed in a line, not as a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # as an exception, so that temporary files and child processes are cleaned up
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("geoclip: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("GEOCLIP_TRACEBACK"):
            raise
        print(f"geoclip: error: {_describe(error, arguments)}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    known = commands()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        print("\n".join(f"  {name:<12}{line}" for name, line in known.items()))
        return 0
    name, *rest = arguments
    if name not in known:
        raise ValueError(f"no command {name!r}; choose from {', '.join(known)}")
    paths.make_variables_absolute()
    command, parser = load(name)
    try:
        options = parser.parse_args(rest)
    except argparse.ArgumentError as error:
        message = _options_as_typed(str(error), rest, parser)
        raise ValueError(f"{message}\n  {parser.prog} --help lists the options") from error
    paths.geoclip_data()  # raises if the folder is missing, before any work is done
    return command.run(options) or 0


def load(name: str):
    """The module of a command and the parser of its options."""
    from jsonargparse import ArgumentParser

    command = importlib.import_module(f"geoclip.commands.{name.replace('-', '_')}")
    what, _, more = (command.__doc__ or "").partition("\n\n")
    kind = getattr(command, "Parser", ArgumentParser)
    parser = kind(prog=f"python -m geoclip {name}", description=what, epilog=more, exit_on_error=False)
    command.options(parser.add_argument)
    return command, parser


RULES = {  # for what jsonargparse calls "Not of type ..."
    "PositiveInt": "must be a positive integer",
    "PositiveFloat": "must be a positive number",
    "NonNegativeInt": "must be an integer of 0 or more",
    "decision": "choose from argmax, mode, median, geoscore and disc:KM, such as disc:25",
}


def _options_as_typed(message: str, arguments: list[str], parser) -> str:
    """`message` with each option named as it is typed, where jsonargparse calls --top-k "top_k"."""
    for argument in arguments:
        option = argument.partition("=")[0]
        key = option.lstrip("-").replace("-", "_")
        message = message.replace(f'Parser key "{key}":\n ', f"{option}:")
    for kind, rule in RULES.items():
        message = re.sub(f"Not of type {kind}: .*", rule, message)
    options = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}
    what, required, names = message.partition("arguments are required: ")
    return what + required + ", ".join(options.get(name, name) for name in names.split(", "))


def _describe(error: Exception, arguments: list[str]) -> str:
    """The message of `error`, and the command if a library raised it: a library does not know our options."""
    if isinstance(error, OSError) and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, FileNotFoundError | PermissionError | ImportError):
        return str(error)
    innermost = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    if innermost.is_relative_to(Path(__file__).resolve().parent) and isinstance(error, ValueError | OSError):
        return str(error)
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{what}\n  while running: {shlex.join(arguments)}   (GEOCLIP_TRACEBACK=1 shows where)"


if __name__ == "__main__":
    sys.exit(main())
