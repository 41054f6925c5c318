"""Reading the public formats: what is in them comes out, and what is wrong in them is named."""

import os

import numpy as np
import pandas as pd
import pytest
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import IFDRational

from geoclip import __main__ as command_line
from geoclip.datasets import benchmarks, folder

HEADER = benchmarks.PLACES365


def places365_csv(path, rows):
    lines = [f"{name},{author},{lat},{lon},{s3},1,2,.1,.2,.7" for name, author, lat, lon, s3 in rows]
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    return path


def test_places365_gives_places_photographers_and_scenes(tmp_path):
    csv = places365_csv(
        tmp_path / "x.csv", [("a.jpg", "1@N00", 32.5, -64.25, 2), ("b.jpg", "2@N01", -8, 180, 0)]
    )
    photos = benchmarks.read_places365(csv)
    assert len(photos) == 2 and photos.name == "x"
    np.testing.assert_array_equal(photos.latlon, [[32.5, -64.25], [-8, -180]])  # 180° E is 180° W
    assert photos.authors.tolist() == ["1@N00", "2@N01"]
    assert photos.table["scene"].tolist() == ["urban", "indoor"]
    assert photos.table["line"].tolist() == [2, 3]
    with pytest.raises(FileNotFoundError, match="no image folder"):
        photos.path(0)


