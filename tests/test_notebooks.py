"""The notebooks keep to the conventions of this repository; nbval checks that their outputs still come out."""

import ast
import re

import nbformat
import pytest

from geoclip import paths
from geoclip.reproduce import notebooks, report

SKIP = "nbval-ignore-output"
ALL = notebooks.numbered()


def read(path):
    """The notebook, and its code cells with the syntax tree of each."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    return notebook, [(cell, ast.parse(cell.source)) for cell in cells]


def calls(trees, function):
    """The arguments of all calls of report.FUNCTION that are written out as text."""
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    nodes = [node for node in nodes if getattr(node.func, "attr", None) == function]
    values = [
        value for node in nodes for value in [*node.args, *(keyword.value for keyword in node.keywords)]
    ]
    return [v.value for v in values if isinstance(v, ast.Constant) and re.match(r"\d\d_\w+$", str(v.value))]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_text_and_code(path):
    notebook, code = read(path)
    title, _, rest = notebook.cells[0].source.partition("\n")
    assert re.fullmatch(r"# .+\?", title.strip()), "the title is a question"
    answer, needs, makes = (rest.find(f"**{word}") for word in ("Answer", "Needs", "Makes"))
    assert 0 <= answer < needs < makes and re.search(r"\d", rest[answer:needs]), "its answer has a number"
    if any("blue_marble" in cell.source for cell, _ in code):
        assert "stand-in" in rest and any("LABEL" in cell.source for cell, _ in code), (
            "tiles are called a stand-in"
        )
    assert len(notebook.cells) <= 32
    for cell, tree in code:
        nodes = list(ast.walk(tree))
        texts = [
            node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        assert not [text for text in texts if re.match(r"(/|~/)\w", text)], "no absolute path"
        assert not re.search(r"\bsys\.path\b|get_ipython|;\s*$", cell.source), "no tricks, no last semicolon"
        assert set(cell.metadata.get("tags", [])) <= {"parameters", SKIP}
        kinds = (ast.FunctionDef, ast.ClassDef)
        defined = [node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, kinds)]
        assert len(cell.source.strip().splitlines()) <= (20 if defined else 15), (
            f"short cells, not {cell.source}"
        )


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_parameters_are_commented_literals_in_capitals_and_those_that_were_accepted(path):
    tagged = [(cell, tree) for cell, tree in read(path)[1] if "parameters" in cell.metadata.get("tags", [])]
    ((cell, tree),) = tagged
    lines = cell.source.splitlines()
    for statement in tree.body:
        assert re.fullmatch(r"[A-Z][A-Z0-9_]*", statement.targets[0].id)
        ast.literal_eval(statement.value)
        above = lines[statement.lineno - 2] if statement.lineno > 1 else ""
        assert "#" in lines[statement.end_lineno - 1] or above.startswith("#"), statement.targets[0].id
    assert report.changed_parameters(path.stem, notebooks.declared(path)) == [], (
        f"make accept NB={path.name[:2]}"
    )
    assert report.accepted_parameters(path.stem).exists()


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_results_carry_the_notebooks_number_and_are_compared(path):
    _, code = read(path)
    trees, last = [tree for _, tree in code], code[-1][0]
    assert all(f"report.{name}(" in last.source for name in ("save_results", "show", "hold_to_expected"))
    assert last.source.rindex("report.show(") < last.source.rindex("report.hold_to_expected("), (
        "shown in any case"
    )
    named = [
        name
        for function in ("save_figure", "save_results", "hold_to_expected")
        for name in calls(trees, function)
    ]
    assert all(name.startswith(f"{path.name[:2]}_") for name in named)
    compared = [
        cell.source
        for cell, _ in code
        if "hold_to_expected" in cell.source and SKIP not in str(cell.metadata)
    ]
    for name in [*calls(trees, "show"), *calls(trees, "hold_to_expected")]:
        assert (paths.EXPECTED / f"{name}.csv").exists() and any(
            f'"{name}"' in source for source in compared
        ), name


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_outputs_are_those_of_one_clean_run(path):
    notebook, code = read(path)
    assert [cell.execution_count for cell, _ in code] == list(range(1, len(code) + 1))
    assert notebook.metadata == notebooks.without_stamps(nbformat.from_dict(notebook)).metadata
    assert not [cell for cell in notebook.cells if set(cell.metadata) - {"tags"}]
    for output in (output for cell, _ in code for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr", output
        assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def test_at_most_15_percent_of_the_cells_with_output_are_not_compared():
    shown = [cell for path in ALL for cell, _ in read(path)[1] if cell.outputs]
    skipped = [cell for cell in shown if SKIP in cell.metadata.get("tags", [])]
    assert len(skipped) <= 0.15 * len(shown), f"{len(skipped)} of {len(shown)}"


def test_every_notebook_has_a_number_of_its_own_and_every_expected_table_a_notebook():
    numbers = [path.name[:2] for path in ALL]
    assert "00" in numbers and len(set(numbers)) == len(numbers) == len(list(paths.NOTEBOOKS.glob("*.ipynb")))
    assert {path.name[:2] for path in paths.EXPECTED.glob("*_*")} <= set(numbers)
