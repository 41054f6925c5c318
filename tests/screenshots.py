"""Pictures of the page of `make try`, one of each state, and what it takes: `python tests/screenshots.py`.

They are figures/try.png (an answer) and figures/try_STATE.png, of the page with notebook 03's model.
The times and the memory are printed.
"""

import sys
import tempfile
import time
from pathlib import Path

from browsing import WIDE, Shown, chromium, memory_mb, resize, screenshot, serve, states

from geoclip import paths


def main() -> int:
    """Write the pictures; 1 where there is no Chromium."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        browser = chromium(folder)
        if browser is None:
            print("no Chromium with chromedriver: install the packages chromium and chromium-driver")
            return 1
        try:
            with serve(folder) as (address, process):
                start = time.monotonic()
                browser.get(address)
                while not browser.find_elements("css selector", ".geoclip .said"):
                    time.sleep(0.02)
                shown = time.monotonic() - start
                page = Shown(browser)
                print(
                    f"first page after {shown:.1f} s, ready for a click after {time.monotonic() - start:.1f} s"
                )
                for state in states(page, folder):
                    suffix = "" if state == "answer" else f"_{state}"
                    path = paths.FIGURES / f"try{suffix}.png"
                    screenshot(browser, path)
                    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB; {page.said}")
                resize(browser, *WIDE)
                took = []
                for lat in range(-60, 70, 10):
                    start = time.monotonic()
                    page.choose(lat, 20)
                    took.append(time.monotonic() - start)
                print(
                    f"from a choice to its answer: median {sorted(took)[len(took) // 2]:.2f} s, "
                    f"at most {max(took):.2f} s"
                )
                print(f"memory of the session: {memory_mb(process)[0]:.0f} MB")
        finally:
            browser.quit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
