"""The search, the paper's steps in order; each of the first ones is also a stage of its own."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from torch import Tensor

from components.core.batches import PackedStream, load_corpus
from components.core.checkpoint import save_model
from components.core.job import Job, Resume
from components.search.assemble import child_layers, shape_of
from components.search.baselines import greedy_choice, most_parameters, random_choice, uniform_choice
from components.search.calibration import calibration_batches, load_parent
from components.search.candidates import compare_candidates
from components.search.children import Child, make_child, picked
from components.search.config import (
    Candidates,
    CostsConfig,
    ImportanceConfig,
    LibraryConfig,
    ScoresConfig,
    SearchConfig,
)
from components.search.costs import architecture_of, own_costs_of
from components.search.costs_stage import costs as measure
from components.search.coupled import couple, pairs_to_couple
from components.search.fusion import ChildLayer
from components.search.fusion_effect import fusion_effect
from components.search.importance import load_importance, share_of_top
from components.search.importance_stage import importance as watch_channels
from components.search.library_stage import library as train_library
from components.search.noise import margins
from components.search.pools import pool
from components.search.problem import Choice
from components.search.results import (
    LIBRARY_FILE,
    SCORES_FILE,
    TABLE_FILE,
    BlockScore,
    CandidateTrial,
    Chosen,
    CoupledPair,
    FrontPoint,
    FusionEffect,
    LayerImportance,
    LayerShape,
    ParetoPoint,
    Proof,
    SearchTable,
    ShardLibrary,
    ShardScores,
    write_record,
)
from components.search.scores_stage import score_blocks
from components.search.solver import Solution, absolute_limits, certify, pareto_front
from components.search.space import Variant, layer_spaces, servable_spaces
from components.search.table import OptionTable, option_table
from components.search.truth import Measured, measure_child, settle

FRONTS = ("parameters", "memory_bytes", "request_ms")
"""Resources besides latency that the best score is told over."""


def search(
    config: SearchConfig,
    *,
    job: Job,
    out: Path,
    parent: Path,
    corpus: Path,
    importance: Path | None = None,
    libraries: Sequence[Path] | None = None,
    scores: Sequence[Path] | None = None,
    costs: Path | None = None,
    problems: Path | None = None,
) -> dict[str, JsonValue]:
    """Solve, fuse, assemble; what the stages before have not made is made here.

    Source: arXiv 2411.19146, section 4 and appendix B; arXiv 2503.18908, section 3.
    """
    here = job.scratch / "search"
    model = load_parent(parent, job, config.dtype)
    spaces = servable_spaces(layer_spaces(config, shape_of(model.config)), config.measurement.tensor_parallel)
    if costs is None:
        measure(config.part(CostsConfig), job=job, out=here, parent=parent)
        costs = here / "costs"
    measured = own_costs_of(model, spaces, costs)
    watched: dict[str, Any] = {"job": job, "out": here, "parent": parent, "corpus": corpus}
    if importance is None:
        watch_channels(config.part(ImportanceConfig), **watched)
        importance = here / "importance"
    if not libraries:
        train_library(config.part(LibraryConfig), importance=importance, **watched)
        libraries = [here / "library"]
    if not scores:
        # Points of their own: those of the library are found by their step alone.
        points = Resume(job.resume.folder / "scores", job.resume.interval_s)
        scoring = watched | {"job": dataclasses.replace(job, resume=points), "costs": costs, "problems": problems}
        score_blocks(config.part(ScoresConfig), libraries, **scoring)
        scores = [here / "scores"]
    shards = _read_scores(scores, libraries)
    scored = sorted((block for shard in shards for block in shard.blocks), key=lambda block: block.layer)

    kls = {(block.layer, Variant(block.part, block.size)): block.of(config.score) for block in scored}
    table = option_table(spaces, measured.fixed, measured.blocks, kls, measured.measurement.batch_tokens)
    parent_costs = table.costs(table.parent_choice)
    limits = absolute_limits(config.limits, parent_costs, table.batch_tokens)

    seed = config.seed or 0
    held_out = calibration_batches(config, corpus, parent, "validation", config.scoring_batches)

    def make(choice: Choice, *better: Path, dependencies: bool = config.fusion.max_dependency is not None) -> Child:
        layers = child_layers(model, spaces, [*better, *(libraries or [])], table.variants(choice))
        return make_child(model, layers, config.fusion, held_out if dependencies else ())

    def beside_the_parent(choice: Choice) -> Measured:
        save_model(make(choice).model, job.scratch / "child", tokenizer=None)
        return measure_child(parent, job.scratch / "child", measured.measurement, job.placement.engine_threads)

    settled = settle(table, limits, beside_the_parent, config.truth, measured.measurement.new_tokens)
    table, solution = settled.table, settled.solution
    trials: tuple[CandidateTrial, ...] = ()
    if config.candidates.count > 1:
        trials = compare_candidates(
            model,
            _best_choices(table, limits, solution, config.candidates),
            lambda choice: make(choice).model,
            PackedStream(load_corpus(corpus, parent, "train"), config.seq_len, seed),
            calibration_batches(config, corpus, parent, "validation", config.candidates.batches),
            config.candidates,
            batch_size=config.batch_size,
            seed=seed,
            job=job,
        )
    choices = {
        "child": next((trial.choice for trial in trials if trial.chosen), solution.choice),
        "random_child": random_choice(table, limits, seed),
        "greedy_child": greedy_choice(table, limits),
    }
    others = {"most parameters": most_parameters(table, limits), "uniform": uniform_choice(table, limits)}
    pairs = pairs_to_couple(spaces, table.variants(choices["child"])) if config.coupled.num_steps else {}
    coupled: dict[int, list[float]] = {}
    if pairs:
        stream = PackedStream(load_corpus(corpus, parent, "train"), config.seq_len, seed)
        coupled = couple(model, pairs, libraries, here / "coupled", stream, config.batch_size, config.coupled, job)
    chosen: dict[str, Chosen] = {}
    fusion: FusionEffect | None = None
    for done, (name, choice) in enumerate(choices.items(), 1):
        better = [here / "coupled"] if name == "child" else []
        child = make(choice, *better, dependencies=name == "child" or config.fusion.max_dependency is not None)
        save_model(child.model, out / name, tokenizer=parent, by_block=True)
        if name == "child":
            fusion = fusion_effect(model, child, held_out, config.fusion, measured.measurement, job)
        chosen[name] = Chosen(
            **picked(table, choice, limits).model_dump(),
            layers=_shapes(child.layers),
            fused_layers=_shapes(child.fused),
            parameters=child.model.num_parameters(),
        )
        job.progress(done, len(choices), "children")

    front = pareto_front(table, limits, config.pareto_points)
    result = SearchTable(
        fixed=table.fixed,
        slots=table.slots,
        batch_tokens=table.batch_tokens,
        limits=limits,
        parent=parent_costs,
        **chosen,
        baselines={name: picked(table, choice, limits) for name, choice in others.items() if choice is not None},
        fusion=fusion,
        candidates=trials,
        proof=Proof(objective=solution.objective, bound=solution.bound, gap=solution.gap, status=solution.status),
        margins=margins(table, limits, solution.choice, shards, config.score),
        certificate=certify(table.problem(table.scores, limits), solution.choice, fixed=table.held),
        pareto=tuple(
            ParetoPoint(limit_ms=limit, choice=best.choice, score=best.objective, costs=table.costs(best.choice))
            for limit, best in front
        ),
        fronts=_fronts(table, limits, config.pareto_points),
        importance=_summary(load_importance(importance)),
        architecture=architecture_of(model),
        measurement=measured.measurement,
        truth=settled.rounds,
        blocks=tuple(block.model_copy(update={"row_sums": {}}) for block in scored),
        coupled=_coupled_pairs(pairs, coupled),
        machine=measured.machine,
    )
    write_record(out / "search_table" / TABLE_FILE, result)
    child_costs = chosen["child"].costs
    return {
        "score": solution.objective,
        "gap": solution.gap,
        "layers": len(chosen["child"].fused_layers),
        **{f"parameters_{name}": choice.parameters for name, choice in chosen.items()},
        "predicted_latency_share": child_costs.latency_ms / parent_costs.latency_ms,
    }


def _fronts(table: OptionTable, limits: Mapping[str, float], points: int) -> dict[str, tuple[FrontPoint, ...]]:
    """The best score over each resource besides latency that the costs know."""
    parent = table.costs(table.parent_choice)
    return {
        resource: tuple(
            FrontPoint(limit=limit, choice=best.choice, score=best.objective, costs=table.costs(best.choice))
            for limit, best in pareto_front(table, limits, points, resource)
        )
        for resource in FRONTS
        if parent.of(resource)
    }


def _coupled_pairs(
    pairs: Mapping[int, tuple[Variant, Variant]], errors: Mapping[int, Sequence[float]]
) -> tuple[CoupledPair, ...]:
    """What training the child's pairs came to."""
    return tuple(
        CoupledPair(
            layer=layer,
            attention=pairs[layer][0].name,
            ffn=pairs[layer][1].name,
            first_error=history[0],
            last_error=history[-1],
        )
        for layer, history in errors.items()
    )


