"""Trains a tokenizer for a new model, or adds the toggle to the tokenizer of a user's model."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from components.core.base.errors import CheckpointError
from components.core.text.chat import END_THINK, ROLE_TOKENS, TEMPLATE, THINK
from components.core.text.tokenizer_files import SETTINGS, VOCABULARY, read_settings, readable, token_text

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
    (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def add_toggle(source: Path, out: Path) -> int:
    """Add the tags and roles to a user's tokenizer as single tokens, and replace its chat template by ours.

    Its tokens do not change, and missing ones are added after them. Tags that are special tokens become plain ones.
    Only `tokenizer.json`, `tokenizer_config.json` and the template are written, because files of older tokenizer
    formats could contradict them.

    Returns:
        Tokens of the new vocabulary.

    Raises:
        CheckpointError: a file is missing or damaged, there is no end-of-sequence token, or ids are left out.
    """
    settings = read_settings(source)
    with readable(source):
        return _write_toggled(source, settings, out)


def _write_toggled(source: Path, settings: dict[str, Any], out: Path) -> int:
    """Write the tokenizer with the toggle; returns its number of tokens."""
    tokenizer = _with_toggle(_load(source))
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
    (out / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return int(tokenizer.get_vocab_size())


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


def _with_toggle(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with tags and roles added, without truncation and padding."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([AddedToken(role, special=True, normalized=False) for role in ROLE_TOKENS])
    tokenizer.add_tokens(TAGS)
    described = json.loads(tokenizer.to_str())
    for token in described["added_tokens"]:
        if token["content"] in (THINK, END_THINK):  # adding does not change a token that exists
            token |= {"special": False, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    changed: Tokenizer = Tokenizer.from_str(json.dumps(described))
    return changed
