from collections.abc import Iterator
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from torch import nn

pytest.importorskip("vllm")

from components.core.serving.plugin import register
from components.core.serving.reasoning_parser import TesseraReasoningParser, split_reply, thinking_is_off
from components.core.serving.served_config import ServedConfig
from components.core.serving.settings import PLUGIN

THINK, END_THINK = "<think>", "</think>"
TOKENS = [THINK, END_THINK, "<", "</", ">", "th", "42", " ", "é", "\n\n"]
EOS = len(TOKENS)


class Vocabulary:
    """The part of a tokenizer that the parser reads."""

    def get_vocab(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(TOKENS)}

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return {0: AddedToken(THINK), 1: AddedToken(END_THINK), EOS: AddedToken("<eos>", special=True)}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join([*TOKENS, "<eos>"][number] for number in ids)


def stream(ids: list[int], cuts: list[int], lag: int) -> Iterator[tuple[str, str]]:
    """Reasoning and answer of each delta. Like vLLM's server, calls the parser until reasoning has ended.

    The text comes `lag` characters late, as it does if a request has stop strings, except at the end.
    """
    parser = TesseraReasoningParser(Vocabulary())
    ended, before_text, before_ids = False, "", list[int]()
    for end in [*sorted(cuts), len(ids)]:
        now_ids = ids[:end]
        whole = "".join(TOKENS[token] for token in now_ids)
        now_text = whole if end == len(ids) else whole[: max(len(whole) - lag, len(before_text))]
        delta = now_text[len(before_text) :]
        if ended:
            yield "", delta
        else:
            found = parser.extract_reasoning_streaming(
                before_text, now_text, delta, before_ids, now_ids, now_ids[len(before_ids) :]
            )
            yield (found.reasoning or "", found.content or "") if found else ("", "")
            ended = parser.is_reasoning_end_streaming(now_ids, now_ids[len(before_ids) :])
        before_text, before_ids = now_text, now_ids


def spells_a_tag(ids: list[int]) -> bool:
    """Whether several tokens together spell a tag."""
    text = "".join(TOKENS[token] for token in ids)
    return text.count(THINK) > ids.count(0) or text.count(END_THINK) > ids.count(1)


tokens = st.lists(st.integers(0, len(TOKENS) - 1), max_size=12).filter(lambda ids: not spells_a_tag(ids))


@given(ids=tokens, data=st.data(), lag=st.sampled_from([0, 1, 3, 9]))
def test_a_stream_cut_anywhere_gives_the_split_of_the_whole_text(ids: list[int], data: st.DataObject, lag: int) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=6))
    reasoning, content = zip(*stream(ids, cuts, lag), strict=True)
    assert ("".join(reasoning), "".join(content)) == split_reply("".join(TOKENS[token] for token in ids))


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("42", None, "42"),
        ("<think>6*7</think>42", "6*7", "42"),
        ("\n<think>6*7</think>\n\n42", "6*7", "\n\n\n42"),
        ("<think>6*7=", "6*7=", None),
        ("<think></think>42", None, "42"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
        ("4</think>2", None, "4</think>2"),
        ("", None, None),
    ],
)
def test_a_whole_reply(text: str, reasoning: str | None, content: str | None) -> None:
    assert TesseraReasoningParser(Vocabulary()).extract_reasoning(text, None) == (reasoning, content)


def test_reasoning_of_earlier_turns_does_not_end_the_reasoning_to_come() -> None:
    parser = TesseraReasoningParser(Vocabulary())
    assert not parser.is_reasoning_end([0, 6, 1, 6, EOS])
    assert not parser.is_reasoning_end([0, 6, 1, 6, EOS, 6])
    assert not parser.is_reasoning_end_streaming([0, 6, 1, 6, EOS, 0, 6], [6])  # the engine asks with the prompt
    assert parser.is_reasoning_end_streaming([6, EOS, 0, 6, 1], [1])


def test_the_thought_of_a_continued_message_goes_on_or_has_ended() -> None:
    parser = TesseraReasoningParser(Vocabulary())
    assert parser.is_reasoning_end([6, EOS, 0, 6, 1])
    assert parser.is_reasoning_end([6, EOS, 0, 6, 1, 6])
    assert not parser.is_reasoning_end([6, EOS, 0, 6])
    assert not parser.is_reasoning_end([0, 6, EOS])  # a thought of an earlier turn that was cut off


class Continuing:
    """A request."""

    def __init__(self, content: object) -> None:
        self.continue_final_message, self.messages = True, [{"role": "assistant", "content": content}]


@pytest.mark.parametrize("content", ["<think>6", [{"type": "text", "text": "<think>"}, {"type": "text", "text": "6"}]])
def test_the_rest_of_a_continued_thought_is_reasoning(content: object) -> None:
    parser = TesseraReasoningParser(Vocabulary())
    assert parser.extract_reasoning("*7</think>42", Continuing(content)) == ("*7", "42")
    assert parser.extract_reasoning("42", Continuing("<think>6*7</think>")) == (None, "42")
    parser.adjust_initial_state_from_prompt([6, EOS, 0, 6])
    first = parser.extract_reasoning_streaming("", "42", "42", [], [6], [6])
    assert first is not None
    assert (first.reasoning, first.content) == ("42", None)
    assert not parser.is_reasoning_end_streaming([6], [6])
    rest = parser.extract_reasoning_streaming("42", "42</think>42", "</think>42", [6], [6, 1, 6], [1, 6])
    assert rest is not None
    assert (rest.reasoning, rest.content) == (None, "42")
    assert parser.is_reasoning_end_streaming([6, 1, 6], [1, 6])


