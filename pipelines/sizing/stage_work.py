"""What each stage of a recipe takes before it runs: tokens, operations, time, memory and disk. Imports no torch.

Answers are counted at full length, so generation is an upper bound. How large the child will be is known only after the
search: as many of the parent's first layers stand for it as its limits leave.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from components.core.base.errors import InputError
from components.core.model.architecture import WEIGHT_BYTES, Architecture
from components.core.model.flops import block_flops, block_weights, forward_flops, training_flops
from components.core.model.inspection import read_architecture, stored_dtype
from components.core.training.step_memory import (
    MASTER,
    PAGED_SHARE,
    PROCESS_BYTES,
    Step,
    offloaded_bytes,
    step_memory,
)
from components.core.training.train_config import TrainConfig
from components.deploy.config import DeployConfig
from components.distill.config import DistillConfig
from components.eval.config import ROLES, WITH_TOGGLE, EvalConfig
from components.rl.config import RlConfig
from components.search.config import (
    Calibration,
    CostsConfig,
    ImportanceConfig,
    LibraryConfig,
    Measurement,
    ScoresConfig,
    SearchConfig,
    Space,
)
from components.search.costs.resources import measured_layers, model_costs
from components.search.costs.work_time import OPEN_S, START_S, Computer, block_of_variant, scoring_flops
from components.search.memory_limits import CHUNK_BYTES, MAX_BYTES_IN_FLIGHT, VALUES_A_LOGIT
from components.search.space.layer_space import PARTS, LayerSpace, layer_spaces, shape_of
from pipelines.recipe.checks import RUN_AS_RANKS
from pipelines.recipe.graph import Task
from pipelines.recipe.llama_nemotron import llama_nemotron, sources_of
from pipelines.recipe.schema import Recipe, is_address
from pipelines.recipe.setting_rules.facts import PROMPT_TOKENS, first_layers, stand_in
from pipelines.recipe.source_files import KINDS, files_of
from pipelines.sizing.machine import Machine

BYTES_A_TOKEN = 4
"""Of text; and of a token in a token file, at most."""
ENCODED_PER_S = 2_000_000
"""Bytes of text that a thread reads, splits and encodes in a second."""


@dataclass(frozen=True)
class StageWork:
    """What a stage takes.

    Attributes:
        tokens: that go through models, those that are generated too.
        flops: floating-point operations.
        seconds: None where the speed of what computes it is not known.
        memory_bytes: of one process; of its device, where that is a GPU.
        disk_bytes: of what it makes.
        offloaded_bytes: of one process in the memory of the node, beside a GPU that does not hold the model.
    """

    tokens: int = 0
    flops: float = 0.0
    seconds: float | None = None
    memory_bytes: int = 0
    disk_bytes: int = 0
    offloaded_bytes: int = 0


@dataclass(frozen=True)
class Models:
    """The models of a recipe.

    Attributes:
        parent: its shape.
        child: the shape that stands for the child's; the parent's where there is no search.
        stored: precision of their files.
    """

    parent: Architecture
    child: Architecture
    stored: str

    @property
    def size(self) -> int:
        """Bytes of a stored weight."""
        return WEIGHT_BYTES[self.stored]


@dataclass(frozen=True)
class _Work:
    """What the work of a task is computed from."""

    task: Task
    models: Models
    computer: Computer | None
    num_ranks: int
    recipe: Recipe

    @property
    def student(self) -> Architecture:
        """The model that the task changes or asks."""
        return self.models.parent if self.task.label == "parent" else self.models.child

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.task.placement.gpus > 0

    @property
    def process_bytes(self) -> int:
        """Memory that the process itself takes of what computes."""
        return 0 if self.on_gpu else PROCESS_BYTES

    @property
    def rank_bytes(self) -> int:
        """Memory that a rank may take."""
        place = self.task.placement
        if place.gpus:
            return 0 if self.computer is None else self.computer.device.memory_bytes
        return int(place.memory_gib * 2**30 / place.processes)

    @property
    def served_dtype(self) -> str:
        """Precision that the task serves models in."""
        serving = getattr(self.task.config, "serving", self.recipe.serving)
        return serving.dtype or self.models.stored


def recipe_work(recipe: Recipe, machine: Machine) -> tuple[Models | None, dict[str, StageWork]]:
    """The models of a recipe, and the work of each stage by its label; nothing where the parent is not known."""
    models = models_of(recipe)
    if models is None:
        return None, {}
    found = {}
    for task in llama_nemotron(recipe).items():
        spreads = task.stage in RUN_AS_RANKS
        computer = machine.computer(task.placement, spreads=spreads)
        ranks = machine.num_ranks(task.placement, spreads=spreads)
        found[task.label] = WORK[task.stage.name](_Work(task, models, computer, ranks, recipe))
    return models, found


def models_of(recipe: Recipe) -> Models | None:
    """The parent and what stands for the child; None where only a store knows the parent, or there is none."""
    stored: str = "float32"
    if recipe.parent is None:
        if recipe.parent_pretrain is None:
            return None
        values = recipe.parent_pretrain.shape.model_dump(exclude_none=True)
        vocabulary = recipe.data.vocab_size if recipe.data else 1
        parent = Architecture.from_config({**values, "model_type": "llama", "vocab_size": vocabulary})
    elif is_address(recipe.parent):
        return None
    else:
        try:
            parent, stored = read_architecture(Path(recipe.parent)), stored_dtype(Path(recipe.parent))
        except InputError:
            return None
    child = parent if recipe.search is None else stand_in(parent, recipe.search.limits)
    return Models(parent, child, stored)


def _data(work: _Work) -> StageWork:
    """Reading, splitting and encoding text; rows are written, and tokens beside them."""
    sources = {name: paths for name, paths in sources_of(work.recipe).items() if name.startswith("own_")}
    num_bytes = 0
    for name, paths in sources.items():
        if name in work.task.stage.inputs and not any(map(is_address, paths)):
            try:
                num_bytes += sum(path.stat().st_size for _, path in files_of(name, paths, KINDS[name]))
            except InputError:
                continue  # said already
    seconds = num_bytes / ENCODED_PER_S / work.task.placement.threads
    return StageWork(num_bytes // BYTES_A_TOKEN, 0.0, seconds, PROCESS_BYTES, 2 * num_bytes)


def _training(work: _Work) -> StageWork:
    config = work.task.config
    assert isinstance(config, TrainConfig)
    shape, models = work.student, work.models
    teacher = models.parent if work.task.label == "distill" else None
    tokens = config.num_steps * config.global_batch_size * config.seq_len
    flops = training_flops(shape, tokens, config.seq_len, checkpointing=config.activation_checkpointing)
    step = training_step(work.task, work.num_ranks, models, work.rank_bytes)
    if teacher is not None:
        flops += forward_flops(teacher, tokens, config.seq_len)
    seconds = None
    if work.computer is not None and not step.offload:  # the speed of transfers and of updates on the CPU is not known
        seconds = work.computer.training_s(
            flops,
            "bfloat16" if step.bfloat16 else "float32",
            steps=config.num_steps,
            micro_batches=-(-step.rows // step.micro_batch_size),
            shape=shape,
        )
    memory = step_memory(shape, step).total + work.process_bytes
    disk, offloaded = models.size * shape.parameters, offloaded_bytes(shape, step)
    return StageWork(tokens, flops, seconds, memory, disk, offloaded_bytes=offloaded)


def training_step(task: Task, num_ranks: int, models: Models, rank_bytes: int) -> Step:
    """The optimizer step of a training, on ranks that may take so much memory."""
    config, place = task.config, task.placement
    assert isinstance(config, TrainConfig)
    step = Step.of(config, num_ranks, models.stored, rank_bytes, on_gpu=place.gpus > 0, offload=place.offload)
    if task.label != "distill":
        return step
    matches_states = not (isinstance(config, DistillConfig) and config.hidden_state_loss is None)
    return step.distilled_from(models.parent, models.stored, matches_states=matches_states)


def _importance(work: _Work) -> StageWork:
    config = work.task.config
    assert isinstance(config, ImportanceConfig)
    tokens = config.importance_batches * config.batch_size * config.seq_len
    flops = forward_flops(work.models.parent, tokens, config.seq_len, logits=0)
    hidden = MASTER * tokens * work.models.parent.hidden_size
    return StageWork(tokens, flops, _read_s(work, flops, config), _parent_bytes(work) + hidden)


def _library(work: _Work) -> StageWork:
    """Forward passes of the parent, and the training of every variant of a share of the layers."""
    config, parent = work.task.config, work.models.parent
    assert isinstance(config, LibraryConfig)
    tokens = config.distillation.num_steps * config.batch_size * config.seq_len
    variants = [v for space in _shard(config, config.shard_index, parent) for p in PARTS for v in space.trained(p)]
    flops: float = forward_flops(parent, tokens, config.seq_len, logits=0)
    flops += sum(3 * block_flops(parent, block_of_variant(v), tokens, config.seq_len) for v in variants)
    weights = sum(block_weights(parent, block_of_variant(v)) for v in variants)
    batch = config.batch_size * config.seq_len
    # All variants of all layers are there at once; of a paged parent, those of one layer.
    trained = 4 * MASTER * weights // (len(parent.blocks) if is_paged(work) else 1)
    memory = _parent_bytes(work) + trained + 16 * MASTER * batch * parent.hidden_size
    return StageWork(tokens, flops, _read_s(work, flops, config), memory, work.models.size * weights)


def _scores(work: _Work) -> StageWork:
    """Every variant goes on through the parent's later sub-blocks."""
    config, parent = work.task.config, work.models.parent
    assert isinstance(config, ScoresConfig)
    tokens = config.scoring_batches * config.batch_size * config.seq_len
    index, count = config.shard_index
    own = [
        space if layer % count == index else LayerSpace(space.attention[:1], space.ffn[:1])
        for layer, space in enumerate(layer_spaces(config, shape_of(parent)))
    ]
    variants = [variant for space in own for part in PARTS for variant in space.of(part)[1:]]
    weights = sum(block_weights(parent, block_of_variant(variant)) for variant in variants)
    in_flight = min(MAX_BYTES_IN_FLIGHT, (1 + len(variants)) * MASTER * config.seq_len * parent.hidden_size)
    batch = config.batch_size * config.seq_len
    predictions = min(CHUNK_BYTES, VALUES_A_LOGIT * MASTER * parent.vocab_size * batch)
    memory = _parent_bytes(work) + work.models.size * weights + in_flight + predictions
    flops = scoring_flops(parent, own, tokens, config.seq_len)
    return StageWork(tokens * (1 + len(variants)), flops, _read_s(work, flops, config), memory)


