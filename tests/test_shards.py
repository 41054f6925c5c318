"""URL lists become shards: photos are saved, and everything else that a server may answer is refused and counted."""

import contextlib
import http.server
import io
import json
import multiprocessing
import random
import socket
import tarfile
import time

import pandas as pd
import pytest
import torch
from PIL import Image

from geoclip.__main__ import main
from geoclip.datasets import embedding, features, shards
from geoclip.datasets.shards import Limits
from geoclip.datasets.sources import Views, open_source
from geoclip.image_encoder import ImageEncoder, ImageEncoderConfig
from geoclip.reproduce import rehearsal

GOOD = 6


def jpeg(number):
    file = io.BytesIO()
    image = Image.linear_gradient("L").resize((96, 64)).rotate(30 * number).convert("RGB")
    image.save(file, "JPEG", quality=98)
    return file.getvalue()


@contextlib.contextmanager
def server(redirects_to=""):
    """/N.jpg is a photo; other paths answer as the links of a ten-year-old list, or a hostile server, do.

    Yields the address and the list of requested paths.
    """
    asked = []

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/")
            asked.append(name)
            if name in ("404", "503"):
                self.send_error(int(name))
                return
            if name == "redirect":
                self.send_response(302)
                self.send_header("Location", redirects_to)
                self.end_headers()
                return
            body = {"page": b"<html>This photo is private</html>", "empty": b""}.get(name) or (
                jpeg(int(name[0])) if name[0].isdigit() else jpeg(8)
            )
            if name == "empty":
                body = b""
            if name == "9_half.jpg":
                body = body[: len(body) * 3 // 4]
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if name == "page" else "image/jpeg")
            if name not in ("huge", "drip"):
                self.send_header("Content-Length", str(len(body) * 2 if name == "7_lost.jpg" else len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client has gone
                if name == "slow":
                    time.sleep(3)
                self.wfile.write(body)
                for _ in range(64 if name == "huge" else 0):
                    self.wfile.write(bytes(1 << 16))
                for _ in range(40 if name == "drip" else 0):
                    time.sleep(0.1)
                    self.wfile.write(b"0")
                    self.wfile.flush()

        def log_message(self, *_):
            pass

    with rehearsal.serving(Answers) as address:
        yield address, asked


def listed(*urls):
    table = pd.DataFrame(
        {"id": [f"0{i}" for i in range(len(urls))], "url": urls}
    )  # ids are text, not numbers
    return table.assign(LAT=1.5, LON=range(len(urls)))


@pytest.mark.slow
def test_photos_are_saved_and_failures_are_told_apart_and_counted(tmp_path, capsys):
    bad = ["404", "503", "slow", "7_lost.jpg", "page", "empty", "huge", "drip"]
    names = [f"{number}.jpg" for number in range(GOOD)] + bad + ["9_half.jpg"]
    places = pd.DataFrame({"IMG_ID": [f"0{i}" for i in range(len(names))]})
    places["LAT"] = [40.0 + i / 3 for i in range(len(names))]
    places["LON"] = [-3.7 - i / 7 for i in range(len(names))]
    places.to_csv(tmp_path / "places.csv", index=False)
    out = tmp_path / "shards"
    with server() as (address, asked):
        rows = [f"0{i},{address}/{name}" for i, name in enumerate(names)] + [f"99,{address}/0.jpg"]
        (tmp_path / "urls.csv").write_text("\n".join(rows) + "\n")
        command = [
            "shards", str(tmp_path / "urls.csv"), "--places", str(tmp_path / "places.csv"), "--out", str(out),
            "--shard-size", "5", "--timeout", "1.5", "--retries", "1", "--max-mb", "1", "--allow-private",
        ]  # fmt: skip
        assert main(command) == 1
        printed = capsys.readouterr().out
        assert asked.count("503") == asked.count("slow") == 2  # tried again
        assert asked.count("404") == asked.count("0.jpg") == 1  # gone for good; without a place
        asked.clear()
        assert main(command) == 1 and asked == []  # complete shards are not downloaded again
        # as a killed process or a full disk leaves them
        (out / "00001_stats.json").write_text('{"successes": 5, "fail')
        (out / ".00001.abc.tar").write_bytes(b"half")
        assert main(command) == 1
        assert set(asked) == {*names[5:10]}  # an incomplete shard is
    assert not list(out.glob(".0*"))
    assert "1 of 16 URLs are skipped" in printed
    assert f"{GOOD + 1} of 15 photos in {out}/{{00000..00002}}.tar" in printed
    reasons = dict(zip(bad, (
        "HTTP 404 Not Found", "HTTP 503 Service Unavailable", "timed out",
        "the connection was lost before the whole photo had arrived", "not an image but text/html",
        "the response is empty", "larger than 1 MB", "timed out",
    ), strict=True))  # fmt: skip
    gone = pd.read_csv(out / "unavailable.csv", dtype=str)
    assert gone["id"].tolist() == [f"0{i}" for i in range(GOOD, GOOD + len(bad))]
    assert gone["reason"].tolist() == list(reasons.values())
    assert "  2 failed: timed out" in printed and "  1 failed: HTTP 404 Not Found" in printed
    with pytest.raises(ValueError, match="the shards of another list"):
        shards.download(listed("http://a"), out)

    # a truncated photo is noticed when it is opened
    encoder = ImageEncoder(ImageEncoderConfig("conv", None, frozen=False), torch.Generator().manual_seed(0))
    source = open_source(f"{out}/{{00000..00002}}.tar")
    report = embedding.embed(source, encoder, tmp_path / "features", Views())
    assert (report.embedded, report.unreadable, report.failed) == (GOOD, 1, ())
    data = features.FeatureData(tmp_path / "features")
    assert sorted(data.ids()) == [f"0{i}" for i in range(GOOD)]
    where = dict(zip(data.ids(), data.latlon.tolist(), strict=True))
    assert where["04"] == pytest.approx([40 + 4 / 3, -3.7 - 4 / 7], abs=1e-5)
    assert "truncated" in (tmp_path / "features" / "unreadable.csv").read_text()


@pytest.mark.slow
def test_private_addresses_are_refused_also_after_redirects(tmp_path, monkeypatch):
    with server() as (private, asked), server(f"{private}/0.jpg") as (trusted, _):
        port = int(trusted.rpartition(":")[2])
        check = shards._public_socket

        def as_if_public(info):
            return socket.socket(*info[:3]) if info[4][1] == port else check(info)

        monkeypatch.setattr(shards, "_public_socket", as_if_public)
        by_name = private.replace("127.0.0.1", "localhost")
        urls = [f"{trusted}/redirect", f"{private}/0.jpg", f"{by_name}/0.jpg", f"{trusted}/1.jpg"]
        done = shards.download(listed(*urls), tmp_path / "out")
        assert asked == [] and done.photos == 1
        assert sum("is not a public address" in reason for reason in done.failed) >= 1
        assert sum(done.failed.values()) == 3
        done = shards.download(listed(*urls), tmp_path / "allowed", limits=Limits(allow_private=True))
        assert done.photos == 4 and asked == ["0.jpg"] * 3


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "::ffff:192.168.0.1", "fe80::1%eth0", "224.0.0.1"],
)
def test_addresses_that_are_not_public(address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with pytest.raises(PermissionError, match="is not a public address"):
        shards._public_socket((family, socket.SOCK_STREAM, 0, "", (address, 80)))
    shards._public_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("1.1.1.1", 80))).close()


