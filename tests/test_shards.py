"""Addresses become shards: what a web server can answer, from a photo to half of one, is told apart and counted."""

import contextlib
import http.server
import io
import time

import pandas as pd
import pytest
import torch
import webserver
from PIL import Image

from geoclip.__main__ import main
from geoclip.datasets import features, shards
from geoclip.datasets.sources import Views, open_source
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig

GOOD = 6


def jpeg(number):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((96, 64)).rotate(30 * number).convert("RGB").save(
        file, "JPEG", quality=98
    )
    return file.getvalue()


@contextlib.contextmanager
def server():
    """/N.jpg is a photo; the others answer as links of a ten years old list do. Yields address and what was asked."""
    asked = []

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/")
            asked.append(name)
            if name in ("404", "410"):
                self.send_error(int(name))
                return
            body = (
                b"<html>This photo is private</html>"
                if name == "page"
                else jpeg(8 if name == "slow" else int(name[0]))
            )
            if name == "9_half.jpg":
                body = body[: len(body) * 3 // 4]
            if name == "slow":
                time.sleep(3)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) * 2 if name == "7_lost.jpg" else len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):  # who asked has gone
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    with webserver.serving(Answers) as address:
        yield address, asked


@pytest.fixture(scope="module")
def img2dataset():
    try:
        return shards.environment()
    except OSError as error:
        pytest.skip(str(error))


def test_what_a_server_answers_is_told_apart_and_counted(tmp_path, img2dataset, capsys):
    names = [f"{number}.jpg" for number in range(GOOD)] + [
        "404",
        "410",
        "slow",
        "7_lost.jpg",
        "9_half.jpg",
        "page",
    ]
    places = pd.DataFrame({"IMG_ID": [f"0{i}" for i in range(len(names))]})  # ids that are numbers to others
    places["LAT"], places["LON"] = (
        [40.0 + i / 3 for i in range(len(names))],
        [-3.7 - i / 7 for i in range(len(names))],
    )
    places.to_csv(tmp_path / "places.csv", index=False)
    out = tmp_path / "shards"
    with server() as (address, asked):
        rows = [f"0{i},{address}/{name}" for i, name in enumerate(names)] + [f"99,{address}/0.jpg"]
        (tmp_path / "urls.csv").write_text("\n".join(rows) + "\n")
        command = [
            "shards", str(tmp_path / "urls.csv"), "--places", str(tmp_path / "places.csv"), "--out", str(out),
            "--shard-size", "5", "--timeout", "1", "--retries", "1",
        ]  # fmt: skip
        assert main(command) == 1
        printed = capsys.readouterr().out
        assert (
            asked.count("410") == 2 and asked.count("0.jpg") == 1
        )  # tried again; the one without a place not at all
        asked.clear()
        assert main(command) == 1 and asked == []  # whole shards are not downloaded again
        (out / "00001_stats.json").write_text(
            '{"count": 5, "succ'
        )  # a disk that was full, a process that was killed
        assert main(command) == 1
        assert set(asked) == {*names[5:10]}  # a shard that is not whole is
    assert "1 of 13 addresses are left out" in printed
    assert f"{GOOD + 2} of 12 photos in {out}/{{00000..00002}}.tar" in printed
    for reason in ("HTTP Error 404", "HTTP Error 410", "timed out", "IncompleteRead"):
        assert sum(reason in line and "  1 failed" in line for line in printed.splitlines()) == 1, printed
    gone = pd.read_csv(out / "unavailable.csv", dtype=str)
    assert gone["id"].tolist() == ["06", "07", "08", "09"]
    with pytest.raises(ValueError, match="shards of another list"):
        shards.download(pd.DataFrame({"id": ["1"], "url": ["http://a"], "LAT": [1.0], "LON": [2.0]}), out)

    # half a photo and a page in a photo's place are found by who opens them
    encoder = ImageEncoder(ImageEncoderConfig("conv", None, frozen=False), torch.Generator().manual_seed(0))
    report = features.embed(
        open_source(f"{out}/{{00000..00002}}.tar"), encoder, tmp_path / "features", Views()
    )
    assert (report.embedded, report.unreadable, report.failed) == (GOOD, 2, ())
    data = features.FeatureData(tmp_path / "features")
    assert sorted(data.ids()) == [f"0{i}" for i in range(GOOD)]
    where = dict(zip(data.ids(), data.latlon.tolist(), strict=True))
    assert where["04"] == pytest.approx([40 + 4 / 3, -3.7 - 4 / 7], abs=1e-5)
    reasons = pd.read_csv(tmp_path / "features" / "unreadable.csv", dtype=str).set_index("id")["reason"]
    assert "truncated" in reasons["010"] and "not an image" in reasons["011"]


def test_lists_with_and_without_a_header(tmp_path):
    path = tmp_path / "urls.csv"
    path.write_text("url,image_id\nhttp://a/1,01\nhttps://b/2,x\n")
    assert shards.read_urls(path).to_numpy().tolist() == [["01", "http://a/1"], ["x", "https://b/2"]]
    path.write_text("01, http://a/1\n")
    assert shards.read_urls(path).to_numpy().tolist() == [["01", "http://a/1"]]
    for text, wrong in (
        ("1,http://a\n2,ftp://b\n", "line 2: '2,ftp://b' is no http address"),
        ("1,http://a\n1,http://b\n", "line 2: '1,http://b' names an image a second time"),
        ("url,id\nhttp://a,\n", "line 2: ',http://a' has no image id"),
        ("1,http://a,3\n", "3 columns and no header"),
        ("", "no list of addresses: No columns"),
        ("1,http://a\n2,http://b,c\n", "no list of addresses: Error tokenizing data"),
        ("id,url\n", "lists no address"),
        ("1,http://a\n\n2,b\n", "line 2: ',' is no http address"),
        ("url,name\nhttp://a,1\n", "names no image"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=wrong):
            shards.read_urls(path)


def test_shards_of_others_are_not_taken_for_ours(tmp_path):
    (tmp_path / "00000.tar").write_bytes(b"")
    listed = pd.DataFrame({"id": ["1"], "url": ["http://a"], "LAT": [1.0], "LON": [2.0]})
    with pytest.raises(ValueError, match="holds the shards of another list"):
        shards.claim(tmp_path, listed, 10)
    (tmp_path / "00000.tar").unlink()
    shards.claim(tmp_path, listed, 10)
    shards.claim(tmp_path, listed, 10)
    for other, cut in ((listed.assign(LAT=3.0), 10), (listed, 11)):
        with pytest.raises(ValueError, match="cut otherwise"):
            shards.claim(tmp_path, other, cut)


def test_addresses_are_joined_with_their_places():
    urls = pd.DataFrame({"id": ["a", "b", "c"], "url": ["http://1", "http://2", "http://3"]})
    places = pd.DataFrame({"file": ["c", "x", "a"], "lat": [1.0, 2.0, 3.0], "lon": [4.0, 5.0, 6.0]})
    joined = shards.join_places(urls, places)
    assert joined.to_numpy().tolist() == [["a", "http://1", 3.0, 6.0], ["c", "http://3", 1.0, 4.0]]
    with pytest.raises(ValueError, match="the places name a twice"):
        shards.join_places(urls, pd.concat([places, places[2:]]))
    with pytest.raises(
        ValueError, match=r"not one of the 3 addresses has a place: .* 'a', the places 'c\.jpg'"
    ):
        shards.join_places(urls, places.assign(file=places["file"] + ".jpg"))
