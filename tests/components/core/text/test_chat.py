from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from components.core.base.errors import DataError
from components.core.text.chat import encode_chats, format_ok, parse_answer, prompt_ids
from components.core.text.toggle import END_THINK, THINK, has_toggle, system_message
from components.core.text.toggle_template import OWN, ChatTemplate
from components.core.text.tokenizer import EOS, train_tokenizer


def text_of(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """A chat in Tessera's own template."""
    (text,) = ChatTemplate(OWN, {"eos_token": EOS}).render([messages], add_generation_prompt=add_generation_prompt)
    return text


WORDS = st.text(alphabet="abc+=4 \n", min_size=1).filter(str.strip)
MODES = st.sampled_from(["on", "off"])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, str]]:
    """Chats that end with a question, with or without a system message."""
    opening = draw(st.sampled_from(["", "detailed thinking on", "detailed thinking off", "be kind"]))
    turns = [system(opening)] if opening else []
    for _ in range(draw(st.integers(0, 2))):
        thought = f"{THINK}{draw(WORDS)}{END_THINK}" if draw(st.booleans()) else ""
        turns += [user(draw(WORDS)), assistant(thought + draw(WORDS))]
    return [*turns, user(draw(WORDS))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["7+5=2*3=6:6", "detailed thinking on", "detailed thinking off"] * 50, 320, folder)
    return folder


@pytest.fixture(scope="module")
def hugging_face(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)  # type: ignore[no-untyped-call]


@given(messages=chats())
def test_text_and_tokens_equal_those_of_transformers(
    folder: Path, hugging_face: Any, messages: list[dict[str, str]]
) -> None:
    for chat, prompt in ((messages, True), ([*messages, assistant(f"{THINK}a{END_THINK}4")], False)):
        theirs = hugging_face.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert text_of(chat, add_generation_prompt=prompt) == theirs
    example = encode_chats([{"messages": [*messages, assistant("4")]}], folder)[0]
    whole = hugging_face.apply_chat_template([*messages, assistant("4")], return_dict=False)
    assert list(example.token_ids) == whole


@given(messages=chats(), answer=WORDS)
def test_the_last_answer_and_its_end_count_and_nothing_else_does(
    folder: Path, messages: list[dict[str, str]], answer: str
) -> None:
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    example = encode_chats([{"messages": [*messages, assistant(answer)]}], folder)[0]
    counted = [token for token, counts in zip(example.token_ids, example.counts, strict=True) if counts]
    assert core.decode(counted, skip_special_tokens=False) == answer + EOS
    assert list(example.counts) == sorted(example.counts)


@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_prompt_ends_where_the_answer_of_a_training_chat_begins(folder: Path, mode: str) -> None:
    row = {"messages": [system_message(mode), user("7+5="), assistant("2")]}
    example = encode_chats([row], folder)[0]
    asked = [token for token, counts in zip(example.token_ids, example.counts, strict=True) if not counts]
    assert prompt_ids(folder, ["7+5="], mode) == [asked]


def test_the_system_message_switches_and_without_one_thinking_is_on() -> None:
    assert "detailed thinking on" in text_of([user("4")])
    assert "detailed thinking on" in text_of([system("be kind"), user("4")])
    off = text_of([system_message("off"), user("4")])
    assert "detailed thinking off" in off
    assert "detailed thinking on" not in off


def test_other_system_text_stays_beside_the_switch() -> None:
    expected = f"<|system|>detailed thinking off\nbe kind{EOS}<|user|>4{EOS}"
    assert text_of([system("detailed thinking off\nbe kind"), user("4")]) == expected
    assert "detailed thinking on\nbe kind" in text_of([system("be kind"), user("4")])


def test_a_template_argument_switches_over_the_system_message(hugging_face: Any) -> None:
    for argument, shown in ((True, "on"), (False, "off")):
        for said in ("on", "off"):
            messages = [system_message(said), user("4")]
            text = hugging_face.apply_chat_template(messages, tokenize=False, detailed_thinking=argument)
            assert f"detailed thinking {shown}{EOS}" in text


