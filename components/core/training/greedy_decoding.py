"""Greedy completions of a model in this process, the likeliest token each time.

A completion that is expected can be checked in one forward pass instead of a pass a token: up to the first token that
the model would not have said it is the model's own. What follows that is generated.

Source of the check: arXiv 2211.17192, section 2, at temperature 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from components.core.model.decoder import TesseraForCausalLM

ROWS = 64
"""Completions at a time."""

Tokens = list[int]


@torch.no_grad()
def complete(model: TesseraForCausalLM, prompts: Sequence[Tokens], limits: Sequence[int], eos: int) -> list[Tokens]:
    """What follows each prompt, up to and with the end token, or as many tokens as its limit says.

    Args:
        model: in evaluation mode.
        prompts: token ids, none empty.
        limits: tokens of each completion at most, at least 1.
        eos: the end token.
    """
    completions: list[Tokens] = []
    for start in range(0, len(prompts), ROWS):
        rows, slacks = prompts[start : start + ROWS], limits[start : start + ROWS]
        longest = max(map(len, rows))
        ids_BT = torch.tensor([[eos] * (longest - len(row)) + row for row in rows])
        mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        generate: Any = GenerationMixin.generate  # its type is of many kinds of models and answers
        found_BT: Tensor = generate(
            model,
            ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=max(slacks),
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        new = zip(found_BT[:, longest:].tolist(), slacks, strict=True)
        completions += [_until_end(tokens[:room], eos) for tokens, room in new]
    return completions


@torch.no_grad()
def complete_like(
    model: TesseraForCausalLM, prompts: Sequence[Tokens], expected: Sequence[Tokens], limit: int, eos: int
) -> list[Tokens]:
    """The same completions as `complete` gives, sooner the more the model says what is expected.

    Args:
        model: in evaluation mode.
        prompts: token ids, none empty.
        expected: a completion of each, none empty, ending as `complete` ends it.
        limit: tokens of a completion at most.
        eos: the end token.
    """
    completions: list[Tokens] = []
    for start in range(0, len(prompts), ROWS):
        rows = list(zip(prompts[start : start + ROWS], expected[start : start + ROWS], strict=True))
        longest = max(len(prompt) + len(tokens) for prompt, tokens in rows)
        ids_BT = torch.tensor([row + [eos] * (longest - len(row)) for row in (p + t for p, t in rows)])
        likeliest_BT = model(ids_BT).logits.argmax(dim=-1).tolist()
        for (prompt, tokens), likeliest_T in zip(rows, likeliest_BT, strict=True):
            said = likeliest_T[len(prompt) - 1 : len(prompt) - 1 + len(tokens)]
            agreed = next((k for k, pair in enumerate(zip(said, tokens, strict=True)) if pair[0] != pair[1]), None)
            completions.append(tokens if agreed is None else said[: agreed + 1])
    open_ends = [
        number
        for number, (found, wanted) in enumerate(zip(completions, expected, strict=True))
        if found is not wanted and found[-1] != eos and len(found) < limit
    ]
    if open_ends:
        rests = complete(
            model,
            [prompts[number] + completions[number] for number in open_ends],
            [limit - len(completions[number]) for number in open_ends],
            eos,
        )
        for number, rest in zip(open_ends, rests, strict=True):
            completions[number] = completions[number] + rest
    return completions


def _until_end(tokens: Tokens, eos: int) -> Tokens:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
