"""Trains a tokenizer for a new model, or adds the toggle to the tokenizer of a user's model."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from components.core.base.errors import CheckpointError, DataError
from components.core.text.toggle import END_THINK, THINK
from components.core.text.toggle_template import OWN, ROLE_TOKENS, ChatTemplate, own_template, special_tokens
from components.core.text.tokenizer_files import (
    CHAT_TEMPLATE,
    SETTINGS,
    VOCABULARY,
    end_token,
    read_settings,
    readable,
    token_text,
)

PAD, EOS = "<|pad|>", "<|end|>"
PIECES = r"\d|[-+*/=]| ?\p{L}+| ?[^\s\p{L}\d]+|\s+(?!\S)|\s+"
"""Pre-tokens, which merges never cross: digits, operators, words and runs of other signs, each with the space before
it, and runs of spaces."""
TAGS = [AddedToken(tag, special=False, normalized=False) for tag in (THINK, END_THINK)]
"""Not special tokens: decoding must not remove them, since the reasoning parser needs them."""

SPECIAL_LISTS = {"additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"}
"""Settings that name further special tokens."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path) -> None:
    """Train a byte-level BPE tokenizer and write a Hugging Face folder with the toggle.

    Every digit and every arithmetic operator is a token of its own, so that numbers are written digit by digit.

    Args:
        texts: texts from which merges are learned.
        vocab_size: maximum number of tokens.
        out: folder to write.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS),
        special_tokens=[PAD, EOS, *ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(TAGS)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / VOCABULARY))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20,
    }
    (out / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    (out / CHAT_TEMPLATE).write_text(OWN, encoding="utf-8")


def beginning_ids(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> list[int]:
    """The tokens that a tokenizer puts before each text, on which its model was trained; empty if there are none.

    Args:
        tokenizer: its post-processor adds them, unless the settings say something else.
        settings: those of its folder.
    """
    adds, token = settings.get("add_bos_token"), token_text(settings.get("bos_token") or "")
    if adds is not None:
        found = tokenizer.token_to_id(token)
        return [found] if adds and found is not None else []
    plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    start = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
    return list(whole[:start])


def eos_token_id(folder: Path) -> int:
    """The id of the end-of-sequence token of a tokenizer folder."""
    return token_id(Tokenizer.from_file(str(folder / VOCABULARY)), end_token(folder), folder)


def token_id(tokenizer: Tokenizer, token: str, folder: Path) -> int:
    """The id of a token of a tokenizer folder.

    Raises:
        DataError: the vocabulary lacks it.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise DataError(f"the token {token!r} is not in the vocabulary of {folder.name}")
    return int(found)


def plain_prompt_ids(folder: Path, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts that a base model completes: they begin as the documents of its training do."""
    tokenizer = _load(folder)
    first = beginning_ids(tokenizer, read_settings(folder))
    return [[*first, *encoding.ids] for encoding in tokenizer.encode_batch(list(prompts), add_special_tokens=False)]


@dataclass(frozen=True)
class Toggled:
    """A tokenizer that the toggle was added to.

    Attributes:
        vocab_size: its tokens.
        replaced: why Tessera's chat template stands in place of the user's; None if that stays, or there was none.
    """

    vocab_size: int
    replaced: str | None


def add_toggle(source: Path, out: Path) -> Toggled:
    """Add the tags to a user's tokenizer as single tokens, and the switch to its chat template.

    A tokenizer without a chat template, or with one that cannot carry the switch, gets Tessera's and its role tokens.
    Its tokens do not change, and missing ones are added after them. Tags that are special tokens become plain ones.
    The end-of-sequence token becomes the one that ends a turn of a chat. Only `tokenizer.json`, `tokenizer_config.json`
    and the template are written, because files of older tokenizer formats could contradict them.

    Raises:
        CheckpointError: a file is missing or damaged, there is no end-of-sequence token, or ids are left out.
    """
    settings = read_settings(source)
    with readable(source):
        return _write_toggled(source, settings, out)


def _write_toggled(source: Path, settings: dict[str, Any], out: Path) -> Toggled:
    """Write the tokenizer with the toggle."""
    before = _load(source)
    theirs = ChatTemplate.of(source)
    theirs = theirs.with_toggle() if theirs else None
    defect = theirs.defect() if theirs else None
    keep = theirs is not None and defect is None
    tokenizer = _with_toggle(before, () if keep else ROLE_TOKENS)
    ids = tokenizer.get_vocab().values()
    if max(ids) >= tokenizer.get_vocab_size() or len(set(ids)) < len(ids):
        raise CheckpointError(
            f"the tokenizer of {source.name} leaves out some ids, and new tokens would get the ids of old ones",
            hint=f"add unused tokens for the missing ids to the vocabulary of {VOCABULARY}",
        )
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / VOCABULARY))
    for key in ("chat_template", "added_tokens_decoder"):
        settings.pop(key, None)
    for key in SPECIAL_LISTS & settings.keys():
        settings[key] = _without_tags(settings[key])
    # Any other class may build another tokenizer from the same vocabulary; this one uses tokenizer.json unchanged.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if theirs is not None and keep:
        template = theirs
        settings["eos_token"] = theirs.end_of_turn(_special_texts(tokenizer)) or settings["eos_token"]
    else:
        first = "".join(before.id_to_token(number) or "" for number in beginning_ids(before, settings))
        template = own_template(special_tokens(settings), first)
    (out / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / CHAT_TEMPLATE).write_text(template.source, encoding="utf-8")
    return Toggled(int(tokenizer.get_vocab_size()), defect)


def _special_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts of the special tokens of a tokenizer."""
    return [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]


def _without_tags(tokens: Any) -> Any:
    """Special tokens, as a list or by name, without the tags, which transformers would make special again."""
    if isinstance(tokens, dict):
        return {name: token for name, token in tokens.items() if token_text(token) not in (THINK, END_THINK)}
    return [token for token in tokens or () if token_text(token) not in (THINK, END_THINK)]


def _load(folder: Path) -> Tokenizer:
    """The tokenizer of a folder.

    Raises:
        CheckpointError: the library cannot read it.
    """
    try:
        return Tokenizer.from_file(str(folder / VOCABULARY))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"the {VOCABULARY} of {folder.name} cannot be read: {error}", hint="copy or download it again"
        ) from None


def _with_toggle(source: Tokenizer, roles: Sequence[str]) -> Tokenizer:
    """A tokenizer with tags and roles added, without truncation and padding."""
    tokenizer = Tokenizer.from_str(source.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([AddedToken(role, special=True, normalized=False) for role in roles])
    tokenizer.add_tokens(TAGS)
    described = json.loads(tokenizer.to_str())
    for token in described["added_tokens"]:
        if token["content"] in (THINK, END_THINK):  # adding does not change a token that exists
            token |= {"special": False, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    changed: Tokenizer = Tokenizer.from_str(json.dumps(described))
    return changed
