"""Take the picture of a report for the README: `python -m tests.pipelines.report.take_picture STORE RUN OUT.png`."""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from components.core.store.store import open_store
from pipelines.records.runs import find_run
from pipelines.report.report import write_report
from tests.pipelines.report.browser import headless_chromium, open_page

WINDOW = (1280, 1900)
LEFT_OUT = "#models, #comparison, #theme, .theme { display: none }"
"""Style that hides what is between the architecture and the Pareto front."""
SHOW_TOP = """
document.head.append(Object.assign(document.createElement("style"), {textContent: arguments[0]}));
const last = document.getElementById("pareto-chart") ?? document.querySelector("main");
return last.getBoundingClientRect().bottom + 12;
"""
"""Script that hides those parts and returns the height down to the Pareto front."""
MAX_BYTES = 200_000


def take_picture(store_uri: str, run: str, out: Path) -> None:
    """Write targets, architecture and Pareto front of a run as a PNG of at most 200 KB."""
    store = open_store(store_uri)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        write_report(store, find_run(store, run), page)
        with headless_chromium(Path(folder) / "profile", WINDOW) as browser:
            open_page(browser, page)
            bottom = browser.execute_script(SHOW_TOP, LEFT_OUT)
            picture = Image.open(io.BytesIO(browser.get_screenshot_as_png()))
    cropped = picture.convert("RGB").crop((0, 0, picture.width, min(picture.height, round(bottom))))
    colours = cropped.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    colours.save(out, optimize=True)
    if out.stat().st_size > MAX_BYTES:
        raise SystemExit(f"{out} has {out.stat().st_size:,} bytes, more than {MAX_BYTES:,}; lower WINDOW")


if __name__ == "__main__":
    take_picture(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
