"""sweep.py and profiles.py: grids become runs, resumed, shared and tabulated; every profile fits its commands."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest
import yaml

from geoclip import paths
from geoclip.__main__ import main
from geoclip.reproduce import notebooks, sweep
from geoclip.reproduce.profiles import Profile

PARAMETERS = """
SETTINGS = {"plain": {"gain": 0}}  # what is varied
SEEDS = [0]  # of the training
FAIL = []  # settings that fail
SLOW = 0.0  # seconds that a run takes
"""
WORK = """
import os, pathlib, time
results = pathlib.Path(os.environ["GEOCLIP_RESULTS"])
lines = ["data,setting,split,seed,acc_1km,acc_25km,n"]
for setting, changes in SETTINGS.items():
    assert setting not in FAIL, f"{setting} cannot be run"
    for seed in SEEDS:
        with open(os.environ["JOURNAL"], "a") as journal:
            journal.write(f"{setting} {seed}\\n")
        time.sleep(SLOW)
        for split in ("random", "blocked"):
            lines.append(f"made,{setting},{split},{seed},{10 + changes['gain'] + seed},{20 + seed},100")
(results / "90_made_runs.csv").write_text("\\n".join(lines) + "\\n")
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A notebook that takes no time, a profile of three settings and two seeds, and the command that sweeps it."""
    cells = [
        nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(WORK),
    ]
    notebook = tmp_path / "90_made.ipynb"
    nbformat.write(notebooks.without_stamps(nbformat.v4.new_notebook(cells=cells)), notebook)
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("GEOCLIP_RESULTS", str(tmp_path / "results"))  # the runs are other processes
    monkeypatch.setenv("JOURNAL", str(tmp_path / "journal"))
    profile = tmp_path / "profile.yaml"
    settings = {name: {"gain": gain} for gain, name in enumerate(("plain", "σ 2⁴", "queue_0 & 50 %"))}
    content = {"seeds": 2, "notebooks": {"90_made": {"grid": {"SETTINGS": settings}}}}
    profile.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return Made(tmp_path, notebook, profile)


class Made:
    def __init__(self, folder, notebook, profile):
        self.notebook, self.profile = notebook, profile
        self.results, self.journal = folder / "results", folder / "journal"
        self.command = ["sweep", str(notebook), "--profile", str(profile)]

    def start(self, *options):
        return subprocess.Popen(
            [sys.executable, "-m", "geoclip", *self.command, *options], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, *options):
        return main([*self.command, *options])

    def ran(self):
        return sorted(self.journal.read_text().splitlines()) if self.journal.exists() else []

    def table(self):
        return pd.read_csv(self.results / "90_made_sweep.csv")

    def jobs(self, **changes):
        return sweep.plan(self.notebook, Profile.load(self.profile), changes=changes)


def runs_of(job):
    return job.out.with_name("90_made_runs.csv")


EVERY = ["plain 0", "plain 1", "queue_0 & 50 % 0", "queue_0 & 50 % 1", "σ 2⁴ 0", "σ 2⁴ 1"]


@pytest.mark.slow
def test_a_failing_setting_is_listed_and_the_rest_goes_on(made, capsys):
    assert made.run("--set", "FAIL=[plain]", "--seeds", "1", "--jobs", "2") == 1
    printed = capsys.readouterr().out
    assert made.ran() == ["queue_0 & 50 % 0", "σ 2⁴ 0"]
    assert printed.count("plain cannot be run") == 2  # when it happens, and at the end
    failed = list(made.results.glob("runs/90_made/plain*/90_made.failed.ipynb"))
    assert len(failed) == 1 and str(failed[0]) in printed
    assert "[3 of 3]" in printed and "left" in printed
    assert "2 of 3 runs are in these tables" in printed
    assert set(made.table()["setting"]) == {"σ 2⁴", "queue_0 & 50 %"}

    # a changed setting reruns itself alone: FAIL is a parameter of all, so here the profile changes
    content = yaml.safe_load(made.profile.read_text(encoding="utf-8"))
    content["notebooks"]["90_made"]["grid"]["SETTINGS"] = {"σ 2⁴": {"gain": 1}, "more": {"gain": 7}}
    made.profile.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    made.journal.unlink()
    assert made.run("--set", "FAIL=[plain]", "--seeds", "1") == 0
    assert made.ran() == ["more 0"] and "kept" in capsys.readouterr().out

    tidy = made.table()
    assert list(tidy.columns) == ["data", "split", "setting", "seed", "n", "threshold_km", "accuracy"]
    assert len(tidy) == 2 * 2 * 2  # settings, splits, thresholds
    row = tidy[(tidy["setting"] == "more") & (tidy["split"] == "blocked") & (tidy["threshold_km"] == 1)]
    assert row["accuracy"].tolist() == [17] and row["n"].tolist() == [100]


def kill_all(process):
    """SIGKILL to the sweep and whatever it started, at once: what a lost machine does."""
    with contextlib.suppress(ProcessLookupError):  # it has come to its end
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.slow
def test_a_killed_sweep_continues_and_two_at_once_share_the_work(made):
    process, limit = made.start("--set", "SLOW=0.5"), time.monotonic() + 600
    while len(made.ran()) < 3 and time.monotonic() < limit:
        time.sleep(0.05)
    kill_all(process)
    time.sleep(2)  # a kernel notices within a second that it is alone
    for job in made.jobs(SLOW=0.5):  # nothing half-written counts as done
        if job.out.exists():
            assert len(pd.read_csv(runs_of(job))) == 2
    done = [job.out for job in made.jobs(SLOW=0.5) if job.out.exists()]
    assert 0 < len(done) < len(EVERY)
    times = [path.stat().st_mtime_ns for path in done]
    before = len(made.ran())
    two = [made.start("--set", "SLOW=0.5") for _ in range(2)]
    printed = [process.communicate(timeout=600)[0] for process in two]
    assert [process.returncode for process in two] == [0, 0], printed
    assert [path.stat().st_mtime_ns for path in done] == times  # what was done was not done again
    assert len(made.ran()) - before == len(EVERY) - len(done)  # and nothing was done twice
    assert sorted(set(made.ran())) == EVERY
    tidy = made.table()
    near, far = (
        [base + gain * (base == 10) + seed for gain in range(3) for seed in range(2)] for base in (10, 20)
    )
    assert tidy["accuracy"].tolist() == 2 * near + 2 * far  # two splits


def finish(job, accuracies):
    """Write what a run leaves behind."""
    job.out.parent.mkdir(parents=True)
    (setting,), (seed,) = job.parameters["SETTINGS"], job.parameters["SEEDS"]
    row = {"data": "made", "setting": setting, "split": "random", "seed": seed, **accuracies, "n": 10}
    pd.DataFrame([row]).to_csv(runs_of(job), index=False)
    job.out.write_text("{}")


def test_the_papers_table(made):
    for job, accuracy in zip(made.jobs(), [10, 12, 30, 30, 50, 54], strict=True):
        finish(job, {"acc_1km": accuracy / 10, "acc_25km": accuracy})
    written = sweep.write_tables(sweep.collect(made.jobs()), "90_made")
    assert [path.name for path in written] == [
        "90_made_sweep.csv", "90_made_table.csv", "90_made_table.md", "90_made_table.tex",
    ]  # fmt: skip
    table = pd.read_csv(written[1])
    assert table["setting"].tolist() == ["plain", "σ 2⁴", "queue_0 & 50 %"]
    assert table["25 km"].tolist() == ["11.0 ± 12.7", "30.0 ± 0.0", "52.0 ± 25.4"]  # t = 12.706 for two seeds
    assert table["seeds"].tolist() == [2, 2, 2]
    assert "| plain " in written[2].read_text(encoding="utf-8")
    latex = written[3].read_text(encoding="utf-8")
    for wanted in (
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
        r"queue\_0 \& 50 \%",
        r"$\sigma$ 2$^{4}$",
        r"$\pm$",
    ):
        assert wanted in latex
    assert "σ" not in latex and "±" not in latex and "⁴" not in latex


def test_a_run_without_its_table_is_an_error_and_two_that_disagree_are_told(made):
    first, second = made.jobs()[:2]
    finish(first, {"acc_1km": 1})
    finish(second, {"acc_1km": 2})
    table = pd.read_csv(runs_of(second))
    table.assign(seed=0).to_csv(runs_of(second), index=False)
    with pytest.warns(UserWarning, match=r"differ by up to 1\.00 points .*'setting': 'plain'"):
        results = sweep.collect([first, second])
    assert results["acc_1km"].tolist() == [1]
    runs_of(second).unlink()
    with pytest.raises(ValueError, match=r"wrote no 90_made_runs\.csv"):
        sweep.collect([first, second])


def test_the_hash_follows_what_a_run_depends_on(made, tmp_path):
    keys = [job.out.parent.name for job in made.jobs()]
    assert len(set(keys)) == 6
    assert keys == [job.out.parent.name for job in made.jobs()]
    assert not set(keys) & {job.out.parent.name for job in made.jobs(SLOW=1.0)}
    data = tmp_path / "features"
    data.mkdir()
    (data / "a").write_text("1")
    one = sweep.run_hash(made.notebook, {"FEATURES": str(data)})
    assert one == sweep.run_hash(made.notebook, {"FEATURES": str(data)})
    (data / "a").write_text("22")
    assert one != sweep.run_hash(made.notebook, {"FEATURES": str(data)})
    content = json.loads(made.notebook.read_text())
    content["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "later\n"}]
    made.notebook.write_text(json.dumps(content))
    assert keys == [job.out.parent.name for job in made.jobs()]  # outputs are not code
    content["cells"][1]["source"] = "pass"
    made.notebook.write_text(json.dumps(content))
    assert not set(keys) & {job.out.parent.name for job in made.jobs()}


def test_shards_cover_the_grid_once(made):
    jobs = made.jobs()
    parts = [sweep.shard(jobs, f"{part}/4") for part in range(1, 5)]
    assert sorted(len(part) for part in parts) == [1, 1, 2, 2]
    assert sorted(job.label for part in parts for job in part) == sorted(job.label for job in jobs)
    for wrong in ("0/4", "5/4", "3", "a/b", "1/0"):
        with pytest.raises(ValueError, match="3/16"):
            sweep.shard(jobs, wrong)


def test_an_empty_grid_is_the_notebooks_own_settings(made):
    made.profile.write_text(yaml.safe_dump({"seeds": 1, "notebooks": {"90_made": {"grid": {}}}}))
    assert [job.parameters for job in made.jobs()] == [{"SETTINGS": {"plain": {"gain": 0}}, "SEEDS": [0]}]


def test_each_run_gets_one_setting_and_one_seed(made):
    jobs = made.jobs(SLOW=0.5)
    assert [job.label for job in jobs[:2]] == ["plain · seed 0", "plain · seed 1"]
    assert jobs[2].parameters == {"SLOW": 0.5, "SETTINGS": {"σ 2⁴": {"gain": 1}}, "SEEDS": [0]}


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ({"notebooks": {"90_made": {"parameters": {"SPEED": 1}}}}, "no parameter SPEED; it has SETTINGS"),
        ({"notebooks": {"90_made": {"grids": {}}}}, "has parameters, grid, not \\['grids'\\]"),
        ({"notebooks": {"90_made": {"grid": {"SLOW": 3}}}}, "the grid's SLOW is 3"),
        ({"seed": 3}, "not \\['seed'\\]"),
        ({"seeds": 0}, "at least one seed"),
    ],
)
def test_wrong_profiles_are_refused(made, profile, said):
    made.profile.write_text(yaml.safe_dump(profile))
    with pytest.raises(ValueError, match=said):
        made.jobs()


def test_what_is_not_there_is_named(made, capsys):
    with pytest.raises(FileNotFoundError, match="no profile"):
        Profile.load("nowhere")
    with pytest.raises(ValueError, match="no notebook '89'"):
        notebooks.find("89")
    assert made.run("--set", "SLOW") == 2
    assert capsys.readouterr().err.startswith("geoclip: error: --set takes NAME=VALUE")