def _costs(work: _Work) -> StageWork:
    """A model of few layers for each variant, timed in turn with the parent's, where costs are measured at all."""
    config, models = work.task.config, work.models
    assert isinstance(config, CostsConfig)
    load = config.measurement
    parent_bytes = 0 if work.on_gpu else _parent_bytes(work)  # of a GPU the memory is left to vLLM
    if load.device is not None or "own_costs" in work.task.inputs:
        return StageWork(seconds=0.0, memory_bytes=parent_bytes)
    spaces = layer_spaces(config, shape_of(models.parent))
    number = len({variant for space in spaces for part in PARTS for variant in space.of(part)})
    batches = 2 * number * (1 + load.rounds)
    served = load.model_copy(update={"dtype": load.dtype or models.stored})
    measured = first_layers(models.parent, measured_layers(models.parent, served))
    seconds = _generated_s(work, measured, load, batches * load.batch_size, starts=1)
    if seconds is not None:
        seconds += (number - 1) * OPEN_S
    tokens = batches * load.batch_size * (load.prompt_tokens + load.new_tokens)
    memory = _served_bytes(work, measured, load) + parent_bytes
    flops = forward_flops(measured, tokens, load.prompt_tokens + load.new_tokens)
    return StageWork(tokens, flops, seconds, memory)


