import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By

from components.core.lineage.curves import record_curves
from components.core.store.store import Store, open_store
from pipelines.report.report import write_report
from tests.pipelines.made_up_run import COSTS, LAYERS, SEARCH, make_run, put
from tests.pipelines.report.browser import CHROMEDRIVER, CHROMIUM, MISSING, headless_chromium, open_page


@pytest.fixture(scope="module")
def store(made_up_store: Store) -> Store:
    return made_up_store


@pytest.fixture(scope="module")
def page(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("report") / "report.html"
    write_report(store, "demo-1", page)
    return page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip(MISSING)
    with headless_chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def opened(browser: Any, page: Path) -> Any:
    browser.get("about:blank")
    browser.get_log("performance")  # what the browser asked for its own first page
    open_page(browser, page)
    return browser


def plotted(browser: Any, element: str) -> Any:
    """The traces of a chart, as the plotting library has them."""
    script = f"return JSON.parse(JSON.stringify(document.getElementById('{element}').data))"
    return browser.execute_script(script)


def on_axis(traces: list[Any], axis: str) -> list[Any]:
    return [trace for trace in traces if trace["xaxis"] == axis]


def test_the_page_opens_without_a_complaint_and_asks_nothing_of_any_server(opened: Any) -> None:
    assert opened.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [found["params"]["request"]["url"] for found in messages if found["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked


def test_every_chart_is_drawn(opened: Any) -> None:
    front, *points, child = on_axis(plotted(opened, "pareto-chart"), "x")
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
    traces = plotted(opened, "pareto-chart")
    by_axis = {}
    for axis in ("x", "x2", "x3"):
        front, *_, child = on_axis(traces, axis)
        by_axis[axis] = front["x"], child["x"][0]
    assert by_axis["x"] == ([point.costs.latency_ms for point in SEARCH.pareto], SEARCH.child.costs.latency_ms)
    assert by_axis["x2"][1] == pytest.approx(1000 / SEARCH.child.costs.latency_ms)
    memory = [point.costs.parameters for point in SEARCH.fronts["parameters"]]
    assert by_axis["x3"] == (memory, SEARCH.child.costs.parameters)


def test_baselines_candidates_costs_and_fusion_are_shown(opened: Any) -> None:
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
    assert sentence.startswith(f"{len(noisy)} of {len(known)} slots of the choice")
    heat, dots = plotted(opened, "scores-chart")
    chosen = zip(SEARCH.slots, SEARCH.child.choice, strict=True)
    marked = [(slot.layer, slot.part) in noisy for slot, pick in chosen if pick > 0]
    assert [symbol == "circle-open" for symbol in dots["marker"]["symbol"]] == marked
    margin = next(margin for margin in known if margin.within_noise)
    difference = f"{margin.difference:+.4g} ± {margin.error:.2g}, within the noise"
    text = f"{margin.chosen}; next best {margin.following}, {difference}"
    assert any(text in label for row in heat["text"] for label in row)
    cells = opened.find_elements(By.CSS_SELECTOR, "figure.map .cell")
    assert sum(text in cell.get_attribute("title") for cell in cells) >= 1
    assert " ± 0.0010" in heat["text"][0][1]


def test_the_map_shows_a_cell_a_subblock(opened: Any) -> None:
    parent, chosen, fused, *_ = opened.find_elements(By.CSS_SELECTOR, "figure.map")
    assert len(parent.find_elements(By.CSS_SELECTOR, ".cell.own")) == 2 * LAYERS
    sizes = [size for layer in SEARCH.child.layers for size in (layer.num_key_value_heads, layer.intermediate_size)]
    assert len(chosen.find_elements(By.CSS_SELECTOR, ".cell.none")) == sizes.count(0)
    assert len(fused.find_elements(By.CSS_SELECTOR, ".cell.fused")) == 1


def test_the_reader_can_change_curve_theme_and_filter(opened: Any) -> None:
    rl = opened.find_elements(By.CSS_SELECTOR, ".curve")[-1]

    def selected() -> set[str]:
        traces = opened.execute_script("return arguments[0].data", rl.find_element(By.CSS_SELECTOR, ".chart"))
        return {trace["name"] for trace in traces if trace["visible"]}

    assert selected() == {"reward"}
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", rl)
    rl.find_element(By.CSS_SELECTOR, ".updatemenu-header").click()
    options = rl.find_elements(By.CSS_SELECTOR, ".updatemenu-dropdown-button")
    next(option for option in options if option.text == "kl").click()
    assert selected() == {"kl"}
    page = opened.find_element(By.TAG_NAME, "body")
    colours = page.value_of_css_property("background-color"), page.value_of_css_property("color")
    opened.find_element(By.CSS_SELECTOR, ".theme").click()
    assert page.value_of_css_property("background-color") != colours[0]
    assert page.value_of_css_property("color") != colours[1]
    opened.find_element(By.ID, "filter").send_keys("rl.clip")
    shown = [line for line in opened.find_elements(By.CSS_SELECTOR, "#settings dl > div") if line.is_displayed()]
    assert [line.find_element(By.TAG_NAME, "dt").text for line in shown] == ["clip_ratio", "clip_ratio_high"]
    assert opened.get_log("browser") == []


def test_a_run_without_results_has_a_page_too(browser: Any, tmp_path: Path) -> None:
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


def test_a_run_without_search_shows_the_maps_of_its_models(store: Store, tmp_path: Path) -> None:
    record = store.document("runs/demo-1/run.json")
    roles = {role: made for role, made in record["roles"].items() if role in ("sft", "rl")}
    store.put_document("runs/tuned/run.json", record | {"run": "tuned", "roles": roles})
    for label in ("sft", "rl"):
        store.put_document(f"runs/tuned/stages/{label}.json", store.document(f"runs/demo-1/stages/{label}.json"))
    write_report(store, "tuned", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("<figure") == 1  # both have one shape
    assert "pareto-chart" not in text


def test_the_page_is_one_small_file_that_forbids_requests(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size <= 5_000_000
    assert "default-src 'none'" in text
    assert '<link rel="icon" href="data:,">' in text
    assert text.count("<link") == 1
    assert "src=" not in text.replace("default-src", "").replace("script-src", "")


def test_text_of_strangers_stays_text(browser: Any, tmp_path: Path) -> None:
    """Recipe, stage labels, metrics and options are named by markup; nothing of it becomes an element or a script."""
    attack = '</script><script>document.title = "attacked"</script><img src=x onerror="document.title = 1">'
    store = open_store(tmp_path / "store")
    make_run(store)
    record_curves(store, "demo-1")
    record = store.document("runs/demo-1/run.json")
    search = json.loads(SEARCH.model_dump_json())
    search["machine"]["device"] = attack
    for margin in search["margins"]:
        margin["following"] = margin["following"] and attack
    digest = put(store, {"search.json": json.dumps(search)}, "table")
    roles = {**record["roles"], "search": {"name": "tampered"}}
    recipe = {**record["recipe"], attack: attack}
    changed = {"recipe_name": attack, "recipe": recipe, "roles": roles, "sources": {"tampered": digest, attack: digest}}
    store.put_document("runs/demo-1/run.json", record | changed)
    for path in store.documents("curves/"):
        curves = store.document(path)
        store.put_document(path, {**curves, attack: next(iter(curves.values()))})
    stage = store.document("runs/demo-1/stages/sft.json")
    store.put_document("runs/demo-1/stages/sft.json", stage | {"label": attack})
    write_report(store, "demo-1", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("</script>") == len(re.findall("<script[ >]", text))
    open_page(browser, tmp_path / "report.html")
    assert browser.get_log("browser") == []
    assert browser.title == "Tessera · demo-1"
    assert browser.find_elements(By.TAG_NAME, "img") == []
    assert attack in browser.find_element(By.TAG_NAME, "header").text


def test_text_can_be_read_without_javascript(page: Path) -> None:
    text = re.sub(r"<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for words in (
        "Speed-up",
        "Replace-1-block scores",
        f"{SEARCH.child.score:.4f}",
        "clip_ratio",
        "slots of the choice",
    ):
        assert words in text
    assert "Figures need JavaScript" in text


def test_the_same_run_gives_the_same_page(store: Store, page: Path, tmp_path: Path) -> None:
    write_report(store, "demo-1", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()
