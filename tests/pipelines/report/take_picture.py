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

WINDOW = (1280, 1060)
MAX_BYTES = 200_000


def take_picture(store_uri: str, run: str, out: Path) -> None:
    """Write the top of a run's report as a PNG of at most 200 KB."""
    store = open_store(store_uri)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        write_report(store, find_run(store, run), page)
        with headless_chromium(Path(folder) / "profile", WINDOW) as browser:
            open_page(browser, page)
            picture = Image.open(io.BytesIO(browser.get_screenshot_as_png()))
    picture.convert("RGB").quantize(128).save(out, optimize=True)
    if out.stat().st_size > MAX_BYTES:
        raise SystemExit(f"{out} has {out.stat().st_size:,} bytes, more than {MAX_BYTES:,}; lower WINDOW")


if __name__ == "__main__":
    take_picture(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
