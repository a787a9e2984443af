"""The evidence for a promotion: the gate's result and its page."""

from pathlib import Path
from typing import NamedTuple

from components.core.store.signatures import SignedLine, sign_once
from components.core.store.store import Store
from pipelines.promotion.evaluation import evaluation_of_run, find_evaluation
from pipelines.promotion.gate import GateResult, judge
from pipelines.promotion.page import promotion_page
from pipelines.promotion.rules import PromotionRules


class Evidence(NamedTuple):
    """What speaks for or against a promotion.

    Attributes:
        gate: the comparison with the champion.
        page: the same for people, with lineage and signature.
    """

    gate: GateResult
    page: str


def gather_evidence(
    store: Store, run: str, served: str, rules: PromotionRules, signing_key: Path | None = None
) -> Evidence:
    """Compare the bundle of a run with what is served. A bundle that passes is signed, unless it is signed already.

    Args:
        store: has both.
        run: name of the run that has made the candidate.
        served: digest of the bundle that is served; empty where there is none.
        rules: which measures decide, and how.
        signing_key: private key, PEM; None for no signature.

    Raises:
        InputError: the run has no bundle, or the key cannot be read.
        StoreError: an artifact of the candidate is gone.
    """
    candidate = evaluation_of_run(store, run)
    champion = find_evaluation(store, served) if served else None
    gate = judge(candidate, champion, served, rules)
    signed: SignedLine | None = None
    if signing_key is not None and gate.passed:
        signed = sign_once(store, gate.bundle, signing_key)
    return Evidence(gate, promotion_page(gate, candidate, champion, signed, store.uri))
