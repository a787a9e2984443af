"""Talking to a model: reasoning and answer arrive apart."""

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from components.core.base.errors import InputError
from components.core.serving.serving_config import ServingConfig
from components.core.store.store import open_store
from pipelines.recipe.schema import Recipe
from pipelines.records.runs import begin_run, run_record
from pipelines.run.chat import StartView, converse, served_model, serving_of, stream_answer


def chunk(**delta: str) -> SimpleNamespace:
    return SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(**{"content": None, **delta}))])


class Client:
    """Answers as a server of vLLM's does, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.chat = SimpleNamespace(completions=self)

    def create(self, **options: Any) -> Iterator[SimpleNamespace]:
        self.asked.append({**options, "messages": list(options["messages"])})
        yield chunk(reasoning="3+4=")
        yield chunk(reasoning="7")
        yield chunk(content="7")
        yield SimpleNamespace(choices=[])


def test_reasoning_and_answer_stream_apart() -> None:
    client: Any = Client()
    assert list(stream_answer(client, "demo-1", [])) == [("reasoning", "3+4="), ("reasoning", "7"), ("content", "7")]


def test_a_conversation_begins_with_the_toggle_and_remembers_answers_without_their_reasoning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client: Any = Client()
    questions = iter(["3+4=", "and now?", ""])
    console = Console(file=io.StringIO())
    monkeypatch.setattr(console, "input", lambda _: next(questions))
    converse(client, "demo-1", "on", console)
    assert [message["content"] for message in client.asked[1]["messages"]] == [
        "detailed thinking on",
        "3+4=",
        "7",
        "and now?",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_how_long_a_server_has_been_starting_is_shown(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with StartView("demo-1", console) as start:
        for seconds in (0.0, 7.5, 15.0, 15.1, 29.0, 31.0):
            start.update(seconds)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    if terminal:
        assert "starting a server for demo-1, 31 s so far" in shown
    else:
        assert shown.splitlines() == [
            "starting a server for demo-1",
            "starting a server for demo-1, 15 s so far",
            "starting a server for demo-1, 31 s so far",
        ]


def test_a_run_without_a_model_has_nothing_to_serve(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    run = begin_run(store, Recipe(name="empty"), {})
    with pytest.raises(InputError, match="has made no model yet"):
        served_model(store, run)


def test_a_run_is_served_as_its_recipe_says(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    serving = ServingConfig(dtype="bfloat16", host="0.0.0.0", port=8123)
    run = begin_run(store, Recipe(name="mine", serving=serving), {})
    assert serving_of(store, run) == serving
    record = run_record(store, run)
    del record["recipe"]["serving"]  # a run from before there was the key
    store.put_document(f"runs/{run}/run.json", record)
    assert serving_of(store, run) == ServingConfig()
