"""A cluster with a platform repository, whose file names a champion."""

from typing import Any

from pipelines.promotion.platform_settings import OperatorSettings
from tests.pipelines.promotion.evaluated_run import answers, record_run, record_stages
from tests.pipelines.promotion.git_server import FakeHost, Platform
from tests.pipelines.retraining.world import World

GIT = {"repository": "platform", "path": "serving/nano.yaml"}


class Site:
    """A cluster with a platform repository that names a champion."""

    def __init__(self, world: World, platform: Platform, host: FakeHost) -> None:
        self.world, self.platform, self.host = world, platform, host
        world.settings = OperatorSettings(repositories={"platform": platform.settings})
        self.champion = record_run(world.store, "champion-1", answers(0.8))
        platform.change(self.champion)
        self.seed = 0

    def create(self, mode: str = "commit", **promote: Any) -> None:
        self.world.create(promote={"git": GIT | {"mode": mode}, **promote})

    def run(self, accuracy: float, *, weights: str | None = None) -> str:
        """A changed recipe becomes a run that succeeds; returns its bundle."""
        self.seed += 1
        self.world.change_recipe(seed=self.seed)
        run = self.world.step(minutes=1).run_id
        bundle = record_stages(self.world.store, run, answers(accuracy), weights=weights)
        self.world.end()
        self.world.step(minutes=1)
        return bundle

    @property
    def served(self) -> str:
        (line,) = (line for line in self.platform.read().splitlines() if "digest" in line)
        return line.split("#")[0].partition(":")[2].strip(' "')
