"""The page of `make try` in a real browser."""

import itertools
import json
import shutil

import numpy as np
import pytest
from browsing import (
    JUPYTERLAB,
    PARIS,
    Shown,
    complaints,
    fetched,
    made_checkpoint,
    memory_mb,
    photo,
    predicted,
    screenshot,
    serve,
    states,
    wait,
)
from PIL import Image

pytestmark = pytest.mark.slow
YELLOW, ORANGE = (240, 228, 66), (213, 94, 0)  # the outline of the 50 % region, and the truth's ring


@pytest.fixture(scope="module")
def served(browser, checkpoint, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("served"), checkpoint) as (address, process):
        yield address, process


def test_a_click_the_downloads_and_files_that_cannot_be_used(
    served, browser, checkpoint, tmp_path, monkeypatch, capsys
):
    page = Shown(browser, served[0])
    assert page.said == "Click anywhere on the globe." and page.pixels(*ORANGE) == 0
    before = page.tops()
    page.click_globe()
    row = page.answered()
    wait(lambda: page.pixels(*ORANGE) > 20)
    assert page.tops() == before, "nothing has jumped"
    seen = page.one(".seen")
    assert page.js("return arguments[0].naturalWidth", seen) == 32 and seen.get_attribute("alt")

    listed = page.download("json", "geoclip.json").read_text(encoding="utf-8")
    [found] = json.loads(listed)["photos"]
    monkeypatch.chdir(tmp_path)
    shutil.copy(page.download("tile", found["file"]), found["file"])
    assert listed == predicted(found["file"], checkpoint, "--format", "json", capsys=capsys)
    table = page.download("csv", "geoclip.csv").read_text(encoding="utf-8")
    assert table == predicted(found["file"], checkpoint, "--format", "csv", capsys=capsys)
    assert found["places"][0]["town"] in row
    assert list(found["truth"].values()) == pytest.approx([20, 0], abs=0.5)
    with Image.open(page.download("png", "geoclip.png")) as drawn:
        assert drawn.width < drawn.height and len(np.unique(drawn.convert("L"))) > 50
    page.select(".decision", "disc:25")
    wait(lambda: "within 25 km" in page.one(".notes").text)

    huge = b"x" * 26_000_000
    for name, data, sentence in (
        ("letter.jpg", b"Dear Sir", "not an image in a known format"),
        ("huge.jpg", huge, "26 MB; a photo may have up to 25 MB"),
        ("good.jpg", photo(), "need CLIP's weights"),
    ):
        (tmp_path / name).write_bytes(data)
        page.one(".files").send_keys(str(tmp_path / name))
        wait(lambda name=name: page.said.startswith(name))
        assert sentence in page.said
    assert complaints(browser) == []
    browser.get("about:blank")
    wait(lambda: not memory_mb(served[1]), 60)  # a kernel ends with its page


SHIFTS = """
window.shifted = 0;
new PerformanceObserver((list) => list.getEntries().forEach((entry) => window.shifted += entry.value))
  .observe({ type: "layout-shift", buffered: arguments[0] });"""


def test_each_state_of_the_page(served, browser, tmp_path):
    fetched(browser), complaints(browser)
    page = Shown(browser, served[0])
    page.js(SHIFTS, True)
    page.settle()
    assert page.js("return window.shifted") < 0.1, "little moves while the page is loading"
    expected = {
        "first": lambda: page.said == "Click anywhere on the globe.",
        "answer": lambda: " off. Answered in " in page.said and page.pixels(*YELLOW),
        "far": lambda: page.one(".notes").text.startswith("Far from anything it was trained on: "),
        "refused": lambda: "torn.jpg: cannot be decoded" in page.said and not page.one(".notes").text,
        "guess": lambda: page.one(".score").text.startswith("Points after 1: you") and "win" in page.said,
        "narrow": lambda: page.js("return document.documentElement.scrollWidth") <= 400,
    }
    before = page.tops()
    for name in states(page, tmp_path):
        assert expected.pop(name)(), name
        assert name == "narrow" or page.tops() == before, f"something has jumped: {name}"
        assert not page.js(
            "return [...document.querySelectorAll('.geoclip img')].some((i) => !i.naturalWidth)"
        )
        if name == "answer":
            assert page.js("return window.shifted") == 0, "an answer moves nothing"
            assert_colours_differ_for_everyone(page)
        assert screenshot(browser).entropy() > 2, "a picture with something on it"
        if name == "first":
            assert_controls_have_names_and_the_keyboard_reaches_them(page)
            page.js(SHIFTS, False)
    assert expected == {} and complaints(browser) == []
    outside = [url for url in fetched(browser) if not url.startswith((served[0], "data:", "blob:"))]
    assert outside == [], "nothing is fetched from elsewhere"


