"""What the end of a run says of MLflow."""

import io
import socket
import sqlite3
from pathlib import Path

import pytest
from rich.console import Console

from components.core.lineage.replay import sync_pending_runs
from components.core.store.store import Store, open_store
from pipelines.run.finish_run import deliver_lineage, tracking_uri
from tests.components.core.lineage.test_mlflow_run import recorded_run


def said(store: Store, run: str) -> str:
    """What the user reads at the end of a run."""
    screen = Console(file=io.StringIO(), width=300)
    deliver_lineage(store, screen, run)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_a_run_says_that_mlflow_was_away_and_the_next_one_that_it_knows_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    recorded_run(store, "demo-1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert "not delivered to MLflow: MLflow at http://127.0.0.1" in (away := said(store, "demo-1"))
    assert "they stay in the store; the next run or `tessera ui` delivers them" in away

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    recorded_run(store, "demo-2", cached=True)
    assert said(store, "demo-2") == "delivered to MLflow, from earlier runs: demo-1\n"
    assert said(store, "demo-2") == ""


@pytest.mark.parametrize("name", ["what?x=1", "100%25 sure", "exp#1"])
def test_the_database_is_in_the_store_whatever_the_name_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = open_store(tmp_path / name)
    recorded_run(store, "demo-1")
    assert sync_pending_runs(store, tracking_uri(store)) == ["demo-1"]
    with sqlite3.connect(tmp_path / name / "local" / "mlflow.db") as database:
        names = {row[0] for row in database.execute("SELECT name FROM runs")}
    assert "demo-1" in names
    assert [path.name for path in tmp_path.iterdir()] == [name]
    database.close()
