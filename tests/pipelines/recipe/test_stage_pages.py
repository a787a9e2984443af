"""The stages' READMEs: their generated part is true to the code, and the rest is left alone."""

from typing import Literal

import pytest

from components.core.base.config import Config
from components.core.runtime.stage import Input, Output, Stage
from pipelines.recipe.stage_pages import BEGIN, END, ROOT, describe, page_path, renewed, settings, stages_by_folder

FOLDERS = stages_by_folder()
NO_STAGE = {"core"}


class Inner(Config):
    """Settings within settings."""

    width: float = 0.5
    """Share of `hidden`, KL(a || b)."""


class Outer(Config):
    """Settings of a made-up stage."""

    num_steps: int
    """Steps."""
    inner: Inner = Inner(width=0.25)
    """Never told itself."""
    mode: Literal["a", "b"] | None = None
    """Either, in
    two lines."""


MADE_UP = Stage(
    name="made-up",
    config=Outer,
    inputs={"many": Input("table", "layer-<i>, `<think>`", optional=True, many=True)},
    outputs={"made": Output("model", "what is made")},
    entry="nowhere:run",
    doc="Makes things up.",
    source="nowhere",
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_stage_page_is_fresh(folder: str, renew_golden: bool) -> None:
    path = page_path(folder)
    page = path.read_text(encoding="utf-8")
    if renew_golden:
        path.write_text(renewed(page, FOLDERS[folder]), encoding="utf-8")
        return
    assert page == renewed(page, FOLDERS[folder]), "make golden"


def test_every_folder_of_a_stage_has_a_page() -> None:
    folders = {path.parent.name for path in (ROOT / "components").glob("*/__init__.py")}
    assert folders - NO_STAGE == set(FOLDERS)


def test_a_setting_has_its_own_default_or_that_of_the_instance_it_stands_in() -> None:
    assert list(settings(Outer)) == [
        ("`num_steps`", "required", "Steps."),
        ("`inner.width`", "`0.25`", "Share of `hidden`, KL(a || b)."),
        ("`mode`", "`null`", "Either, in\ntwo lines."),
    ]


def test_a_table_survives_bars_tags_and_line_ends() -> None:
    lines = describe(MADE_UP).splitlines()
    assert r"| `inner.width` | `0.25` | Share of `hidden`, KL(a \|\| b). |" in lines
    assert "| `mode` | `null` | Either, in two lines. |" in lines
    assert "| `many` | table, several, optional | layer-&lt;i>, `<think>` |" in lines


def test_only_what_is_between_the_markers_changes() -> None:
    page = renewed(f"# Before\n\n{BEGIN}\nstale\n{END}\n\nafter\n", [MADE_UP])
    assert page.startswith(f"# Before\n\n{BEGIN}\n")
    assert page.endswith(f"\n{END}\n\nafter\n")
    assert "stale" not in page
    assert renewed(page, [MADE_UP]) == page


@pytest.mark.parametrize("page", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{END}"])
def test_a_page_without_its_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        renewed(page, [MADE_UP])
