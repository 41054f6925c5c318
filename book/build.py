"""Build the book and check its links: `make book`, or `python book/build.py [OUT]`.

OUT (default: book/_build) gets the pages in html/. The exit status is 1 if Sphinx warns, if a link leads nowhere, or
if a page would load anything from the internet.
"""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from geoclip import paths

BOOK = Path(__file__).resolve().parent
ROOT = BOOK.parent
OF_CSS = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = {name: value or "" for name, value in attributes}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if "href" in values:
            rel = values.get("rel", "").split()
            loaded = tag == "link" and {"stylesheet", "icon", "preload", "modulepreload", "manifest"} & set(
                rel
            )
            (self.loads if loaded else self.links).append(values["href"])
        self.loads += [values[name] for name in ("src", "data", "poster") if name in values]
        self.loads += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        self.loads += of_css(values.get("style", ""))


def of_css(text: str) -> list[str]:
    """Addresses that a style sheet loads."""
    return [first or second for first, second in OF_CSS.findall(text)]


def problems(html: Path) -> list[str]:
    """What is wrong with the links of all pages and style sheets below `html`, one line each."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(html.rglob("*.html"))}
    sheets = {path: of_css(path.read_text(encoding="utf-8")) for path in sorted(html.rglob("*.css"))}
    if not pages:
        return [f"{html} has no page"]
    found = []
    for path, loads in [*((path, page.loads) for path, page in pages.items()), *sheets.items()]:
        wrong = [url for url in loads if urlsplit(url).scheme not in ("", "data") or url.startswith("//")]
        found += [f"{path.relative_to(html)} loads {url} from outside the book" for url in wrong]
    for path, urls in [*((path, page.loads + page.links) for path, page in pages.items()), *sheets.items()]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file() or html.resolve() not in target.resolve().parents:
                found.append(f"{path.relative_to(html)}: {url} does not exist")
            elif target.suffix == ".html" and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{path.relative_to(html)}: {url} has no such anchor")
    return found


def build(out: Path) -> int:
    """Copy the sources to `out`/source, build `out`/html from them and check it; the number of problems."""
    source, html = out / "source", out / "html"
    for folder in (source, html):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        BOOK, source, ignore=lambda folder, names: [n for n in names if not n.endswith((".md", ".rst"))]
    )
    for name in ("README.md", "CONTRIBUTING.md"):
        shutil.copy2(ROOT / name, source)
    for folder, pattern in (("notebooks", "*.ipynb"), ("figures", "*.png")):
        (source / folder).mkdir()
        for path in (ROOT / folder).glob(pattern):
            shutil.copy2(path, source / folder)
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-j", "auto", "-c", BOOK]
    environment = os.environ | {"MPLCONFIGDIR": str(paths.CACHE / "matplotlib"), "PYTHONPATH": str(ROOT)}
    if subprocess.run([*sphinx, "-d", out / "doctrees", source, html], env=environment).returncode:
        return 1
    found = problems(html)
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    if not found:
        print(f"The book: {html / 'index.html'}")
    return len(found)


if __name__ == "__main__":
    sys.exit(bool(build(Path(sys.argv[1]) if len(sys.argv) > 1 else BOOK / "_build")))
