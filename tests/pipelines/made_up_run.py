"""A finished run of the demo recipe in a real store, without any work: artifacts, records and events are made up."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.core.base.config import digest_of
from components.core.model.architecture import Architecture, BlockConfig
from components.core.runtime.events import Events
from components.core.runtime.runner import events_path
from components.core.store.manifest import Kind
from components.core.store.store import StageRecord, Store, key_of
from components.search.child.child_model import choice_record
from components.search.config import Measurement
from components.search.costs.resources import Costs, CostTable, Machine, MeasuredModel
from components.search.scoring.score_table import BlockScore, ShardScores
from components.search.search_table import (
    CandidateTrial,
    ChildRecord,
    FeedbackRound,
    FfnRun,
    FusionEffect,
    LayerShape,
    Proof,
    SearchTable,
)
from components.search.solver.baselines import greedy_choice, most_parameters, random_choice, uniform_choice
from components.search.solver.explain import margins
from components.search.solver.fronts import FrontPoint, ParetoPoint, pareto_front
from components.search.solver.option_table import Option, OptionTable, Slot
from components.search.solver.solve import fits, pool, solve
from components.search.space.layer_space import Part
from pipelines.recipe.graph import Task
from pipelines.recipe.llama_nemotron import llama_nemotron
from pipelines.recipe.schema import Recipe
from pipelines.recipe.targets import Targets
from pipelines.records.predictions import RunPrediction, StagePrediction, record_prediction
from pipelines.records.runs import begin_run, end_run, run_record

START = 1_790_000_000.0
LAYERS, HEADS, WIDTH = 12, 4, 512
PARENT = tuple((HEADS, WIDTH) for _ in range(LAYERS))
OFFERED: dict[Part, tuple[int, ...]] = {"attention": (4, 2, 1, 0), "ffn": (512, 384, 256, 128, 0)}
SHAPE: dict[str, Any] = {"vocab_size": 64, "hidden_size": 128, "num_attention_heads": HEADS, "head_dim": 32}

# role: tokens/s; accuracy standard on, off, hard on, off; format on, off
MEASURED: dict[str, tuple[float, tuple[float | None, ...], tuple[float | None, float | None]]] = {
    "parent": (3612.0, (0.988, None, 0.604, None), (None, None)),
    "child": (7104.0, (0.212, None, 0.094, None), (None, None)),
    "random": (6988.0, (0.051, None, 0.101, None), (None, None)),
    "greedy": (7050.0, (0.127, None, 0.088, None), (None, None)),
    "distilled": (7098.0, (0.972, None, 0.561, None), (None, None)),
    "pretrained": (7101.0, (0.980, None, 0.588, None), (None, None)),
    "sft": (7093.0, (0.981, 0.392, 0.612, 0.128), (0.998, 1.0)),
    "rl": (7110.0, (0.984, 0.388, 0.668, 0.131), (0.999, 0.996)),
}


TARGETS = Targets(
    speed_up=1.8, accuracy_retained=0.97, format_after_sft=0.99, thinking_gain=0.2, rl_gain=0.03, format_after_rl=0.99
)


def make_run(store: Store, name: str = "demo-1", *, cached: bool = False, started: float = START) -> str:
    """Write a run as `tessera run` would have left it; `cached` marks every stage as found in the store."""
    recipe = Recipe(name="demo", seed=7, targets=TARGETS)
    graph = llama_nemotron(recipe)
    begin_run(store, recipe, {}, name)
    record_prediction(store, name, PREDICTION)
    made: dict[str, dict[str, str]] = {}
    now = started
    for task in graph.items():
        inputs = task.digests({}, made) or {}
        outputs = _outputs(store, task)
        computed: Any = {
            "stage": task.stage.name,
            "config": task.config.canonical(),
            "code": digest_of([task.stage.entry, task.label]),
            "libraries": {"torch": "2.13.0"},
            "inputs": inputs,
        }
        record = StageRecord(
            key=key_of(**computed),
            **computed,
            outputs=outputs,
            result=RESULTS.get(task.label, {}),
            seconds=SECONDS.get(task.label, 20.0),
            peak_memory_bytes=PEAKS.get(task.label),
        )
        record = store.put_stage_record(record)
        made[task.label] = record.outputs
        seconds = 0.02 if cached else record.seconds
        document = {"label": task.label, "stage": record.stage, "key": record.key, "cached": cached}
        times = {"seconds": seconds, "started": now, "finished": now + seconds}
        store.put_document(f"runs/{name}/stages/{task.label}.json", document | times)
        _write_events(store, name, task, record, now, cached)
        now += seconds
    end_run(store, name, "succeeded")
    times = {"started": started, "finished": now, "seconds": now - started}
    store.put_document(f"runs/{name}/run.json", {**run_record(store, name), **times})
    return name


SECONDS = {"data": 4.1, "parent": 148.0, "search/costs": 41.0, "search": 9.0, "distill": 66.0, "rl": 97.0}
PEAKS = {"parent": 3 << 29, "distill": 1 << 30, "rl": 2 << 30}
PREDICTION = RunPrediction(
    device="a made-up processor",
    stages={
        "parent": StagePrediction(seconds=100.0, memory_bytes=1 << 30),
        "distill": StagePrediction(seconds=None, memory_bytes=2 << 30),
        "deploy": StagePrediction(seconds=25.0, memory_bytes=1 << 30),
    },
)
RESULTS: dict[str, dict[str, Any]] = {
    "deploy": {"gate": {"passed": True, "min_format": 0.996}, "alias": "candidate", "registered_model": "tessera"},
    "rl": {"pass_rate_before": 0.57, "quarantine": {}},
    "distill": {"loss": 0.034, "num_steps": 200},
}


# Artifacts


def _outputs(store: Store, task: Task) -> dict[str, str]:
    """A small artifact for each output of a task."""
    outputs: dict[str, str] = {}
    for name, output in task.stage.outputs.items():
        if task.label == "search" and output.kind == "model":
            files = _model_files(f"search-{name}", _fused(PICKED[name.removesuffix("_child")]))
        elif output.kind == "model":
            same_as = "rl" if task.label == "deploy" else task.label
            files = _model_files(same_as, PARENT if task.label == "parent" else _fused(PICKED["child"]))
        elif name == "metrics":
            files = {"metrics.json": json.dumps({"models": _metrics(), "settings": {}})}
        elif name == "search_table":
            files = {"search.json": SEARCH.model_dump_json()}
        elif name == "costs":
            files = {"costs.json": COSTS.model_dump_json()}
        else:
            files = {f"{name}.jsonl": json.dumps({"made by": task.label, "row": name}) + "\n"}
        outputs[name] = put(store, files, output.kind)
    return outputs


def put(store: Store, files: Mapping[str, str], kind: Kind) -> str:
    """Store texts as an artifact."""
    folder = store.local / "made-up" / digest_of(dict(files))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return store.put_folder(folder, kind).digest


def _model_files(identity: str, layers: Sequence[tuple[int, int]]) -> dict[str, str]:
    """A configuration, and something in place of weights."""
    blocks = tuple(BlockConfig(num_key_value_heads=h or None, intermediate_size=w or None) for h, w in layers)
    if len(set(layers)) == 1:
        dense = {"num_key_value_heads": HEADS, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS}
        config = {"model_type": "llama", **SHAPE, **dense}
    else:
        blocks_of = Architecture(family="nemotron-nas", blocks=blocks, **SHAPE).block_configs()
        config = {"model_type": "nemotron-nas", **SHAPE, "num_hidden_layers": len(blocks), "block_configs": blocks_of}
    return {"config.json": json.dumps(config), "model.safetensors": f"weights of {identity}"}


def _gain(value: float, ratio: float) -> dict[str, Any]:
    """A paired comparison, as sure as of about 250 problems."""
    bounds = {"low": value - 0.04, "high": value + 0.04, "ratio_low": ratio - 0.03, "ratio_high": ratio + 0.03}
    return {"value": value, "ratio": ratio, **bounds, "problems": 250}


GAINS: dict[str, Any] = {
    "distilled": {"thinking": {}, "over": {"parent": {"standard": {"on": _gain(0.972 - 0.988, 0.972 / 0.988)}}}},
    "sft": {"thinking": {"hard": _gain(0.612 - 0.128, 0.612 / 0.128)}, "over": {}},
    "rl": {"thinking": {}, "over": {"sft": {"hard": {"on": _gain(0.668 - 0.612, 0.668 / 0.612)}}}},
}


def _metrics() -> dict[str, Any]:
    """`metrics.json` of the evaluation."""
    return {
        role: {
            "parameters": 1,
            "kv_bytes_per_token": 1,
            "tokens_per_second": speed,
            "accuracy": _by_split(accuracy),
            "interval": _by_split([value and [max(0.0, value - 0.024), min(1.0, value + 0.024)] for value in accuracy]),
            "format": dict(zip(("on", "off"), kept, strict=True)),
            "gains": GAINS.get(role, {"thinking": {"standard": None, "hard": None}, "over": {}}),
        }
        for role, (speed, accuracy, kept) in MEASURED.items()
    }


def _by_split(values: Sequence[Any]) -> dict[str, dict[str, Any]]:
    return {"standard": {"on": values[0], "off": values[1]}, "hard": {"on": values[2], "off": values[3]}}


# Search


def _option_table() -> OptionTable:
    """Scores that grow towards both ends of the model and with what is taken away."""
    dice = random.Random(3)
    slots = []
    for layer in range(LAYERS):
        weight = 0.05 + 0.9 * abs(layer - 7) ** 2 / 49
        for part, all_sizes in OFFERED.items():
            sizes = all_sizes[:-1] if layer == 0 and part == "attention" else all_sizes
            options = []
            for size in sizes:
                share = 1 - size / sizes[0]
                score = weight * share**1.5 * dice.uniform(0.6, 1.4)
                parameters = 128 * (256 + 64 * size) * (size > 0) if part == "attention" else 3 * 128 * size
                latency = (0.32 + 0.02 * size if part == "attention" else 0.10 + 0.0006 * size) if size else 0.0
                kv_bytes = 128 * size if part == "attention" else 0
                costs = Costs(parameters=parameters, kv_bytes_per_token=kv_bytes, latency_ms=latency)
                options.append(Option(name=f"{part}-{size}", size=size, score=score, costs=costs))
            slots.append(Slot(layer=layer, part=part, options=tuple(options)))
    return OptionTable(fixed=Costs(parameters=20_000, latency_ms=0.8), slots=tuple(slots))


def _layers(table: OptionTable, choice: Sequence[int]) -> list[tuple[int, int]]:
    return [(attention.count, ffn.count) for attention, ffn in table.variants(choice)]


def _fused_shapes(layers: Sequence[tuple[int, int]]) -> list[LayerShape]:
    """Empty layers dropped, runs of FFNs without attention fused."""
    return [
        LayerShape(num_key_value_heads=heads, intermediate_size=width, parent_layers=numbers)
        for heads, width, numbers in _fused_runs(layers)
    ]


def _fused_runs(layers: Sequence[tuple[int, int]]) -> list[tuple[int, int, tuple[int, ...]]]:
    """KV heads, channels and the parent's layers of each layer of the child."""
    runs: list[tuple[int, int, tuple[int, ...]]] = []
    for number, (heads, width) in enumerate(layers):
        if not heads and not width:
            continue
        if not heads and runs and not runs[-1][0]:
            runs[-1] = (0, runs[-1][1] + width, (*runs[-1][2], number))
        else:
            runs.append((heads, width, (number,)))
    return runs


