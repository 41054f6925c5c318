"""The notebooks keep to the conventions of this repository; nbval checks that their outputs still come out."""

import ast
import re

import nbformat
import pytest

from geoclip import paths
from geoclip.reproduce import notebooks, report

SKIP = "nbval-ignore-output"
ALL = notebooks.numbered()
each_notebook = pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)


def read(path):
    """The notebook, and its code cells with the syntax tree of each."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    return notebook, [(cell, ast.parse(cell.source)) for cell in cells]


def names(code, *functions):
    """The result names NN_name that calls of report.FUNCTION are given as text."""
    nodes = [node for _, tree in code for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = [node for node in nodes if getattr(node.func, "attr", None) in functions]
    given = [value for node in called for value in (*node.args, *(k.value for k in node.keywords))]
    return [v.value for v in given if isinstance(v, ast.Constant) and re.match(r"\d\d_\w+$", str(v.value))]


@each_notebook
def test_text_and_code(path):
    notebook, code = read(path)
    title, _, rest = notebook.cells[0].source.partition("\n")
    assert re.fullmatch(r"# .+\?", title.strip()), "the title is a question"
    answer, needs, makes = (rest.find(f"**{word}") for word in ("Answer", "Needs", "Makes"))
    assert 0 <= answer < needs < makes and re.search(r"\d", rest[answer:needs]), "its answer has a number"
    if any(
        re.search("blue_marble|open_study", cell.source) for cell, _ in code
    ):  # tiles are called a stand-in
        named = re.compile(r"LABEL|\.label|print\(study\)")
        assert "stand-in" in rest and any(named.search(cell.source) for cell, _ in code)
    assert len(notebook.cells) <= 32
    for cell, tree in code:
        nodes = list(ast.walk(tree))
        assert not [node for node in nodes if re.match(r"(/|~/)\w", str(getattr(node, "value", "")))]
        assert not re.search(r"\bsys\.path\b|get_ipython|;\s*$", cell.source), "no tricks, no last semicolon"
        assert set(cell.metadata.get("tags", [])) <= {"parameters", SKIP}
        defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in nodes)
        assert len(cell.source.strip().splitlines()) <= (20 if defines else 15), cell.source


@each_notebook
def test_parameters_are_commented_literals_in_capitals_and_those_that_were_accepted(path):
    [(cell, tree)] = [both for both in read(path)[1] if "parameters" in both[0].metadata.get("tags", [])]
    lines = cell.source.splitlines()
    for statement in tree.body:
        assert re.fullmatch(r"[A-Z][A-Z0-9_]*", statement.targets[0].id)
        ast.literal_eval(statement.value)
        above = lines[statement.lineno - 2] if statement.lineno > 1 else ""
        assert "#" in lines[statement.end_lineno - 1] or above.startswith("#"), statement.targets[0].id
    changed = report.changed_parameters(path.stem, notebooks.declared(path))
    assert changed == [], f"make accept NB={path.name[:2]}"
    assert report.accepted_parameters(path.stem).exists()


@each_notebook
def test_results_carry_the_notebooks_number_and_are_compared(path):
    code = read(path)[1]
    last = code[-1][0].source
    assert "report.save_results(" in last
    assert 0 <= last.rindex("report.show(") < last.rindex("report.hold_to_expected("), "shown in any case"
    named = names(code, "save_figure", "save_results", "hold_to_expected")
    assert all(name.startswith(f"{path.name[:2]}_") for name in named)
    held = [cell.source for cell, _ in code if SKIP not in str(cell.metadata)]
    held = "\n".join(source for source in held if "hold_to_expected" in source)
    for name in names(code, "show", "hold_to_expected"):
        assert (paths.EXPECTED / f"{name}.csv").exists() and f'"{name}"' in held, name


NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def numbers(text):
    """The numbers in a text: (value, decimals)."""
    found = [number.replace(",", "") for number in NUMBER.findall(text)]
    return {(float(number), len(number.partition(".")[2])) for number in found}


def printed(path):
    """What the notebook prints and shows, and the tables that its results are compared with."""
    outputs = [output for cell, _ in read(path)[1] for output in cell.outputs]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    tables = [file.read_text(encoding="utf-8") for file in paths.EXPECTED.glob(f"{path.name[:2]}_*.*")]
    return "\n".join(texts + tables)


def unsupported(text, path):
    """The numbers of `text` that no number that the notebook prints rounds to."""
    known = [value for value, _ in numbers(printed(path))]
    return [
        value
        for value, decimals in numbers(text)
        if not any(abs(other - value) <= 0.5 * 10.0**-decimals * 1.001 for other in known)
    ]


@each_notebook
def test_each_number_of_the_answer_stands_in_an_output_or_a_result(path):
    first = read(path)[0].cells[0].source
    answer = first[first.index("**Answer.**") : first.index("**Needs.**")]
    assert unsupported(answer, path) == []
    assert len(answer.split()) <= 75


def test_each_number_of_the_readmes_table_of_answers_stands_in_its_notebook():
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\d\d)\]\(notebooks/\S+\) \| .+? \| (.+) \|$", readme, re.MULTILINE)
    assert [number for number, _ in rows] == [path.name[:2] for path in ALL]
    assert {number: unsupported(text, notebooks.find(number)) for number, text in rows} == {
        number: [] for number, _ in rows
    }


@each_notebook
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
