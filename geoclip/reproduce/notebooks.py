"""Run a numbered notebook with parameters, or run it to accept its results."""

import ast
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

from geoclip import paths
from geoclip.reproduce import report

CELL_TIMEOUT_S = 1200
KERNEL_TIMEOUT_S = 180


def environment() -> dict[str, str]:
    """Environment variables that make a notebook's outputs independent of the machine; creates their folders."""
    paths.make_variables_absolute()  # a notebook runs in a folder of its own
    paths.geoclip_data()
    folders = {
        "JUPYTER_CONFIG_DIR": "jupyter/config",
        "JUPYTER_DATA_DIR": "jupyter/data",
        "JUPYTER_RUNTIME_DIR": "jupyter/runtime",
        "IPYTHONDIR": "ipython",
        "MPLCONFIGDIR": "matplotlib",
    }
    return {name: str(paths.make_folder(paths.CACHE / folder)) for name, folder in folders.items()} | {
        "JUPYTER_PATH": "",
        "JUPYTER_PREFER_ENV_PATH": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONHASHSEED": "0",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def run(
    path: Path,
    parameters: Mapping[str, object] | None = None,
    out: Path | None = None,
    cell_timeout_s: int | None = CELL_TIMEOUT_S,
) -> Path:
    """Execute the notebook `path` in its own folder, write it with its outputs and return where.

    parameters: override those of the cell tagged `parameters`. out: by default data/results/runs/NAME.ipynb.
    If a cell fails or takes longer than `cell_timeout_s` (None: no limit), `out` is left as it was,
    NAME.failed.ipynb beside it holds the notebook up to the failure, and papermill's error is raised.
    """
    import nbformat
    import papermill

    path = Path(path).resolve()
    out = Path(out) if out else paths.RESULTS / "runs" / path.name
    known = declared(path)
    if unknown := sorted(set(parameters or {}) - set(known)):
        raise ValueError(f"{path.name} has no parameter {', '.join(unknown)}; it has {', '.join(known)}")
    failed = out.with_suffix(".failed.ipynb")
    how = {"kernel_name": "python3", "language": "python", "cwd": path.parent}
    how |= {"start_timeout": KERNEL_TIMEOUT_S, "execution_timeout": cell_timeout_s}
    how |= {"progress_bar": False, "extra_arguments": ["--log-level=CRITICAL"]}
    with paths.atomic(out) as temporary, mock.patch.dict(os.environ, environment()):
        try:
            papermill.execute_notebook(path, temporary, dict(parameters or {}), **how)
        except Exception:
            shutil.copyfile(temporary, failed)
            raise
        notebook = nbformat.read(temporary, as_version=4)
        nbformat.write(without_stamps(notebook), temporary)
    failed.unlink(missing_ok=True)
    return out


def declared(path: Path) -> dict[str, object]:
    """Names and default values of the parameters in the notebook's cell tagged `parameters`."""
    import papermill

    values = {}
    for name, about in papermill.inspect_notebook(str(path)).items():
        try:
            values[name] = ast.literal_eval(about["default"])
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{path.name}: parameter {name} is not a literal: {about['default']}") from error
    return values


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


def numbered() -> list[Path]:
    """The notebooks notebooks/NN_name.ipynb, in the order of their numbers."""
    return sorted(p for p in paths.NOTEBOOKS.glob("*.ipynb") if re.fullmatch(r"\d\d_\w+\.ipynb", p.name))


def find(name: str | Path) -> Path:
    """The notebook of this path, stem or number ("3" and "03" are the same); raises ValueError if there is none."""
    if Path(name).is_file():
        return Path(name).resolve()
    stem = f"{Path(name).name.removesuffix('.ipynb'):0>2}"
    found = [path for path in numbered() if path.stem == stem or path.name.startswith(f"{stem}_")]
    if len(found) != 1:
        there = ", ".join(path.stem for path in numbered())
        raise ValueError(f"there is no notebook {str(name)!r}; give a path or a number of {there}")
    return found[0]


def accept(number: str) -> list[Path]:
    """Run notebook `number` and make its results the expected ones; returns the files written.

    Its tables and parameters go to data/expected, and the executed notebook replaces the one in notebooks/.
    Nothing changes if a cell fails. Tables in data/expected that the notebook no longer makes are removed.
    """
    path, accepting = find(number), report.ACCEPT_VARIABLE
    with tempfile.TemporaryDirectory() as offered, mock.patch.dict(os.environ, {accepting: offered}):
        executed = run(path)
        sources = {paths.EXPECTED / table.name: table for table in sorted(Path(offered).glob("*.csv"))}
        if sources:
            parameters = Path(offered) / report.accepted_parameters(path.stem).name
            values = report.as_json(declared(path))
            parameters.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
            sources[paths.EXPECTED / parameters.name] = parameters
        sources[path] = executed
        for target, source in sources.items():
            with paths.atomic(target) as temporary:
                shutil.copyfile(source, temporary)
    for old in set(paths.EXPECTED.glob(f"{path.name[:2]}_*.csv")) - set(sources):
        old.unlink()
        print(f"removed {short(old)}: the notebook no longer makes it")
    return list(sources)


def short(path: Path) -> str:
    """`path` relative to the repository, if it lies there."""
    return os.path.relpath(path, paths.ROOT) if path.is_relative_to(paths.ROOT) else str(path)
