"""The notebooks keep to the conventions of this repository; whether their outputs still come out, nbval says."""

import ast
import re

import nbformat
import pytest

from geoclip import paths
from geoclip.reproduce import notebooks

TAGS = {"parameters", "nbval-ignore-output"}
CALLS_THAT_NAME_FILES = {"save_figure": 1, "save_results": 1, "hold_to_expected": 1}
# Marked as not compared, a cell proves nothing: most cells must not be.
MOST_IGNORED = 0.6


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def problems(notebook, number):
    """What in a notebook is against the conventions, one line each."""
    return [
        *_opening(notebook),
        *_parameters(notebook),
        *_cells(notebook),
        *_run(notebook),
        *_ending(notebook, number),
    ]


def _opening(notebook):
    first = notebook.cells[0]
    title, _, rest = first.source.partition("\n")
    if first.cell_type != "markdown" or not re.fullmatch(r"# .+\?", title.strip()):
        yield f"the title is not a question: {title!r}"
    places = [rest.find(f"**{word}") for word in ("Answer", "Needs", "Makes")]
    if -1 in places or places != sorted(places):
        yield "the first cell does not go on with **Answer**, **Needs**, **Makes**"
    elif not re.search(r"\d", rest[places[0] : places[1]]):
        yield "the answer has no number"
    source = "\n".join(cell.source for cell in code(notebook))
    if "blue_marble" in source and not ("stand-in" in rest and "LABEL" in source):
        yield "the embedded data are not called a stand-in for photos in text and figures (LABEL)"


def _parameters(notebook):
    tagged = [cell for cell in code(notebook) if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        yield f"{len(tagged)} cells are tagged parameters, not one"
        return
    lines = tagged[0].source.splitlines()
    for statement in ast.parse(tagged[0].source).body:
        line = lines[statement.lineno - 1]
        if not (isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)):
            yield f"a parameter is not a plain assignment: {line}"
            continue
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", statement.targets[0].id):
            yield f"a parameter is not in capitals: {line}"
        try:
            ast.literal_eval(statement.value)
        except ValueError:
            yield f"a parameter is not a literal: {line}"
        above = lines[statement.lineno - 2].strip() if statement.lineno > 1 else ""
        if "#" not in lines[statement.end_lineno - 1] and not above.startswith("#"):
            yield f"a parameter has no comment: {line}"


def _cells(notebook):
    if len(notebook.cells) > 30:
        yield f"{len(notebook.cells)} cells, more than 30"
    for cell in code(notebook):
        start = cell.source.strip().splitlines()[0]
        if len(cell.source.strip().splitlines()) > 15:
            yield f"more than 15 lines in the cell that starts with {start!r}"
        if re.search(r"^\s*[!%]|\bsys\.path\b|pip install|get_ipython", cell.source, flags=re.MULTILINE):
            yield f"a shell or path trick in the cell that starts with {start!r}"
            continue
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield f"a definition that belongs to the package: {node.name}"
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and re.match(r"(/|~/)\w", node.value)
            ):
                yield f"an absolute path: {node.value!r}"
        if cell.source.rstrip().endswith(";"):
            yield f"a last semicolon, which nbval does not heed, in the cell that starts with {start!r}"
        if extra := set(cell.metadata.get("tags", [])) - TAGS:
            yield f"unknown tags {sorted(extra)}: only {sorted(TAGS)} are known"


