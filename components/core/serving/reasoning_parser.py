"""The reasoning parser for models with a toggle: `<think>` and `</think>` enclose the reasoning of a reply.

A reply without `<think>` is an answer, which vLLM's own parsers take for reasoning.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser

from components.core.text.toggle import END_THINK, THINK


def split_reply(text: str) -> tuple[str, str]:
    """Reasoning and answer of a reply, or of its beginning."""
    before, _, inside = text.partition(THINK)
    reasoning, _, after = inside.partition(END_THINK)
    return reasoning, before + after


class TesseraReasoningParser(BaseThinkingReasoningParser):  # type: ignore[misc]  # vLLM has no type hints
    """Splits replies of both modes, complete or streamed.

    A streamed delta is the difference between the splits of two prefixes of the text. If a request has stop strings,
    the text lags behind the tokens, and a tag may arrive in pieces: the token tells that the pieces are a tag.
    """

    start_token, end_token = THINK, END_THINK
    _tag_is_partial = False

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        missing = {THINK, END_THINK} - tokenizer.get_vocab().keys()
        if missing:
            raise ValueError(f"the tokenizer has no single token for {', '.join(sorted(missing))}")
        super().__init__(tokenizer, *args, **kwargs)

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether a prompt ends with finished reasoning. Reasoning of earlier turns does not count."""
        return bool(input_ids) and input_ids[-1] == self.end_token_id

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        """Whether the rest of the reply is answer."""
        return self.end_token_id in self._after_start(input_ids) and not self._tag_is_partial

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """Reasoning and answer of a complete reply, each None if empty."""
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
        """What the delta adds to the reasoning and to the answer; None if nothing."""
        self._tag_is_partial = self._expected_tag(current_text, current_token_ids) != ""
        before = split_reply(self._without_partial_tag(previous_text, previous_token_ids))
        now = split_reply(self._without_partial_tag(current_text, current_token_ids))
        reasoning, content = (text[len(old) :] or None for old, text in zip(before, now, strict=True))
        return DeltaMessage(reasoning=reasoning, content=content) if reasoning or content else None

    def _after_start(self, ids: Sequence[int]) -> Sequence[int]:
        """The tokens after the first `<think>`."""
        return ids[ids.index(self.start_token_id) + 1 :] if self.start_token_id in ids else []

    def _expected_tag(self, text: str, ids: Sequence[int]) -> str:
        """The tag whose token is there but whose text is not, or nothing."""
        if self.start_token_id in ids and THINK not in text:
            return THINK
        ended = self.end_token_id in self._after_start(ids)
        return END_THINK if ended and END_THINK not in text.partition(THINK)[2] else ""

    def _without_partial_tag(self, text: str, ids: Sequence[int]) -> str:
        """The text up to the beginning of an expected tag."""
        tag = self._expected_tag(text, ids)
        beginnings = (tag[:size] for size in range(len(tag) - 1, 0, -1))
        return text.removesuffix(next((beginning for beginning in beginnings if text.endswith(beginning)), ""))
