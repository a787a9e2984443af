"""The search, the paper's steps in order; each of the first ones is also a stage of its own."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import JsonValue

from components.core.base.errors import RecipeError
from components.core.model.checkpoint import save_model
from components.core.model.layer_paging import is_paged
from components.core.runtime.context import StageContext
from components.core.text.packing import PackedStream, load_corpus
from components.search.child.child_model import ChildFactory, chosen, picked
from components.search.child.fusion_effect import fusion_effect
from components.search.child.records import Chosen, FusionEffect
from components.search.config import CostsConfig, SearchConfig
from components.search.costs.measured import architecture_of, own_costs_of
from components.search.library.calibration import calibration_batches, load_parent
from components.search.library.coupled_training import couple, pairs_to_couple
from components.search.library.importance import load_importance
from components.search.refine.candidate_trials import best_choices, compare_candidates
from components.search.refine.latency_feedback import Measured, calibrate_latency, measure_child
from components.search.refine.records import CandidateTrial
from components.search.solver.baselines import greedy_choice, most_parameters, random_choice, uniform_choice
from components.search.solver.margins import margins
from components.search.solver.option_table import option_table
from components.search.solver.problem import Choice
from components.search.solver.records import Proof
from components.search.solver.solve import absolute_limits, certify
from components.search.space.build import shape_of
from components.search.space.layer_space import Variant, layer_spaces, servable_spaces
from components.search.space.records import write_record
from components.search.stages.costs_step import costs as measure
from components.search.stages.records import TABLE_FILE, SearchTable
from components.search.stages.report_fields import coupled_pairs, latency_front, other_fronts, spread_of_importance
from components.search.stages.upstream import read_scores, run_missing_upstream


def search(
    config: SearchConfig,
    *,
    context: StageContext,
    out: Path,
    parent: Path,
    corpus: Path,
    importance: Path | None = None,
    libraries: Sequence[Path] | None = None,
    scores: Sequence[Path] | None = None,
    costs: Path | None = None,
    problems: Path | None = None,
    earlier: Path | None = None,
) -> dict[str, JsonValue]:
    """Solve, fuse, assemble; what the stages before have not made is made here.

    A parent larger than memory is read layer by layer, and so are its children while they are compared and written.
    Short distillations hold a whole child and its parent: they need memory for both.

    Raises:
        RecipeError: the parent is larger than memory, and something is asked for that holds it whole.
        InfeasibleBudget: no choice is within the limits.

    Source: arXiv 2411.19146, section 4 and appendix B; arXiv 2503.18908, section 3.
    """
    here = context.scratch / "search"
    model = load_parent(parent, context, config.dtype)
    if is_paged(model.model.layers):
        _refuse_what_holds_all(config)
    spaces = servable_spaces(layer_spaces(config, shape_of(model.config)), config.measurement.tensor_parallel)
    if costs is None:
        measure(config.part(CostsConfig), context=context, out=here, parent=parent)
        costs = here / "costs"
    measured = own_costs_of(model, spaces, costs)
    read = {"parent": parent, "corpus": corpus, "costs": costs, "problems": problems}
    given: dict[str, Any] = {"importance": importance, "libraries": libraries, "scores": scores}
    before = run_missing_upstream(config, here, context, read, earlier=earlier, **given)
    shards = read_scores(before)
    scored = sorted((block for shard in shards for block in shard.blocks), key=lambda block: block.layer)

    kls = {(block.layer, Variant(block.part, block.size)): block.of(config.score) for block in scored}
    table = option_table(spaces, measured.fixed, measured.blocks, kls, measured.measurement.batch_tokens)
    parent_costs = table.costs(table.parent_choice)
    limits = absolute_limits(config.limits, parent_costs, table.batch_tokens)

    seed = config.seed or 0
    held_out = calibration_batches(config, corpus, parent, "validation", config.scoring_batches)

    nursery = ChildFactory(model, spaces, before.libraries, config.fusion, held_out)

    def beside_the_parent(choice: Choice) -> Measured:
        with TemporaryDirectory(dir=context.scratch) as folder:
            save_model(nursery.child(table.variants(choice)).model, Path(folder), tokenizer=None, by_block=True)
            return measure_child(parent, Path(folder), measured.measurement, context.placement.engine_threads)

    settled = calibrate_latency(
        table, limits, beside_the_parent, config.latency_feedback, measured.measurement.new_tokens
    )
    table, solution = settled.table, settled.solution
    trials: tuple[CandidateTrial, ...] = ()
    if config.candidates.count > 1:
        trials = compare_candidates(
            model,
            best_choices(table, limits, solution, config.candidates),
            lambda choice: nursery.child(table.variants(choice)).model,
            PackedStream(load_corpus(corpus, parent, "train"), config.seq_len, seed),
            calibration_batches(config, corpus, parent, "validation", config.candidates.batches),
            config.candidates,
            batch_size=config.batch_size,
            seed=seed,
            context=context,
        )
    choices = {
        "child": next((trial.choice for trial in trials if trial.chosen), solution.choice),
        "random_child": random_choice(table, limits, seed),
        "greedy_child": greedy_choice(table, limits),
    }
    others = {
        "most parameters": most_parameters(table, limits, solution.choice),
        "uniform": uniform_choice(table, limits),
    }
    pairs = pairs_to_couple(spaces, table.variants(choices["child"])) if config.coupled.num_steps else {}
    coupled: dict[int, list[float]] = {}
    if pairs:
        stream = PackedStream(load_corpus(corpus, parent, "train"), config.seq_len, seed)
        folders = before.libraries, here / "coupled"
        coupled = couple(model, pairs, *folders, stream, config.batch_size, config.coupled, context)
    told: dict[str, Chosen] = {}
    fusion: FusionEffect | None = None
    for done, (name, choice) in enumerate(choices.items(), 1):
        better = [here / "coupled"] if name == "child" else []
        child = nursery.child(table.variants(choice), *better, measured=name == "child")
        save_model(child.model, out / name, tokenizer=parent, by_block=True, numbers=child.numbers)
        if name == "child":
            fusion = fusion_effect(model, child, held_out, config.fusion, measured.measurement, context)
        told[name] = chosen(table, choice, limits, child)
        context.progress(done, len(choices), "children")

    result = SearchTable(
        fixed=table.fixed,
        slots=table.slots,
        batch_tokens=table.batch_tokens,
        limits=limits,
        parent=parent_costs,
        **told,
        baselines={name: picked(table, choice, limits) for name, choice in others.items() if choice is not None},
        fusion=fusion,
        candidates=trials,
        proof=Proof(objective=solution.objective, bound=solution.bound, gap=solution.gap, status=solution.status),
        margins=margins(table, limits, solution.choice, shards, config.score),
        certificate=certify(table.problem(table.scores, limits), solution.choice, fixed=table.held),
        pareto=latency_front(table, limits, config.pareto_points),
        fronts=other_fronts(table, limits, config.pareto_points),
        importance=spread_of_importance(load_importance(before.importance)),
        architecture=architecture_of(model),
        measurement=measured.measurement,
        latency_feedback=settled.rounds,
        blocks=tuple(block.model_copy(update={"row_sums": {}}) for block in scored),
        coupled=coupled_pairs(pairs, coupled),
        machine=measured.machine,
    )
    write_record(out / "search_table" / TABLE_FILE, result)
    child_costs = told["child"].costs
    return {
        "score": solution.objective,
        "gap": solution.gap,
        "layers": len(told["child"].fused_layers),
        **{f"parameters_{name}": child.parameters for name, child in told.items()},
        "predicted_latency_share": child_costs.latency_ms / parent_costs.latency_ms,
    }


def _refuse_what_holds_all(config: SearchConfig) -> None:
    """Name, before any work, the settings that a parent larger than memory cannot have."""
    asked = {
        f"candidates.count={config.candidates.count} distils whole children": config.candidates.count > 1,
        "fusion.timing=decoder times whole children": config.fusion.timing == "decoder",
    }
    for what in (what for what, wanted in asked.items() if wanted):
        raise RecipeError(
            f"search.{what}, and the layers of this parent are read one at a time",
            hint="leave it out, or raise placement.memory_gib to twice what the parent takes",
        )
