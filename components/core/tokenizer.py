"""Tokenizers: trained on the fly for new models, and given the toggle where a user's model brings its own."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from components.core.chat import END_THINK, ROLE_TOKENS, TEMPLATE, THINK
from components.core.errors import CheckpointError

PAD, EOS = "<|pad|>", "<|end|>"
PIECES = r"\d|[-+*/=]| ?\p{L}+| ?[^\s\p{L}\d]+|\s+(?!\S)|\s+"
"""What merges never cross: digits, signs of arithmetic, words and runs of signs with the space before, white space."""
TAGS = [AddedToken(tag, special=False, normalized=False) for tag in (THINK, END_THINK)]
"""Not special, so that decoding never hides them: the reasoning parser has to see them."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path) -> None:
    """Train a byte-level BPE tokenizer and write a Hugging Face folder with the toggle.

    Every digit and every sign of arithmetic is a token of its own, so that sums are spelled digit by digit.

    Args:
        texts: what to learn merges from.
        vocab_size: tokens in all, at most.
        out: folder to fill.
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
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def add_toggle(source: Path, out: Path) -> int:
    """Copy a user's tokenizer, with the tags and roles as single tokens and our chat template.

    Returns:
        Tokens of the new vocabulary.

    Raises:
        CheckpointError: there is no tokenizer.json, or no end-of-sequence token.
    """
    file, config_file = source / "tokenizer.json", source / "tokenizer_config.json"
    for needed in (file, config_file):
        if not needed.is_file():
            raise CheckpointError(
                f"the tokenizer of {source.name} has no {needed.name}, which the toggle needs",
                hint="save it as a fast tokenizer: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            )
    settings = json.loads(config_file.read_text(encoding="utf-8"))
    if not settings.get("eos_token"):
        raise CheckpointError(
            f"the tokenizer of {source.name} has no eos_token, which ends every answer",
            hint="set eos_token in tokenizer_config.json",
        )
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens([AddedToken(role, special=True, normalized=False) for role in ROLE_TOKENS])
    tokenizer.add_tokens(TAGS)
    out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.name.startswith(("tokenizer", "special_tokens", "vocab", "merges", "added_tokens")):
            shutil.copy(path, out / path.name)
    tokenizer.save(str(out / "tokenizer.json"))
    settings.pop("chat_template", None)
    settings.pop("added_tokens_decoder", None)
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return int(tokenizer.get_vocab_size())
