"""Run the numbered notebooks: one with parameters, all in order, or one to accept what it finds."""

import ast
import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from geoclip import paths
from geoclip.reproduce import report

CELL_TIMEOUT_S = 1200
KERNEL_TIMEOUT_S = 180


def environment() -> dict[str, str]:
    """Environment variables under which a notebook gives the same outputs anywhere; makes their folders.

    Jupyter, IPython and matplotlib keep to the cache and to the kernel of this Python, whatever the user's
    home holds (or if there is none); hashes are the same in each run.
    """
    folders = {
        "JUPYTER_CONFIG_DIR": paths.CACHE / "jupyter" / "config",
        "JUPYTER_DATA_DIR": paths.CACHE / "jupyter" / "data",
        "JUPYTER_RUNTIME_DIR": paths.CACHE / "jupyter" / "runtime",
        "IPYTHONDIR": paths.CACHE / "ipython",
        "MPLCONFIGDIR": paths.CACHE / "matplotlib",
    }
    return {name: str(paths.make_folder(folder)) for name, folder in folders.items()} | {
        "JUPYTER_PATH": "",
        "JUPYTER_PREFER_ENV_PATH": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONHASHSEED": "0",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        # lightning's progress bars look for a widget that no executed notebook can show
        "PYTHONWARNINGS": "ignore:IProgress not found",
    }


