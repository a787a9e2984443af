import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from components.core.lineage.curves import record_curves
from components.core.store.store import Store, open_store
from pipelines.report.report import write_report
from tests.pipelines.made_up_run import COSTS, LAYERS, SEARCH, make_run

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1280,1000"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
DRAWN_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = open_store(tmp_path_factory.mktemp("store"))
    make_run(store)
    record_curves(store, "demo-1")
    return store


@pytest.fixture(scope="module")
def page(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("report") / "report.html"
    write_report(store, "demo-1", page)
    return page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def opened(browser: Any, page: Path) -> Any:
    browser.get("about:blank")
    browser.get_log("performance")  # what the browser asked for its own first page
    open_page(browser, page)
    return browser


def open_page(browser: Any, page: Path) -> None:
    """Open a page and wait until its script has drawn everything."""
    browser.get(page.as_uri())
    deadline = time.monotonic() + DRAWN_WITHIN_S
    while "drawn" not in browser.find_element(By.TAG_NAME, "html").get_attribute("class"):
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.1)


def plotted(browser: Any, element: str) -> Any:
    """The traces of a chart, as the plotting library has them."""
    script = f"return JSON.parse(JSON.stringify(document.getElementById('{element}').data))"
    return browser.execute_script(script)


def test_the_page_opens_without_a_complaint_and_asks_nothing_of_any_server(opened: Any) -> None:
    assert opened.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [found["params"]["request"]["url"] for found in messages if found["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked


def test_every_chart_is_drawn(opened: Any) -> None:
    front, *points, child = plotted(opened, "pareto-chart")
    assert front["y"] == pytest.approx([point.score for point in SEARCH.pareto])
    assert (child["x"], child["y"]) == ([SEARCH.child.costs.latency_ms], [SEARCH.child.score])
    names = ["parent", "random choice", "greedy choice", *SEARCH.baselines]
    assert [trace["name"] for trace in points] == names
    on_standard = plotted(opened, "accuracy-chart")[0]
    assert on_standard["text"] == ["parent", "random", "greedy", "child", "distilled", "pretrained", "sft", "rl"]
    assert on_standard["y"][-1] == pytest.approx(98.4)
    curves = opened.find_elements(By.CSS_SELECTOR, ".curve")
    assert [curve.find_element(By.TAG_NAME, "h3").text for curve in curves] == [
        "parent",
        "distill",
        "pretrain",
        "sft",
        "rl",
    ]
    assert all(curve.find_elements(By.CSS_SELECTOR, ".js-line") for curve in curves)


def test_quality_is_shown_against_latency_throughput_and_memory(opened: Any) -> None:
    shown = {}
    for button in opened.find_elements(By.CSS_SELECTOR, "#pareto-axes button"):
        button.click()
        front, *_, child = plotted(opened, "pareto-chart")
        shown[button.text] = front["x"], child["x"][0]
    assert shown["latency"] == ([point.costs.latency_ms for point in SEARCH.pareto], SEARCH.child.costs.latency_ms)
    assert shown["throughput"][1] == pytest.approx(1000 / SEARCH.child.costs.latency_ms)
    memory = [point.costs.parameters for point in SEARCH.fronts["parameters"]]
    assert shown["memory"] == (memory, SEARCH.child.costs.parameters)


def test_baselines_candidates_costs_and_fusion_are_told(opened: Any) -> None:
    rows = [row.text for row in opened.find_elements(By.CSS_SELECTOR, "#choices tbody tr")]
    names = ["parent", "chosen child", "greedy", *SEARCH.baselines, "random", "limit"]
    assert all(row.startswith(name) for row, name in zip(rows, names, strict=True))
    assert f"{SEARCH.child.score:.4f} {SEARCH.child.costs.parameters:,}" in rows[1]
    assert opened.find_element(By.CSS_SELECTOR, "#speeds tbody tr").text.startswith("child 1.9")
    candidates = opened.find_elements(By.CSS_SELECTOR, "#candidates tbody tr")
    assert ["chosen" in row.text for row in candidates] == [True, False, False]
    rounds = opened.find_element(By.CSS_SELECTOR, "#rounds tbody tr").text
    assert rounds.startswith("1 agreed")
    assert rounds.endswith("1.0 %")
    assert plotted(opened, "costs-chart")[1]["y"] == [model.median_ms for model in COSTS.models]
    assert "0.6100 without fusion, 0.6600 with it (+0.0500 ± 0.0080 nats a token)" in opened.page_source
    assert SEARCH.fusion is not None
    charts = opened.find_elements(By.CSS_SELECTOR, "#fusion-charts .chart")
    assert len(charts) == len(SEARCH.fusion.runs) > 0
    assert all(chart.find_elements(By.CSS_SELECTOR, ".hm") for chart in charts)
    assert opened.get_log("browser") == []


def test_what_lies_within_the_noise_is_marked(opened: Any) -> None:
    known = [margin for margin in SEARCH.margins if margin.within_noise is not None]
    noisy = {(margin.layer, margin.part) for margin in known if margin.within_noise}
    assert 0 < len(noisy) < len(known)
    sentence = opened.find_element(By.ID, "noise").text
    assert sentence.startswith(f"{len(noisy)} of {len(known)} places of the choice")
    heat, dots = plotted(opened, "scores-chart")
    chosen = zip(SEARCH.slots, SEARCH.child.choice, strict=True)
    marked = [(slot.layer, slot.part) in noisy for slot, pick in chosen if pick > 0]
    assert [symbol == "circle-open" for symbol in dots["marker"]["symbol"]] == marked
    margin = next(margin for margin in known if margin.within_noise)
    difference = f"{margin.difference:+.4g} ± {margin.error:.2g}, within the noise"
    told = f"{margin.chosen}; next best {margin.following}, {difference}"
    assert any(told in text for row in heat["text"] for text in row)
    cells = opened.find_elements(By.CSS_SELECTOR, "figure.map .cell")
    assert sum(told in cell.get_attribute("title") for cell in cells) >= 1
    assert " ± 0.0010" in heat["text"][0][1]


def test_the_map_shows_a_cell_a_subblock(opened: Any) -> None:
    parent, chosen, written, *_ = opened.find_elements(By.CSS_SELECTOR, "figure.map")
    assert len(parent.find_elements(By.CSS_SELECTOR, ".cell.own")) == 2 * LAYERS
    sizes = [size for layer in SEARCH.child.layers for size in (layer.num_key_value_heads, layer.intermediate_size)]
    assert len(chosen.find_elements(By.CSS_SELECTOR, ".cell.none")) == sizes.count(0)
    assert len(written.find_elements(By.CSS_SELECTOR, ".cell.fused")) == 1


def test_the_reader_can_change_curve_theme_and_filter(opened: Any) -> None:
    rl = opened.find_elements(By.CSS_SELECTOR, ".curve")[-1]
    assert rl.find_element(By.CSS_SELECTOR, "[aria-pressed=true]").text == "reward"
    next(button for button in rl.find_elements(By.TAG_NAME, "button") if button.text == "kl").click()
    assert rl.find_element(By.CSS_SELECTOR, "[aria-pressed=true]").text == "kl"
    was_dark = "dark" in opened.find_element(By.TAG_NAME, "html").get_attribute("class")
    opened.find_element(By.ID, "theme").click()
    assert ("dark" in opened.find_element(By.TAG_NAME, "html").get_attribute("class")) != was_dark
    opened.find_element(By.ID, "filter").send_keys("rl.clip")
    shown = [line for line in opened.find_elements(By.CSS_SELECTOR, "#settings dl > div") if line.is_displayed()]
    assert [line.find_element(By.TAG_NAME, "dt").text for line in shown] == ["clip_ratio"]
    assert opened.get_log("browser") == []


def test_a_run_that_has_come_to_nothing_yet_has_a_page_too(browser: Any, tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    make_run(store)
    for path in store.documents("runs/demo-1/stages/"):
        store.backend.delete(path)
    store.put_document("runs/demo-1/run.json", store.document("runs/demo-1/run.json") | {"status": "failed"})
    write_report(store, "demo-1", tmp_path / "report.html")
    open_page(browser, tmp_path / "report.html")
    assert browser.get_log("browser") == []
    headings = [heading.text for heading in browser.find_elements(By.TAG_NAME, "h2") if heading.is_displayed()]
    assert headings == ["Settings"]


def test_a_run_without_search_shows_its_models_by_themselves(store: Store, tmp_path: Path) -> None:
    record = store.document("runs/demo-1/run.json")
    roles = {role: made for role, made in record["roles"].items() if role in ("sft", "rl")}
    store.put_document("runs/tuned/run.json", record | {"run": "tuned", "roles": roles})
    for label in ("sft", "rl"):
        store.put_document(f"runs/tuned/stages/{label}.json", store.document(f"runs/demo-1/stages/{label}.json"))
    write_report(store, "tuned", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("<figure") == 1  # both have one shape
    assert "pareto-chart" in text


def test_the_page_is_one_small_file_that_forbids_requests(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size <= 5_000_000
    assert "default-src 'none'" in text
    assert '<link rel="icon" href="data:,">' in text
    assert text.count("<link") == 1
    assert "src=" not in text.replace("default-src", "").replace("script-src", "")


def test_names_that_look_like_markup_stay_text(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    make_run(store)
    record = store.document("runs/demo-1/run.json")
    store.put_document("runs/demo-1/run.json", record | {"recipe_name": "<script>alert(1)</script>"})
    write_report(store, "demo-1", tmp_path / "report.html")
    assert "<script>alert(1)" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_same_run_gives_the_same_page(store: Store, page: Path, tmp_path: Path) -> None:
    write_report(store, "demo-1", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()
