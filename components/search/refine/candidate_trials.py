"""Trials of candidates: the best choices by score, each distilled for a short while, since ranking can change then.

Source: arXiv 2411.19146, section 4.3 (loss), appendix B (several solutions).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.runtime.resume import Resume
from components.core.text.packing import Batch, RowStream
from components.core.training.loop import train
from components.core.training.losses import distillation_loss, paired_layers
from components.core.training.train_config import TrainConfig
from components.search.child.child_model import trainable
from components.search.child.evaluation import HeldOut, held_out_kl
from components.search.config import Candidates
from components.search.search_table import CandidateTrial
from components.search.solver.option_table import OptionTable
from components.search.solver.problem import Choice
from components.search.solver.solve import Solution, pool

SIGNIFICANT = 2.0
"""Standard errors by which a candidate must beat the best one by score; a smaller difference is noise."""


def compare_candidates(
    parent: TesseraForCausalLM,
    choices: Sequence[tuple[Choice, float]],
    make: Callable[[Choice], TesseraForCausalLM],
    stream: RowStream,
    batches: Sequence[Batch],
    config: Candidates,
    *,
    batch_size: int,
    context: StageContext,
) -> tuple[CandidateTrial, ...]:
    """Distil every candidate alike, and choose by held-out KL.

    Args:
        parent: the teacher, and the reference of the KL; not paged, since a child in training is in memory.
        choices: with their scores, the best first.
        make: makes the child of a choice, as it would be written.
        stream: packed training text.
        batches: held-out text.
        config: steps and learning rate.
        batch_size: packed rows a step.
        context: takes progress, keeps resume points, says when to stop.

    Returns:
        One for each choice, in order; exactly one is chosen.

    Raises:
        Interrupted: the stage was asked to stop; a checkpoint was saved.
    """
    before: list[HeldOut] = []
    after: list[HeldOut] = []
    training = TrainConfig(
        num_steps=config.num_steps,
        learning_rate=config.learning_rate,
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
        seq_len=stream.seq_len,
        seed=stream.seed,
    )
    for number, (choice, _) in enumerate(choices):
        child = trainable(make(choice))
        before += held_out_kl(parent, [child], batches)
        loss = distillation_loss(parent, paired_layers(parent, child))
        own = replace(context, resume=Resume(context.resume.folder / f"candidate-{number}"))
        train(child, stream, loss, training, own)
        after += held_out_kl(parent, [child], batches)
        context.progress(number + 1, len(choices), "candidates distilled", kl=after[-1].kl)
    return judge(choices, before, after)


def best_choices(
    table: OptionTable, limits: Mapping[str, float], best: Solution, config: Candidates
) -> list[tuple[Choice, float]]:
    """The best choices and their scores, the proven one first."""
    found = pool(table.problem(table.scores, limits), config.count, distance=config.distance)
    others = [other for other in found if other.choice != best.choice]
    return [(solution.choice, solution.objective) for solution in [best, *others]][: config.count]


def judge(
    choices: Sequence[tuple[Choice, float]], before: Sequence[HeldOut], after: Sequence[HeldOut]
) -> tuple[CandidateTrial, ...]:
    """Choose the candidate with the lowest KL among those that beat the first by more than noise, else the first."""
    differences = [trial.minus(after[0]) for trial in after]
    ahead = [number for number, (mean, error) in enumerate(differences) if number and mean < -SIGNIFICANT * error]
    winner = min(ahead, key=lambda number: differences[number][0], default=0)
    return tuple(
        CandidateTrial(
            choice=choice,
            score=score,
            kl_before=before[number].kl,
            kl_after=after[number].kl,
            difference=differences[number][0],
            difference_error=differences[number][1],
            chosen=number == winner,
        )
        for number, (choice, score) in enumerate(choices)
    )