def _best_choices(
    table: OptionTable, limits: Mapping[str, float], best: Solution, config: Candidates
) -> list[tuple[Choice, float]]:
    """The best choices and their scores, the proven one first."""
    found = pool(table.problem(table.scores, limits), config.count, distance=config.distance)
    others = [other for other in found if other.choice != best.choice]
    return [(solution.choice, solution.objective) for solution in [best, *others]][: config.count]


def _read_scores(scores: Sequence[Path], libraries: Sequence[Path]) -> list[ShardScores]:
    """The scores of all shards, with the training errors that the libraries tell."""
    trained = {
        (block.layer, block.part, block.size): block
        for folder in libraries
        for block in ShardLibrary.model_validate_json((folder / LIBRARY_FILE).read_bytes()).blocks
    }

    def with_errors(block: BlockScore) -> BlockScore:
        known = trained.get((block.layer, block.part, block.size))
        return block.model_copy(update=known.model_dump()) if known else block

    shards = [ShardScores.model_validate_json((folder / SCORES_FILE).read_bytes()) for folder in scores]
    return [shard.model_copy(update={"blocks": tuple(map(with_errors, shard.blocks))}) for shard in shards]


def _shapes(layers: Sequence[ChildLayer]) -> tuple[LayerShape, ...]:
    """The layers of a child as numbers."""
    return tuple(
        LayerShape(
            num_key_value_heads=layer.num_key_value_heads,
            intermediate_size=layer.intermediate_size,
            parent_layers=layer.parent_layers,
        )
        for layer in layers
    )


def _summary(contributions: Mapping[int, Tensor]) -> tuple[LayerImportance, ...]:
    """How contribution spreads over the channels of each layer."""
    return tuple(
        LayerImportance(layer=layer, mean=float(values_I.mean()), top_half_share=share_of_top(values_I, 0.5))
        for layer, values_I in sorted(contributions.items())
    )
