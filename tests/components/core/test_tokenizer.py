import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from components.core.chat import END_THINK, ROLE_TOKENS, THINK, has_toggle
from components.core.errors import CheckpointError
from components.core.tokenizer import EOS, PAD, add_toggle, train_tokenizer
from tests.components.core.tiny_models import tokenizer as plain_tokenizer

TEXTS = ["7+5*3-2=", "+5=2*3=6-2=4:4", "detailed thinking on", "the cat sat on the mat"] * 50


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_tokenizer(TEXTS, 384, folder)
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A tokenizer folder as transformers writes it."""
    folder = tmp_path / "own"
    plain_tokenizer().save_pretrained(folder)
    return folder


def reload(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)  # type: ignore[no-untyped-call]


def edit_settings(folder: Path, **changes: Any) -> None:
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


@given(text=st.text())
def test_any_text_decodes_to_itself(trained: Path, text: str) -> None:
    core = Tokenizer.from_file(str(trained / "tokenizer.json"))
    ids = core.encode(text, add_special_tokens=False).ids
    assert core.decode(ids, skip_special_tokens=False) == text


def test_tags_roles_and_end_are_one_token_each_within_the_limit(trained: Path) -> None:
    core = Tokenizer.from_file(str(trained / "tokenizer.json"))
    for token in (THINK, END_THINK, *ROLE_TOKENS, EOS, PAD):
        assert len(core.encode(f"4{token}4", add_special_tokens=False).ids) == 3
    assert len(ByteLevel.alphabet()) < core.get_vocab_size() <= 384
    assert has_toggle(trained)


def test_decoding_without_special_tokens_keeps_the_tags_and_drops_the_markers(trained: Path) -> None:
    fast = reload(trained)
    ids = fast.encode(f"{ROLE_TOKENS[2]}{THINK}7+5=2{END_THINK}2{EOS}", add_special_tokens=False)
    assert fast.decode(ids, skip_special_tokens=True) == f"{THINK}7+5=2{END_THINK}2"


def test_transformers_reads_the_same_tokens_and_names(trained: Path) -> None:
    fast, core = reload(trained), Tokenizer.from_file(str(trained / "tokenizer.json"))
    assert isinstance(fast, PreTrainedTokenizerFast)
    assert (fast.eos_token, fast.pad_token, fast.bos_token) == (EOS, PAD, None)
    for text in TEXTS[:4]:
        assert fast.encode(text, add_special_tokens=False) == core.encode(text, add_special_tokens=False).ids


def test_the_same_texts_give_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 384, tmp_path)
    for file in trained.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_the_toggle_is_added_beside_what_a_users_tokenizer_has(own: Path, tmp_path: Path) -> None:
    before = reload(own)
    size = add_toggle(own, tmp_path / "out")
    after = reload(tmp_path / "out")
    assert size == len(after) == max(after.get_vocab().values()) + 1
    assert before.get_vocab().items() <= after.get_vocab().items()
    assert before.encode("7+5=2", add_special_tokens=False) == after.encode("7+5=2", add_special_tokens=False)
    assert after.eos_token == before.eos_token
    assert has_toggle(tmp_path / "out")
    assert after.chat_template == (tmp_path / "out" / "chat_template.jinja").read_text()
    for token in (THINK, END_THINK, *ROLE_TOKENS):
        assert after.encode(token, add_special_tokens=False) == [after.get_vocab()[token]]


def test_adding_the_toggle_twice_changes_nothing_more(own: Path, tmp_path: Path) -> None:
    assert add_toggle(own, tmp_path / "once") == add_toggle(tmp_path / "once", tmp_path / "twice")
    once, twice = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("once", "twice"))
    assert once == twice


def test_a_tokenizer_without_a_fast_form_is_refused_with_the_way_out(own: Path, tmp_path: Path) -> None:
    (own / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"the tokenizer of own has no tokenizer\.json") as caught:
        add_toggle(own, tmp_path / "out")
    assert "save_pretrained" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_an_end_is_refused_with_the_way_out(own: Path, tmp_path: Path) -> None:
    edit_settings(own, eos_token=None)
    with pytest.raises(CheckpointError, match="the tokenizer of own has no eos_token") as caught:
        add_toggle(own, tmp_path / "out")
    assert caught.value.hint == "set eos_token in tokenizer_config.json"
    assert not (tmp_path / "out").exists()
