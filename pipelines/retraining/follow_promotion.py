"""The way of a run that has succeeded into what is served: gate, commit or request, canary, and back if it fails.

Each step can be done again without effect. What was pushed or opened is found in Git: a commit by the digest that the
file has or by a line of the message, a request by its branch, whose name has the digests of both bundles.
"""

import os
from collections.abc import Callable
from datetime import datetime
from typing import Any

from components.core.base.config import digest_of
from components.core.base.errors import TesseraError
from components.core.lineage.champion import move_champion
from components.core.runtime.stage_command import TRACKING_URI
from components.core.store.store import Store
from pipelines.promotion.evaluation import evaluation_of_run
from pipelines.promotion.evidence import gather_evidence
from pipelines.promotion.git_hosts import connect_host
from pipelines.promotion.page import promotion_title
from pipelines.promotion.platform_settings import OperatorSettings, PlatformRepository
from pipelines.promotion.publish import Change, commit_to_branch, open_request, served_bundle
from pipelines.promotion.repository import GitConflict, Repository
from pipelines.promotion.rules import Promotion
from pipelines.retraining.cluster import BUNDLE_ANNOTATION, Objects
from pipelines.retraining.status import PromotionStatus, RetrainingStatus

BUNDLE_LINE, BACK_LINE = "Tessera-Bundle: ", "Tessera-Reverts: "
"""Lines of a commit's message by which a promotion and its reversal are found again."""


