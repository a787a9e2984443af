"""From a run that has succeeded to what is served: on real git, with a stand-in for the host and for the Rollout."""

import pytest
import yaml

from components.core.lineage.champion import champion
from infra.chart import render
from pipelines.promotion.repository import Repository
from pipelines.records.runs import run_names
from tests.helm.cases import find
from tests.pipelines.promotion.evaluated_run import answers, record_run
from tests.pipelines.promotion.git_server import FILE
from tests.pipelines.retraining.site import Site
from tests.pipelines.retraining.world import World, condition, set_rollout


def test_a_better_model_becomes_one_commit(site: Site) -> None:
    site.create()
    bundle = site.run(0.85)
    status = site.world.step(minutes=1)
    assert site.served == bundle
    subject = site.platform.commits()[0]
    assert subject == f"Serve nano: bundle {bundle[:12]} of run {status.runs[0].run}"
    assert site.platform.read() == FILE.format(digest=bundle).strip()
    assert status.gate is not None
    assert (status.gate.champion, status.gate.champion_run, status.gate.passed) == (site.champion, "champion-1", True)
    status = site.world.step(minutes=1)
    assert condition(status, "Promoted")[:2] == ("True", "Serving")
    assert status.last_promoted == site.world.now
    assert champion(site.world.store, "nano") == bundle
    before = site.platform.commits()
    assert site.world.step(days=1) == status
    assert site.platform.commits() == before


def test_a_worse_model_is_stopped_at_the_gate(site: Site) -> None:
    site.create()
    site.run(0.6)
    status = site.world.step()
    assert condition(status, "Promoted")[:2] == ("False", "GateNotPassed")
    assert "accuracy_on: -20.0 points" in condition(status, "Promoted")[2]
    assert (site.served, status.promotion, status.phase) == (site.champion, None, "Ready")
    better = site.run(0.9)
    site.world.step()
    assert site.served == better


def test_the_first_model_passes_by_its_thresholds(site: Site) -> None:
    site.platform.change("")
    site.create()
    bundle = site.run(0.3)
    site.world.step()
    assert site.served == bundle


def test_a_request_waits_for_a_person_who_merges_it(site: Site) -> None:
    site.create("pullRequest")
    bundle = site.run(0.9)
    status = site.world.step(minutes=1)
    assert condition(status, "Promoted")[:2] == ("Unknown", "Requested")
    (request,) = site.host.requests
    assert f"## Bundle `{bundle}`" in request["body"]
    assert request["branch"] == f"tessera/promote-models-nano-{bundle[:16]}-over-{site.champion[:12]}"
    assert site.served == site.champion
    site.world.step(minutes=1)
    assert len(site.host.requests) == 1
    site.platform.merge(request["branch"])
    request["state"] = "merged"
    site.world.step(minutes=1)
    status = site.world.step(minutes=1)
    assert (condition(status, "Promoted")[1], site.served) == ("Serving", bundle)


def test_a_request_that_a_person_closes_is_not_opened_again(site: Site) -> None:
    site.create("pullRequest")
    site.run(0.9, weights="same")
    site.world.step()
    site.host.requests[0]["state"] = "closed"
    status = site.world.step()
    assert condition(status, "Promoted")[:2] == ("False", "RequestClosed")
    site.run(0.9, weights="same")  # another recipe that makes the same bundle
    site.world.step()
    assert len(site.host.requests) == 1


def test_a_newer_model_replaces_an_open_request_but_not_a_merged_one(site: Site) -> None:
    site.create("pullRequest")
    site.run(0.85)
    site.world.step()
    site.run(0.9)
    site.world.step()
    assert [each["state"] for each in site.host.requests] == ["closed", "open"]
    second = site.host.requests[1]
    third = site.run(0.95)
    site.platform.merge(second["branch"])  # just before the operator looks
    second["state"] = "merged"
    site.world.step()
    for _ in range(3):
        status = site.world.step()
    assert [each["state"] for each in site.host.requests] == ["closed", "merged", "open"]
    assert status.promotion is not None
    assert (status.promotion.bundle, status.promotion.previous) == (third, site.served)


