"""The repository: one list of dependencies, light imports, make targets, published tables with sources."""

import csv
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from geoclip import paths

PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = ("test", "index", "try")


def tracked():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=paths.ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout: nothing says which files belong to it")
    return [paths.ROOT / name for name in done.stdout.split("\0") if name and (paths.ROOT / name).is_file()]


def pinned():
    lines = (paths.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}


def needed(extras):
    """Names of all distributions that `pip install .[EXTRAS]` brings, by following their metadata."""
    todo = [Requirement(text) for text in PROJECT["dependencies"]]
    todo += [Requirement(text) for extra in extras for text in PROJECT["optional-dependencies"][extra]]
    found = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, *sorted(requirement.extras))
        if key in found:
            continue
        found.add(key)
        for text in importlib.metadata.requires(name) or []:
            inner = Requirement(text)
            chosen = requirement.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in chosen):
                todo.append(inner)
    return {name for name, *_ in found}


def test_environment_yml_defers_to_pyproject():
    import yaml

    listed = yaml.safe_load((paths.ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    python, pip, by_pip = listed
    assert python.startswith("python=")
    assert tuple(map(int, python.removeprefix("python=").split("."))) >= (3, 11)
    assert pip == "pip"
    assert by_pip == {"pip": ["-c constraints.txt", f"-e .[{','.join(EXTRAS)}]"]}


def test_makefile_installs_what_environment_yml_installs():
    assert f"-c constraints.txt -e '.[{','.join(EXTRAS)}]'" in (paths.ROOT / "Makefile").read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
def test_constraints_pin_everything_that_is_needed():
    installed = ["book"] if importlib.util.find_spec("sphinx") else []  # `make book` installs it
    missing = needed([*EXTRAS, *installed]) - set(pinned())
    assert not missing, f"constraints.txt has no version of {sorted(missing)}"


def test_constraints_are_exact_public_versions():
    for name, version in pinned().items():
        assert re.fullmatch(r"==[0-9][0-9a-z.!]*", version), f"{name}{version}"
    assert pinned()["torch"] == "==2.12.1" and pinned()["torchvision"] == "==0.27.1"  # a matched pair


def test_nothing_pinned_is_excluded_by_pyproject():
    pins = pinned()
    texts = [
        *PROJECT["dependencies"],
        *(t for extra in EXTRAS for t in PROJECT["optional-dependencies"][extra]),
    ]
    for requirement in map(Requirement, texts):
        version = pins[canonicalize_name(requirement.name)].removeprefix("==")
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{requirement} but {version} is pinned"
        )


def test_no_file_names_the_place_it_was_made_at():
    forbidden = re.compile(
        r"(?<![\w.-])/(?:work|root|home/\w+|tmp)/|files\.pythonhosted|pypi\.org/simple|/simple/"
    )
    found = []
    for path in tracked():
        if path.suffix in {".png", ".pdf", ".jpg", ".geojson"} or path.name == "test_house.py":
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if path.suffix == ".ipynb":
            lines = _spoken(json.loads("\n".join(lines)))
        wrong = [line.strip()[:100] for line in lines if forbidden.search(line)]
        found += [f"{path.relative_to(paths.ROOT)}: {line}" for line in wrong]
    assert not found, "\n".join(found)


def _spoken(notebook):
    """Source and text outputs of a notebook, without its pictures."""
    for cell in notebook["cells"]:
        yield from "".join(cell["source"]).splitlines()
        for output in cell.get("outputs", []):
            yield from "".join(output.get("text", [])).splitlines()
            for kind, data in output.get("data", {}).items():
                if kind.startswith("text/"):
                    yield from "".join(data).splitlines()


def test_import_and_help_are_light():
    code = "import sys, geoclip, geoclip.__main__ as m; m.main(['--help'])\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=paths.ROOT
    )
    loaded = done.stdout.splitlines()[-1].split()
    heavy = {"torch", "open_clip", "lightning", "cartopy", "matplotlib", "pandas", "sklearn", "jsonargparse"}
    assert "geoclip.paths" in loaded and not heavy & set(loaded)


def targets():
    text = (paths.ROOT / "Makefile").read_text(encoding="utf-8")
    return {
        name: "##" in rest for name, rest in re.findall(r"^([a-z]+):(?!=)(.*)$", text, flags=re.MULTILINE)
    }


def test_make_commands_named_in_the_texts_exist():
    for name in ("README.md", "CONTRIBUTING.md", "data/README.md"):
        text = (paths.ROOT / name).read_text(encoding="utf-8")
        for command in re.findall(r"(?:`|^ {4}|^\$ |^)make ([a-z]+)", text, flags=re.MULTILINE):
            assert command in targets(), f"{name} names `make {command}`"


def test_make_help_lists_each_target():
    printed = subprocess.run(
        ["make", "help"], cwd=paths.ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name, has_help in targets().items():
        assert (f"make {name}" in printed) == has_help


def test_a_python_that_is_too_old_is_refused_with_what_to_do(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    arguments = ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(arguments, cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stderr and "make PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("path", sorted(paths.PAPER.glob("*.csv")), ids=lambda path: path.stem)
def test_published_numbers_have_a_source_and_gaps_a_reason(path):
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        numbers = [column for column in row if re.match(r"acc_|median|mean|map$|value$|n$", column)]
        assert all(row[column] == "" or float(row[column]) >= 0 for column in numbers)
        if any(row[column] for column in numbers if column != "n"):
            assert row["source"], row
        if any(row[column] == "" for column in numbers):
            assert row["reason"], row
        within = [float(row[c]) for c in row if c.startswith("acc_") and row[c]]
        assert within == sorted(within) and all(value <= 100 for value in within)


def test_published_geoclip_on_im2gps3k():
    with (paths.PAPER / "benchmarks.csv").open(encoding="utf-8", newline="") as file:
        [row] = [r for r in csv.DictReader(file) if (r["benchmark"], r["protocol"]) == ("Im2GPS3k", "paper")]
    assert [row[c] for c in row if c.startswith("acc_")] == ["14.1", "34.5", "50.7", "69.7", "83.8"]


def test_citation_names_the_paper():
    import yaml

    paper = yaml.safe_load((paths.ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    assert paper["title"].startswith("GeoCLIP: Clip-Inspired Alignment") and paper["year"] == 2023
    assert [author["family-names"] for author in paper["authors"]] == ["Vivanco Cepeda", "Nayak", "Shah"]


def test_ci_runs_the_readme_without_data_first():
    script = paths.ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    commands = [
        line for line in script.read_text(encoding="utf-8").splitlines() if "make" in line or "pytest" in line
    ]
    assert commands[:2] == ["env -u GEOCLIP_DATA make test", "env -u GEOCLIP_DATA make book"]
    assert commands[-1].endswith("-m pytest tests -m data")
