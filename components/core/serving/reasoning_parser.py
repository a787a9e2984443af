"""The reasoning parser for models with a toggle: `<think>` and `</think>` enclose the reasoning of a reply.

A reply without `<think>` is an answer, which vLLM's own parsers take for reasoning.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser

from components.core.text.toggle import END_THINK, THINK, system_message

ROLE = re.compile(r"\W*(system|user|assistant|tool)(_prompt)?\W*?(\n|$)", re.IGNORECASE)
"""A role alone in a special token, or on the first line after one."""
MODE = re.compile(rf"^\s*{system_message('(on|off)')['content']}\b", re.MULTILINE)


def thinking_is_off(pieces: Iterable[str]) -> bool:
    """Whether the system message of a prompt switches thinking off; the last one counts.

    Where a chat template names no roles, the first piece that names a mode counts: the system message comes first.

    Args:
        pieces: the special tokens of the prompt and the texts between them, in order.
    """
    role = mode = None
    for piece in pieces:
        if named := ROLE.match(piece):
            role = named[1].lower()
        modes = MODE.findall(piece)
        if role == "system" and modes:
            mode = modes[-1]
        elif role is None and mode is None and modes:
            mode = modes[0]
    return mode == "off"


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
    _continues_thought = False

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        missing = {THINK, END_THINK} - tokenizer.get_vocab().keys()
        if missing:
            raise ValueError(f"the tokenizer has no single token for {', '.join(sorted(missing))}")
        super().__init__(tokenizer, *args, **kwargs)
        options = kwargs.get("chat_template_kwargs") or {}
        self._off_by_default = options.get("default_thinking") == "off"

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        """Tokens between the messages of a prompt; the tags are none."""
        tokens = self.model_tokenizer.added_tokens_decoder
        return frozenset(number for number, token in tokens.items() if token.special)

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether the reply to a prompt begins with the answer, so that structured output is enforced from there.

        It does if thinking is off, or if the message that is continued has a finished thought. Reasoning of earlier
        turns does not count.
        """
        message = self._last_message(input_ids)
        if self.start_token_id in message or self.end_token_id in message:
            return not self._is_open(message)
        return thinking_is_off(self._pieces(input_ids))

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        """Whether the rest of the reply is answer; `input_ids` are the reply, or the prompt and the reply."""
        message = self._last_message(input_ids)
        return self.end_token_id in self._after_start(self._with_thought(message)) and not self._tag_is_partial

    def adjust_initial_state_from_prompt(self, prompt_token_ids: Sequence[int]) -> None:
        """Remember whether the prompt ends within a thought: the message that is continued has begun one."""
        self._continues_thought = self._is_open(self._last_message(prompt_token_ids))

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """Reasoning and answer of a complete reply, each None if empty.

        With thinking off all of it is answer, as in a streamed reply, where vLLM asks `is_reasoning_end` alone.
        """
        if _switched_off(request, by_default=self._off_by_default) and not _continues_thought(request):
            return None, model_output or None
        reasoning, content = split_reply(THINK + model_output if _continues_thought(request) else model_output)
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
        if self._continues_thought:
            previous_text, current_text = THINK + previous_text, THINK + current_text
        previous_token_ids, current_token_ids = map(self._with_thought, (previous_token_ids, current_token_ids))
        self._tag_is_partial = self._expected_tag(current_text, current_token_ids) != ""
        before = split_reply(self._without_partial_tag(previous_text, previous_token_ids))
        now = split_reply(self._without_partial_tag(current_text, current_token_ids))
        reasoning, content = (text[len(old) :] or None for old, text in zip(before, now, strict=True))
        return DeltaMessage(reasoning=reasoning, content=content) if reasoning or content else None

    def _with_thought(self, ids: Sequence[int]) -> Sequence[int]:
        """A reply after the `<think>` of the message that it continues."""
        return [self.start_token_id, *ids] if self._continues_thought else ids

    def _last_message(self, ids: Sequence[int]) -> Sequence[int]:
        """The tokens after the last special token."""
        begin = len(ids)
        while begin and ids[begin - 1] not in self._special_ids:
            begin -= 1
        return ids[begin:]

    def _is_open(self, message: Sequence[int]) -> bool:
        """Whether the last tag begins a thought."""
        tags = [token for token in message if token in (self.start_token_id, self.end_token_id)]
        return tags[-1:] == [self.start_token_id]

    def _pieces(self, ids: Sequence[int]) -> Iterator[str]:
        """The text of a prompt, cut before and after each special token."""
        begin = 0
        for end, token in enumerate(ids):
            if token in self._special_ids:
                yield self.model_tokenizer.decode(ids[begin:end], skip_special_tokens=False)
                yield self.model_tokenizer.decode([token], skip_special_tokens=False)
                begin = end + 1
        yield self.model_tokenizer.decode(ids[begin:], skip_special_tokens=False)

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


def _continues_thought(request: Any) -> bool:
    """Whether a request continues a message of the assistant that ends within a thought."""
    if not getattr(request, "continue_final_message", False):  # not every kind of request can
        return False
    text = _text_of(request.messages[-1])
    return text.rfind(THINK) > text.rfind(END_THINK)


def _switched_off(request: Any, *, by_default: bool) -> bool:
    """Whether thinking is off: by the template's argument, else the last system message, else the server's default."""
    options = getattr(request, "chat_template_kwargs", None) or {}
    if "detailed_thinking" in options:
        return not options["detailed_thinking"] or options["detailed_thinking"] == "off"
    messages = getattr(request, "messages", None) or []
    texts = [_text_of(message) for message in messages if message.get("role") == "system"]
    modes = [mode for text in texts for mode in MODE.findall(text)]
    return modes[-1] == "off" if modes else by_default


def _text_of(message: Any) -> str:
    """The text of a message, whose content is a text or a list of parts."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(str(part.get("text") or "") for part in parts)
