import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from components.core.base.errors import CheckpointError
from components.core.text.toggle import END_THINK, THINK, has_toggle
from components.core.text.toggle_template import ROLE_TOKENS
from components.core.text.tokenizer import EOS, PAD, add_toggle, eos_token_id, train_tokenizer
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
    size = add_toggle(own, tmp_path / "out").vocab_size
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
    first, second = add_toggle(own, tmp_path / "once"), add_toggle(tmp_path / "once", tmp_path / "twice")
    assert (first.vocab_size, second.replaced) == (second.vocab_size, None)
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


@pytest.mark.parametrize(
    "named",
    [
        {"extra_special_tokens": [THINK, END_THINK, "<on>"]},
        {"additional_special_tokens": [THINK, {"content": END_THINK}, "<on>"]},
        {"extra_special_tokens": {"think_token": THINK, "end_think_token": END_THINK, "on_token": "<on>"}},
        {"model_specific_special_tokens": {"think_token": THINK, "on_token": "<on>"}},
        {},
    ],
)
def test_tags_that_were_special_become_plain_so_that_decoding_shows_them(
    own: Path, tmp_path: Path, named: dict[str, Any]
) -> None:
    described = json.loads((own / "tokenizer.json").read_text())
    for token in described["added_tokens"]:
        token["special"] = True
    (own / "tokenizer.json").write_text(json.dumps(described))
    before, thought = reload(own), f"{THINK}7{END_THINK}2"
    assert before.decode(before.encode(thought), skip_special_tokens=True) == "72"
    edit_settings(own, **named)
    add_toggle(own, tmp_path / "out")
    after = reload(tmp_path / "out")
    assert after.decode(after.encode(thought), skip_special_tokens=True) == thought
    assert after.encode(thought) == before.encode(thought)
    assert not {THINK, END_THINK} & set(after.all_special_tokens)
    assert after.decode(after.encode("7<on>"), skip_special_tokens=True) == "7"


def test_a_tokenizer_that_cuts_and_pads_does_neither_any_more(own: Path, tmp_path: Path) -> None:
    core = Tokenizer.from_file(str(own / "tokenizer.json"))
    core.enable_truncation(4)
    core.enable_padding(length=4)
    core.save(str(own / "tokenizer.json"))
    add_toggle(own, tmp_path / "out")
    after = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert [len(found.ids) for found in after.encode_batch(["7+5-2*3=", "7"])] == [8, 1]


def test_a_chat_template_without_a_place_for_the_switch_is_replaced_wherever_it_stands(
    own: Path, tmp_path: Path
) -> None:
    (own / "chat_template.jinja").write_text("the user's own")
    edit_settings(own, chat_template="the user's own")
    assert add_toggle(own, tmp_path / "out").replaced == "it leaves the system message out"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for path in (tmp_path / "out").iterdir():
        assert "the user's own" not in path.read_text()


@pytest.mark.parametrize("claimed", ["LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2TokenizerFast", "MyTokenizer"])
def test_transformers_reads_the_vocabulary_as_it_is_whatever_class_was_claimed(
    trained: Path, tmp_path: Path, claimed: str
) -> None:
    source = Path(shutil.copytree(trained, tmp_path / "own"))
    edit_settings(source, tokenizer_class=claimed)
    add_toggle(source, tmp_path / "out")
    core = Tokenizer.from_file(str(source / "tokenizer.json"))
    for text in TEXTS[:4]:
        assert reload(tmp_path / "out").encode(text) == core.encode(text).ids


def test_an_end_that_older_folders_name_in_a_file_of_its_own_is_found(own: Path, tmp_path: Path) -> None:
    edit_settings(own, eos_token=None)
    (own / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<eos>", "lstrip": False}}))
    assert eos_token_id(own) == reload(own).convert_tokens_to_ids("<eos>")  # what the stages before the toggle use
    add_toggle(own, tmp_path / "out")
    assert reload(tmp_path / "out").eos_token == "<eos>"


def spoil(name: str, content: str | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink() if content is None else (folder / name).write_text(content)

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (spoil("tokenizer_config.json", None), r"the tokenizer of own has no tokenizer_config\.json"),
        (spoil("tokenizer_config.json", "{"), r"the tokenizer_config\.json of own is not JSON"),
        (spoil("tokenizer_config.json", "[]"), r"the tokenizer_config\.json of own is not a JSON object"),
        (spoil("tokenizer_config.json", '{"eos_token": "<end>"}'), "eos_token '<end>', which is not in its vocabulary"),
        (spoil("tokenizer.json", "{"), r"the tokenizer\.json of own is not JSON"),
        (spoil("tokenizer.json", "{}"), r"the tokenizer\.json of own has no vocabulary"),
        (spoil("tokenizer.json", '{"model": {"vocab": {"<eos>": 0}}}'), r"the tokenizer\.json of own cannot be read"),
    ],
)
def test_a_damaged_tokenizer_is_refused_with_the_way_out(
    own: Path, tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    change(own)
    with pytest.raises(CheckpointError, match=told) as caught:
        add_toggle(own, tmp_path / "out")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_unigram_vocabulary_is_read_too(tmp_path: Path) -> None:
    core = Tokenizer(models.Unigram([("<unk>", 0.0), ("<eos>", 0.0), *((letter, -1.0) for letter in "abc4")], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(tmp_path / "own")  # type: ignore[no-untyped-call]
    assert add_toggle(tmp_path / "own", tmp_path / "out").vocab_size == 6 + 5
    assert reload(tmp_path / "out").encode(f"a{THINK}4") == [2, 9, 5]


@pytest.mark.parametrize("last", [6, 30])
def test_a_vocabulary_that_leaves_out_ids_is_refused_before_two_tokens_have_one(tmp_path: Path, last: int) -> None:
    words = models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "c": last}, unk_token="<eos>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="<eos>").save_pretrained(tmp_path / "own")  # type: ignore[no-untyped-call]
    with pytest.raises(CheckpointError, match="the tokenizer of own leaves out some ids") as caught:
        add_toggle(tmp_path / "own", tmp_path / "out")
    assert "unused tokens" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