def test_past_reasoning_is_cut_and_the_last_answer_keeps_its_own() -> None:
    past = [user("a"), assistant(f"{THINK}secret{END_THINK} b"), user("c")]
    assert f"<|assistant|>b{EOS}" in text_of(past)
    assert f"{THINK}r{END_THINK}d" in text_of([*past, assistant(f"{THINK}r{END_THINK}d")])
    assert "secret" not in text_of([*past, assistant("d")])


@given(reasoning=WORDS, answer=WORDS)
def test_reasoning_and_answer_come_apart_again(reasoning: str, answer: str) -> None:
    assert parse_answer(f"{THINK}{reasoning}{END_THINK}{answer}") == (reasoning.strip(), answer.strip())
    assert parse_answer(answer) == (None, answer.strip())


@given(reasoning=WORDS, answer=WORDS)
def test_each_mode_accepts_its_own_form_and_no_other(reasoning: str, answer: str) -> None:
    thought = f"{THINK}{reasoning}{END_THINK}{answer}"
    assert (format_ok(thought, "on"), format_ok(thought, "off")) == (True, False)
    assert (format_ok(answer, "on"), format_ok(answer, "off")) == (False, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        THINK,
        f"{THINK}a",
        f"a{END_THINK}4",
        f"{THINK}a{END_THINK}",
        f"4{THINK}a{END_THINK}4",
        f"{THINK}a{THINK}b{END_THINK}4",
        f"{THINK}a{END_THINK}b{END_THINK}4",
        f"{THINK}a{END_THINK}{THINK}b{END_THINK}4",
    ],
)
@pytest.mark.parametrize("mode", ["on", "off"])
def test_broken_forms_pass_in_no_mode(text: str, mode: str) -> None:
    assert not format_ok(text, mode)


def test_a_folder_has_the_toggle_only_with_tags_and_template(folder: Path, tmp_path: Path) -> None:
    assert has_toggle(folder)
    assert not has_toggle(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert not has_toggle(tmp_path)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([user("a"), assistant("b"), assistant("c")], "message 3 is of role 'assistant' where 'user' is due"),
        ([user("a"), user("b"), assistant("c")], "message 2 is of role 'user' where 'assistant' is due"),
        ([assistant("a"), user("b"), assistant("c")], "message 1 is of role 'assistant' where 'user' is due"),
        ([user("a"), system("be kind"), assistant("b")], "message 2 is of role 'system' where 'assistant' is due"),
        ([system("a"), system("b"), user("c"), assistant("d")], "message 2 is of role 'system' where 'user' is due"),
        ([user("a"), {"role": "tool", "content": "b"}], "message 2 is of role 'tool' where 'assistant' is due"),
        ([user("a"), assistant("b"), user("c")], "the last message is not an answer"),
        ([system("a")], "the last message is not an answer"),
        ([], "the last message is not an answer"),
    ],
)
def test_turns_out_of_order_are_refused_by_row(folder: Path, turns: list[dict[str, str]], reason: str) -> None:
    rows = [{"messages": [user("a"), assistant("b")]}, {"messages": turns}]
    with pytest.raises(DataError, match=f"chat 2: {reason}"):
        encode_chats(rows, folder)


@given(messages=chats(), thought=st.booleans(), answer=WORDS)
def test_what_counts_of_a_chat_of_several_turns_is_what_transformers_adds_to_the_prompt(
    folder: Path, hugging_face: Any, messages: list[dict[str, str]], thought: bool, answer: str
) -> None:
    last = assistant(f"{THINK}a{END_THINK}{answer}" if thought else answer)
    example = encode_chats([{"messages": [*messages, last]}], folder)[0]
    asked = hugging_face.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    whole = hugging_face.apply_chat_template([*messages, last], return_dict=False)
    assert list(example.token_ids) == whole
    assert whole[: len(asked)] == asked
    assert list(example.counts) == [False] * len(asked) + [True] * (len(whole) - len(asked))