class PromotionFollower:
    """The promotion of one object.

    Args:
        status: is kept up to date.
        rules: the specification's.
        place: namespace and name of the object.
        store: has the runs.
        objects: the API server.
        settings: the operator's repositories and key.
        write: writes the status.
        now: the present time.
    """

    def __init__(
        self,
        status: RetrainingStatus,
        rules: Promotion,
        place: tuple[str, str],
        store: Store,
        objects: Objects,
        settings: OperatorSettings,
        write: Callable[[], None],
        now: datetime,
    ) -> None:
        self._status, self._rules, self._store, self._objects = status, rules, store, objects
        self._namespace, self._name = place
        self._settings, self._write, self._now = settings, write, now
        self._git, self._rules_digest = rules.git.naming(place[1]), digest_of(rules.model_dump(mode="json"))

    @property
    def _platform(self) -> PlatformRepository:
        return self._settings.repository(self._git.repository)

    def advance(self) -> None:
        """Take the step that the promotion needs now. An error is a condition; the next step tries again."""
        try:
            self._advance()
        except TesseraError as error:
            reason = "Conflict" if isinstance(error, GitConflict) else type(error).__name__
            self._judge(None, reason, str(error))

    def _advance(self) -> None:
        current = self._status.promotion
        if current is not None and current.state == "Committed":
            self._follow_canary(current)
            return
        run = next((each.run for each in self._status.runs if each.state == "Succeeded"), None)
        if run is not None and not self._is_settled(run):
            self._promote(run)
        elif current is not None and current.state == "Requested":
            self._follow_request(current)
        elif current is not None and current.state == "Serving":
            self._notice_withdrawal(current)

    # The gate

    def _is_settled(self, run: str) -> bool:
        """Whether the bundle of a run is on its way, or was judged by these rules and stays where it is."""
        promotion, gate = self._status.promotion, self._status.gate
        if promotion is not None and promotion.run == run:
            return True
        is_judged = gate is not None and gate.run == run and self._status.gate_rules == self._rules_digest
        return is_judged and gate is not None and (not gate.passed or self._git.mode == "none")

    def _promote(self, run: str) -> None:
        """Compare the bundle of a run with what Git names, and publish it where it passes."""
        status = self._status
        bundle = evaluation_of_run(self._store, run).bundle
        with Repository(self._platform, self._git.branch) as repository:
            served = served_bundle(repository, self._git)
            if self._continue_earlier(repository, run, bundle, served):
                return
            evidence = gather_evidence(self._store, run, served, self._rules, self._settings.signing_key)
            gate = status.gate = evidence.gate
            status.gate_rules = self._rules_digest
            if not gate.passed:
                self._judge(False, "GateNotPassed", gate.message)
                return
            if self._git.mode == "none":
                command = f"tessera promote {run} --to {self._git.path} --key {self._git.key} --store {self._store.uri}"
                self._judge(False, "ByHand", f"{gate.message}; to promote it: {command}")
                return
            if self._was_merged_meanwhile():
                return
            self._judge(None, "Promoting", gate.message)
            self._write()  # the champion, which a step after a restart could not tell any more
            title = promotion_title(self._name, gate)
            change = Change(served, bundle, f"{BUNDLE_LINE}{bundle}", title, evidence.page)
            promotion = PromotionStatus(run=run, bundle=bundle, previous=served, mode=self._git.mode, state="Requested")
            self._publish(repository, change, promotion, "promote")
        status.promotion = promotion
        if promotion.state == "Requested":
            self._judge(None, "Requested", f"waits to be merged: {promotion.address}")
        else:
            self._judge(None, "Committed", f"commit {promotion.commit[:12]} names bundle {bundle[:12]}")

    def _continue_earlier(self, repository: Repository, run: str, bundle: str, served: str) -> bool:
        """Go on with a promotion of this bundle that the status or Git knows; returns whether there is one."""
        before, gate = self._status.promotion, self._status.gate
        if before is not None and before.bundle == bundle and (served == bundle or before.state != "Serving"):
            before.run = run  # another run that has made the same bundle
            return True
        previous = gate.champion if gate is not None and gate.bundle == bundle else ""
        promotion = PromotionStatus(run=run, bundle=bundle, previous=previous, mode=self._git.mode, state="Serving")
        if served == bundle:
            commit = repository.find_commit(f"{BUNDLE_LINE}{bundle}")
            if commit is not None:
                promotion.state, promotion.commit = "Committed", commit
            self._judge(True if commit is None else None, "AlreadyNamed", f"Git names bundle {bundle[:12]} already")
        elif commit := repository.find_commit(f"{BACK_LINE}{bundle}"):
            promotion.state = "Ended"
            reason = f"bundle {bundle[:12]} has failed in its canary before, and commit {commit[:12]} took it back"
            self._judge(False, "FailedBefore", reason)
        else:
            return False
        self._status.promotion = promotion
        return True

    def _was_merged_meanwhile(self) -> bool:
        """Close the open request of an earlier run, which this one replaces; returns whether it was merged before."""
        earlier = self._status.promotion
        if earlier is None or earlier.state != "Requested":
            return False
        host = connect_host(self._platform)
        request = host.read(earlier.request)
        if request.state == "open":
            host.close(earlier.request)
        elif request.state == "merged":
            self._follow_request(earlier)
            return True
        return False

    def _publish(self, repository: Repository, change: Change, promotion: PromotionStatus, what: str) -> None:
        """Commit a change to the branch, or open a request with it; notes where it is."""
        if promotion.mode == "commit":
            promotion.commit = commit_to_branch(repository, self._git, change)
            promotion.state = "Committed"
            return
        over = f"-over-{change.old[:12]}" if change.old else ""
        branch = f"tessera/{what}-{self._namespace}-{self._name}-{promotion.bundle[:16]}{over}"
        request = open_request(repository, self._platform, self._git, change, branch)
        promotion.request, promotion.address = request.number, request.url

    def _follow_request(self, promotion: PromotionStatus) -> None:
        """See what has become of the request."""
        request = connect_host(self._platform).read(promotion.request)
        if request.state == "merged":
            promotion.state = "Committed"
            self._judge(None, "Merged", f"{promotion.address} was merged")
        elif request.state == "closed":
            promotion.state = "Ended"
            self._judge(False, "RequestClosed", f"{promotion.address} was closed; the champion stays")

    # The canary

    def _follow_canary(self, promotion: PromotionStatus) -> None:
        """Wait for the canary of what Git names; it becomes the champion, or Git goes back."""
        if self._rules.rollout is None:
            self._serve(promotion, "Git names it, and no Rollout is watched")
            return
        rollout = self._objects.rollout(self._namespace, self._rules.rollout)
        if rollout is None or _bundle(rollout) != promotion.bundle:
            self._wait_for_rollout(promotion, rollout)
            return
        if not promotion.seen:
            promotion.seen = True
            self._write()  # what the Rollout has had, it cannot tell after the way back
        phase, message = _phase(rollout)
        if phase == "Healthy":
            self._serve(promotion, f"the Rollout {self._rules.rollout} is healthy")
        elif phase == "Degraded":
            self._go_back(promotion, message)
        else:
            self._judge(None, "Canary", f"the Rollout {self._rules.rollout} is {phase}: {message}".rstrip(": "))

    def _wait_for_rollout(self, promotion: PromotionStatus, rollout: dict[str, Any] | None) -> None:
        """See whether what Git names has yet to reach the Rollout, or was taken back by a person."""
        is_withdrawn = promotion.seen
        if not promotion.seen:
            with Repository(self._platform, self._git.branch) as repository:
                is_withdrawn = served_bundle(repository, self._git) != promotion.bundle
        name, bundle = self._rules.rollout, promotion.bundle[:12]
        if is_withdrawn:
            promotion.state = "Ended"
            self._judge(False, "Withdrawn", f"Git does not name bundle {bundle} any more")
        elif rollout is None:
            self._judge(None, "NoRollout", f"there is no Rollout {name!r}")
        else:
            self._judge(None, "NotApplied", f"the Rollout {name} has not got bundle {bundle} yet")

    def _notice_withdrawal(self, promotion: PromotionStatus) -> None:
        """See whether the Rollout still has what was promoted: a person may have taken it back, or put it back."""
        name, judged = self._rules.rollout, self._status.condition("Promoted")
        rollout = None if name is None else self._objects.rollout(self._namespace, name)
        if rollout is None:
            return
        if _bundle(rollout) != promotion.bundle:
            now = _bundle(rollout)[:12]
            self._judge(False, "Withdrawn", f"the Rollout {name} has bundle {now}, not {promotion.bundle[:12]}, now")
        elif judged is not None and judged.reason == "Withdrawn" and _phase(rollout)[0] == "Healthy":
            self._serve(promotion, f"the Rollout {name} is healthy with it again")

    def _serve(self, promotion: PromotionStatus, why: str) -> None:
        """The bundle serves all traffic: it is the champion."""
        evaluation = evaluation_of_run(self._store, promotion.run)
        name = str(evaluation.deploy.result.get("registered_model") or "")
        if name:
            move_champion(self._store, name, promotion.bundle, os.environ.get(TRACKING_URI))
        promotion.state, self._status.last_promoted = "Serving", self._now
        self._judge(True, "Serving", f"bundle {promotion.bundle[:12]} of run {promotion.run}: {why}")

    def _go_back(self, promotion: PromotionStatus, why: str) -> None:
        """The canary has failed, and the cluster serves the old bundle: let Git name that again."""
        bundle, previous = promotion.bundle, promotion.previous
        with Repository(self._platform, self._git.branch) as repository:
            if previous and served_bundle(repository, self._git) == bundle:
                title = f"Serve {self._name} as before: the canary of bundle {bundle[:12]} has failed"
                body = f"Bundle `{bundle}` of run `{promotion.run}` has failed in its canary: {why}\n"
                change = Change(bundle, previous, f"{BACK_LINE}{bundle}", title, body)
                self._publish(repository, change, promotion, "revert")
                where = promotion.address if promotion.mode == "pullRequest" else f"commit {promotion.commit[:12]}"
                why = f"{why}; Git goes back by {where}"
        promotion.state = "Ended"
        self._judge(False, "CanaryFailed", why)

    def _judge(self, value: bool | None, reason: str, message: str) -> None:
        self._status.judge("Promoted", value, reason, message, self._now)


def _bundle(rollout: dict[str, Any]) -> str:
    """Digest of the bundle that a Rollout is to serve."""
    return str((rollout["metadata"].get("annotations") or {}).get(BUNDLE_ANNOTATION, ""))


def _phase(rollout: dict[str, Any]) -> tuple[str, str]:
    """Phase and message of a Rollout; `Progressing` where its status is about an earlier specification."""
    status = rollout.get("status") or {}
    if str(status.get("observedGeneration", "")) != str(rollout["metadata"].get("generation", "")):
        return "Progressing", ""
    return str(status.get("phase") or "Progressing"), str(status.get("message") or "")
