"""An operator that is killed before or after any write of a promotion neither promotes twice nor forgets one."""

from collections.abc import Callable
from typing import Any

import pytest

from components.core.lineage.champion import champion
from pipelines.promotion.git_hosts import Gitea
from pipelines.promotion.repository import Repository
from tests.pipelines.retraining.site import Site
from tests.pipelines.retraining.world import World, count_store_writes, set_rollout, step


def serve(site: Site, bundle: str) -> None:
    """A commit, and a canary that ends well."""
    step(site.world)
    set_rollout(site.world, bundle, "Healthy")
    step(site.world)
    assert champion(site.world.store, "nano") == bundle
    assert site.served == bundle


def take_back(site: Site, bundle: str) -> None:
    """A commit, a canary that fails, and a commit that takes it back."""
    before = site.served
    step(site.world)
    set_rollout(site.world, bundle, "Degraded", message="aborted")
    step(site.world)
    assert site.served == before


def request(site: Site, bundle: str) -> None:
    """A request, and a person who merges it."""
    step(site.world)
    newest = site.host.requests[-1]
    site.platform.merge(newest["branch"])
    newest["state"] = "merged"
    step(site.world)
    step(site.world)
    assert site.served == bundle


def count_pushes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what goes to Git and its server be killed too."""

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any) -> Any:
            with world.writes.one():
                return method(*arguments)

        return write

    monkeypatch.setattr(Repository, "push", counted(Repository.push))
    monkeypatch.setattr(Gitea, "open", counted(Gitea.open))


@pytest.mark.parametrize(
    ("story", "mode", "commits", "requests", "watch"),
    [(serve, "commit", 1, 0, True), (take_back, "commit", 2, 0, True), (request, "pullRequest", 2, 1, False)],
)
def test_killed_at_every_write_in_turn(
    story: Callable[[Site, str], None],
    mode: str,
    commits: int,
    requests: int,
    watch: bool,
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = site.world
    count_store_writes(world, monkeypatch)
    count_pushes(world, monkeypatch)
    site.create(mode, **({"rollout": "nano"} if watch else {}))
    number, num_writes = 0, 0
    while number < num_writes + 2:  # a round without a kill, then one before each of its writes, and after the last
        world.writes.is_counting = False
        bundle = site.run(0.8)
        before = len(site.platform.commits()), len(site.host.requests)
        kill_at = number - 1 if number <= num_writes else num_writes - 0.5
        world.writes.is_counting = True
        world.writes.done, world.writes.kill_at = 0, kill_at if number else None
        story(site, bundle)
        if number == 0:
            num_writes = world.writes.done
        world.writes.is_counting = False
        status = world.step(minutes=1)
        where = f"killed at {kill_at} of {num_writes}: {status.condition('Promoted')}"
        assert len(site.platform.commits()) == before[0] + commits, where
        assert len(site.host.requests) == before[1] + requests, where
        assert status.promotion is not None, where
        assert (status.promotion.bundle, status.attempt) == (bundle, None), where
        assert status.promotion.state == ("Ended" if story is take_back else "Serving"), where
        number += 1
    assert num_writes >= 5
