"""Evaluation of children: held-out KL from the parent row by row, and the effect of fusion on KL and decode time.

Rows are kept apart, so that a difference of two models comes with its standard error.

Shape letters: B rows, T tokens, N positions that count, D hidden size.
"""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from components.core.model.checkpoint import save_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.serving.load_profile import LoadProfile, Workload
from components.core.serving.timing import TimingReport, measure_step_ms
from components.core.text.packing import Batch
from components.core.training.losses import counted, kl_sum
from components.search.child.child_model import Child
from components.search.child.ffn_fusion import ChildLayer, Dependencies, drop_empty, split_runs
from components.search.config import Fusion
from components.search.search_table import FfnRun, FusionEffect


@dataclass(frozen=True)
class HeldOut:
    """KL(parent || model) on packed rows.

    Attributes:
        sums: of each row, nats.
        tokens: positions that count, of each row.
    """

    sums: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def kl(self) -> float:
        """Nats a token, never below 0."""
        return max(0.0, sum(self.sums) / sum(self.tokens))

    def minus(self, other: "HeldOut") -> tuple[float, float]:
        """Difference of the means on the same rows, and its standard error: rows differ, but alike for both."""
        total = sum(self.tokens)
        mean = (sum(self.sums) - sum(other.sums)) / total
        rest = [a - b - mean * n for a, b, n in zip(self.sums, other.sums, self.tokens, strict=True)]
        rows = len(rest)
        error = math.sqrt(sum(x * x for x in rest) * rows / (rows - 1)) / total if rows > 1 else math.inf
        return mean, error


@torch.no_grad()
def held_out_kl(
    parent: TesseraForCausalLM, models: Sequence[TesseraForCausalLM], batches: Sequence[Batch]
) -> list[HeldOut]:
    """KL of each model from the parent, whose predictions are computed once."""
    sums: list[list[float]] = [[] for _ in models]
    tokens: list[int] = []
    for batch in (batch.to(parent.device) for batch in batches):
        teacher_BTD = _hidden(parent, batch)
        students = [_hidden(model, batch) for model in models]
        for row in range(len(teacher_BTD)):
            labels_1T = batch.labels_BT[row : row + 1]
            teacher_ND, labels_N = counted(teacher_BTD[row : row + 1], labels_1T)
            if not len(labels_N):
                continue
            tokens.append(len(labels_N))
            for model, student_BTD, found in zip(models, students, sums, strict=True):
                student_ND, _ = counted(student_BTD[row : row + 1], labels_1T)
                found.append(float(kl_sum(student_ND, teacher_ND, model.lm_head, parent.lm_head)))
    return [HeldOut(tuple(found), tuple(tokens)) for found in sums]


def _hidden(model: TesseraForCausalLM, batch: Batch) -> Tensor:
    """Hidden states after the final norm."""
    output = model.model(batch.input_ids_BT, position_ids=batch.position_ids_BT, segment_ids=batch.segment_ids_BT)
    hidden_BTD: Tensor = output.last_hidden_state
    return hidden_BTD


def fusion_effect(
    parent: TesseraForCausalLM,
    child: Child,
    batches: Sequence[Batch],
    config: Fusion,
    workload: Workload,
    context: StageContext,
) -> FusionEffect:
    """Compare a child with its fused self, neither trained.

    Args:
        parent: the reference of the KL.
        child: with the dependencies of its FFNs.
        batches: held-out text.
        config: where to time a decode step, if at all.
        workload: batch and lengths to time.
        context: gives scratch space for the models that vLLM times.
    """
    models = (child.unfused, child.model)
    before, after = held_out_kl(parent, models, batches)
    times: Sequence[Sequence[float]] = ((), ())
    if config.timing == "decoder":
        times = decoder_steps_ms(models, workload)
    elif config.timing == "vllm":
        times = _vllm_steps_ms(models, workload, context)
    return FusionEffect(
        runs=run_records(drop_empty(child.layers), child.fused, child.dependencies),
        tokens=sum(before.tokens),
        kl_before=before.kl,
        kl_after=after.kl,
        kl_error=after.minus(before)[1],
        timing=config.timing,
        before_ms=tuple(times[0]),
        after_ms=tuple(times[1]),
    )


def run_records(
    layers: Sequence[ChildLayer], fused: Sequence[ChildLayer], dependencies: Dependencies
) -> tuple[FfnRun, ...]:
    """Records of the FFN runs of a child.

    Args:
        layers: none of them empty, nothing fused.
        fused: the layers that they became.
        dependencies: of the FFNs on each other.
    """
    groups = [layer.parent_layers for layer in fused if len(layer.parent_layers) > 1]
    records = []
    for run in split_runs(layers):
        numbers = tuple(layer.parent_layers[0] for layer in run)
        if len(numbers) > 1:
            matrix = tuple(tuple(dependencies.get((a, b), 0.0) for b in numbers) for a in numbers)
            mine = tuple(group for group in groups if group[0] in numbers)
            records.append(FfnRun(layers=numbers, dependency=matrix, groups=mine))
    return tuple(records)


@torch.no_grad()
def decoder_steps_ms(models: Sequence[TesseraForCausalLM], workload: Workload) -> list[list[float]]:
    """Time decode steps of models in our own decoder, in turns, so that a busy machine slows all of them.

    Returns:
        Milliseconds of each step of the batch, after the prompt and one step that warms up.
    """
    steps: list[list[float]] = [[] for _ in models]
    shape = (workload.batch_size, workload.prompt_tokens)
    prompt_BT = torch.zeros(shape, dtype=torch.long, device=models[0].device)
    for _ in range(workload.rounds):
        caches = [DynamicCache() for _ in models]
        for model, cache in zip(models, caches, strict=True):
            model.model(prompt_BT, past_key_values=cache)
            model.model(prompt_BT[:, :1], past_key_values=cache)
        for _, (model, cache, found) in itertools.product(
            range(workload.new_tokens), zip(models, caches, steps, strict=True)
        ):
            began = time.perf_counter()
            logits_BTV = model(prompt_BT[:, :1], past_key_values=cache).logits
            logits_BTV[0, -1, 0].item()  # waits for the device
            found.append(1000 * (time.perf_counter() - began))
    return steps


def _vllm_steps_ms(
    models: Sequence[TesseraForCausalLM], workload: Workload, context: StageContext
) -> list[list[float]]:
    """The same in vLLM, which serves the child later."""
    folders: list[Path] = []
    for name, model in zip(("before-fusion", "after-fusion"), models, strict=True):
        folders.append(context.scratch / name)
        save_model(model, folders[-1], tokenizer=None, by_block=True)
    load = LoadProfile(**workload.model_dump(include=set(Workload.model_fields)))
    place, report = context.placement, TimingReport.to_context(context, "times before and after fusion")
    return measure_step_ms(folders, load, place.engine_threads, place.memory_gib, report=report)
