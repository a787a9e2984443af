"""Model folders of a few kilobytes, for tests that need a real one."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from components.core.model.architecture import Architecture, BlockConfig, Linear
from components.core.model.decoder import TesseraConfig, TesseraForCausalLM

VOCAB_SIZE, EOS, PAD = 64, 1, 0
TAGS = ["<think>", "</think>"]
TOKENS = ["<pad>", "<eos>", "<on>", "<off>", *TAGS, *"0123456789+-*= abcdefghijklmnopqrstuvwxyz"]
TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}<eos>{% endif %}"
    "{{ messages[-1].content }}{{ '<off>' if 'thinking off' in messages[0].content else '<on>' }}"
)


def llama(seed: int, **changes: Any) -> LlamaForCausalLM:
    """A random Llama of three layers."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "vocab_size": VOCAB_SIZE,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}
    ids = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    config = LlamaConfig(**{**sizes, **heads, **ids, "initializer_range": 0.2, **changes})
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    return model


Shapes = Sequence[tuple[int | Linear | None, int | Linear | None]]
DIFFERENT: Shapes = [(4, 40), (None, 100), (2, None), (1, 17)]


def heterogeneous(seed: int, shapes: Shapes = DIFFERENT, **changes: Any) -> TesseraForCausalLM:
    """A random decoder, of four layers that all differ if not told otherwise."""
    torch.manual_seed(seed)
    architecture = Architecture(
        family="nemotron-nas",
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_attention_heads=4,
        head_dim=32,
        blocks=tuple(BlockConfig(num_key_value_heads=heads, intermediate_size=width) for heads, width in shapes),
    )
    config = TesseraConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=len(shapes),
        num_attention_heads=4,
        head_dim=32,
        block_configs=architecture.block_configs(),
        initializer_range=0.2,
        max_position_embeddings=512,
        eos_token_id=EOS,
        pad_token_id=PAD,
        architectures=["DeciLMForCausalLM"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **changes,
    )
    model: TesseraForCausalLM = TesseraForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    return model


def speaker(*sentences: list[str]) -> LlamaForCausalLM:
    """A Llama that knows which token follows which, and nothing else, so that its replies are known beforehand."""
    model = llama(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name or name == "lm_head.weight":
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE, 64))
        for sentence in sentences:
            for token, following in itertools.pairwise(sentence):
                model.lm_head.weight[TOKENS.index(following), TOKENS.index(token)] = 1.0
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, both tags, and a template that ends with the mode."""
    words = models.WordLevel({token: number for number, token in enumerate(TOKENS)}, unk_token="<pad>")
    core = Tokenizer(words)
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    core.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in ("<on>", "<off>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")  # type: ignore[no-untyped-call]
    fast.chat_template = TEMPLATE
    return fast


def write(model: LlamaForCausalLM, folder: Path) -> Path:
    """A Llama folder with the tokenizer, as transformers writes it."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
