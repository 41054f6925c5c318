"""Sphinx configuration of the book; `make book` builds it. Notebooks are shown as committed and never run."""

import ast
import json
import os
import re
from importlib.metadata import distribution
from pathlib import Path

from docutils import nodes

ROOT = Path(__file__).resolve().parent.parent
project = "GeoCLIP, reproduced"
author = "The contributors of this repository"
copyright = author
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
extensions += ["sphinx.ext.mathjax"]
exclude_patterns = ["README.md"]  # part of index.md
templates_path = [str(ROOT / "book" / "_templates")]  # absolute: autosummary takes them from the sources

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_inline"]
myst_heading_anchors = 3

smartquotes = False
default_role = "code"  # docstrings quote code as Markdown does
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
add_module_names = False
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
napoleon_numpy_docstring = False

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = project
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_copy_source = False
html_show_search_summary = False  # it is fetched, which browsers refuse for pages opened from disk
# Offline: MathJax is one file, which draws glyphs as SVG and so needs no fonts.
_files = distribution("sphinx-mathjax-offline")
html_static_path += [str(_files.locate_file("sphinx-mathjax-offline/static/mathjax/tex-svg.js"))]
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}

NUMBERED = {path.name[:2]: path for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))}
NUMBER = re.compile(r"\d\d")
MENTIONED = re.compile(r"(?<=otebook )\d\d\b|(?<=otebooks )\d\d(?:(?:, | and |, and | to | or )\d\d)*\b")

RUN = """\
:::{{admonition}} Run this notebook
:class: run
```bash
make reproduce ONLY={number}
```
or, with another value of a parameter,
```bash
papermill {path} out.ipynb -y '{parameter}: {value}'
```
{colab}:::
"""

# GitHub Actions says which repository this is; a book that is built elsewhere has no address to open in Colab.
REPOSITORY, BRANCH = os.environ.get("GITHUB_REPOSITORY"), os.environ.get("GITHUB_REF_NAME", "main")
IN_COLAB = ("00", "15")  # they need nothing but what the package index has, and minutes
COLAB = """\
[Open in Colab](https://colab.research.google.com/github/{repository}/blob/{branch}/{path}){{.badge}} \
and first run there
```ipython
!git clone --depth 1 https://github.com/{repository} repository && pip install --quiet ./repository
%cd repository
```
"""


def open_with_number_and_command(app, docname, source):
    """Put a notebook's number before its title, and below its first cell the commands that run it."""
    if not docname.startswith("notebooks/"):
        return
    notebook, number = json.loads(source[0]), Path(docname).name[:2]
    first, *others = notebook["cells"]
    tagged = [cell for cell in others if "parameters" in cell["metadata"].get("tags", [])]
    statements = ast.parse("".join(tagged[0]["source"])).body
    parameters = {s.targets[0].id: json.dumps(ast.literal_eval(s.value)) for s in statements}
    name, value = min(parameters.items(), key=lambda item: len(item[1]))
    path = f"notebooks/{Path(docname).name}.ipynb"
    open_there = REPOSITORY and number in IN_COLAB
    colab = COLAB.format(repository=REPOSITORY, branch=BRANCH, path=path) if open_there else ""
    text = RUN.format(number=number, path=path, parameter=name, value=value, colab=colab)
    title = "".join(first["source"]).replace("# ", f"# {number} · ", 1)
    notebook["cells"] = [{**first, "source": f"{title}\n\n{text}"}, *others]
    source[0] = json.dumps(notebook)


def quote_log(app, docname, source):
    """Replace each line "- TITLE" of the page of failures by the entry of LOG.md that has this title."""
    if docname == "failures":
        log = (ROOT / "LOG.md").read_text(encoding="utf-8")
        entries = {
            e[2]: e for e in re.finditer(r"^### (?P<date>\S+) · (.+)\n(?P<text>(?:(?!### ).*\n)+)", log, re.M)
        }
        app.env.note_dependency(str(ROOT / "LOG.md"))
        source[0] = re.sub(r"^- (.+)$", lambda line: _entry(entries[line[1]]), source[0], flags=re.M)


def link_notebooks(app, doctree, docname):
    """Link numbers of notebooks in running text, such as "notebooks 04 and 05", and in tables, to their pages."""
    for text in list(doctree.findall(nodes.Text)):
        inside = (nodes.reference, nodes.literal, nodes.literal_block, nodes.title, nodes.raw)
        pattern = NUMBER if text in NUMBERED and isinstance(text.parent.parent, nodes.entry) else MENTIONED
        mentions = [mention.span() for mention in pattern.finditer(text)]
        if not mentions or any(isinstance(n, inside) for n in _parents(text)):
            continue
        parts, end = [], 0
        for match in (number for span in mentions for number in NUMBER.finditer(text, *span)):
            target = NUMBERED.get(match[0])
            if target is None or f"notebooks/{target.stem}" == docname:
                continue
            uri = app.builder.get_relative_uri(docname, f"notebooks/{target.stem}")
            link = nodes.reference("", match[0], internal=True, refuri=uri)
            parts += [nodes.Text(text[end : match.start()]), link]
            end = match.end()
        text.parent.replace(text, [*parts, nodes.Text(text[end:])])


def describe_figures(app, doctree, docname):
    """Give figures without a description that of the section in which they stand."""
    for image in doctree.findall(nodes.image):
        section = next((n for n in _parents(image) if isinstance(n, nodes.section)), None)
        if "alt" not in image and section is not None:
            image["alt"] = f"Figure: {section.next_node(nodes.title).astext()}"


def skip_fields(app, what, name, thing, skip, options):
    """Leave out the fields of named tuples, whose only description is that they are fields."""
    return True if type(thing).__name__ == "_tuplegetter" else None


def _entry(match):
    paragraphs = re.sub(r"\n(?=(?:Expected|Found|Surprise|Kept|Dropped|Changed)\b)", "\n\n", match["text"])
    return f"### {match[2]}\n\n*{match['date']}.* {paragraphs}"


def _parents(node):
    while node := node.parent:
        yield node


def setup(app):
    app.connect("source-read", open_with_number_and_command)
    app.connect("source-read", quote_log)
    app.connect("doctree-resolved", link_notebooks)
    app.connect("doctree-resolved", describe_figures)
    app.connect("autodoc-skip-member", skip_fields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
