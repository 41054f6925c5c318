"""The command line: `python -m geoclip COMMAND …`. Each command is one module of geoclip.commands."""

import ast
import importlib
import importlib.resources
import os
import sys


def commands() -> dict[str, str]:
    """Command name → first line of its module's docstring, read without importing it (torch takes seconds)."""
    folder = importlib.resources.files("geoclip.commands")
    found = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".py") and file.name != "__init__.py":
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            found[file.name.removesuffix(".py")] = text.partition("\n")[0]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status: 0 all well, 1 some items failed, 2 nothing could be done."""
    arguments = sys.argv[1:] if arguments is None else arguments
    known = commands()
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m geoclip COMMAND [options]     (COMMAND --help lists its options)\n")
        print("\n".join(f"  {name:<12}{line}" for name, line in known.items()))
        return 0
    name, *rest = arguments
    if name not in known:
        print(f"geoclip: error: no command {name!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"geoclip.commands.{name}")
    options = command.parser().parse_args(rest)
    try:
        return command.run(options) or 0
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("GEOCLIP_TRACEBACK"):
            raise
        print(f"geoclip: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