def assert_controls_have_names_and_the_keyboard_reaches_them(page):
    """Names as screen readers hear them, from Chromium's accessibility tree."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    spoken = {
        "button",
        "textbox",
        "spinbutton",
        "combobox",
        "image",
        "img",
        "application",
        "progressbar",
        "table",
    }
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nodes = [node for node in nodes if not node["ignored"] and node["role"]["value"] in spoken]
    nameless = [node["role"]["value"] for node in nodes if not node.get("name", {}).get("value")]
    assert len(nodes) > 10 and nameless == []
    controls = page.js("""
        const all = [...document.querySelectorAll(".geoclip :is(button, input, select, canvas)")];
        return all.filter((c) => !c.disabled && c.offsetParent).map((c) => c.className || c.textContent);""")
    page.js("document.activeElement.blur(); window.scrollTo(0, 0)")
    reached = []
    for _ in range(len(controls) + 5):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        reached.append(page.js("const c = document.activeElement; return c.className || c.textContent"))
    assert [name for name in controls if name not in reached] == []
    page.one(".globe").send_keys(Keys.ARROW_LEFT, "+", Keys.ENTER)
    page.answered()
    assert float(page.one(".lon").get_attribute("value")) < 0


def assert_colours_differ_for_everyone(page):
    """The three kinds of dots have one shape, so their colours must differ for each kind of colour blindness."""
    corners = [page.one(f".legend .{name}").rect for name in ("half", "most", "rest")]
    for deficiency in ("none", "protanopia", "deuteranopia", "tritanopia", "achromatopsia"):
        page.browser.execute_cdp_cmd("Emulation.setEmulatedVisionDeficiency", {"type": deficiency})
        picture = screenshot(page.browser)
        seen = [
            picture.getpixel((round(r["x"] + r["width"] / 2), round(r["y"] + r["height"] / 2)))
            for r in corners
        ]
        for a, b in itertools.combinations(seen, 2):
            assert np.linalg.norm(np.subtract(a, b)) > 40, (deficiency, a, b)
    page.browser.execute_cdp_cmd("Emulation.setEmulatedVisionDeficiency", {"type": "none"})


def test_a_photo_is_dropped_and_its_download_is_what_predict_says(
    browser, tiny_clip, tmp_path, monkeypatch, capsys
):
    checkpoint = made_checkpoint(
        tmp_path / "clip.ckpt", tiny_clip
    )  # random weights: the way, not the answers
    (tmp_path / "holiday.jpg").write_bytes(photo(PARIS))
    complaints(browser)
    with serve(tmp_path, checkpoint) as (address, _):
        page = Shown(browser, address)
        assert page.said == "Drop photos, or write a text." and page.pixels(*YELLOW) == 0
        page.drop(tmp_path / "holiday.jpg")
        row = page.answered()
        assert page.pixels(*YELLOW) > 20 and page.pixels(*ORANGE) > 20, "a region, and the truth of the EXIF"
        listed = page.download("json", "geoclip.json").read_text(encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        assert listed == predicted("holiday.jpg", checkpoint, "--format", "json", capsys=capsys)
        assert json.loads(listed)["photos"][0]["places"][0]["town"] in row

        (tmp_path / "other.png").write_bytes(photo(kind="PNG"))
        page.one(".files").send_keys(f"{tmp_path / 'holiday.jpg'}\n{tmp_path / 'other.png'}")
        wait(lambda: len(browser.find_elements("css selector", ".geoclip .photos button")) == 2)
        page.one(".new").click()
        wait(lambda: page.one(".seen").get_attribute("alt") == "Image china.jpg")
        page.one(".text").send_keys("a desert\n")
        wait(lambda: not page.one(".seen").get_attribute("alt") and "Answered in" in page.said)
        assert complaints(browser) == []
        browser.get("about:blank")


def test_ten_sessions_at_once_do_not_meet(served, browser):
    import psutil

    if psutil.virtual_memory().available < 12e9:
        pytest.skip("ten sessions take about 9 GB, and less than 12 GB are free")
    address, process = served
    first, places = browser.current_window_handle, [(5.0 * i, 15.0 * i - 70) for i in range(10)]
    browser.get("about:blank")
    for _ in places:
        browser.switch_to.new_window("tab")
        browser.execute_script("location.href = arguments[0]", address)  # all are loading at once
    tabs = dict(zip([h for h in browser.window_handles if h != first], places, strict=True))
    for tab, place in tabs.items():
        browser.switch_to.window(tab)
        page = Shown(browser)
        page.choose(*place)
    used = memory_mb(process)
    print(f"{len(used)} sessions, {sum(used):,.0f} MB")
    assert sum(used) / len(used) < 1000, "megabytes of a session"
    for tab, place in tabs.items():
        browser.switch_to.window(tab)
        [found] = json.loads(page.download("json", "geoclip.json").read_text(encoding="utf-8"))["photos"]
        assert list(found["truth"].values()) == pytest.approx(place, abs=1e-6)
        browser.get("about:blank")  # closing by the driver tells the page nothing; closing by a reader does
        browser.close()
    browser.switch_to.window(first)
    wait(lambda: not memory_mb(process), 60)


def test_the_page_opens_in_jupyterlab(browser, checkpoint, tmp_path):
    with serve(tmp_path, checkpoint, JUPYTERLAB) as (address, _):
        browser.get(f"{address}lab/tree/try.ipynb")
        idle = "return window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        wait(lambda: browser.execute_script(idle))
        browser.execute_script("jupyterapp.commands.execute('notebook:run-all-cells')")
        page = Shown(browser)
        assert page.one(".globe").size["width"] > 300
        page.choose(*PARIS)
        assert page.pixels(*ORANGE) > 20
        browser.get("about:blank")
