"""Folders in a checkout and of an installed package; atomic files; the GEOCLIP_* variables."""

import errno
import os
import subprocess
import sys
import time
import venv

import pytest

from geoclip import paths


def test_atomic_replaces_only_on_success(tmp_path):
    path = tmp_path / "new" / "table.csv"
    with paths.atomic(path) as temporary:
        temporary.write_text("first")
        assert temporary.parent == path.parent and not path.exists()
    with pytest.raises(ZeroDivisionError), paths.atomic(path) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o044  # as readable as any new file


def test_atomic_names_the_file_on_a_full_disk(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, paths.atomic(tmp_path / "map.png"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "map.png")


def test_atomic_leaves_other_errors_alone(tmp_path):
    error = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    with pytest.raises(ConnectionResetError) as caught, paths.atomic(tmp_path / "map.png"):
        raise error
    assert caught.value is error


def test_atomic_removes_what_a_killed_process_left(tmp_path):
    old, recent, other = (
        tmp_path / name for name in (".a.12345678.csv", ".a.abcdefgh.csv", ".b.12345678.csv")
    )
    for path in (old, recent, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    with paths.atomic(tmp_path / "a.csv"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.abcdefgh.csv", ".b.12345678.csv", "a.csv"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="no permission to write"), paths.atomic(tmp_path / "x" / "a"):
        pass


def test_geoclip_data_is_a_folder_an_error_or_none(tmp_path, monkeypatch):
    monkeypatch.delenv("GEOCLIP_DATA", raising=False)
    assert paths.geoclip_data() is None
    monkeypatch.setenv("GEOCLIP_DATA", str(tmp_path / "nosuch"))
    with pytest.raises(FileNotFoundError, match=r"GEOCLIP_DATA names .*nosuch, which is not a folder"):
        paths.geoclip_data()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEOCLIP_DATA", ".")
    paths.make_variables_absolute()
    monkeypatch.chdir("/")
    assert paths.geoclip_data() == tmp_path


def make(*arguments, **variables):
    """Run make as from a shell: under `make test` pytest inherits variables that would make it a sub-make."""
    ours = (*paths.VARIABLES, "MFLAGS")
    inherited = {
        name: value for name, value in os.environ.items() if name not in ours and not name.startswith("MAKE")
    }
    return subprocess.run(
        ["make", *arguments], cwd=paths.ROOT, capture_output=True, text=True, env=inherited | variables
    )


def test_make_refuses_a_missing_geoclip_data_before_anything_runs():
    done = make("test", GEOCLIP_DATA="../no such folder")
    assert done.returncode == 2 and done.stdout == ""
    assert "no such folder, which is not a folder; correct or unset it" in done.stderr


def test_make_resolves_relative_folders():
    printed = make(
        "--print-data-base", "--dry-run", "help", GEOCLIP_DATA="data", GEOCLIP_CACHE="my cache"
    ).stdout
    assert f"GEOCLIP_DATA := {paths.ROOT}/data\n" in printed
    assert f"GEOCLIP_CACHE := {paths.ROOT}/my cache\n" in printed


@pytest.mark.parametrize(
    ("variables", "arguments", "expected"),
    [
        ({}, (), ".venv"),
        ({"CONDA_DEFAULT_ENV": "base", "CONDA_PREFIX": "/opt/conda"}, (), ".venv"),
        ({"CONDA_DEFAULT_ENV": "geoclip", "CONDA_PREFIX": "/opt/geoclip"}, (), "/opt/geoclip"),
        ({"CONDA_DEFAULT_ENV": "geoclip", "CONDA_PREFIX": "/opt/geoclip"}, ("VENV=mine",), "mine"),
    ],
)
def test_make_uses_the_active_conda_environment(variables, arguments, expected, tmp_path):
    (tmp_path / "Makefile").write_bytes((paths.ROOT / "Makefile").read_bytes())
    done = make("-C", str(tmp_path), "--dry-run", "weights", *arguments, **variables)
    assert "No rule to make target 'pyproject.toml'" in done.stderr  # the copy has no project to install
    assert f"needed by '{expected}/geoclip-ready'" in done.stderr


OUTSIDE = """
import sys
from pathlib import Path
import geoclip
from geoclip import maps, paths
assert not paths.CHECKOUT and Path(geoclip.__file__).is_relative_to(sys.prefix), geoclip.__file__
assert (paths.NOTEBOOKS / "profiles" / "paper.yaml").is_file() and (paths.PAPER / "benchmarks.csv").is_file()
maps.earth_axes(maps.figure()).figure.savefig(sys.argv[1])
print(paths.CACHE, paths.RESULTS)
"""


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path):
    def run(*command):
        environment = {k: v for k, v in os.environ.items() if k not in (*paths.VARIABLES, "PYTHONPATH")}
        environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path), "PIP_QUIET": "1"}
        done = subprocess.run(command, cwd=outside, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    outside = tmp_path / "elsewhere"
    outside.mkdir()
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    # The packages of this environment without its .pth files, so without its editable geoclip.
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "layer.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(paths.ROOT))
    [wheel] = tmp_path.glob("*.whl")
    run(*pip, "--python", str(python), "install", "--no-deps", "--ignore-installed", str(wheel))

    cache, results = run(str(python), "-c", OUTSIDE, str(tmp_path / "map.png")).split()
    assert cache == str(tmp_path / "cache" / "geoclip-reproduced")
    assert results == str(outside / "geoclip_results")
    command = str(tmp_path / "venv" / "bin" / "geoclip-reproduced")
    assert "--top-k" in run(command, "predict", "--help")
    assert list(outside.iterdir()) == []