def _search(work: _Work) -> StageWork:
    """The solver takes seconds; children are made, and candidates distilled where the recipe asks for it."""
    config, models = work.task.config, work.models
    assert isinstance(config, SearchConfig)
    held_out = config.scoring_batches * config.batch_size * config.seq_len
    trials = config.candidates.count if config.candidates.count > 1 else 0
    trained = trials * config.candidates.num_steps * config.batch_size * config.seq_len
    flops = float(2 * forward_flops(models.parent, held_out, config.seq_len))
    flops += training_flops(models.child, trained, config.seq_len)
    memory = _parent_bytes(work) + models.size * models.parent.parameters
    if trials:
        memory += 4 * MASTER * models.child.parameters
    return StageWork(2 * held_out + trained, flops, _read_s(work, flops, config), memory)


def _rl(work: _Work) -> StageWork:
    """Pass rates, then rollouts, each followed by optimizer steps on its answers."""
    config, shape = work.task.config, work.student
    assert isinstance(config, RlConfig)
    length = PROMPT_TOKENS + config.max_tokens
    rollout = config.prompts_per_step * config.samples_per_prompt
    rollouts = config.num_steps * rollout * (1 + config.dynamic_sampling)
    measured = config.max_problems * config.pass_rate_samples
    learned = config.num_steps * rollout * length
    flops: float = training_flops(shape, learned, length)
    flops += forward_flops(shape, learned, length) * (config.updates_per_step > 1) * (1 - 1 / config.updates_per_step)
    flops += forward_flops(shape, learned, length) * bool(config.kl_coef)
    load = Measurement(batch_size=rollout, prompt_tokens=PROMPT_TOKENS, new_tokens=max(2, config.max_tokens))
    seconds = _generated_s(work, shape, load, rollouts + measured, starts=1)
    step = rl_step(config, work.models.stored, on_gpu=work.on_gpu)
    if seconds is not None and work.computer is not None:
        seconds += work.computer.training_s(
            flops,
            "bfloat16" if step.bfloat16 else "float32",
            steps=config.num_steps * config.updates_per_step,
            micro_batches=-(-step.rows // step.micro_batch_size),
            shape=shape,
        )
    memory = step_memory(shape, step).total + _served_bytes(work, shape, load)  # in one process
    memory += MASTER * shape.parameters * bool(config.kl_coef)
    generated = (rollouts + measured) * length
    flops += forward_flops(shape, generated, length)
    return StageWork(generated + learned, flops, seconds, memory, work.models.size * shape.parameters)


def rl_step(config: RlConfig, stored: str, *, on_gpu: bool) -> Step:
    """The optimizer step of reinforcement learning, on answers of full length."""
    rows = -(-config.prompts_per_step * config.samples_per_prompt // config.updates_per_step)
    bfloat16 = (config.dtype or stored) == "bfloat16"
    micro, length = min(rows, config.micro_batch_size), PROMPT_TOKENS + config.max_tokens
    return Step(micro, rows, length, bfloat16, on_gpu=on_gpu, optimizer=config.optimizer)


def _eval(work: _Work) -> StageWork:
    """Answers of every model, and its loss on held-out text."""
    config, models = work.task.config, work.models
    assert isinstance(config, EvalConfig)
    roles = [role for role in ROLES if role in work.task.inputs]
    splits = 1 if "own_problems" in sources_of(work.recipe) else 2
    asked = splits * config.num_problems if "problems" in work.task.inputs else 0
    load = Measurement(batch_size=config.concurrency, prompt_tokens=PROMPT_TOKENS, new_tokens=max(2, config.max_tokens))
    text = config.held_out.num_batches * config.held_out.batch_size * config.held_out.seq_len
    tokens, flops, seconds = 0, 0.0, 0.0 if work.computer is not None else None
    for role in roles:
        shape = models.parent if role == "parent" else models.child
        answers = asked * (config.num_samples + (role in WITH_TOGGLE))
        length = PROMPT_TOKENS + config.max_tokens
        tokens += answers * length + text
        flops += forward_flops(shape, answers * length, length)
        flops += forward_flops(shape, text, config.held_out.seq_len)
        took = _generated_s(work, shape, load, answers, starts=1)
        if seconds is not None and took is not None and work.computer is not None:
            seconds += took
            seconds += work.computer.computing_s(forward_flops(shape, text, config.held_out.seq_len), "float32")
    return StageWork(tokens, flops, seconds, _served_bytes(work, models.parent, load))


def _deploy(work: _Work) -> StageWork:
    config, shape = work.task.config, work.student
    assert isinstance(config, DeployConfig)
    answers = 4 * len(config.questions)  # both modes, with and without streaming
    load = Measurement(batch_size=1, prompt_tokens=PROMPT_TOKENS, new_tokens=max(2, config.max_tokens))
    tokens = answers * (PROMPT_TOKENS + config.max_tokens)
    flops = forward_flops(shape, tokens, PROMPT_TOKENS + config.max_tokens)
    seconds = _generated_s(work, shape, load, answers, starts=1)
    return StageWork(tokens, flops, seconds, _served_bytes(work, shape, load))


WORK: Mapping[str, Callable[[_Work], StageWork]] = {
    "data": _data,
    "pretrain": _training,
    "distill": _training,
    "sft": _training,
    "search-importance": _importance,
    "search-costs": _costs,
    "search-library": _library,
    "search-scores": _scores,
    "search": _search,
    "rl": _rl,
    "eval": _eval,
    "deploy": _deploy,
}
"""Function from a task to its work, by the name of its stage."""


def is_paged(work: _Work) -> bool:
    """Whether the layers of the parent are read one at a time; of a GPU whose memory is not known, they are not."""
    stored, have = work.models.size * work.models.parent.parameters, work.task.placement.memory_gib * 2**30
    if work.on_gpu:
        have = math.inf if work.computer is None else work.computer.device.memory_bytes
    return stored > PAGED_SHARE * have


def _shard(space: Space, shard: tuple[int, int], parent: Architecture) -> list[LayerSpace]:
    index, count = shard
    return layer_spaces(space, shape_of(parent))[index::count]


def _parent_bytes(work: _Work) -> int:
    """The process, and the parent in the precision of its files, or two of its layers."""
    parent = work.models.parent
    count = parent.parameters
    if is_paged(work):
        outside = parent.vocab_size * parent.hidden_size * (1 if parent.tie_word_embeddings else 2)
        count = outside + 2 * max(block_weights(parent, block) for block in parent.blocks)
    return work.models.size * count + work.process_bytes


def _read_s(work: _Work, flops: float, config: Calibration) -> float | None:
    return None if work.computer is None else work.computer.computing_s(flops, config.dtype)


def _generated_s(
    work: _Work, shape: Architecture, load: Measurement, num_requests: int, *, starts: int
) -> float | None:
    """Time of answers of full length, and of starting vLLM so often."""
    if work.computer is None:
        return None
    devices = load.tensor_parallel if work.computer.device.link_bytes_per_s is not None else 1
    dtype = work.computer.computed_dtype(work.served_dtype)
    served = load.model_copy(update={"dtype": dtype, "tensor_parallel": devices})
    return work.computer.generation_s(shape, served, num_requests) + starts * START_S


def _served_bytes(work: _Work, shape: Architecture, load: Measurement) -> int:
    """Weights, KV cache and activations of an engine."""
    served = load.model_copy(update={"dtype": work.served_dtype, "cached_tokens": None})
    fixed, parts = model_costs(shape, served)
    return sum(parts, start=fixed).memory_bytes + work.process_bytes
