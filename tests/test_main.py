"""The command line: help of every command, exit statuses, and errors without tracebacks."""

import json
import os
import re
import signal
import subprocess
import sys
import types

import pytest

from geoclip import __main__ as command_line
from geoclip import paths

# Prints, for each command, its help and the heavy packages that printing it loaded.
HELP = """
import contextlib, io, json, sys
from geoclip.__main__ import commands, main
heavy = ("torch", "lightning", "pandas", "matplotlib", "open_clip", "numpy", "sklearn", "PIL")
found = {}
for name in [*commands(), "train --model geocells", "train --model context"]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*name.split(), "--help"])
    found[name] = printed.getvalue(), [package for package in heavy if package in sys.modules]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def printed_help():
    environment = os.environ | {"COLUMNS": "1000"}  # an option and its help in one or two lines
    done = subprocess.run([sys.executable, "-c", HELP], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "name", [*command_line.commands(), "train --model geocells", "train --model context"]
)
def test_help_is_light_and_explains_every_option(printed_help, name):
    text, loaded = printed_help[name]
    assert not loaded, f"{name} --help imports {loaded}"
    assert (
        command_line.commands()[name.split()[0]]
        and text.startswith(f"usage: python -m geoclip {name.split()[0]}")
        and "<" not in text
    )
    options = re.findall(r"^  (-[^\n]*?|\w+)(?:  +|\n +|$)([^\n]*)", text, flags=re.MULTILINE)
    assert ("-h, --help", "Show this help message and exit.") in options
    missing = [option for option, about in options if about.startswith("(") or " " not in about]
    assert not missing, f"{name}: no help for {missing}"


@pytest.fixture
def command(monkeypatch):
    """Make `geoclip test …` run a function of the test."""

    def install(run):
        def options(add):
            add("--devices", default="auto")

        module = types.SimpleNamespace(options=options, run=run)
        monkeypatch.setitem(sys.modules, "geoclip.commands.test", module)
        monkeypatch.setattr(command_line, "commands", lambda: {"test": "A test."})

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.delenv("GEOCLIP_TRACEBACK", raising=False)
    yield install
    signal.signal(signal.SIGTERM, handler)


def raising(error):
    def run(options):
        raise error

    return run


def test_an_error_of_ours_is_one_line(command, capsys, monkeypatch):
    command(lambda options: paths.geoclip_data() and 0)
    monkeypatch.setenv("GEOCLIP_DATA", "nosuch")
    assert command_line.main(["test"]) == 2
    assert re.fullmatch(
        r"geoclip: error: GEOCLIP_DATA names .+/nosuch, which is not a folder; correct or unset it\n",
        capsys.readouterr().err,
    )


def test_an_error_of_a_library_names_the_options(command, capsys):
    command(lambda options: json.loads("{"))
    assert command_line.main(["test", "--devices", "zero"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("geoclip: error: JSONDecodeError: Expecting property name")
    assert "while running: test --devices zero " in error and "Traceback" not in error


def test_a_file_error_names_the_file(command, capsys):
    command(lambda options: open("/nosuch/file"))
    assert command_line.main(["test"]) == 2
    assert capsys.readouterr().err == "geoclip: error: /nosuch/file: No such file or directory\n"


def test_the_traceback_can_be_asked_for(command, monkeypatch):
    command(raising(RuntimeError("inner")))
    monkeypatch.setenv("GEOCLIP_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="inner"):
        command_line.main(["test"])


@pytest.mark.parametrize(
    ("run", "status", "said"),
    [
        (lambda options: None, 0, ""),
        (lambda options: 1, 1, ""),
        (raising(KeyboardInterrupt()), 130, "geoclip: interrupted\n"),
        (raising(RuntimeError()), 2, "geoclip: error: RuntimeError\n"),
    ],
)
def test_exit_status(command, capsys, run, status, said):
    command(run)
    assert command_line.main(["test"]) == status
    assert capsys.readouterr().err.startswith(said)


def test_sigterm_ends_with_143_after_cleaning_up(command, tmp_path):
    def run(options):
        with paths.atomic(tmp_path / "table.csv"):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    command(run)
    with pytest.raises(SystemExit) as ended:
        command_line.main(["test"])
    assert ended.value.code == 143 and list(tmp_path.iterdir()) == []


def test_an_unknown_command_is_named(capsys):
    assert command_line.main(["nosuch"]) == 2
    assert "no command 'nosuch'; choose from accept, " in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error():
    code = (
        "import sys; from geoclip import __main__ as m\n"
        "m.commands = lambda: dict.fromkeys(map(str, range(9**6)), '')\n"
        "sys.exit(m.main(['--help']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().startswith("usage:")
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (141, "")
