"""Every shipped profile goes through every command that takes one: it runs, or the command says what is wrong."""

import pytest
import yaml

from geoclip import __main__ as command_line
from geoclip import baselines, paths
from geoclip.reproduce import notebooks
from geoclip.reproduce.profiles import Profile

SHIPPED = sorted(file.stem for file in (paths.NOTEBOOKS / "profiles").glob("*.yaml"))
OF_NOTEBOOKS = ["embedded", "paper"]


def on_features(profile):
    """The notebooks of a profile that read features of the training photos."""
    return {stem for stem in profile.notebooks if "DATA" in notebooks.declared(notebooks.find(stem))}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.delenv("GEOCLIP_DATA", raising=False)
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)  # profiles are found from anywhere


@pytest.mark.parametrize("name", OF_NOTEBOOKS)
def test_sweep_plans_it_and_says_what_is_missing(name, capsys):
    sweep, parser = command_line.load("sweep")
    options = parser.parse_args(["--profile", name, "--dry-run"])
    assert sweep.run(options) == 0
    printed = capsys.readouterr().out
    for stem in Profile.load(name).notebooks:
        assert f"{stem}: " in printed
    assert ("MISSING" in printed) == (name == "paper")
    if name == "paper":
        options.dry_run = False
        with pytest.raises(
            FileNotFoundError, match=r"MP-16 features MISSING: .*make it with: python -m geoclip embed"
        ):
            sweep.run(options)


@pytest.mark.parametrize("name", OF_NOTEBOOKS)
def test_reproduce_runs_what_has_its_data_and_lists_the_rest(name, capsys, monkeypatch):
    started = []

    monkeypatch.setattr(notebooks, "run_jobs", lambda jobs: started.extend(jobs) or [])
    reproduce, parser = command_line.load("reproduce")
    options = parser.parse_args(["--profile", name])
    read_features = {
        path.stem for path in notebooks.numbered() if {"DATA", "TOWERS"} & notebooks.declared(path).keys()
    }
    at_paper_size = read_features if name == "paper" else set()
    assert reproduce.run(options) == (1 if at_paper_size else 0)
    assert {path.stem for path in notebooks.numbered()} == {job.label for job in started} | at_paper_size
    printed = capsys.readouterr().out
    for stem in at_paper_size:
        first = "ViT-L-14, mp16" if stem == "18_towers" else "MP-16 features"
        assert f"FAILED {stem}.ipynb: {first} MISSING" in printed
    for job in started:
        assert job.parameters.keys() <= notebooks.declared(job.notebook).keys()


def test_towers_without_features_are_named_and_not_missed(tmp_path, monkeypatch):
    for folder in ("mp16", "im2gps3k", "yfcc26k"):
        (tmp_path / "data" / folder / "features").mkdir(parents=True)
    monkeypatch.setenv("GEOCLIP_DATA", "data")
    profile, path = Profile.load("paper"), notebooks.find("18")
    given = profile.whole(path, notebooks.declared(path))
    gone = {name for name, (_, gone) in profile.samples(given).items() if gone}
    assert len(given["TOWERS"]) == 6 and len(gone) == 15 and not profile.missing(given)
    (tmp_path / "data/mp16/features").rmdir()
    assert profile.missing(given)[0].startswith("ViT-L-14, mp16 MISSING")


def test_a_benchmark_without_features_is_named_and_the_notebook_runs(tmp_path, monkeypatch, capsys):
    for folder in ("mp16", "im2gps3k"):
        (tmp_path / "data" / folder / "features").mkdir(parents=True)
    monkeypatch.setenv("GEOCLIP_DATA", "data")
    started = []
    monkeypatch.setattr(notebooks, "run_jobs", lambda jobs: started.extend(jobs) or [])
    assert notebooks.reproduce(["04"], Profile.load("paper")) == 0 and len(started) == 1
    said = capsys.readouterr().out
    assert "04_ablation_location_encoder: YFCC26k features MISSING" in said
    assert "without it, the benchmark is left out" in said and "Im2GPS3k features" not in said
    (tmp_path / "data/im2gps3k/features").rmdir()
    assert notebooks.reproduce(["04"], Profile.load("paper")) == 1
    assert "FAILED 04_ablation_location_encoder.ipynb: Im2GPS3k features MISSING" in capsys.readouterr().out


def test_with_its_data_the_paper_s_profile_reaches_the_ablations_whole(tmp_path, monkeypatch):
    for folder in ("mp16", "im2gps3k", "yfcc26k"):
        for kind in ("features", "features_one_view", "features_ten_crops"):
            (tmp_path / "data" / folder / kind).mkdir(parents=True)
    monkeypatch.setenv("GEOCLIP_DATA", "data")
    profile = Profile.load("paper")
    for stem in on_features(profile):
        path = notebooks.find(stem)
        known = notebooks.declared(path)
        given = profile.whole(path, known)
        assert profile.missing(known | given) == []
        assert given["DATA"] == str(tmp_path / "data" / "mp16" / "features")
        assert paths.profile(given.get("REFERENCE") or given["CONFIG"]).is_file()
        assert given.get("SEEDS") == ([0, 1, 2, 3, 4] if isinstance(known["SEEDS"], list) else None)
    assert (
        "queue 32,768"
        in profile.whole(notebooks.find("05"), notebooks.declared(notebooks.find("05")))["SETTINGS"]
    )


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in OF_NOTEBOOKS])
def test_the_others_configure_training_and_are_refused_as_profiles(name):
    assert baselines.as_config(paths.profile(name)).epochs > 0
    with pytest.raises(ValueError, match="a profile has parameters, notebooks, seeds, data, not"):
        Profile.load(name)


@pytest.mark.parametrize("name", OF_NOTEBOOKS)
def test_train_refuses_a_profile_of_notebooks(name):
    with pytest.raises(ValueError):
        baselines.as_config(paths.profile(name))


@pytest.mark.parametrize(
    "text", ["a: [1", "!!python/object/apply:os.system [echo]", "- a list", "seeds: 2\nx: 1"]
)
def test_a_damaged_profile_is_named(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        Profile.load(path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        Profile.load(path)


def test_a_notebook_s_wrong_section_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"notebooks": {"05_ablation_queue": {"parameters": {"SPEED": 1}}}}))
    five = notebooks.find("05")
    with pytest.raises(ValueError, match=r"05_ablation_queue.ipynb has no parameter SPEED; it has REFERENCE"):
        Profile.load(path).given(five, notebooks.declared(five))
    with pytest.raises(
        FileNotFoundError, match=r"no profile .*nosuch\.yaml; notebooks/profiles has ablation_embedded"
    ):
        Profile.load("nosuch")
