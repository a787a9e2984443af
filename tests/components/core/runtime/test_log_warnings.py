import logging
from pathlib import Path

from components.core.runtime.runner import run_stage
from components.core.store.store import open_store
from tests.components.conftest import Recorder
from tests.components.core.fake_stage import STAGE, FakeConfig, numbers_folder


def test_what_the_store_has_to_say_is_a_note_of_the_stage_that_runs(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    numbers = store.put_folder(numbers_folder(tmp_path / "numbers", 1, 2), "data").digest
    first, second = Recorder(), Recorder()
    for recorder in (first, second):
        run_stage(STAGE, FakeConfig(), {"numbers": numbers}, store=store, reporter=recorder)
    logging.getLogger("tessera.store").warning("the server at %s is away", "here")
    assert (first.notes, second.notes) == ([], ["the server at here is away"])