def test_without_git_a_person_gets_the_command(site: Site) -> None:
    site.create("none")
    site.run(0.9)
    status = site.world.step()
    assert condition(status, "Promoted")[:2] == ("False", "ByHand")
    assert f"tessera promote {status.runs[0].run} --to serving/nano.yaml" in condition(status, "Promoted")[2]
    assert site.served == site.champion


def test_the_alias_waits_for_the_canary(site: Site) -> None:
    site.create(rollout="nano")
    bundle = site.run(0.9)
    site.world.step()
    assert condition(site.world.step(), "Promoted")[1] == "NoRollout"
    set_rollout(site.world, site.champion, "Healthy")
    assert condition(site.world.step(), "Promoted")[1] == "NotApplied"
    set_rollout(site.world, bundle, "Healthy", generation=3, seen=2)  # the status is about the old bundle
    assert condition(site.world.step(), "Promoted")[1] == "Canary"
    set_rollout(site.world, bundle, "Paused", message="CanaryPauseStep")
    assert condition(site.world.step(), "Promoted")[2] == "the Rollout nano is Paused: CanaryPauseStep"
    assert champion(site.world.store, "nano") is None
    set_rollout(site.world, bundle, "Healthy")
    status = site.world.step()
    assert condition(status, "Promoted")[:2] == ("True", "Serving")
    assert champion(site.world.store, "nano") == bundle


def test_the_operator_follows_the_rollout_that_the_chart_makes_of_its_commit(site: Site) -> None:
    name = "tessera-serving-nano"
    site.create(rollout=name)
    bundle = site.run(0.9)
    site.world.step()
    assert condition(site.world.step(), "Promoted")[1] == "NoRollout"
    rollout = find(render(yaml.safe_load(site.platform.read())), "Rollout", name)
    rollout["metadata"]["generation"] = 1
    site.world.objects.rollouts[name] = rollout | {"status": {"phase": "Healthy", "observedGeneration": "1"}}
    assert condition(site.world.step(), "Promoted")[:2] == ("True", "Serving")
    assert champion(site.world.store, "nano") == bundle


@pytest.mark.parametrize("mode", ["commit", "pullRequest"])
def test_a_canary_that_fails_is_taken_back_in_git_once(site: Site, mode: str) -> None:
    site.create(mode, rollout="nano")
    bundle = site.run(0.9, weights="broken in serving")
    site.world.step()
    if mode == "pullRequest":
        site.platform.merge(site.host.requests[0]["branch"])
        site.host.requests[0]["state"] = "merged"
        site.world.step()
    assert site.served == bundle
    set_rollout(site.world, bundle, "Degraded", message="RolloutAborted: metric error-rate")
    status = site.world.step()
    assert condition(status, "Promoted")[:2] == ("False", "CanaryFailed")
    assert "RolloutAborted: metric error-rate; Git goes back by" in condition(status, "Promoted")[2]
    if mode == "pullRequest":
        assert len(site.host.requests) == 2
        site.platform.merge(site.host.requests[1]["branch"])
        site.host.requests[1]["state"] = "merged"
    assert site.served == site.champion
    assert champion(site.world.store, "nano") is None
    set_rollout(site.world, site.champion, "Healthy")
    commits = site.platform.commits()
    site.world.step()
    site.run(0.9, weights="broken in serving")
    site.world.step()
    assert (site.platform.commits(), len(site.host.requests)) == (commits, 2 if mode == "pullRequest" else 0)
    next_one = site.run(0.95)
    site.world.step()
    if mode == "commit":
        assert site.served == next_one


def test_a_bundle_that_failed_before_is_known_from_git_alone(site: Site) -> None:
    site.create(rollout="nano")
    bundle = site.run(0.9, weights="broken in serving")
    site.world.step()
    set_rollout(site.world, bundle, "Degraded", message="aborted")
    site.world.step()
    site.create(rollout="nano")  # the object was deleted and made anew
    site.run(0.9, weights="broken in serving")
    status = site.world.step()
    assert condition(status, "Promoted")[:2] == ("False", "FailedBefore")
    assert site.served == site.champion


