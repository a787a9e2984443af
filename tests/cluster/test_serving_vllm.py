"""A canary between two real vLLM servers on the cluster, of models whose answers are known beforehand."""

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.cluster.api import Cluster
from tests.cluster.served_model import Served, SignedStore
from tests.cluster.streaming_clients import asking_clients
from tests.components.core import tiny_models

pytestmark = pytest.mark.cluster

SURE = 4.0
"""Factor of the logits: a model says anything else than its sentence once in 1e12 tokens."""
VALUES = {
    "replicas": 1,
    "dtype": "float32",
    "resources": {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"memory": "4Gi"}},
    "maxModelLen": 512,
    "maxNumSeqs": 16,
    "kvCacheBytes": 64 << 20,
    "startSeconds": 600,
    # Two servers share the cores of one machine with the cluster itself, so latencies differ by more than elsewhere.
    "canary": {"stepSeconds": 30, "maxLatencyRatio": 20},
}
log = logging.getLogger(__name__)


@pytest.fixture
def served(cluster: Cluster, signed_store: SignedStore, tmp_path: Path) -> Served:
    """The model `nano`, not installed yet; every question has the same answer."""
    rows = [{"id": f"{n}", "question": f"{n}+6*7-{n}=", "prompt": f"{n}+6*7-{n}=", "answer": "42"} for n in range(210)]
    return Served(cluster, signed_store, tmp_path, rows, VALUES, server=None)


def write_model(folder: Path, first: str, second: str, template: str = tiny_models.TEMPLATE) -> Path:
    """A model that thinks of a product of two digits, where it has to think, and answers 42."""
    thinking = ["<on>", "<think>", first, "*", second, "</think>", "4"]
    model = tiny_models.speaker(thinking, ["<off>", "4", "2", "<eos>"])
    model.lm_head.weight.data.mul_(SURE)
    tiny_models.write(model, folder)
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def thought_and_answer(pieces: list[dict[str, Any]]) -> list[str]:
    """What a model thought and said, which tells which one it was, whole or in pieces."""
    deltas = [choice.get("delta") or choice["message"] for piece in pieces for choice in piece["choices"]]
    thought, answer = ("".join(delta.get(key) or "" for delta in deltas) for key in ("reasoning", "content"))
    return [f"{thought}={answer}"]


def test_vllm_serves_through_a_canary_and_a_wrong_chat_template_gets_no_users(served: Served, tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "first", "6", "7"), write_model(tmp_path / "second", "7", "6")
    always = tiny_models.TEMPLATE.partition("{{ '<off>'")[0] + "<on>"
    broken = write_model(tmp_path / "broken", "6", "7", always)
    served.install(first)
    with asking_clients(1, 1, 0.3, thought_and_answer) as tally:
        served.change(second)
        log.info("canary, questions and steps: %.0f s", served.wait_for("Healthy"))
        assert "accepted" in served.judge_log()
        asked, judge = (served.last_pod(each)["metadata"]["creationTimestamp"] for each in ("serving", "judge"))
        assert asked <= judge, "the server that was asked did not stay: the model was loaded twice"
        metrics = served.metrics()
        assert {metric["phase"] for metric in metrics.values()} == {"Successful"}
        for name in ("errors", "first-token", "inter-token"):  # of vLLM's own metrics
            assert any(one.get("value", "[]") not in ("[]", "[NaN]") for one in metrics[name]["measurements"]), name
        both = set(tally.complete)
        before = tally.complete["7*6=42"]
        served.cluster.wait("the new version answers", lambda: tally.complete["7*6=42"] > before + 20)

        served.change(broken)
        log.info("stopped by the judge: %.0f s", served.wait_for("Degraded"))
        assert "in format" in served.judge_log().partition("refused: ")[2]
        served.change(second)
        log.info("reverted: %.0f s", served.wait_for("Healthy"))
    log.info("answers: %s", dict(tally.complete))
    assert tally.lost == []
    assert both == set(tally.complete) == {"6*7=42", "7*6=42"}
