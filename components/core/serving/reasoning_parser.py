"""Reasoning and answer of a reply, each in its own field, for models that think when told to and otherwise do not.

A text without `<think>` is answer throughout. What stands between the first `<think>` and the next `</think>` is
reasoning; reasoning that was cut off is reasoning so far.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.reasoning import ReasoningParser

from components.core.text.chat import END_THINK, THINK


class Split(NamedTuple):
    """A reply, or as much of it as has come in."""

    reasoning: str
    content: str


def split_reply(text: str) -> Split:
    """Reasoning and answer of a whole reply."""
    before, _, inside = text.partition(THINK)
    reasoning, _, after = inside.partition(END_THINK)
    return Split(reasoning, before + after)


class TesseraReasoningParser(ReasoningParser):  # type: ignore[misc]  # vLLM has no types for us
    """Serves both modes, whole and streaming.

    Streaming gives the same split as the whole text, however the stream was cut: a delta is the difference between what
    two prefixes show. Where a client asked for stop strings, vLLM lets the text lag behind the tokens, so that a tag
    can come in pieces; the tokens then tell that it is one.
    """

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        missing = {THINK, END_THINK} - self.vocab.keys()
        if missing:
            raise ValueError(f"the tokenizer has no single token for {', '.join(sorted(missing))}")
        self._think, self._end_think = self.vocab[THINK], self.vocab[END_THINK]
        self._text_lags = False

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
        """Whether reasoning has ended, so that all that follows is answer."""
        return self._end_think in self._inside(input_ids) and not self._text_lags

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """The tokens after the end of reasoning; all of them where there is none."""
        return input_ids[input_ids.index(self._end_think) + 1 :] if self._end_think in input_ids else input_ids

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens between the tags, for the usage that a client is shown."""
        inside = self._inside(token_ids)
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
        self._text_lags = self._coming(current_text, current_token_ids) is not None
        shown = split_reply(self._without_partial_tag(previous_text, previous_token_ids))
        now = split_reply(self._without_partial_tag(current_text, current_token_ids))
        reasoning, content = now.reasoning[len(shown.reasoning) :], now.content[len(shown.content) :]
        if not reasoning and not content:
            return None
        return DeltaMessage(reasoning=reasoning or None, content=content or None)

    def _inside(self, ids: Sequence[int]) -> Sequence[int]:
        """What follows the token that opens reasoning."""
        return ids[ids.index(self._think) + 1 :] if self._think in ids else []

    def _coming(self, text: str, ids: Sequence[int]) -> str | None:
        """The tag that is among the tokens, but not yet in the text."""
        opened, closed = self._think in ids, self._end_think in self._inside(ids)
        if opened and THINK not in text:
            return THINK
        return END_THINK if closed and END_THINK not in text.partition(THINK)[2] else None

    def _without_partial_tag(self, text: str, ids: Sequence[int]) -> str:
        """The text up to a tag whose beginning alone is there."""
        tag = self._coming(text, ids) or ""
        partial = next((size for size in range(len(tag) - 1, 0, -1) if text.endswith(tag[:size])), 0)
        return text[: len(text) - partial]
