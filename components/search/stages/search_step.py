"""The search, the paper's steps in order; each of the first ones is also a stage of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Unpack

from pydantic import JsonValue

from components.core.base.errors import RecipeError
from components.core.model.architecture import Architecture
from components.core.model.checkpoint import save_model
from components.core.model.layer_files import is_paged
from components.core.runtime.context import StageContext
from components.core.serving.load_profile import LoadProfile
from components.core.serving.timing import TimingReport
from components.core.text.packing import corpus_stream
from components.search.child.child_model import ChildFactory, child_record, choice_record
from components.search.child.evaluation import fusion_effect
from components.search.config import SearchConfig
from components.search.costs.measured import architecture_of, own_costs_of
from components.search.costs.resources import Costs, CostTable
from components.search.library.calibration import calibration_batches, load_parent
from components.search.library.initialisation import load_importance, spread_of_importance
from components.search.refine.candidate_trials import best_choices, compare_candidates
from components.search.refine.latency_feedback import (
    FeedbackResult,
    MeasuredChild,
    calibrate_latency,
    measure_child,
)
from components.search.scoring.score_table import BlockScore, ShardScores
from components.search.search_table import TABLE_FILE, CandidateTrial, ChildRecord, FusionEffect, Proof, SearchTable
from components.search.solver.baselines import greedy_choice, most_parameters, random_choice, uniform_choice
from components.search.solver.explain import margins
from components.search.solver.fronts import latency_front, other_fronts
from components.search.solver.option_table import OptionTable, option_table
from components.search.solver.problem import Choice
from components.search.solver.solve import absolute_limits, certify
from components.search.space.layer_space import LayerSpace, Variant, layer_spaces, servable_spaces
from components.search.space.library_table import LayerImportance, write_record
from components.search.space.subblocks import shape_of
from components.search.stages.upstream import SearchInputs, costs_folder, read_scores, run_missing_upstream


def search(
    config: SearchConfig, *, context: StageContext, out: Path, **inputs: Unpack[SearchInputs]
) -> dict[str, JsonValue]:
    """Score, solve, fuse, assemble; what the stages before have not made is made here.

    A parent larger than memory is read layer by layer, and so are its children while they are compared and written.
    Short distillations need memory for a whole child and its parent.

    Raises:
        RecipeError: the parent is larger than memory, and a setting needs whole models in memory.
        InfeasibleBudget: no choice is within the limits.

    Source: arXiv 2411.19146, section 4 and appendix B; arXiv 2503.18908, section 3.
    """
    parent = load_parent(inputs["parent"], context, config.dtype)
    if is_paged(parent.model.layers):
        _refuse_whole_models(config)
    spaces = servable_spaces(layer_spaces(config, shape_of(parent.config)), config.measurement.tensor_parallel)
    costs = own_costs_of(parent, spaces, costs_folder(config, inputs, context))
    upstream = run_missing_upstream(config, inputs, context)
    shards = read_scores(upstream)

    uncorrected = _options(config, spaces, costs, shards)
    parent_costs = uncorrected.costs(uncorrected.parent_choice)
    limits = absolute_limits(config.limits, parent_costs, uncorrected.batch_tokens)
    held_out = calibration_batches(
        config, inputs["corpus"], inputs["parent"], "validation", config.scoring_batches, context
    )
    children = ChildFactory(parent, spaces, upstream.libraries, config.fusion, held_out)

    measure = _child_timer(children, uncorrected, inputs["parent"], costs.measurement, context)
    found = calibrate_latency(
        uncorrected, limits, measure, config.latency_feedback, new_tokens=costs.measurement.new_tokens
    )
    trials = _try_candidates(config, inputs, children, found, limits, context)
    choices = {
        "child": next((trial.choice for trial in trials if trial.chosen), found.solution.choice),
        "random_child": random_choice(found.table, limits, config.seed or 0),
        "greedy_child": greedy_choice(found.table, limits),
    }

    written: dict[str, ChildRecord] = {}
    fusion: FusionEffect | None = None
    for done, (name, choice) in enumerate(choices.items(), 1):
        child = children.child(found.table.variants(choice), with_dependencies=name == "child")
        save_model(child.model, out / name, tokenizer=inputs["parent"], by_block=True, numbers=child.numbers)
        if name == "child":
            fusion = fusion_effect(parent, child, held_out, config.fusion, costs.measurement, context)
        written[name] = child_record(found.table, choice, limits, child)
        context.progress(done, len(choices), "children")

    outcome = _Outcome(limits, parent_costs, found, trials, written, fusion)
    spread = spread_of_importance(load_importance(upstream.importance))
    record = _search_record(config, outcome, costs, shards, spread, architecture_of(parent))
    write_record(out / "search_table" / TABLE_FILE, record)
    return {
        "score": found.solution.objective,
        "gap": found.solution.gap,
        "layers": len(written["child"].fused_layers),
        **{f"parameters_{name}": child.parameters for name, child in written.items()},
        "predicted_latency_share": written["child"].costs.latency_ms / parent_costs.latency_ms,
    }


def _refuse_whole_models(config: SearchConfig) -> None:
    """Refuse, before any work, the settings that need whole models in memory.

    Raises:
        RecipeError: one of them is set.
    """
    refused = {
        f"candidates.count={config.candidates.count} distils whole children": config.candidates.count > 1,
        "fusion.timing=decoder times whole children": config.fusion.timing == "decoder",
    }
    for setting in (setting for setting, is_set in refused.items() if is_set):
        raise RecipeError(
            f"search.{setting}, and the layers of this parent are read one at a time",
            hint="leave it out, or raise placement.memory_gib to twice what the parent takes",
        )


def _blocks(shards: Sequence[ShardScores]) -> list[BlockScore]:
    """The scored sub-blocks of all shards, by layer."""
    return sorted((block for shard in shards for block in shard.blocks), key=lambda block: block.layer)


def _options(
    config: SearchConfig, spaces: Sequence[LayerSpace], costs: CostTable, shards: Sequence[ShardScores]
) -> OptionTable:
    """Score and costs of every option of every slot."""
    scores = {(block.layer, Variant(block.part, block.size)): block.of(config.score) for block in _blocks(shards)}
    return option_table(spaces, costs.fixed, costs.blocks, scores, costs.measurement.batch_tokens)


def _child_timer(
    children: ChildFactory, table: OptionTable, parent: Path, load: LoadProfile, context: StageContext
) -> Callable[[Choice], MeasuredChild]:
    """A function that assembles the child of a choice and times it in vLLM, in turns with the parent."""

    def measure(choice: Choice) -> MeasuredChild:
        with TemporaryDirectory(dir=context.scratch) as folder:
            child = children.child(table.variants(choice)).model
            save_model(child, Path(folder), tokenizer=None, by_block=True)
            report = TimingReport.to_context(context, "times of a child and its parent")
            return measure_child(parent, Path(folder), load, context.placement, report)

    return measure


def _try_candidates(
    config: SearchConfig,
    inputs: SearchInputs,
    children: ChildFactory,
    found: FeedbackResult,
    limits: Mapping[str, float],
    context: StageContext,
) -> tuple[CandidateTrial, ...]:
    """Distil the best choices for a short while; nothing where a single one is to be considered."""
    if config.candidates.count == 1:
        return ()
    parent, corpus = inputs["parent"], inputs["corpus"]
    return compare_candidates(
        children.parent,
        best_choices(found.table, limits, found.solution, config.candidates),
        lambda choice: children.child(found.table.variants(choice)).model,
        corpus_stream(corpus, parent, "train", seq_len=config.seq_len, seed=config.seed or 0),
        calibration_batches(config, corpus, parent, "validation", config.candidates.batches, context),
        config.candidates,
        batch_size=config.batch_size,
        context=context,
    )


@dataclass(frozen=True)
class _Outcome:
    """What the search found and wrote.

    Attributes:
        limits: absolute.
        parent_costs: predicted cost of the parent.
        found: the best choice, and the options with costs as the latency feedback left them.
        trials: the candidates that were distilled.
        written: the children by their output.
        fusion: what fusion did to the best one.
    """

    limits: dict[str, float]
    parent_costs: Costs
    found: FeedbackResult
    trials: tuple[CandidateTrial, ...]
    written: Mapping[str, ChildRecord]
    fusion: FusionEffect | None


def _search_record(
    config: SearchConfig,
    outcome: _Outcome,
    costs: CostTable,
    shards: Sequence[ShardScores],
    importance: tuple[LayerImportance, ...],
    architecture: Architecture,
) -> SearchTable:
    """`search.json`: the outcome, with baselines, margins, proof and Pareto fronts."""
    limits, table, best = outcome.limits, outcome.found.table, outcome.found.solution
    baselines = {
        "most parameters": most_parameters(table, limits, best.choice),
        "uniform": uniform_choice(table, limits),
    }
    return SearchTable(
        fixed=table.fixed,
        slots=table.slots,
        batch_tokens=table.batch_tokens,
        limits=limits,
        parent=outcome.parent_costs,
        **outcome.written,
        baselines={name: choice_record(table, choice, limits) for name, choice in baselines.items() if choice},
        fusion=outcome.fusion,
        candidates=outcome.trials,
        proof=Proof(objective=best.objective, bound=best.bound, gap=best.gap, status=best.status),
        margins=margins(table, limits, best.choice, shards, config.score),
        certificate=certify(table.problem(table.scores, limits), best.choice, fixed=table.fixed_options),
        pareto=latency_front(table, limits, config.pareto_points),
        fronts=other_fronts(table, limits, config.pareto_points),
        importance=importance,
        architecture=architecture,
        measurement=costs.measurement,
        latency_feedback=outcome.found.rounds,
        blocks=tuple(block.model_copy(update={"row_sums": {}}) for block in _blocks(shards)),
        machine=costs.machine,
    )
