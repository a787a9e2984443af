"""Greedy completions of a model in this process: each token is the most likely one.

An expected completion is checked in one forward pass instead of one pass for each token. Up to the first token that the
model would not have chosen, it is the model's own completion; the rest is generated.

Source of the check: arXiv 2211.17192, section 2, at temperature 0.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from components.core.model.decoder import TesseraForCausalLM

ROWS = 64
"""Completions that are generated or checked together."""

Tokens = list[int]


@torch.no_grad()
def complete(model: TesseraForCausalLM, prompts: Sequence[Tokens], limits: Sequence[int], eos: int) -> list[Tokens]:
    """The completion of each prompt, up to its end token, which is included, or to its limit.

    Args:
        model: in evaluation mode.
        prompts: token ids, none empty.
        limits: maximum number of tokens of each completion, at least 1.
        eos: the end token.
    """
    completions: list[Tokens] = []
    for start in range(0, len(prompts), ROWS):
        rows, row_limits = prompts[start : start + ROWS], limits[start : start + ROWS]
        longest = max(map(len, rows))
        ids_BT = torch.tensor([[eos] * (longest - len(row)) + row for row in rows], device=model.device)
        mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
        found_BT = _likeliest(model, ids_BT, mask_BT, max(row_limits), eos)
        new = zip(found_BT.tolist(), row_limits, strict=True)
        completions += [_until_end(tokens[:limit], eos) for tokens, limit in new]
    return completions


@torch.no_grad()
def complete_like(
    model: TesseraForCausalLM, prompts: Sequence[Tokens], expected: Sequence[Tokens], limit: int, eos: int
) -> list[Tokens]:
    """The same completions as `complete`; faster, the more of the expected tokens the model would choose.

    Args:
        model: in evaluation mode.
        prompts: token ids, none empty.
        expected: the expected completion of each prompt, none empty, with the end that `complete` would give it.
        limit: maximum number of tokens of a completion.
        eos: the end token.
    """
    completions: list[Tokens] = []
    for start in range(0, len(prompts), ROWS):
        rows = list(zip(prompts[start : start + ROWS], expected[start : start + ROWS], strict=True))
        longest = max(len(prompt) + len(tokens) for prompt, tokens in rows)
        whole = [prompt + tokens for prompt, tokens in rows]
        ids_BT = torch.tensor([row + [eos] * (longest - len(row)) for row in whole], device=model.device)
        likeliest_BT = model(ids_BT).logits.argmax(dim=-1).tolist()
        for (prompt, tokens), likeliest_T in zip(rows, likeliest_BT, strict=True):
            chosen = likeliest_T[len(prompt) - 1 : len(prompt) - 1 + len(tokens)]
            mismatch = next((k for k, pair in enumerate(zip(chosen, tokens, strict=True)) if pair[0] != pair[1]), None)
            completions.append(tokens if mismatch is None else chosen[: mismatch + 1])
    unfinished = [
        number
        for number, (found, tokens) in enumerate(zip(completions, expected, strict=True))
        if found is not tokens and found[-1] != eos and len(found) < limit
    ]
    if unfinished:
        rests = complete(
            model,
            [prompts[number] + completions[number] for number in unfinished],
            [limit - len(completions[number]) for number in unfinished],
            eos,
        )
        for number, rest in zip(unfinished, rests, strict=True):
            completions[number] = completions[number] + rest
    return completions


def _likeliest(model: TesseraForCausalLM, ids_BT: Tensor, mask_BT: Tensor, limit: int, eos: int) -> Tensor:
    """The most likely next tokens of each row, up to the limit or until every row has its end token.

    Args:
        model: in evaluation mode.
        ids_BT: token ids, padded on the left.
        mask_BT: 0 for padding, else 1.
        limit: maximum number of tokens.
        eos: the end token.
    """
    cache, positions_BT = DynamicCache(), (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    chosen: list[Tensor] = []
    ended_B1 = torch.zeros(len(ids_BT), 1, dtype=torch.bool, device=ids_BT.device)
    while len(chosen) < limit and not bool(ended_B1.all()):
        inputs = {"position_ids": positions_BT, "attention_mask": mask_BT, "past_key_values": cache}
        ids_BT = model(ids_BT, **inputs, logits_to_keep=1).logits.argmax(dim=-1)
        chosen.append(ids_BT)
        ended_B1 |= ids_BT == eos
        mask_BT, positions_BT = F.pad(mask_BT, (0, 1), value=1), positions_BT[:, -1:] + 1
    return torch.cat(chosen, dim=1)


def _until_end(tokens: Tokens, eos: int) -> Tokens:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