def run(
    path: Path,
    parameters: Mapping[str, object] | None = None,
    out: Path | None = None,
    cell_timeout_s: int | None = CELL_TIMEOUT_S,
) -> Path:
    """Execute the notebook `path` in its own folder and write it with its outputs; returns where that is.

    `parameters` override those of its cell tagged `parameters`. `out`: data/results/runs/NAME.ipynb unless
    given; it is replaced only when all cells went well, otherwise the notebook up to the failure is
    NAME.failed.ipynb beside it and the failure (papermill's, or a cell beyond `cell_timeout_s`, None for no
    limit) is raised.
    Raises ValueError for a parameter that the notebook does not have.
    """
    import nbformat
    import papermill

    path = Path(path).resolve()
    out = Path(out) if out else paths.RESULTS / "runs" / path.name
    known = declared(path)
    if unknown := sorted(set(parameters or {}) - set(known)):
        raise ValueError(
            f"{path.name} has no parameter {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    failed = out.with_suffix(".failed.ipynb")
    with paths.atomic(out) as temporary, _variables(environment()):
        try:
            papermill.execute_notebook(
                path,
                temporary,
                parameters=dict(parameters or {}),
                cwd=path.parent,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                start_timeout=KERNEL_TIMEOUT_S,
                execution_timeout=cell_timeout_s,
                # The kernel's notices about its sockets are not what a notebook says.
                extra_arguments=["--log-level=CRITICAL"],
            )
        except Exception:
            shutil.copyfile(temporary, failed)
            raise
        notebook = nbformat.read(temporary, as_version=4)
        nbformat.write(without_stamps(notebook), temporary)
    failed.unlink(missing_ok=True)
    return out


def declared(path: Path) -> list[str]:
    """Names of the parameters that the notebook's cell tagged `parameters` sets, in its order."""
    import nbformat

    cells = nbformat.read(path, as_version=4).cells
    sources = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    statements = [statement for source in sources for statement in ast.parse(source).body]
    targets = [s.targets[0] for s in statements if isinstance(s, ast.Assign)]
    targets += [s.target for s in statements if isinstance(s, ast.AnnAssign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def without_stamps(notebook):
    """The notebook without what changes in each run: times, versions, names of kernels."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        tags = [tag for tag in cell.metadata.get("tags", []) if tag != "papermill-error-cell-tag"]
        cell.metadata = {"tags": tags} if tags else {}
        for output in cell.get("outputs", []):
            output.get("metadata", {}).pop("papermill", None)
    return notebook


def numbered(folder: Path | None = None) -> list[Path]:
    """The notebooks NN_name.ipynb of `folder` (default notebooks/), in the order of their numbers."""
    folder = folder or paths.NOTEBOOKS
    return sorted(path for path in folder.glob("*.ipynb") if re.fullmatch(r"\d\d_\w+\.ipynb", path.name))


def with_number(number: str, folder: Path | None = None) -> Path:
    """The one notebook of that number ("3" and "03" are the same); ValueError where there is none."""
    found = [path for path in numbered(folder) if path.name.startswith(f"{number:0>2}_")]
    if len(found) != 1:
        there = ", ".join(path.stem for path in numbered(folder))
        raise ValueError(f"no single notebook has the number {number!r}; there are {there}")
    return found[0]


def reproduce(
    only: Sequence[str] = (), parameters: Mapping[str, object] | None = None, folder: Path | None = None
) -> int:
    """Run all numbered notebooks in order, a line each, and print their results; 0 if all went well, else 1.

    `only`: numbers of the notebooks to run. `parameters`: a value for each notebook that declares the name,
    or NN_name → parameters of that notebook alone. A notebook that fails is listed and the rest go on.
    Raises ValueError where a parameter belongs to no notebook.
    """
    todo = [with_number(number, folder) for number in only] or numbered(folder)
    if not todo:
        raise ValueError(f"no notebook NN_name.ipynb in {folder or paths.NOTEBOOKS}")
    given = _share(parameters or {}, todo)
    failures = []
    started = time.monotonic()
    for count, path in enumerate(todo, start=1):
        print(f"{count:>2} of {len(todo)}  {path.stem:<28}", end=" ", flush=True)
        start = time.monotonic()
        try:
            run(path, given[path])
        except Exception as error:  # whatever a notebook does, the next one is run
            failures.append((path, error))
            print(f"{time.monotonic() - start:6.0f} s  FAILED", flush=True)
        else:
            print(f"{time.monotonic() - start:6.0f} s", flush=True)
    print(f"\n{len(todo) - len(failures)} of {len(todo)} notebooks ran, {time.monotonic() - started:.0f} s")
    print_results(todo)
    for path, error in failures:
        print(f"\nFAILED {path.name}: {_reason(error)}")
        print(f"  see {_short(paths.RESULTS / 'runs' / path.stem)}.failed.ipynb")
    return 1 if failures else 0


def print_results(notebooks: Sequence[Path]) -> None:
    """Print the published accuracies, and those in the tables that `notebooks` left in data/results."""
    published = paths.PAPER / "benchmarks.csv"
    if published.exists():
        print("\nPublished (data/paper/benchmarks.csv)")
        _print_accuracies(pd.read_csv(published))
    others = []
    for notebook in notebooks:
        for path in sorted(paths.RESULTS.glob(f"{notebook.name[:2]}_*.csv")):
            table = pd.read_csv(path)
            if "acc_25km" in table.columns:
                print(f"\nFound here ({_short(path)})")
                _print_accuracies(table)
            else:
                others.append(_short(path))
    if others:
        print("\nMore tables: " + ", ".join(others))


def accept(number: str, folder: Path | None = None) -> list[Path]:
    """Run notebook `number` and make what it found the expectation; returns the files written.

    Its tables go to data/expected, and the executed notebook replaces the one in notebooks/. Nothing changes
    where a cell fails. Tables in data/expected that it no longer makes are removed.
    """
    path = with_number(number, folder)
    with tempfile.TemporaryDirectory() as put_up, _variables({report.ACCEPT_VARIABLE: put_up}):
        executed = run(path)
        tables = sorted(Path(put_up).glob("*.csv"))
        written = [paths.make_folder(paths.EXPECTED) / table.name for table in tables]
        for table, target in zip(tables, written, strict=True):
            with paths.atomic(target) as temporary:
                shutil.copyfile(table, temporary)
        for old in set(paths.EXPECTED.glob(f"{path.name[:2]}_*.csv")) - set(written):
            old.unlink()
            print(f"removed {_short(old)}: the notebook no longer makes it")
        with paths.atomic(path) as temporary:
            shutil.copyfile(executed, temporary)
    return [*written, path]


def _share(parameters: Mapping[str, object], notebooks: Sequence[Path]) -> dict[Path, dict]:
    """Parameters of each notebook: first the names it declares, then its own section."""
    names = {path: declared(path) for path in notebooks}
    sections = {name for name, value in parameters.items() if isinstance(value, Mapping)}
    everyone = {path.stem for path in numbered(notebooks[0].parent)}
    unknown = [name for name in sections if name not in everyone]
    if len(notebooks) == len(everyone):
        unknown += [
            n for n in parameters if n not in sections and not any(n in known for known in names.values())
        ]
    if unknown:
        raise ValueError(f"no notebook has the name or the parameter {', '.join(sorted(unknown))}")
    return {
        path: {name: parameters[name] for name in names[path] if name in parameters}
        | dict(parameters.get(path.stem, {}))
        for path in notebooks
    }


def _print_accuracies(table: pd.DataFrame) -> None:
    wanted = [
        c
        for c in ("data", "benchmark", "model", "protocol", "setting", "split", "seed")
        if c in table.columns
    ]
    numbers = [c for c in table.columns if c.startswith("acc_") or c in ("median_km", "geoscore", "n")]
    what = "data" if "data" in wanted else wanted[0]
    for value, part in table.groupby(what, sort=False):
        print(f"  {value}")
        shown = part[[c for c in (*wanted, *numbers) if c != what and part[c].notna().any()]]
        print("    " + report.readable(shown).to_string(index=False).replace("\n", "\n    "))


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _reason(error: Exception) -> str:
    kind, said = getattr(error, "ename", type(error).__name__), str(getattr(error, "evalue", error))
    return f"{kind}: {said.strip()[:600]}"


def _short(path: Path) -> str:
    return os.path.relpath(path, paths.ROOT) if path.is_relative_to(paths.ROOT) else str(path)
