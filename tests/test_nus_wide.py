"""NUS-WIDE: its layout, a planted GPS signal found and a shuffled one not, and every file that may be wrong."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from geoclip import earth, paths
from geoclip.datasets import nus_wide, nus_wide_synthetic
from geoclip.studies import label_probes, position_encodings

QUICK = label_probes.LabelProbeConfig(hidden=64, batch=32, epochs=15)


@pytest.fixture
def root(tmp_path):
    return nus_wide_synthetic.write(tmp_path / "nus-wide", n=200, concepts=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return nus_wide.read(nus_wide_synthetic.write(tmp_path_factory.mktemp("made"), n=2500, concepts=6))


def harmonics(latlon):
    return position_encodings.spherical_harmonics(latlon, degree=8)


def edit(path, row, text):
    lines = path.read_text().splitlines()
    lines[row] = text
    path.write_text("\n".join(lines) + "\n")


def test_the_layout_is_read_row_by_row(root):
    data = nus_wide.read(root)
    tagged = pd.read_csv(root / "geotags.csv", dtype={"id": str}).set_index("id")
    assert len(data.table) == len(tagged) < 200 and data.labels.shape == (len(tagged), 3)
    assert data.concepts == ["concept00", "concept01", "concept02"]
    assert set(data.labels.ravel()) == {0, 1} and data.labels.dtype == np.uint8
    row = 7
    photo = data.table.photo[row]
    assert data.latlon[row].tolist() == tagged.loc[photo, ["latitude", "longitude"]].tolist()
    listed = (root / "ImageList/TrainImagelist.txt").read_text().splitlines()
    line = next(i for i, name in enumerate(listed) if name.endswith(f"_{photo}.jpg"))
    assert data.table.file[row] == listed[line].replace("\\", "/")
    for column, concept in enumerate(data.concepts):
        labels = (root / f"Groundtruth/TrainTestLabels/Labels_{concept}_Train.txt").read_text().split()
        assert data.labels[row, column] == int(labels[line])
        assert (concept in data.table.tags[row].split()) == bool(data.labels[row, column])
    assert (data.table.part == "train").sum() + data.rows("test").sum() == len(tagged)


def test_what_differs_from_the_published_subset_is_said(root):
    notes = " ".join(nus_wide.read(root).notes)
    assert "3 concepts are listed; NUS-WIDE has 81" in notes and "the published subset has 41,173" in notes


@pytest.mark.slow
def test_a_planted_gps_signal_is_found_and_a_shuffled_one_is_not(made, tmp_path):
    shuffled = nus_wide.read(nus_wide_synthetic.write(tmp_path, n=2500, concepts=6, planted=False))
    for data, low, high in ((made, 0.4, 0.9), (shuffled, 0.03, 0.15)):
        (row,) = label_probes.probe_labels(data, harmonics, config=QUICK).itertuples()
        assert row.input == "GPS" and row.concepts == 6 and low < row.map_macro < high
        base = data.labels[data.rows("test")].mean()  # what a guess would have
        assert (row.map_macro > 4 * base) == (data is made)


@pytest.mark.slow
def test_gps_and_visual_together_know_more_than_either_unless_the_places_are_shuffled(tmp_path):
    for planted in (True, False):
        root = nus_wide_synthetic.write(tmp_path / str(planted), n=1500, concepts=4, planted=planted)
        data = nus_wide.read(root)
        seen = nus_wide.visual_features(data, root / "features")
        table = label_probes.probe_labels(data, harmonics, seen, QUICK).set_index("input")
        assert list(table.index) == ["GPS", "visual", "GPS + visual"] and list(table.d) == [81, 128, 209]
        assert table.map_macro["visual"] > 3 * table.chance["visual"]
        gain = table.map_macro["GPS + visual"] - table.map_macro["visual"]
        assert gain > 0.15 if planted else gain < 0.05
    with pytest.raises(ValueError, match=f"5 visual features for {len(data.table)} photos"):
        label_probes.probe_labels(data, harmonics, seen[:5])


def test_photos_without_a_concept_can_be_left_out(made):
    config = dataclasses.replace(QUICK, unlabelled=False)
    (row,) = label_probes.probe_labels(made, earth.unit_sphere, config=config).itertuples()
    assert row.n_train == (made.labels.any(1) & made.rows("train")).sum() < made.rows("train").sum()
    assert row.n_test == (made.labels.any(1) & made.rows("test")).sum()
    assert row.chance > made.labels.mean()


@pytest.mark.slow
def test_one_seed_gives_one_table(made):
    one, two = (label_probes.probe_labels(made, earth.unit_sphere, config=QUICK, seeds=n) for n in (2, 3))
    pd.testing.assert_frame_equal(one, two[:2])
    assert two.seed.tolist() == [0, 1, 2] and two.map_macro.nunique() == 3


def test_the_csv_for_embedding_can_be_read_back(made, tmp_path):
    from geoclip.datasets import folder

    nus_wide.write_csv(made, tmp_path / "nus.csv")
    photos = folder.read(tmp_path / "nus.csv")
    assert photos.table.file.tolist() == made.table.file.tolist()
    np.testing.assert_allclose(photos.latlon, made.latlon)


def test_visual_features_come_in_the_order_of_the_photos(root, tmp_path):
    from PIL import Image

    from geoclip.datasets import embedding, sources
    from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig

    data, images = nus_wide.read(root), tmp_path / "images"
    for row, name in enumerate(data.table.file):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (row, 255 - row, 128)).save(images / name)
    lost = images / data.table.file[5]
    lost.unlink()
    nus_wide.write_csv(data, tmp_path / "nus.csv")
    encoder = ImageEncoder(ImageEncoderConfig("conv", None, False, 8, 4), torch.Generator().manual_seed(0))
    source = sources.open_source(str(tmp_path / "nus.csv"), images)
    embedding.embed(source, encoder, tmp_path / "features", sources.Views(number=1), arithmetic="fp32")
    notes = len(data.notes)
    found = nus_wide.visual_features(data, tmp_path / "features")
    assert found.shape[0] == len(data.table) and data.notes[notes].startswith(
        "1 photos have no visual features"
    )
    others = np.delete(found, 5, axis=0)
    np.testing.assert_allclose(found[5], others.mean(0), rtol=1e-4)
    for row in (0, 7, len(found) - 1):  # each photo has a colour of its own
        with Image.open(images / data.table.file[row]) as image:
            own = encoder.eval().features(encoder.preprocess(image)[None])[0].detach().numpy()
        np.testing.assert_allclose(found[row], own, atol=2e-3 * np.abs(own).max())  # kept as float16
    data.table["file"] = "elsewhere/" + data.table["file"]
    with pytest.raises(ValueError, match=r"no features of elsewhere/.* and \d+ more of \d+ photos"):
        nus_wide.visual_features(data, tmp_path / "features")


def test_find_says_how_to_bring_it(tmp_path, monkeypatch):
    monkeypatch.delenv("GEOCLIP_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="needs NUS-WIDE"):
        nus_wide.find()
    monkeypatch.setenv("GEOCLIP_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="needs NUS-WIDE"):
        nus_wide.find()
    (tmp_path / "nus-wide").mkdir()
    assert nus_wide.find() == paths.geoclip_data() / "nus-wide"


def test_names_in_another_case_are_found(root):
    (root / "ImageList/TrainImagelist.txt").rename(root / "ImageList/trainimagelist.TXT")
    (root / "ConceptsList/Concepts81.txt").rename(root / "Concepts81.txt")
    assert nus_wide.read(root).rows("train").any()


def test_absent_files_are_named(root):
    (root / "NUS_WID_Tags/All_Tags.txt").unlink()
    assert nus_wide.read(root).table.tags.isna().all()
    label = root / "Groundtruth/TrainTestLabels/Labels_concept01_Test.txt"
    label.rename(label.with_name("kept"))
    with pytest.raises(FileNotFoundError, match=r"Labels_concept01_Test\.txt: no such file"):
        nus_wide.read(root)
    label.with_name("kept").rename(label)
    (root / "geotags.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"geotags\.csv: no geotag file"):
        nus_wide.read(root)
    with pytest.raises(FileNotFoundError, match="no such NUS-WIDE folder"):
        nus_wide.read(root / "elsewhere")


def test_labels_that_do_not_fit_are_refused(root):
    path = root / "Groundtruth/TrainTestLabels/Labels_concept02_Train.txt"
    whole = path.read_text()
    path.write_text(whole + "1\n")
    with pytest.raises(
        ValueError, match=r"Labels_concept02_Train\.txt: 121 lines, but TrainImagelist\.txt names 120"
    ):
        nus_wide.read(root)
    path.write_text(whole)
    edit(path, 4, "yes")
    with pytest.raises(ValueError, match=r"concept02_Train\.txt, line 5: 'yes' is neither 0 nor 1"):
        nus_wide.read(root)


def test_an_image_list_without_ids_is_refused(root):
    edit(root / "ImageList/TestImagelist.txt", 2, "concept00\\picture.jpg")
    with pytest.raises(
        ValueError, match=r"TestImagelist\.txt, line 3: 'concept00/picture\.jpg' does not end in"
    ):
        nus_wide.read(root)


def test_geotags_that_are_none_are_refused(root):
    path = root / "geotags.csv"
    table = pd.read_csv(path)
    swapped = table.rename(columns={"latitude": "longitude", "longitude": "latitude"})
    swapped.to_csv(path, index=False)
    with pytest.raises(
        ValueError, match=r"geotags\.csv: the columns latitude and longitude are swapped: line \d+ has"
    ):
        nus_wide.read(root)
    table.astype({"latitude": object}).assign(latitude=lambda t: ["north", *t.latitude[1:]]).to_csv(
        path, index=False
    )
    with pytest.raises(ValueError, match=r"geotags\.csv, line 2: latitude is 'north'"):
        nus_wide.read(root)
    table.drop(columns="id").to_csv(path, index=False)
    with pytest.raises(
        ValueError, match=r"no column for file \(one of id, photo_id.*the header is latitude,longitude"
    ):
        nus_wide.read(root)
    again = pd.concat([table, table.iloc[[3]].assign(latitude=1.5)])
    again.to_csv(path, index=False)
    with pytest.raises(
        ValueError, match=rf"line {len(table) + 2}: photo {table.id[3]} has another place above"
    ):
        nus_wide.read(root)
    table.assign(id=range(len(table))).to_csv(path, index=False)
    with pytest.raises(ValueError, match="no train photo is in the geotag file; are its ids Flickr's"):
        nus_wide.read(root)
    zero = table.assign(latitude=[0.0, *table.latitude[1:]], longitude=[0.0, *table.longitude[1:]])
    zero.to_csv(path, index=False)
    data = nus_wide.read(root)
    assert len(data.table) == len(table) - 1 and data.notes[1].startswith("1 geotags of exactly (0, 0)")