def _fused(layers: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple((heads, width) for heads, width, _ in _fused_runs(layers))


def _search() -> SearchTable:
    """What the search of the made-up table finds."""
    table = _option_table()
    parent = table.costs(table.parent_choice)
    limits = {"latency_ms": 0.52 * parent.latency_ms}
    solution = solve(table, limits)
    choices = {
        "child": solution.choice,
        "random_child": random_choice(table, limits, 1),
        "greedy_child": greedy_choice(table, limits),
    }
    chosen = {name: _chosen(table, choice, limits) for name, choice in choices.items()}
    tried = pool(table.problem(table.scores, limits), 3, distance=2)
    scores = tuple(_scored(slot, option) for slot in table.slots for option in slot.options[1:])
    shard = ShardScores(tokens=sum(ROW_TOKENS), row_tokens=ROW_TOKENS, blocks=scores)
    return SearchTable(
        fixed=table.fixed,
        slots=table.slots,
        limits=limits,
        parent=parent,
        **chosen,
        baselines={
            name: choice_record(table, choice, limits)
            for name, choice in (
                ("most parameters", most_parameters(table, limits, solution.choice)),
                ("uniform", uniform_choice(table, limits)),
            )
            if choice is not None
        },
        fusion=_fusion(chosen["child"]),
        candidates=tuple(_trial(number, found.choice, found.objective) for number, found in enumerate(tried)),
        latency_feedback=(_round(solution.choice, solution.objective, table.costs(solution.choice).latency_ms),),
        fronts={
            "parameters": tuple(
                FrontPoint(limit=limit, choice=best.choice, score=best.objective, costs=table.costs(best.choice))
                for limit, best in pareto_front(table, limits, 9, "parameters")
            )
        },
        proof=Proof(objective=solution.objective, bound=solution.bound, gap=solution.gap, status=solution.status),
        pareto=tuple(
            ParetoPoint(limit_ms=limit, choice=best.choice, score=best.objective, costs=table.costs(best.choice))
            for limit, best in pareto_front(table, limits, 9)
        ),
        importance=(),
        margins=margins(table, limits, solution.choice, [shard], "kl"),
        blocks=tuple(block.model_copy(update={"row_sums": {}}) for block in scores),
        machine=Machine(device="cpu", threads=1, versions={"vllm": "0.32.0"}),
    )


ROW_TOKENS = (30, 32, 28, 32, 31, 27, 32, 32)


def _scored(slot: Slot, option: Option) -> BlockScore:
    """A score, and the rows of text that it is the mean over."""
    dice = random.Random(f"{slot.layer} {option.name}")
    noise = [dice.gauss(0, 0.05) for _ in ROW_TOKENS]
    mean = sum(noise) / len(noise)
    sums = tuple(option.score * count + value - mean for count, value in zip(ROW_TOKENS, noise, strict=True))
    return BlockScore(
        layer=slot.layer,
        part=slot.part,
        size=option.size,
        kl=option.score,
        errors={"kl": 0.001},
        row_sums={"kl": sums},
        first_error=1.0,
        last_error=0.4,
    )


def _trial(number: int, choice: tuple[int, ...], score: float) -> CandidateTrial:
    """A candidate that comes out as its score says."""
    return CandidateTrial(
        choice=choice,
        score=score,
        kl_before=2 * score,
        kl_after=0.2 * score,
        difference=0.01 * number,
        difference_error=0.004 * (number > 0),
        chosen=number == 0,
    )


def _round(choice: tuple[int, ...], score: float, latency_ms: float) -> FeedbackRound:
    """A child that is as fast as predicted, but for one in a hundred."""
    return FeedbackRound(
        choice=choice,
        score=score,
        predicted={"latency_ms": latency_ms},
        measured={"latency_ms": 1.01 * latency_ms},
        pace=1.0,
        spread=0.02,
        error=0.01,
        agreed=True,
    )


def _fusion(child: ChildRecord) -> FusionEffect:
    """Runs as the child has them, FFNs that depend on their neighbours."""
    runs = []
    for layer in child.fused_layers:
        numbers = layer.parent_layers
        if len(numbers) > 1:
            matrix = tuple(tuple(0.3 / (b - a) if b > a else 0.0 for b in numbers) for a in numbers)
            runs.append(FfnRun(layers=numbers, dependency=matrix, groups=(numbers,)))
    return FusionEffect(
        runs=tuple(runs),
        tokens=2048,
        kl_before=0.61,
        kl_after=0.66,
        kl_error=0.008,
        timing="decoder",
        before_ms=(3.1, 3.0, 3.2),
        after_ms=(2.8, 2.7, 2.9),
    )


def _costs() -> CostTable:
    """Three models that were timed."""
    models = tuple(
        MeasuredModel(
            num_key_value_heads=(HEADS,) * LAYERS,
            intermediate_size=(width,) * LAYERS,
            step_ms=(median - 0.1, median, median + 0.2),
            median_ms=median,
            spread_ms=0.3,
            explained_ms=median * 1.02,
        )
        for width, median in ((512, 9.0), (256, 7.0), (0, 5.0))
    )
    return CostTable(
        fixed=SEARCH.fixed,
        blocks={option.name: option.costs for slot in SEARCH.slots for option in slot.options},
        machine=SEARCH.machine,
        measurement=Measurement(),
        models=models,
    )


def _chosen(table: OptionTable, choice: tuple[int, ...], limits: Mapping[str, float]) -> ChildRecord:
    layers = _layers(table, choice)
    return ChildRecord(
        choice=choice,
        score=table.score(choice),
        costs=table.costs(choice),
        within_limits=fits(table.costs(choice), dict(limits)),
        layers=tuple(
            LayerShape(num_key_value_heads=heads, intermediate_size=width, parent_layers=(number,))
            for number, (heads, width) in enumerate(layers)
        ),
        fused_layers=tuple(_fused_shapes(layers)),
        parameters=table.costs(choice).parameters,
    )


SEARCH = _search()
COSTS = _costs()
PICKED = {
    role: [(int(layer.num_key_value_heads), int(layer.intermediate_size)) for layer in chosen.layers]
    for role, chosen in (("child", SEARCH.child), ("random", SEARCH.random_child), ("greedy", SEARCH.greedy_child))
}


# Events


def _write_events(store: Store, run: str, task: Task, record: StageRecord, now: float, cached: bool) -> None:
    """What the stage would have reported."""
    path: Path = events_path(store, run, task.label)
    events = Events(path)
    events.emit({"type": "start", "time": now, "stage": record.stage, "label": task.label, "key": record.key})
    if not cached:
        for event in _progress(task, record.seconds, now):
            events.emit(event)
    kind = "cached" if cached else "finish"
    events.emit({"type": kind, "time": now + record.seconds, "seconds": record.seconds, "result": record.result})


def _progress(task: Task, seconds: float, now: float) -> list[dict[str, Any]]:
    """Noisy curves that fall, or climb with rewards."""
    dice = random.Random(task.label)
    steps = {"parent": 800, "distill": 200, "pretrain": 100, "sft": 200, "rl": 40}.get(task.label, 0)
    found = []
    for step in range(1, steps + 1):
        fallen = 1 - math.exp(-5 * step / steps)
        if task.label == "rl":
            reward = 0.6 + 0.25 * fallen + dice.gauss(0, 0.02)
            metrics = {
                "reward": reward,
                "accuracy": reward - 0.05,
                "format": 0.99,
                "kl": 0.02 * fallen,
                "grad_norm": 0.4,
            }
        else:
            loss = 3.2 * (1 - fallen) + 0.03 + abs(dice.gauss(0, 0.02))
            metrics = {"loss": loss, "grad_norm": 0.5 + dice.random(), "learning_rate": 2e-3 * (1 - step / steps)}
            metrics |= {"tokens_per_s": 19_000 + dice.gauss(0, 300)}
            metrics |= {"kl": 0.8 * loss, "cosine": 0.2 * loss} if task.label == "distill" else {}
        time = now + seconds * step / steps
        found.append({"type": "progress", "time": time, "done": step, "total": steps, "what": "", "metrics": metrics})
    return found
