"""Models that the chart serves: a canary behind a real gateway, judged by the chart's Job and a real Prometheus.

`tests/vllm_standin.py` takes the place of vLLM, so that versions fail as they are told to; `test_serving_vllm.py` has
vLLM itself. A file of the model has the version and the faults of its stand-in, so a bad version differs from a good
one in its digest alone.
"""

import logging
from pathlib import Path

import pytest

from tests.cluster.api import Cluster
from tests.cluster.served_model import Served, SignedStore
from tests.cluster.streaming_clients import asking_clients
from tests.vllm_standin import Behaviour, sums

pytestmark = pytest.mark.cluster

TOKEN_S = 0.25
GOOD = Behaviour("1", token_s=TOKEN_S)
log = logging.getLogger(__name__)


@pytest.fixture
def served(cluster: Cluster, signed_store: SignedStore, tmp_path: Path) -> Served:
    """The model `nano`, not installed yet."""
    return Served(cluster, signed_store, tmp_path, sums(220))


def test_a_good_version_gets_all_users_and_the_old_one_gets_them_back_without_a_lost_request(served: Served) -> None:
    served.install(GOOD)
    with asking_clients() as tally:
        served.change(Behaviour("2", token_s=TOKEN_S))
        log.info("canary, questions and steps: %.0f s", served.wait_for("Healthy"))
        assert "accepted" in served.judge_log()
        assert served.analysis() == dict.fromkeys(("questions", "errors", "first-token", "inter-token"), "Successful")
        answered = tally.complete["2"]
        served.cluster.wait("the new version answers alone", lambda: tally.complete["2"] > answered + 150)
        old = tally.complete["1"]
        served.cluster.wait("it goes on doing so", lambda: tally.complete["2"] > answered + 250)
        assert tally.complete["1"] == old
        served.change(GOOD)
        log.info("canary of the version before: %.0f s", served.wait_for("Healthy"))
        served.cluster.wait("the old version answers again", lambda: tally.complete["1"] > old + 50)
    log.info("answers: %s", dict(tally.complete))
    assert tally.lost == []


def test_a_version_that_fails_or_has_a_wrong_chat_template_is_stopped_before_it_has_users(served: Served) -> None:
    served.install(GOOD)
    with asking_clients() as tally:
        for bad, words in (
            (Behaviour("2", error_fraction=0.1, token_s=TOKEN_S), "failed"),
            (Behaviour("3", wrong_template=True, token_s=TOKEN_S), "in format"),
        ):
            served.change(bad)
            log.info("stopped by the judge: %.0f s", served.wait_for("Degraded"))
            refused = served.judge_log().partition("refused: ")[2]
            assert words in refused
            assert served.analysis() == {"questions": "Failed"}
        served.change(GOOD)
        log.info("reverted: %.0f s", served.wait_for("Healthy"))
    log.info("answers: %s", dict(tally.complete))
    assert tally.lost == []
    assert set(tally.complete) == {"1"}


def test_a_version_that_is_slow_with_users_is_stopped_by_prometheus(served: Served) -> None:
    served.install(GOOD)
    with asking_clients() as tally:
        served.change(Behaviour("2", token_s=3 * TOKEN_S))
        log.info("stopped by Prometheus: %.0f s", served.wait_for("Degraded"))
        assert "accepted" in served.judge_log()
        phases = served.analysis()
        assert phases["questions"] == "Successful"
        assert "Failed" in (phases["first-token"], phases["inter-token"])
        answered = tally.complete["1"]
        served.cluster.wait("the old version answers", lambda: tally.complete["1"] > answered + 50)
        slow = tally.complete["2"]
        served.change(GOOD)
        log.info("reverted: %.0f s", served.wait_for("Healthy"))
    log.info("answers: %s", dict(tally.complete))
    assert tally.lost == []
    assert tally.complete["2"] <= slow + 5  # open answers of the canary came to their end