OFF, ON = "detailed thinking off", "detailed thinking on"
PROMPTS = {
    "ours": (["<|system|>", OFF, "<eos>", "<|user|>", ON, "<|assistant|>"], True),
    "ours, with more": (["<|system|>", f"{OFF}\nBe brief.", "<eos>", "<|user|>", "6*7", "<|assistant|>"], True),
    "on": (["<|system|>", ON, "<eos>", "<|user|>", OFF, "<|assistant|>"], False),
    "ChatML": (["<|im_start|>", f"system\n{OFF}", "<|im_end|>", "\n", "<|im_start|>", f"user\n{ON}"], True),
    "ChatML, none": (["<|im_start|>", f"user\n{OFF}", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"], False),
    "Llama 3": (
        ["<|start_header_id|>", "system", "<|end_header_id|>", f"\n\nToday Date: 1\n\n{OFF}", "<|eot_id|>"],
        True,
    ),
    "Mistral": (["<s>", "[INST]", f" {ON}\n\n{OFF}", "[/INST]", ON], False),
    "Mistral, off": (["<s>", "[INST]", f" {OFF}\n\n{ON}", "[/INST]", ON], True),
    "Mistral 7": (["<s>", "[SYSTEM_PROMPT]", OFF, "[/SYSTEM_PROMPT]", "[INST]", "6*7", "[/INST]"], True),
    "two system messages": (["<|system|>", ON, "<|system|>", OFF, "<|user|>", "6*7"], True),
    "spoken of": (["<|system|>", f"What is {OFF}?", "<|user|>", "6*7"], False),
    "none": (["<|user|>", "6*7", "<|assistant|>"], False),
}


@pytest.mark.parametrize(("pieces", "off"), PROMPTS.values(), ids=PROMPTS)
def test_the_mode_of_a_prompt_is_that_of_its_system_message(pieces: list[str], off: bool) -> None:
    assert thinking_is_off(pieces) is off


def test_reasoning_tokens_are_counted_between_the_tags() -> None:
    parser = TesseraReasoningParser(Vocabulary())
    assert [parser.count_reasoning_tokens(ids) for ids in ([6, 6], [0, 6, 6, 1, 6], [0, 6, 6])] == [0, 2, 2]


def test_a_tokenizer_without_the_tags_is_refused() -> None:
    class Bare:
        def get_vocab(self) -> dict[str, int]:
            return {THINK: 0}

    with pytest.raises(ValueError, match="</think>"):
        TesseraReasoningParser(Bare())


def test_the_plug_in_registers_parser_weight_transfer_and_configuration_and_may_be_called_twice() -> None:
    from transformers import AutoConfig
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.reasoning import ReasoningParserManager

    from components.core.serving.weight_transfer import TesseraWeightTransfer

    register()
    register()
    assert ReasoningParserManager.get_reasoning_parser(PLUGIN) is TesseraReasoningParser
    transfer = WeightTransferEngineFactory.create_engine(
        WeightTransferConfig(backend=PLUGIN), MagicMock(), torch.device("cpu"), nn.Identity()
    )
    assert type(transfer) is TesseraWeightTransfer
    assert type(AutoConfig.for_model("nemotron-nas")) is ServedConfig


def test_vllm_finds_the_plug_in() -> None:
    (found,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == PLUGIN]
    assert found.load() is register


def test_the_default_of_the_server_counts_where_no_system_message_says_a_mode() -> None:
    parser = TesseraReasoningParser(Vocabulary(), chat_template_kwargs={"default_thinking": "off"})
    for content, expected in (("be kind", (None, "<think>a</think>b")), ("detailed thinking on", ("a", "b"))):
        request = SimpleNamespace(messages=[{"role": "system", "content": content}])
        assert parser.extract_reasoning("<think>a</think>b", request) == expected


@pytest.mark.parametrize(
    ("options", "off"),
    [
        ({"messages": [{"role": "system", "content": "detailed thinking off\nbe kind"}]}, True),
        ({"messages": [{"role": "system", "content": [{"type": "text", "text": "detailed thinking off"}]}]}, True),
        ({"messages": [{"role": "user", "content": "detailed thinking off"}]}, False),
        ({"messages": [], "chat_template_kwargs": {"detailed_thinking": False}}, True),
        (
            {
                "messages": [{"role": "system", "content": "detailed thinking off"}],
                "chat_template_kwargs": {"detailed_thinking": True},
            },
            False,
        ),
    ],
)
def test_with_thinking_off_a_complete_reply_is_answer_alone_as_in_a_stream(options: dict[str, Any], off: bool) -> None:
    parser, request = TesseraReasoningParser(Vocabulary()), SimpleNamespace(**options)
    expected = (None, "<think>a</think>b") if off else ("a", "b")

    assert parser.extract_reasoning("<think>a</think>b", request) == expected