def test_a_change_that_is_taken_back_during_the_canary_ends_it(site: Site) -> None:
    site.create(rollout="nano")
    bundle = site.run(0.9)
    set_rollout(site.world, bundle, "Paused")
    site.world.step()
    site.world.step()
    site.platform.change(site.champion)
    set_rollout(site.world, site.champion, "Healthy")
    status = site.world.step()
    assert condition(status, "Promoted")[:2] == ("False", "Withdrawn")
    assert status.last_promoted is None


def test_a_model_that_a_person_takes_back_and_puts_back_after_it_served_all_users_is_told(site: Site) -> None:
    site.create(rollout="nano")
    bundle = site.run(0.9)
    site.world.step()
    set_rollout(site.world, bundle, "Healthy")
    served = site.world.step()
    assert condition(served, "Promoted")[:2] == ("True", "Serving")
    site.platform.change(site.champion)
    set_rollout(site.world, site.champion, "Healthy")
    status = site.world.step()
    assert condition(status, "Promoted") == (
        "False",
        "Withdrawn",
        f"the Rollout nano has bundle {site.champion[:12]}, not {bundle[:12]}, now",
    )
    assert status.last_promoted == served.last_promoted
    site.world.step()
    assert site.served == site.champion
    site.platform.change(bundle)  # and another one puts it back
    set_rollout(site.world, bundle, "Paused")
    assert condition(site.world.step(), "Promoted")[:2] == ("False", "Withdrawn")
    set_rollout(site.world, bundle, "Healthy")
    assert condition(site.world.step(), "Promoted")[:2] == ("True", "Serving")


def test_a_commit_that_is_taken_back_before_the_rollout_has_it_ends_too(site: Site) -> None:
    site.create(rollout="nano")
    site.run(0.9)
    set_rollout(site.world, site.champion, "Healthy")
    site.world.step()
    assert condition(site.world.step(), "Promoted")[1] == "NotApplied"
    site.platform.change(site.champion)
    assert condition(site.world.step(), "Promoted")[:2] == ("False", "Withdrawn")


def test_an_outage_of_git_is_a_condition_and_stops_no_run(site: Site) -> None:
    site.create()
    hidden = site.platform.bare.rename(site.platform.bare.with_suffix(".away"))
    site.run(0.9)
    status = site.world.step()
    assert condition(status, "Promoted")[:2] == ("Unknown", "GitError")
    assert (status.phase, condition(status, "Ready")[0]) == ("Ready", "True")
    site.world.change_recipe(seed=99)
    assert site.world.step().phase == "Running"
    hidden.rename(site.platform.bare)
    site.world.step()
    assert site.served != site.champion


def test_a_champion_that_changes_meanwhile_is_compared_anew(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    other = record_run(site.world.store, "other-1", answers(0.99, seed=0))
    push, is_first = Repository.push, [True]

    def slower(self: Repository, commit: str, branch: str) -> None:
        if is_first.pop() if is_first else False:
            site.platform.change(other)
        push(self, commit, branch)

    monkeypatch.setattr(Repository, "push", slower)
    site.create()
    site.run(0.85)
    status = site.world.step()
    assert site.served == other
    assert condition(status, "Promoted")[1] == "Conflict"
    status = site.world.step()
    assert condition(status, "Promoted")[1] == "GateNotPassed"
    assert status.gate is not None
    assert status.gate.champion == other


def test_the_runs_of_champion_and_candidate_are_not_forgotten(site: Site, world: World) -> None:
    site.create()
    world.change_spec(history=1)
    runs = []
    for accuracy in (0.9, 0.1, 0.1, 0.1):
        site.run(accuracy)
        runs.append(world.step().runs[0].run)
    names = set(run_names(world.store))
    assert {"champion-1", runs[0], runs[-1]} <= names
    assert runs[1] not in names


def test_a_run_without_a_bundle_is_a_condition(site: Site, world: World) -> None:
    site.create()
    world.step()
    world.end()
    world.step()
    status = world.step()
    assert condition(status, "Promoted")[1] == "InputError"
    assert "has made no bundle" in condition(status, "Promoted")[2]