@pytest.mark.slow
def test_several_processes_and_machines_leave_the_same_photos(tmp_path):
    with server() as (address, _):
        table = listed(*(f"{address}/{i % 8}.jpg" for i in range(20)))
        limits = Limits(allow_private=True)
        one = shards.download(table, tmp_path / "one", 4, limits=limits)
        two = shards.download(table, tmp_path / "two", 4, processes=2, limits=limits)
        for rank in (1, 0):
            ranks = shards.download(table, tmp_path / "ranks", 4, limits=limits, rank=rank, world=2)
    assert one.photos == two.photos == ranks.photos == 20
    assert members(tmp_path / "one") == members(tmp_path / "two") == members(tmp_path / "ranks")


@pytest.mark.slow
def test_kills_at_random_moments_end_in_the_bytes_of_an_unbroken_download(tmp_path):
    context, draw = multiprocessing.get_context("forkserver"), random.Random(0)
    limits = Limits(connections=3, retries=0, allow_private=True)
    with server() as (address, _):
        table = listed(*(f"{address}/{'404' if i % 9 == 4 else f'{i % 8}.jpg'}" for i in range(40)))
        for folder in ("starts the server", "unbroken"):
            process = context.Process(target=shards.download, args=(table, tmp_path / folder, 5, 1, limits))
            began = time.monotonic()
            process.start()
            process.join()
            duration = time.monotonic() - began
        kills = folders = 0
        while kills < 20:
            out = tmp_path / str(folders)
            process = context.Process(target=shards.download, args=(table, out, 5, 1, limits))
            process.start()
            process.join(draw.uniform(0, duration))
            kills += process.is_alive()
            process.kill()
            process.join()
            folders += (out / "unavailable.csv").is_file()
        for number in range(folders + 1):
            shards.download(table, tmp_path / str(number), 5, limits=limits)
            assert whole(tmp_path / str(number)) == whole(tmp_path / "unbroken")


