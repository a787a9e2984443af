"""Reasoning and answer of a reply, each in its own field, for models that think when told to and otherwise do not.

A text without `<think>` is answer throughout. What stands between the first `<think>` and the next `</think>` is
reasoning; reasoning that was cut off is reasoning so far.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.reasoning import ReasoningParser

THINK, END_THINK = "<think>", "</think>"


class Split(NamedTuple):
    """A reply, or as much of it as has come in."""

    reasoning: str
    content: str


def split_reply(text: str) -> Split:
    """Reasoning and answer of a whole reply."""
    before, _, inside = text.partition(THINK)
    reasoning, _, after = inside.partition(END_THINK)
    return Split(reasoning, before + after)


def settled(text: str) -> str:
    """What of an unfinished reply can be shown: without an end that may turn out to be the beginning of a tag."""
    start = text.find(THINK)
    tag = THINK if start < 0 else END_THINK
    if tag in text[max(start, 0) :]:
        return text
    longest = next((size for size in range(len(tag) - 1, 0, -1) if text.endswith(tag[:size])), 0)
    return text[: len(text) - longest]


class TesseraReasoningParser(ReasoningParser):  # type: ignore[misc]  # vLLM has no types for us
    """Serves both modes, whole and streaming.

    Streaming gives the same split as the whole text, however the text was cut: a delta is the difference between what
    two prefixes show.
    """

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._think, self._end_think = self.vocab.get(THINK), self.vocab.get(END_THINK)

    @property
    def reasoning_start_str(self) -> str:
        """The tag that opens reasoning."""
        return THINK

    @property
    def reasoning_end_str(self) -> str:
        """The tag that closes reasoning."""
        return END_THINK

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether a prompt leaves nothing to think about: its template closed the reasoning itself.

        vLLM asks this of prompts alone; reasoning of earlier turns says nothing about the turn to come.
        """
        return bool(input_ids) and input_ids[-1] == self._end_think

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        """Whether reasoning that was opened ends in this delta."""
        return self._end_think in delta_ids and self._think in input_ids

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """The tokens after the end of reasoning; all of them where there is none."""
        if self._end_think not in input_ids:
            return input_ids
        return input_ids[input_ids.index(self._end_think) + 1 :]

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens between the tags, for the usage that a client is shown."""
        ids = list(token_ids)
        if self._think not in ids:
            return 0
        inside = ids[ids.index(self._think) + 1 :]
        return inside.index(self._end_think) if self._end_think in inside else len(inside)

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """Reasoning and answer of a whole reply, `None` where there is none."""
        reasoning, content = split_reply(model_output)
        return reasoning or None, content or None

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        """What the delta adds to reasoning and to the answer, or `None` where that is nothing."""
        before, now = split_reply(settled(previous_text)), split_reply(settled(current_text))
        reasoning, content = now.reasoning[len(before.reasoning) :], now.content[len(before.content) :]
        if not reasoning and not content:
            return None
        return DeltaMessage(reasoning=reasoning or None, content=content or None)