def test_a_photo_is_found_under_either_name_and_the_missing_are_listed(tmp_path):
    (tmp_path / "45").mkdir()
    for name in ("45/1.jpg", "45_2.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    csv = tmp_path / "train.csv"
    csv.write_text("IMG_FILE,LAT,LON\n45/1.jpg,1,2\n45/2.jpg,3,4\n45/3.jpg,5,6\n")
    photos = folder.read(csv, tmp_path)
    assert [photos.path(i).relative_to(tmp_path).as_posix() for i in range(3)] == [
        "45/1.jpg",
        "45_2.jpg",
        "45/3.jpg",
    ]
    assert photos.missing() == ["45/3.jpg"]
    assert photos.authors is None


@pytest.mark.parametrize(
    "header", ["path,lat,lon", "IMG_FILE,LAT,LON", "file,latitude,longitude", "image,Lat,lng"]
)
def test_any_csv_of_photos_and_places_is_recognised(tmp_path, header):
    csv = tmp_path / "any.csv"
    csv.write_text(f"{header}\r\na b.jpg, 1.5,-2.5\r\n\r\n")  # spaces, CRLF and a blank last line are common
    photos = folder.read(csv)
    assert photos.table["file"].tolist() == ["a b.jpg"]
    np.testing.assert_array_equal(photos.latlon, [[1.5, -2.5]])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a.jpg,1,2", "b.jpg,nan,2"], r"set\.csv, line 3: LAT is 'nan', not a number .* 1 of 2 rows"),
        (["a.jpg,1,2", "b.jpg,,2"], r"line 3: LAT is '', not a number"),
        (["a.jpg,1,2", "b.jpg,1"], r"line 3: 2 fields, but the header has 3"),
        (["a.jpg,1,2", "", "b.jpg,1,12°E"], r"line 4: LON is '12°E'"),
        (["a.jpg,inf,2"], r"line 2: LAT is 'inf'"),
        (["a.jpg,1,2", "b.jpg,91.5,2", "c.jpg,3,170"], r"line 3: LAT is 91.5, beyond ±90; 1 of 3"),
        (["a.jpg,1,359"], r"line 2: LON is 359, beyond ±180"),
        (["a.jpg,1,2", ",1,2"], r"line 3: IMG_FILE is empty"),
        (["a.jpg,1,2,3,4"], r"set\.csv: not a CSV"),
        ([], r"there are no rows below the header"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_value(tmp_path, rows, message):
    csv = tmp_path / "set.csv"
    csv.write_text("\n".join(["IMG_FILE,LAT,LON", *rows]) + "\n")
    with pytest.raises(ValueError, match=message):
        folder.read(csv)


def test_a_header_without_the_columns_says_what_it_has(tmp_path):
    csv = tmp_path / "set.csv"
    csv.write_text("IMG_FILE,LAT,NORTHING\na.jpg,1,2\n")
    with pytest.raises(ValueError, match=r"no column for lon .* the header is IMG_FILE,LAT,NORTHING"):
        folder.read(csv)
    with pytest.raises(
        ValueError, match=r"no column IMG_ID, LON, AUTHOR, S3_Label; the header is IMG_FILE,LAT"
    ):
        benchmarks.read_places365(csv)
    csv.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        folder.read(csv)
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such file"):
        folder.read(tmp_path / "none.csv")
    csv.write_text("IMG_FILE,LAT,LON\na.jpg,1,2\n")
    with pytest.raises(FileNotFoundError, match="no such image folder"):
        folder.read(csv, tmp_path / "none")


def test_an_unknown_scene_is_refused(tmp_path):
    csv = places365_csv(tmp_path / "x.csv", [("a.jpg", "1", 1, 2, 0), ("b.jpg", "1", 1, 2, 3)])
    with pytest.raises(ValueError, match="line 3: S3_Label is '3'"):
        benchmarks.read_places365(csv)


def test_swapped_columns_are_refused_by_their_range(tmp_path):
    csv = places365_csv(tmp_path / "x.csv", [("a.jpg", "1", 2.35, 48.86, 0), ("b.jpg", "2", 151.2, -33.9, 1)])
    with pytest.raises(
        ValueError, match=r"LAT and LON are swapped: line 3 has LAT 151.2.*exchange the two names"
    ):
        benchmarks.read_places365(csv)


def test_the_benchmarks_swapped_are_refused_and_unswapped_are_not(tmp_path, geoclip_data):
    csv = benchmarks.find_csv(benchmarks.card("im2gps3k"), geoclip_data)
    table = pd.read_csv(csv)
    swapped = tmp_path / "swapped_places365.csv"
    table.rename(columns={"LAT": "LON", "LON": "LAT"}).to_csv(swapped, index=False)
    with pytest.raises(ValueError, match="LAT and LON are swapped"):
        benchmarks.read_places365(swapped)
    table.to_csv(swapped, index=False)
    assert len(benchmarks.read_places365(swapped)) == len(table)


def osv_mini(directory, rows):
    columns = "id,latitude,longitude,region,sub-region,city,unique_city,unique_sub-region,climate,captured_at"
    (directory / "test_images" / "Texas").mkdir(parents=True)
    (directory / "test_mini.csv").write_text("\n".join([columns, *rows]) + "\n")
    return directory / "test_mini.csv"


def test_osv_mini_finds_images_by_region_and_reads_climate_and_time(tmp_path):
    rows = [
        "41,30.27,-97.74,Texas,Travis,Austin,Austin_TX,Travis_TX,13,1577836800000",
        "42,29.76,-95.37,Texas,Harris,Houston,Houston_TX,Harris_TX,,",
    ]
    photos = benchmarks.read_osv_mini(osv_mini(tmp_path / "mini", rows))
    Image.new("RGB", (4, 4)).save(tmp_path / "mini/test_images/Texas/41.jpg")
    assert photos.table["file"].tolist() == ["Texas/41.jpg", "Texas/42.jpg"]
    assert photos.missing() == ["Texas/42.jpg"]
    assert photos.table["climate"].tolist() == [13, -1]  # -1: not known, which is not class 0
    assert photos.table["captured_at"].iloc[0] == pd.Timestamp("2020-01-01", tz="UTC")
    assert photos.table["captured_at"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("climate", "time", "message"),
    [
        ("30", "0", "line 2: climate is '30', not a class from 0 to 29"),
        ("wet", "0", "climate is 'wet'"),
        ("3", "May", "captured_at is 'May'"),
    ],
)
def test_osv_mini_refuses_labels_out_of_range(tmp_path, climate, time, message):
    csv = osv_mini(tmp_path / "mini", [f"41,30.27,-97.74,Texas,a,b,c,d,{climate},{time}"])
    with pytest.raises(ValueError, match=message):
        benchmarks.read_osv_mini(csv)


def test_osv_5m_finds_images_in_whichever_archive_held_them(tmp_path):
    (tmp_path / "images/test/03").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images/test/03/7.jpg")
    (tmp_path / "test.csv").write_text("id,latitude,longitude\n7,1,2\n8,3,4\n")
    photos = benchmarks.read_osv5m(tmp_path / "test.csv")
    assert photos.table["file"].tolist() == ["03/7.jpg", "8.jpg"]
    assert photos.missing() == ["8.jpg"]


def test_cards_are_complete_and_found_by_name():
    assert set(benchmarks.CARDS) >= {
        "mp16", "im2gps", "im2gps3k", "yfcc4k", "yfcc26k", "gws15k", "osv5m", "osv-mini", "nus-wide",
    }  # fmt: skip
    for card in benchmarks.CARDS.values():
        assert card.what and card.source and card.licence
        assert card.sha256 is None or len(bytes.fromhex(card.sha256)) == 32
    assert benchmarks.card("IM2GPS3K") is benchmarks.card("im2gps3k") is benchmarks.CARDS["im2gps3k"]
    assert benchmarks.card("osv_mini").title == "OSV-Mini"
    with pytest.raises(ValueError, match="unknown benchmark 'im2gp'; choose from mp16, im2gps, im2gps3k"):
        benchmarks.card("im2gp")


def test_a_benchmark_is_loaded_from_either_place_and_checked_for_completeness(tmp_path, monkeypatch):
    monkeypatch.delenv("GEOCLIP_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="GEOCLIP_DATA, which is not set"):
        benchmarks.load("im2gps")
    with pytest.raises(
        FileNotFoundError, match=r"Im2GPS: im2gps_places365\.csv was not found at .* get it from: "
    ):
        benchmarks.load("im2gps", tmp_path)
    rows = [(f"{i}.jpg", "1@N00", 40 + i / 100, -100, 1) for i in range(237)]
    (tmp_path / "benchmarks").mkdir()
    csv = places365_csv(tmp_path / "benchmarks/im2gps_places365.csv", rows)
    photos = benchmarks.load("im2gps", tmp_path)
    assert (len(photos), photos.name, photos.images) == (237, "Im2GPS", None)
    assert benchmarks.is_pinned(benchmarks.card("im2gps"), csv) is False
    (tmp_path / "images/im2gps").mkdir(parents=True)
    assert benchmarks.load("im2gps", tmp_path).images == tmp_path / "images/im2gps"
    places365_csv(csv, rows[:-1])
    with pytest.raises(ValueError, match="Im2GPS: 236 rows, but the published set has 237"):
        benchmarks.load("im2gps", tmp_path, strict=True)
    part = benchmarks.load("im2gps", tmp_path)
    assert (len(part), part.name) == (236, "Im2GPS, 236 of 237")
    with pytest.raises(ValueError, match="nus_wide"):
        benchmarks.load("nus-wide", tmp_path)


def test_the_pinned_files_have_their_photographers(geoclip_data):
    for name, n, photographers in (
        ("im2gps", 237, 233),
        ("im2gps3k", 2997, 198),
        ("yfcc26k", 25_600, 13_018),
    ):
        photos = benchmarks.load(name, geoclip_data)
        assert (len(photos), len(set(photos.authors))) == (n, photographers)
        assert benchmarks.is_pinned(
            benchmarks.card(name), benchmarks.find_csv(benchmarks.card(name), geoclip_data)
        )


def geotagged(path, lat=None, lon=None, zero=False):
    """A JPEG with this position in its EXIF; `zero`: with a fraction over 0."""
    exif = Image.Exif()
    if lat is not None:
        gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
        gps[ExifTags.GPS.GPSLatitudeRef], gps[ExifTags.GPS.GPSLongitudeRef] = "NS"[lat < 0], "EW"[lon < 0]
        gps[ExifTags.GPS.GPSLatitude] = degrees(abs(lat))
        gps[ExifTags.GPS.GPSLongitude] = (IFDRational(1, 0),) * 3 if zero else degrees(abs(lon))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), "green").save(path, exif=exif)


def degrees(value):
    return int(value), int(value % 1 * 60), IFDRational(round(value * 60 % 1 * 60 * 10_000), 10_000)


@pytest.mark.slow
def test_a_folder_of_geotagged_photos_becomes_a_data_set(tmp_path, capsys):
    photos, csv = tmp_path / "photos", tmp_path / "out" / "my.csv"
    geotagged(photos / "rio.jpg", -22.9519, -43.2105)
    geotagged(photos / "trip/tokyo.jpg", 35.6586, 139.7454)
    geotagged(photos / "plain.jpg")
    geotagged(photos / "broken.jpg", 10.5, 20.5, zero=True)
    geotagged(photos / "cut.jpg", 1.5, 2.5)
    cut = photos / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    (photos / "text.jpg").write_text("not a photo")
    (photos / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40)
    geotagged(photos / "two\nlines.jpg", 3.5, 4.5)
    geotagged(photos / "latin.jpg", 3.5, 4.5)
    os.rename(photos / "latin.jpg", os.fsencode(photos / "caf") + b"\xe9.jpg")  # not UTF-8
    assert command_line.main(["dataset", str(photos), "--out", str(csv)]) == 1
    assert "7 of 9 photos could not be used" in capsys.readouterr().out

    read = folder.read(csv, photos)
    assert read.table["file"].tolist() == ["rio.jpg", "trip/tokyo.jpg"] and read.missing() == []
    np.testing.assert_allclose(read.latlon, [[-22.9519, -43.2105], [35.6586, 139.7454]], atol=1e-6)
    unused = pd.read_csv(tmp_path / "out/my_unused.csv").set_index("file")["reason"]
    assert set(unused.index) == {
        "plain.jpg", "broken.jpg", "cut.jpg", "text.jpg", "phone.HEIC", "two\\nlines.jpg", "caf\\udce9.jpg",
    }  # fmt: skip
    assert unused["two\\nlines.jpg"] == "its name contains a line break; rename it"
    assert unused["caf\\udce9.jpg"] == "its name is not UTF-8; rename it"
    assert unused["phone.HEIC"].startswith("a HEIC photo")
    assert unused["plain.jpg"] == "no GPS position in its EXIF"
    assert unused["broken.jpg"] == "EXIF longitude: a fraction with the denominator 0"
    assert "truncated" in unused["cut.jpg"].lower()
    assert unused["text.jpg"] == "not an image in a known format"

    for path in photos.rglob("*.*"):
        if path.name not in ("rio.jpg", "tokyo.jpg"):
            path.unlink()
    assert command_line.main(["dataset", str(photos), "--out", str(csv)]) == 0
    assert not (tmp_path / "out/my_unused.csv").exists()  # that of the run before is gone


def test_a_folder_without_a_usable_photo_writes_nothing(tmp_path, capsys):
    geotagged(tmp_path / "photos/plain.jpg")
    for source, message in (("photos", "no photo has a usable GPS position"), ("none", "no such folder")):
        assert command_line.main(["dataset", str(tmp_path / source), "--out", str(tmp_path / "my.csv")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "my.csv").exists()
