"""The book: its pages are complete, its links lead somewhere, and it opens without the internet."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from geoclip import paths
from geoclip.reproduce import notebooks

BOOK = paths.ROOT / "book"
spec = importlib.util.spec_from_file_location("book_build", BOOK / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def site(tmp_path, **pages):
    """A folder of pages: NAME → the page NAME.html, with a style sheet and a picture beside them."""
    for name, text in pages.items():
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
    (tmp_path / "style.css").write_text("body { background: url('a.png') }")
    (tmp_path / "a.png").write_bytes(b"")
    return tmp_path


def test_links_that_lead_somewhere_are_no_problem(tmp_path):
    good = """<link rel="stylesheet" href="style.css?v=1"><link rel="canonical" href="https://example.org/">
    <h1 id="müller">x</h1><img src="a.png"><img src="data:image/png;base64,AA=="><a href="https://example.org">x</a>
    <a href="#m%C3%BCller">x</a><a href="b.html#there">x</a><a href="mailto:a@example.org">x</a>"""
    assert build.problems(site(tmp_path, a=good, b='<p id="there">')) == []


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<a href="gone.html">', "a.html: gone.html does not exist"),
        ('<a href="#gone">', "a.html: #gone has no such anchor"),
        ('<a href="b.html#gone">', "a.html: b.html#gone has no such anchor"),
        ('<a href="../b.html">', "a.html: ../b.html does not exist"),
        ('<img src="gone.png">', "a.html: gone.png does not exist"),
        ('<img src="https://x.org/a.png">', "a.html loads https://x.org/a.png from outside the book"),
        ('<script src="//x.org/a.js">', "a.html loads //x.org/a.js from outside the book"),
        (
            '<link rel="stylesheet" href="http://x.org/a.css">',
            "a.html loads http://x.org/a.css from outside the book",
        ),
        ("<p style=\"background: url('gone.png')\">", "a.html: gone.png does not exist"),
    ],
)
def test_each_wrong_link_is_found(tmp_path, html, problem):
    assert build.problems(site(tmp_path, a=html, b="")) == [problem]


def test_style_sheets_are_checked_too(tmp_path):
    site(tmp_path, a="")
    (tmp_path / "style.css").write_text('@import "https://x.org/a.css"; p { background: url(gone.png) }')
    assert build.problems(tmp_path) == [
        "style.css loads https://x.org/a.css from outside the book",
        "style.css: gone.png does not exist",
    ]
    assert build.problems(tmp_path / "nothing") == [f"{tmp_path / 'nothing'} has no page"]


def test_the_api_names_every_module():
    listed = {line.strip() for line in (BOOK / "api.rst").read_text(encoding="utf-8").splitlines()}
    for path in (paths.ROOT / "geoclip").rglob("[!_]*.py"):
        name = ".".join(path.relative_to(paths.ROOT).with_suffix("").parts)
        assert name in listed, f"add {name} to book/api.rst"


def test_the_failures_are_entries_of_the_log():
    log = (paths.ROOT / "LOG.md").read_text(encoding="utf-8")
    chosen = [x[2:] for x in (BOOK / "failures.md").read_text(encoding="utf-8").splitlines() if x[:2] == "- "]
    assert len(chosen) >= 10
    for title in chosen:
        assert f" · {title}\n" in log, f"book/failures.md names {title!r}, which LOG.md does not have"


def test_what_the_book_needs_is_pinned():
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (paths.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(line.partition("==")[0]) for line in lines}
    for text in project["optional-dependencies"]["book"]:
        assert canonicalize_name(Requirement(text).name) in pins, text


def test_the_workflow_waits_to_be_started():
    workflow = yaml.safe_load((paths.ROOT / ".github" / "workflows" / "book.yml").read_text(encoding="utf-8"))
    assert workflow[True] == {"workflow_dispatch": None}  # YAML reads `on` as true
    steps = [SimpleNamespace(**{"run": "", "with": {}} | step) for step in workflow["jobs"]["book"]["steps"]]
    assert [step.run for step in steps if step.run] == ["make book"]
    assert {"path": "book/_build/html"} in [vars(step)["with"] for step in steps]


def test_open_in_colab_only_where_the_repository_is_known(monkeypatch):
    pytest.importorskip("myst_nb", reason="Sphinx is not installed: `make book` installs it")
    spec = importlib.util.spec_from_file_location("book_conf", BOOK / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)

    def opened(path, repository):
        monkeypatch.setattr(conf, "REPOSITORY", repository)
        source = [path.read_text(encoding="utf-8")]
        conf.open_with_number_and_command(None, f"notebooks/{path.stem}", source)
        text = json.loads(source[0])["cells"][0]["source"]
        assert f"make reproduce ONLY={path.name[:2]}\n" in text
        return re.findall(r"colab.research.google.com/github/(\S+)\)\{.badge\}|^([!%].+)", text, re.MULTILINE)

    for path in notebooks.numbered():
        assert opened(path, None) == []
        lines = [first or second for first, second in opened(path, "someone/geoclip")]
        assert lines in (
            [],
            [
                f"someone/geoclip/blob/{conf.BRANCH}/notebooks/{path.name}",
                "!git clone --depth 1 https://github.com/someone/geoclip repository "
                "&& pip install --quiet ./repository",
                "%cd repository",
            ],
        )
        written = path.read_text(encoding="utf-8")
        assert bool(lines) == ("`%cd repository`" in written), path.name
        assert bool(lines) == (path.name[:2] in ("00", "15"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The book that GEOCLIP_BOOK names, or one that is built now, as by GitHub Actions."""
    if os.environ.get("GEOCLIP_BOOK"):
        return Path(os.environ["GEOCLIP_BOOK"]).resolve()
    pytest.importorskip("myst_nb", reason="Sphinx is not installed: `make book` installs it")
    out = tmp_path_factory.mktemp("book")
    command = [sys.executable, BOOK / "build.py", out]
    environment = os.environ | {"GITHUB_REPOSITORY": "someone/geoclip"}
    done = subprocess.run(command, cwd=paths.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "html"


@pytest.mark.slow
def test_the_book_builds_without_warnings_and_its_pages_are_complete(built):
    def page(name):
        return (built / f"{name}.html").read_text(encoding="utf-8")

    for path in notebooks.numbered():
        text = page(f"notebooks/{path.stem}")
        words = re.sub("<[^>]+>", "", text)
        assert (
            f"make reproduce ONLY={path.name[:2]}\n" in words and f"papermill notebooks/{path.name} " in words
        )
        assert f'href="notebooks/{path.name.replace(".ipynb", ".html")}"' in page("index")
        assert text.count("<img alt=") == path.read_text(encoding="utf-8").count('"image/png":')
    assert 'href="07_benchmarks.html">07</a>' in page("notebooks/03_training")
    assert "\\frac" in page("notebooks/03_training") and (built / "_static/tex-svg.js").is_file()
    assert "Return the mean cross-entropy" in page("api/geoclip.loss")
    assert "raised no false alarm in 1,943 blocks" in page("failures")
    assert "What did not work" in (built / "searchindex.js").read_text(encoding="utf-8")
    if not os.environ.get("GEOCLIP_BOOK"):
        assert 'href="https://colab.research.google.com/github/someone/geoclip/' in page(
            "notebooks/15_your_own_task"
        )
    table = page("index").partition("in the paper</p></th>")[2].partition("</table>")[0]
    for number in ("01", "04", "05", "06", "07", "08", "09", "16"):
        assert f'href="notebooks/{notebooks.find(number).stem}.html">{number}</a>' in table


@pytest.mark.slow
def test_the_book_in_a_browser_from_disk(built, browser):
    from browsing import complaints, fetched, resize, wait

    def one(css):
        return browser.find_element("css selector", css)

    fetched(browser)
    browser.get((built / "notebooks" / "02_location_encoder.html").as_uri())
    figures = browser.find_elements("css selector", "article img")
    assert len(figures) > 1 and {f.find_element("xpath", "..").tag_name for f in figures} == {"button"}
    assert all(figure.get_attribute("alt") for figure in figures)
    browser.execute_script("arguments[0].click()", figures[0])
    assert one("dialog.figure[open] img").size["width"] > figures[0].size["width"]
    one("dialog.figure").click()
    assert not browser.find_elements("css selector", "dialog.figure[open]")
    wait(lambda: browser.find_elements("css selector", "mjx-container svg"))  # equations are drawn
    light = one("body").value_of_css_property("background-color")
    for _ in range(2):  # from automatic to light or dark, and to the other
        browser.execute_script("document.querySelector('.theme-toggle').click()")
        if one("body").value_of_css_property("background-color") != light:
            break
    assert one("body").value_of_css_property("background-color") != light, "dark mode"
    browser.execute_script("localStorage.removeItem('theme')")
    one(".sidebar-search").send_keys("Equal Earth projection\n")
    wait(lambda: browser.find_elements("css selector", "#search-results li a"))
    assert "02_location_encoder" in " ".join(
        a.get_attribute("href") for a in browser.find_elements("css selector", "#search-results li a")
    )
    resize(browser, 400, 800)
    browser.get((built / "index.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    resize(browser, 1200, 1000)
    assert complaints(browser) == []
    assert {url.partition(":")[0] for url in fetched(browser)} <= {"file", "data", "blob"}
