"""The three stages of the search, each the paper's steps in order."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor

from components.core.batches import Batch, PackedStream, load_batches, load_corpus
from components.core.checkpoint import load_model, save_model
from components.core.config import Config
from components.core.job import Job
from components.core.model import TesseraForCausalLM
from components.search.assemble import assemble, build_subblock, child_layers, shape_of
from components.search.baselines import greedy_choice, random_choice
from components.search.config import BlocksConfig, Calibration, PrepareConfig, SearchConfig
from components.search.costs import measure_costs, own_costs_of, read_costs
from components.search.fusion import ChildLayer, fuse_layers
from components.search.importance import channel_contributions, load_importance, save_importance, share_of_top
from components.search.library import distil, save_block, shard_layers, variants_to_train
from components.search.results import (
    COSTS_FILE,
    SCORES_FILE,
    TABLE_FILE,
    BlockScore,
    Chosen,
    LayerImportance,
    LayerShape,
    ParetoPoint,
    Proof,
    SearchTable,
    ShardScores,
)
from components.search.scoring import replacement_kl
from components.search.solver import absolute_limits, certify, fits, pareto_front, solve
from components.search.space import PARTS, Variant, layer_spaces, left_out
from components.search.subblock import Subblock
from components.search.table import option_table
from components.search.variants import initialise, subblock_weights


def prepare(
    config: PrepareConfig, *, job: Job, out: Path, parent: Path, corpus: Path, own_costs: Path | None = None
) -> dict[str, JsonValue]:
    """Channel importance on calibration text, and block costs. Source: arXiv 2411.19146, appendix A and section 4.1."""
    model = _load_parent(parent, job)
    spaces = layer_spaces(config, shape_of(model.config))
    if note := left_out(config, shape_of(model.config)):
        job.note(note)
    batches = _batches(config, corpus, parent, "train", config.importance_batches)
    save_importance(channel_contributions(model, batches, job), out / "importance")
    if own_costs is None:
        costs = measure_costs(model, spaces, config.measurement, job)
    else:
        costs = own_costs_of(model, spaces, own_costs)
    _write(out / "costs" / COSTS_FILE, costs)
    return {
        "fixed_ms": costs.fixed.latency_ms,
        **{f"{name}_ms": block.latency_ms for name, block in costs.blocks.items()},
    }


def blocks(
    config: BlocksConfig, *, job: Job, out: Path, parent: Path, corpus: Path, importance: Path
) -> dict[str, JsonValue]:
    """Blockwise local distillation and replace-one-block scores of a share of the layers.

    Source: arXiv 2411.19146, sections 3 and 4.2.
    """
    model = _load_parent(parent, job)
    spaces = layer_spaces(config, shape_of(model.config))
    layers = shard_layers(len(spaces), *config.shard_index)
    contributions = load_importance(importance)

    students: dict[tuple[int, Variant], Subblock] = {}
    for layer, variant in variants_to_train(spaces, layers):
        own = subblock_weights(model.model.layers[layer].state_dict(), variant.part)
        weights = initialise(own, variant, importance_I=contributions.get(layer), head_dim=model.config.head_dim)
        students[layer, variant] = build_subblock(model, layer, variant, weights)
    stream = PackedStream(load_corpus(corpus, parent, "train"), config.seq_len, config.seed or 0)
    errors = distil(model, students, stream, config.batch_size, config.distillation, job)
    for key, student in students.items():
        save_block(out / "library", key, student.weights())

    held_out = _batches(config, corpus, parent, "validation", config.scoring_batches)
    no_ops = {
        (layer, variant): None
        for layer in layers
        for part in PARTS
        for variant in spaces[layer].of(part)[1:]
        if variant.is_no_op
    }
    scores = replacement_kl(model, {**students, **no_ops}, held_out, job)
    table = ShardScores(
        tokens=sum(batch.num_targets for batch in held_out),
        blocks=tuple(
            BlockScore(layer=layer, part=variant.part, size=variant.size, kl=kl, **_errors(errors, number))
            for number, ((layer, variant), kl) in enumerate(scores.items())
        ),
    )
    _write(out / "scores" / SCORES_FILE, table)
    return {"trained": len(students), "scored": len(scores), "mean_kl": statistics.fmean(scores.values())}


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
) -> dict[str, JsonValue]:
    """Solve, fuse, assemble; what the stages before have not made is made here.

    Source: arXiv 2411.19146, section 4 and appendix B; arXiv 2503.18908, section 3.
    """
    here = job.scratch / "search"
    if importance is None or costs is None:
        prepare(config.prepare(), job=job, out=here, parent=parent, corpus=corpus, own_costs=costs)
        importance, costs = importance or here / "importance", here / "costs"
    if not libraries or not scores:
        blocks(config.blocks(), job=job, out=here, parent=parent, corpus=corpus, importance=importance)
        libraries, scores = [here / "library"], [here / "scores"]

    model = _load_parent(parent, job)
    spaces = layer_spaces(config, shape_of(model.config))
    measured, scored = read_costs(costs), _read_scores(scores)
    kls = {(block.layer, Variant(block.part, block.size)): block.kl for block in scored}
    table = option_table(spaces, measured.fixed, measured.blocks, kls)
    parent_costs = table.costs(table.parent_choice)
    limits = absolute_limits(config.limits, parent_costs)

    solution = solve(table, limits)
    choices = {
        "child": solution.choice,
        "random_child": random_choice(table, limits, config.seed or 0),
        "greedy_child": greedy_choice(table, limits),
    }
    chosen: dict[str, Chosen] = {}
    for done, (name, choice) in enumerate(choices.items(), 1):
        layers = child_layers(model, spaces, libraries, table.variants(choice))
        fused = fuse_layers(layers, config.fusion)
        child = assemble(model, fused)
        save_model(child, out / name, tokenizer=parent)
        chosen[name] = Chosen(
            choice=choice,
            score=table.score(choice),
            costs=table.costs(choice),
            within_limits=fits(table.costs(choice), limits),
            layers=_shapes(layers),
            fused_layers=_shapes(fused),
            parameters=child.num_parameters(),
        )
        job.progress(done, len(choices), "children")

    front = pareto_front(table, limits, config.pareto_points)
    result = SearchTable(
        fixed=table.fixed,
        slots=table.slots,
        limits=limits,
        parent=parent_costs,
        **chosen,
        proof=Proof(objective=solution.objective, bound=solution.bound, gap=solution.gap, status=solution.status),
        certificate=certify(table.problem(table.scores, limits), solution.choice, fixed=table.held),
        pareto=tuple(
            ParetoPoint(limit_ms=limit, choice=best.choice, score=best.objective, costs=table.costs(best.choice))
            for limit, best in front
        ),
        importance=_summary(load_importance(importance)),
        blocks=scored,
        machine=measured.machine,
    )
    _write(out / "search_table" / TABLE_FILE, result)
    child_costs = chosen["child"].costs
    return {
        "score": solution.objective,
        "gap": solution.gap,
        "layers": len(chosen["child"].fused_layers),
        **{f"parameters_{name}": choice.parameters for name, choice in chosen.items()},
        "predicted_latency_share": child_costs.latency_ms / parent_costs.latency_ms,
    }


def _load_parent(folder: Path, job: Job) -> TesseraForCausalLM:
    """The parent, frozen."""
    torch.set_num_threads(job.placement.threads)
    parent = load_model(folder)
    parent.requires_grad_(False)
    return parent


def _batches(config: Calibration, corpus: Path, parent: Path, split: str, limit: int) -> list[Batch]:
    """Packed batches of one split of the corpus."""
    return load_batches(
        corpus,
        parent,
        split,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        limit=limit,
        seed=config.seed or 0,
    )


def _errors(history: Sequence[Sequence[float]], student: int) -> dict[str, float]:
    """First and last training error of a student; nothing for a block that was not trained."""
    if not history or student >= len(history[0]):
        return {}
    errors = [step[student] for step in history]
    return {"first_error": errors[0], "last_error": statistics.fmean(errors[-max(1, len(errors) // 10) :])}


def _read_scores(folders: Sequence[Path]) -> tuple[BlockScore, ...]:
    """The scores of all shards, by layer."""
    shards = [ShardScores.model_validate_json((folder / SCORES_FILE).read_bytes()) for folder in folders]
    return tuple(sorted((block for shard in shards for block in shard.blocks), key=lambda block: block.layer))


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


def _write(path: Path, record: Config) -> None:
    """Write a record as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record.model_dump_json(indent=1), encoding="utf-8")
