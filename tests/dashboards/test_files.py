"""The files of the chart and the page of the alerts are what the code makes, and dashboards are well formed."""

import json
import os
from pathlib import Path

import pytest

from dashboards.__main__ import files, main
from tests.dashboards.queries import FILES

NAMES = ["fleet", "rl", "run", "search", "serving", "training"]


def test_golden_files_are_what_the_code_makes() -> None:
    if os.environ.get("TESSERA_GOLDEN") == "renew":
        main()
    assert [path.stem for path in FILES] == NAMES
    assert {str(path): text for path, text in files().items() if path.read_text(encoding="utf-8") != text} == {}


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_dashboard_opens_on_numbers_and_every_panel_is_explained(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"] == f"tessera-{path.stem}"
    assert [panel["type"] for panel in dashboard["panels"][:4]] == ["stat"] * 4
    assert dashboard["panels"][0]["gridPos"]["y"] == 0
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            assert panel["description"].endswith(".")
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    variables = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert variables[:2] == ["datasource", "namespace"]
    used = {name for name in ("run", "model") if any(f"${name}" in json.dumps(panel) for panel in dashboard["panels"])}
    assert set(variables[2:]) == used
    assert [link["title"] for link in dashboard["links"]] == ["Dashboards", "MLflow", "Kubeflow", "Logs"]


def test_panels_of_a_dashboard_do_not_overlap() -> None:
    for path in FILES:
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(path.read_text())["panels"]:
            place = panel["gridPos"]
            columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
            cells = {(column, row) for column in columns for row in rows}
            assert max(columns) < 24
            assert not cells & taken, panel["title"]
            taken |= cells