def _run(notebook):
    counts = [cell.execution_count for cell in code(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"not run from top to bottom in one go: {counts}"
    ignored = [cell for cell in code(notebook) if "nbval-ignore-output" in cell.metadata.get("tags", [])]
    if len(ignored) > MOST_IGNORED * len(counts):
        yield f"{len(ignored)} of {len(counts)} cells are not compared"
    for cell in code(notebook):
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"an error was left in: {output.ename}"
            if output.get("name") == "stderr":
                yield f"something was written to stderr: {output.text[:80]!r}"
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                yield "a widget was left in"
    if notebook.metadata != notebooks.without_stamps(nbformat.from_dict(notebook)).metadata:
        yield "its metadata are not those that `make accept` writes"
    if any(set(cell.metadata) - {"tags"} for cell in notebook.cells):
        yield "cells carry times or other metadata that change with each run"


def _ending(notebook, number):
    last = code(notebook)[-1].source
    for name in ("save_results(", "hold_to_expected(", "show("):
        if name not in last:
            yield f"the last cell does not call {name[:-1]}"
    for name in _names(notebook):
        if not name.startswith(f"{number}_"):
            yield f"the file {name!r} does not carry the notebook's number {number}"


def _names(notebook):
    """The file names that the notebook gives to report's functions, as far as they are written out."""
    for cell in code(notebook):
        if re.search(r"^\s*[!%]", cell.source, flags=re.MULTILINE):
            continue
        for node in ast.walk(ast.parse(cell.source)):
            called = getattr(
                getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", None)
            )
            if isinstance(node, ast.Call) and called in CALLS_THAT_NAME_FILES and len(node.args) > 1:
                if isinstance(node.args[1], ast.Constant):
                    yield node.args[1].value


@pytest.mark.parametrize("path", notebooks.numbered(), ids=lambda path: path.stem)
def test_notebook_keeps_the_conventions(path):
    notebook = read(path)
    nbformat.validate(notebook)
    found = list(problems(notebook, path.name[:2]))
    assert not found, f"{path.name}:\n" + "\n".join(f"  {line}" for line in found)


@pytest.mark.parametrize("path", notebooks.numbered(), ids=lambda path: path.stem)
def test_tables_a_notebook_is_held_to_are_there(path):
    calls = re.findall(
        r"hold_to_expected\(\s*\w+,\s*\"(\w+)\"", "\n".join(cell.source for cell in code(read(path)))
    )
    for name in calls:
        assert (paths.EXPECTED / f"{name}.csv").exists(), f"make accept NB={path.name[:2]}"


def test_each_expected_table_belongs_to_a_notebook():
    owners = {path.name[:2] for path in notebooks.numbered()}
    orphans = [path.name for path in paths.EXPECTED.glob("*.csv") if path.name[:2] not in owners]
    assert not orphans


def test_there_are_notebooks_and_their_numbers_are_their_own():
    numbers = [path.name[:2] for path in notebooks.numbered()]
    assert "00" in numbers
    assert len(set(numbers)) == len(numbers)
    others = [p.name for p in paths.NOTEBOOKS.glob("*.ipynb") if p not in notebooks.numbered()]
    assert not others, f"not of the form NN_name.ipynb, so never run: {others}"


def test_the_paper_s_profile_sets_parameters_that_exist():
    from geoclip.reproduce import sweep

    profile = sweep.load_profile("paper")
    declared = {path.stem: set(notebooks.declared(path)) for path in notebooks.numbered()}
    for name in profile.parameters:
        assert any(name in known for known in declared.values()), name
    for stem, part in profile.notebooks.items():
        for names in (part.get("parameters", {}), part.get("grid", {})):
            assert set(names) <= declared[stem], stem


def good():
    """A small notebook that keeps all conventions."""
    cells = [
        nbformat.v4.new_markdown_cell(
            "# Is it so?\n\n**Answer.** 3 km.\n\n**Needs** nothing. **Makes** a table."
        ),
        nbformat.v4.new_code_cell("SEED = 0  # of the only draw", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            'report.save_results(t, "03_a", o)\nreport.hold_to_expected(t, "03_a", ["a"])\nreport.show(t)'
        ),
    ]
    for count, cell in enumerate(cells[1:], start=1):
        cell.execution_count = count
    return notebooks.without_stamps(nbformat.v4.new_notebook(cells=cells))


def test_a_notebook_that_keeps_the_conventions_has_no_problem():
    assert list(problems(good(), "03")) == []


BREAKS = {
    "the title is not a question": lambda n: n.cells[0].update(source=n.cells[0].source.replace("?", ".")),
    "does not go on with": lambda n: n.cells[0].update(source=n.cells[0].source.replace("Needs", "Takes")),
    "the answer has no number": lambda n: n.cells[0].update(source=n.cells[0].source.replace("3 km", "Yes")),
    "a stand-in for photos": lambda n: n.cells[2].update(source="blue_marble.splits()\n" + n.cells[2].source),
    "are tagged parameters": lambda n: n.cells[1].metadata.update(tags=[]),
    "not in capitals": lambda n: n.cells[1].update(source="seed = 0  # of the draw"),
    "not a literal": lambda n: n.cells[1].update(source="SEED = int('0')  # of the draw"),
    "has no comment": lambda n: n.cells[1].update(source="SEED = 0"),
    "not a plain assignment": lambda n: n.cells[1].update(source="import torch  # no parameter"),
    "more than 15 lines": lambda n: n.cells[2].update(source="a = 1\n" * 13 + n.cells[2].source),
    "more than 30": lambda n: n.cells.extend(nbformat.v4.new_markdown_cell("more") for _ in range(28)),
    "a definition": lambda n: n.cells[2].update(source="def f():\n    pass\n" + n.cells[2].source),
    "an absolute path": lambda n: n.cells[2].update(source='open("/data/x")\n' + n.cells[2].source),
    "shell or path trick": lambda n: n.cells[2].update(source="!ls\n" + n.cells[2].source),
    "a last semicolon": lambda n: n.cells[2].update(source=n.cells[2].source + ";"),
    "unknown tags": lambda n: n.cells[2].metadata.update(tags=["nbval-skip"]),
    "not run from top": lambda n: n.cells[2].update(execution_count=7),
    "are not compared": lambda n: [
        c.metadata.update(tags=[*c.metadata.get("tags", []), "nbval-ignore-output"]) for c in n.cells[1:]
    ],
    "an error was left in": lambda n: n.cells[2].outputs.append(
        nbformat.v4.new_output("error", ename="E", evalue="")
    ),
    "written to stderr": lambda n: n.cells[2].outputs.append(
        nbformat.v4.new_output("stream", name="stderr", text="w")
    ),
    "its metadata are not": lambda n: n.metadata.update(papermill={"start_time": "now"}),
    "change with each run": lambda n: n.cells[2].metadata.update(execution={"iopub.execute_input": "now"}),
    "does not call show": lambda n: n.cells[2].update(source=n.cells[2].source.replace("report.show(t)", "")),
    "does not carry the notebook's number": lambda n: n.cells[2].update(
        source=n.cells[2].source.replace("03_a", "04_a")
    ),
}


@pytest.mark.parametrize("line", BREAKS)
def test_each_convention_is_checked(line):
    broken = good()
    BREAKS[line](broken)
    assert any(line in problem for problem in problems(broken, "03")), list(problems(broken, "03"))