def whole(folder):
    """The contents of its files, but for locks and for temporary files of lists, which are kept for an hour."""
    found = {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if not path.name.startswith((".lock", ".u", ".l"))
    }
    assert len(found) == 2 * 8 + 2
    return found


def members(folder):
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {(path.name, member.name): tar.extractfile(member).read() for member in tar}
    assert len(found) == 40
    about = json.loads(found["00000.tar", "0000000001.json"])
    assert (about["id"], about["LAT"], about["LON"]) == ("01", 1.5, 1)
    return found


def test_options_below_their_least_value_are_refused_by_name(tmp_path, capsys):
    for option, value in (
        ("shard-size", "0"),
        ("threads", "0"),
        ("timeout", "0"),
        ("retries", "-1"),
        ("max-mb", "0"),
    ):
        command = ["shards", "urls.csv", "--places", "p.csv", "--out", str(tmp_path), f"--{option}", value]
        assert main(command) == 2
        assert f"error: --{option}: must be " in capsys.readouterr().err


def test_lists_with_and_without_a_header(tmp_path):
    path = tmp_path / "urls.csv"
    path.write_text("url,image_id\nhttp://a/1,01\nhttps://b/2,x\n")
    assert shards.read_urls(path).to_numpy().tolist() == [["01", "http://a/1"], ["x", "https://b/2"]]
    path.write_text("01, http://a/1\n")
    assert shards.read_urls(path).to_numpy().tolist() == [["01", "http://a/1"]]
    for text, wrong in (
        ("1,http://a\n2,ftp://b\n", "line 2: '2,ftp://b' is not an http address"),
        ("1,http://a\n1,http://b\n", "line 2: '1,http://b' repeats an image id"),
        ("url,id\nhttp://a,\n", "line 2: ',http://a' has no image id"),
        ("1,http://a,3\n", "3 columns and no header"),
        ("", "the file is empty"),
        ("1,http://a\n2,http://b,c\n", "not a CSV file"),
        ("id,url\n", "contains no URLs"),
        ("1,http://a\n\n2,b\n", "line 3: '2,b' is not an http address"),
        ("url,name\nhttp://a,1\n", r"no column for id \(one of id"),
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
        with pytest.raises(ValueError, match="of another size"):
            shards.claim(tmp_path, other, cut)


def test_addresses_are_joined_with_their_places():
    urls = pd.DataFrame({"id": ["a", "b", "c"], "url": ["http://1", "http://2", "http://3"]})
    places = pd.DataFrame({"file": ["c", "x", "a"], "lat": [1.0, 2.0, 3.0], "lon": [4.0, 5.0, 6.0]})
    joined = shards.join_places(urls, places)
    assert joined.to_numpy().tolist() == [["a", "http://1", 3.0, 6.0], ["c", "http://3", 1.0, 4.0]]
    with pytest.raises(ValueError, match="the places list a twice"):
        shards.join_places(urls, pd.concat([places, places[2:]]))
    with pytest.raises(ValueError, match=r"none of the 3 URLs has a place: .* 'a', the places 'c\.jpg'"):
        shards.join_places(urls, places.assign(file=places["file"] + ".jpg"))
