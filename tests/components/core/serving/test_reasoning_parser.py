from collections.abc import Iterator
from importlib.metadata import entry_points
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("vllm")

from components.core.serving.plugin import register
from components.core.serving.reasoning_parser import TesseraReasoningParser, split_reply
from components.core.serving.served_config import ServedConfig
from components.core.serving.settings import PLUGIN

THINK, END_THINK = "<think>", "</think>"
TOKENS = [THINK, END_THINK, "<", "</", ">", "th", "42", " ", "é", "\n\n"]


class Vocabulary:
    """The part of a tokenizer that the parser reads."""

    def get_vocab(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(TOKENS)}


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
    assert not parser.is_reasoning_end([0, 6, 1, 6])
    assert parser.is_reasoning_end([6, 0, 1])


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
