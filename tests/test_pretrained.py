"""The released weights: checked before they are read, fetched once, and a clear word where they are not there."""

import os
import shutil
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch

from geoclip import pretrained


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of this test's own that holds a copy of the wheel and nothing else."""
    source = pretrained.authors_wheel()
    folder = tmp_path / "authors"
    folder.mkdir()
    shutil.copyfile(source, folder / pretrained.WHEEL)
    monkeypatch.setattr(pretrained, "AUTHORS", folder)
    return folder


def corrupt(path, offset=1000):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0xFF]))


def test_location_encoder_loads_into_ours_with_nothing_missing():
    from geoclip.location_encoder import LocationEncoder

    state = pretrained.location_encoder_state()
    assert len(state) == 27
    encoder = LocationEncoder()
    encoder.load_state_dict(state, strict=True)
    assert (
        sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad) == 9_447_936
    )


@pytest.mark.slow
def test_weights_below_the_normal_numbers_are_0_and_no_embedding_changes(monkeypatch):
    import torch

    from geoclip.location_encoder import LocationEncoder

    def small(tensor):
        return ((tensor != 0) & (tensor.abs() < torch.finfo().smallest_normal)).sum()

    places = torch.tensor([[48.9, 2.3], [-33.9, 151.2], [90.0, 0.0], [0.0, -180.0]])
    encoder = LocationEncoder.pretrained()
    assert sum(small(parameter) for parameter in encoder.parameters()) == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "masked_fill", lambda tensor, *_: tensor)
        released = LocationEncoder.pretrained()
    assert sum(small(parameter) for parameter in released.parameters()) > 90_000
    with torch.inference_mode():
        assert torch.equal(encoder(places), released(places))


def test_frequencies_have_the_spread_of_their_levels():
    state = pretrained.location_encoder_state()
    for level, sigma in enumerate((1, 16, 256)):
        frequencies = state[f"levels.{level}.frequencies"]
        assert frequencies.shape == (256, 2)
        assert 0.9 * sigma < frequencies.std().item() < 1.1 * sigma


def test_head_has_the_paper_s_shape():
    state = pretrained.head_state()
    shapes = {"0.weight": (768, 768), "0.bias": (768,), "2.weight": (512, 768), "2.bias": (512,)}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    assert sum(tensor.numel() for tensor in state.values()) == 984_320


def test_temperature():
    assert pretrained.logit_scale() == 3.681034803390503


def test_gallery():
    gallery = pretrained.official_gallery()
    assert gallery.shape == (100_000, 2) and gallery.dtype == np.float64
    assert len(np.unique(gallery, axis=0)) == 94_123
    assert np.abs(gallery[:, 0]).max() <= 90 and np.abs(gallery[:, 1]).max() <= 180
    np.testing.assert_array_equal(gallery[0], [-50.943392, -72.935664])


def test_a_corrupt_wheel_is_refused_by_name_and_both_hashes(own_cache):
    corrupt(own_cache / pretrained.WHEEL, offset=1_000_000)
    with pytest.raises(ValueError) as error:
        pretrained.location_encoder_state()
    assert pretrained.WHEEL in str(error.value) and pretrained.WHEEL_SHA256 in str(error.value)
    assert "its SHA-256 is" in str(error.value)
    assert not (own_cache / "geoclip-1.3.0").exists(), "a file of a corrupt wheel was unpacked"


@pytest.mark.slow
def test_changed_code_of_the_authors_is_never_handed_out(own_cache):
    path = pretrained.authors_package() / "geoclip/model/GeoCLIP.py"
    released = path.read_text()
    path.write_text(released + "\n# changed\n")
    assert (pretrained.authors_package() / "geoclip/model/GeoCLIP.py").read_text() == released


def test_a_pickle_in_the_place_of_weights_is_not_executed(monkeypatch, tmp_path):
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    torch.save(Trap(), tmp_path / "trap")
    monkeypatch.setattr(pretrained, "_read", lambda _: (tmp_path / "trap").read_bytes())
    with pytest.raises(Exception, match="weights_only"):
        pretrained.logit_scale()
    assert not ran.exists()


@pytest.mark.slow
def test_offline_says_what_is_missing_where_it_goes_and_what_still_works(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "AUTHORS", tmp_path / "authors")
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # as on a machine without a network: no index to ask
    monkeypatch.setenv("PIP_FIND_LINKS", str(nowhere))
    with pytest.raises(FileNotFoundError) as error:
        pretrained.authors_wheel()
    message = str(error.value)
    assert str(tmp_path / "authors" / pretrained.WHEEL) in message
    assert "could not be downloaded (pip: " in message and "still works" in message
    left = [path.name for path in (tmp_path / "authors").iterdir()]
    assert left in ([], [".lock"])


@pytest.mark.slow
def test_another_wheel_of_that_name_is_not_accepted_from_the_index(tmp_path, monkeypatch):
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / pretrained.WHEEL, "w") as archive:
        archive.writestr("geoclip/__init__.py", "raise SystemExit('executed')")
        archive.writestr(
            "geoclip-1.3.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: geoclip\nVersion: 1.3.0\n"
        )
        archive.writestr("geoclip-1.3.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setattr(pretrained, "AUTHORS", tmp_path / "authors")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(FileNotFoundError, match="DO NOT MATCH THE HASHES"):
        pretrained.authors_wheel()
    assert not (tmp_path / "authors" / pretrained.WHEEL).exists()


@pytest.mark.slow
def test_two_at_once_download_once(tmp_path, monkeypatch):
    source = pretrained.authors_wheel()
    monkeypatch.setattr(pretrained, "AUTHORS", tmp_path / "authors")
    downloads = []

    def download(wheel):
        downloads.append(wheel)
        shutil.copyfile(source, wheel.with_suffix(".part"))
        os.replace(wheel.with_suffix(".part"), wheel)

    monkeypatch.setattr(pretrained, "_download", download)
    found = []
    threads = [threading.Thread(target=lambda: found.append(pretrained.authors_package())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 1
    assert found == [tmp_path / "authors" / "geoclip-1.3.0"] * 3


def test_the_authors_package_never_becomes_importable_as_ours():
    pretrained.authors_package()
    code = "import geoclip, sys; print(geoclip.__file__); print(*sys.path, sep='\\n')"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert str(pretrained.AUTHORS) not in printed
