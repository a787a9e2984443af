"""A stage that says which GPUs it may use, and ends when as many of its kind as expected have begun."""

import json
import os
from pathlib import Path

from pydantic import JsonValue

from components.core.runtime.context import StageContext
from components.core.runtime.hardware import VISIBLE_GPUS
from components.core.runtime.stage import Input, Output, Stage
from tests.components.core.fake_stage import FakeConfig
from tests.waiting import wait_until

MEETING_FOLDER, AT_ONCE = "GPU_STAGE_MEETING_FOLDER", "GPU_STAGE_AT_ONCE"
"""Environment variables: a folder in which those that have begun leave a file, and how many work at the same time."""

STAGE = Stage(
    name="gpu",
    config=FakeConfig,
    inputs={"numbers": Input("data", "anything")},
    outputs={"gpus": Output("table", "gpus.json")},
    entry="tests.pipelines.run.gpu_stage:run",
    doc="Say which GPUs there are.",
    source="none",
)


def run(config: FakeConfig, *, context: StageContext, out: Path, numbers: Path) -> dict[str, JsonValue]:
    """The GPUs of this process."""
    gpus, folder, at_once = os.environ[VISIBLE_GPUS], Path(os.environ[MEETING_FOLDER]), int(os.environ[AT_ONCE])
    lock = folder / f"{gpus}.lock"
    lock.touch(exist_ok=False)  # nobody else has these GPUs now
    (folder / f"{str(config.shard).replace('/', '-of-')}.begun").touch()
    wait_until("others have begun", lambda: len(list(folder.glob("*.begun"))) >= at_once)
    lock.unlink()
    (out / "gpus" / "gpus.json").write_text(json.dumps(gpus))
    return {"gpus": gpus}
