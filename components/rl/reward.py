"""Rewards that a program can check: is the answer right, is the format kept. Source: arXiv 2505.00949, section 5.1."""

from collections.abc import Callable
from dataclasses import dataclass

from components.core.text.chat import format_ok, parse_answer
from components.core.text.verifier import verify

ACCURACY_REWARD, FORMAT_REWARD = 1.0, 0.2
"""Rewards of a right answer and of the format of the mode; the paper adds the two and does not say their weights."""

Judge = Callable[[str, str], bool]
"""(answer, expected) to right or wrong; may raise, which says nothing about the answer."""


@dataclass(frozen=True)
class Reward:
    """What one answer earned."""

    total: float
    right: bool
    kept_format: bool


class Environment:
    """Judges answers; a problem on which the judge itself fails is put in quarantine, never scored as zero."""

    def __init__(self, judge: Judge = verify) -> None:
        self._judge = judge
        self.quarantine: dict[str, str] = {}
        """Problem id to the reason it was taken out."""

    def score(self, problem_id: str, text: str, expected: str, mode: str) -> Reward | None:
        """Reward of one answer, or None where the judge failed."""
        kept = format_ok(text, mode)
        _, answer = parse_answer(text)
        try:
            right = self._judge(answer, expected)
        except Exception as error:
            self.quarantine[problem_id] = f"{type(error).__name__}: {error}"
            return None
        return Reward(ACCURACY_REWARD * (right and kept) + FORMAT_REWARD * kept, right, kept)
