"""What is wrong with a recipe before any work starts."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from components.core.base.errors import DataError, InfeasibleBudget, InputError, MissingPackage, RecipeError
from components.core.model.accelerators import device_of
from components.core.model.architecture import Architecture, BlockConfig
from components.core.model.inspection import checkpoint_notes, read_architecture
from components.core.runtime.hardware import vllm_uses_gpu
from components.core.runtime.placement import refuse_offload_without_gpu
from components.core.serving.settings import refuse_head_sizes
from components.core.text.corpus.blend import Blend
from components.core.text.embedding_rows import embedding_rows, tokens_without_row
from components.core.text.judges.reasoning_tasks import require_tasks
from components.core.text.tokenizer_files import VOCABULARY, read_settings
from components.core.training.train_config import TrainConfig
from components.deploy.config import STAGE as DEPLOY
from components.distill.config import STAGE as DISTILL
from components.eval.config import STAGE as EVAL
from components.eval.config import EvalConfig
from components.pretrain.config import STAGE as PRETRAIN
from components.rl.config import STAGE as RL
from components.search.config import CostsConfig, Measurement, SearchConfig
from components.search.costs.resources import model_costs
from components.search.costs.roofline import require_support
from components.search.declarations import COSTS, SEARCH
from components.search.space.layer_space import LayerSpace, block_of, layer_spaces, left_out, servable_spaces, shape_of
from components.sft.config import STAGE as SFT
from pipelines.recipe.graph import Graph, Made, Task
from pipelines.recipe.llama_nemotron import llama_nemotron, sources_of
from pipelines.recipe.schema import Recipe, is_address, own_parent, rules_of
from pipelines.recipe.source_files import KINDS, files_of

RUN_AS_RANKS = (PRETRAIN, DISTILL, SFT, EVAL)
"""Stages whose `run` can be one of several ranks."""


def check(recipe: Recipe) -> Graph:
    """The graph of a recipe with which nothing is wrong.

    Raises:
        InputError: everything that is wrong, in one message.
    """
    faults = list(find_faults(recipe))
    if len(faults) == 1:
        raise faults[0]
    if faults:
        hints = "\n  ".join(fault.hint for fault in faults if fault.hint)
        raise InputError("; ".join(fault.message for fault in faults), hint=hints or None)
    return llama_nemotron(recipe)


def find_faults(recipe: Recipe) -> Iterator[InputError]:
    """Everything that is wrong, as far as headers and names tell it."""
    graph = llama_nemotron(recipe)
    yield from _missing_inputs(graph)
    if recipe.distill is not None and recipe.search is None:
        yield RecipeError(
            "distill needs the child that search finds, and search is left out",
            hint="set distill: null, or give search",
        )
    yield from _missing_files(recipe, graph)
    yield from _blend(recipe)
    yield from _refused_tasks(recipe)
    yield from _unreadable_files(recipe)
    yield from _unfit_tokenizer(recipe)
    yield from _missing_keys(recipe)
    yield from _several_nodes(graph)
    yield from _cannot_offload(graph)
    yield from _too_few_gpus(graph)
    yield from _unservable(recipe, graph)
    if (
        recipe.search
        and recipe.search.allow_plugin_only_blocks
        and recipe.deploy
        and recipe.deploy.add_configuration_file
    ):
        yield RecipeError(
            "search.allow_plugin_only_blocks offers what vLLM runs only with Tessera, and "
            "deploy.add_configuration_file is for servers without it",
            hint="set one of them to false",
        )
    try:
        _check_search(recipe)
    except InputError as error:
        yield error


def _several_nodes(graph: Graph) -> Iterator[InputError]:
    """Stages that cannot spread over nodes, where they are to."""
    labels = [task.label for task in graph.tasks if task.placement.nodes > 1 and task.stage not in RUN_AS_RANKS]
    if labels:
        able = ", ".join(stage.name for stage in RUN_AS_RANKS)
        yield RecipeError(
            f"placement.nodes is more than 1 for {', '.join(labels)}; these run on one node",
            hint=f"set it in the placement of a stage that can use several: {able}",
        )


def _cannot_offload(graph: Graph) -> Iterator[InputError]:
    """Stages that are to offload a training, and have none, or no GPU that computes it."""
    for task in graph.tasks:
        if task.placement.offload and not isinstance(task.config, TrainConfig):
            yield RecipeError(
                f"placement.offload is set for {task.label}, which cannot use it",
                hint="set it in the placement of a training: pretrain, distill or sft",
            )
            continue
        try:
            refuse_offload_without_gpu(task.placement, task.label)
        except InputError as error:
            yield error


def _too_few_gpus(graph: Graph) -> Iterator[InputError]:
    """An evaluation with more replicas on a node than its GPUs are enough for."""
    for task in graph.tasks:
        if isinstance(task.config, EvalConfig) and task.placement.gpus:
            place, width = task.placement, task.config.serving.tensor_parallel
            if place.processes * width > place.gpus:
                yield RecipeError(
                    f"{task.label}: {place.processes} replicas of tensor_parallel={width} need "
                    f"{place.processes * width} GPUs a node, and placement.gpus is {place.gpus}",
                    hint=f"set {task.label}.placement.processes to {max(1, place.gpus // width)}, or gpus to more",
                )


def _unservable(recipe: Recipe, graph: Graph) -> Iterator[InputError]:
    """A parent that vLLM cannot run, where a stage serves or measures it or a child, whose heads have its size."""
    tasks = [task for task in graph.tasks if _runs_vllm(task)]
    try:
        shape = _parent_architecture(recipe)
    except InputError:
        return  # said already
    if shape is None or not tasks:
        return
    on_gpu = vllm_uses_gpu() or all(task.placement.gpus for task in tasks)
    try:
        refuse_head_sizes(shape, f"the parent in {', '.join(task.label for task in tasks)}", on_gpu=on_gpu)
    except InputError as error:
        yield error


def _runs_vllm(task: Task) -> bool:
    """Whether a stage serves models or measures them, with vLLM."""
    config = task.config
    if task.stage is COSTS:
        return isinstance(config, CostsConfig) and config.measurement.device is None and "own_costs" not in task.inputs
    if task.stage is SEARCH:
        assert isinstance(config, SearchConfig)
        return config.latency_feedback.max_rounds > 0 or config.fusion.timing == "vllm"
    return task.stage in (EVAL, DEPLOY, RL)


def _missing_keys(recipe: Recipe) -> Iterator[InputError]:
    """Trusted keys that are not there, which would be noticed only when the model is served."""
    for path in recipe.trust.keys if recipe.trust is not None else ():
        if not path.is_file():
            yield RecipeError(f"trust.keys: no such file: {path}", hint="give public keys, PEM")


def _unreadable_files(recipe: Recipe) -> Iterator[InputError]:
    """Files that are not there, and a checkpoint that cannot or must not be read."""
    for name, paths in sources_of(recipe).items():
        if any(map(is_address, paths)):
            continue
        try:
            list(files_of(name, paths, KINDS[name]))
        except InputError as error:
            yield error


def _unfit_tokenizer(recipe: Recipe) -> Iterator[InputError]:
    """A parent's tokenizer that the data stage could not give the toggle."""
    if recipe.data is None or recipe.parent is None or is_address(recipe.parent):
        return
    if (Path(recipe.parent) / VOCABULARY).is_file():  # that it is missing was said already
        try:
            read_settings(Path(recipe.parent))
        except InputError as error:
            yield error


def _check_search(recipe: Recipe) -> None:
    """Refuse widths and heads that the parent cannot be cut to, and limits that no cut meets, as far as shapes tell."""
    parent = _parent_architecture(recipe)
    if recipe.search is None or parent is None:
        return
    measurement = recipe.search.measurement
    spaces = servable_spaces(layer_spaces(recipe.search, shape_of(parent)), measurement.tensor_parallel)
    if measurement.device is not None:
        require_support(measurement, device_of(measurement.device))
    for resource, own in _counted(parent, measurement).items():
        limit = recipe.search.limits.absolute(resource, own)
        reachable = _least(parent, spaces, resource, measurement)
        if limit is not None and reachable > limit:
            raise InfeasibleBudget(
                f"no choice of blocks fits {resource}={limit:.6g}; the smallest reachable is {reachable}",
                hint=f"offer smaller sub-blocks in search, or raise search.limits.{resource}",
            )


def _least(parent: Architecture, spaces: Sequence[LayerSpace], resource: str, measurement: Measurement) -> int:
    """The least of a resource that a child can have."""

    def taken(*blocks: BlockConfig) -> int:
        return _counted(parent.model_copy(update={"blocks": blocks}), measurement)[resource]

    layers = [[block_of(a.size, f.size) for a in space.attention for f in space.ffn] for space in spaces]
    return taken(*(min(blocks, key=taken) for blocks in layers))


def _counted(shape: Architecture, measurement: Measurement) -> dict[str, int]:
    """What a model takes that no machine changes, as `search.limits` names it."""
    fixed, parts = model_costs(shape, measurement)
    whole = sum(parts, start=fixed)
    names = ("parameters", "kv_bytes_per_token", "attention_layers", "weight_bytes", "memory_bytes")
    return {name: getattr(whole, name) for name in names}


def find_notes(recipe: Recipe) -> Iterator[str]:
    """What is not wrong, but good to know before a run."""
    parent = _parent_architecture(recipe)
    if recipe.parent is not None and not is_address(recipe.parent):
        yield from (f"parent: {note}" for note in checkpoint_notes(Path(recipe.parent)))
        if recipe.data is not None:  # its tokenizer was checked for that stage
            yield from _tokens_without_row(Path(recipe.parent))
        yield from _defaults_of_a_small_world(recipe)
    if recipe.search is not None and parent is not None:
        note = left_out(recipe.search, shape_of(parent))
        if note is not None:
            yield f"search: {note}"


FROM_DATA = {
    "distill": ("seq_len", "num_steps"),
    "pretrain": ("seq_len", "num_steps"),
    "sft": ("seq_len", "num_steps"),
    "rl": ("max_tokens",),
    "eval": ("max_tokens",),
    "deploy": ("max_tokens",),
}
"""Keys, by section, whose values follow from data."""
DATA_OF = {"eval": "rl", "deploy": "sft"}
"""Sections that ask what is given by the data of another section; without it their keys matter little."""


def _defaults_of_a_small_world(recipe: Recipe) -> Iterator[str]:
    """What a recipe with a parent of the user's own leaves to defaults that were not made for it."""
    if own_parent(recipe) is None:
        return
    names = [name for name in FROM_DATA if getattr(recipe, DATA_OF.get(name, name)) is not None]
    sections = {name: section for name in names if (section := getattr(recipe, name)) is not None}
    filled = {setting.key for setting in rules_of(recipe)}
    keys = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key in FROM_DATA[name]
        if key not in section.model_fields_set and f"{name}.{key}" not in filled
    ]
    if keys:
        yield (
            f"{', '.join(keys)}: not set, so that the defaults hold, which are for small models and short texts; "
            "tessera init chooses them by your data and this machine"
        )


def _tokens_without_row(parent: Path) -> Iterator[str]:
    """Tokens that stop the run where a text has one."""
    tokens = tokens_without_row(parent)
    if tokens:
        first = min(tokens)
        yield (
            f"parent: {len(tokens)} tokens of its tokenizer have no row in its embedding of {embedding_rows(parent)} "
            f"rows, such as {tokens[first]!r} with id {first}; a text with one of them is refused"
        )


def _parent_architecture(recipe: Recipe) -> Architecture | None:
    """The parent's shape; None where only the store knows it, or nothing is there.

    A vocabulary that is still to be trained counts as one token, which makes the least that a child can have no larger
    than it will be.
    """
    if recipe.parent is None:
        if recipe.parent_pretrain is None:
            return None
        values = recipe.parent_pretrain.shape.model_dump(exclude_none=True)
        return Architecture.from_config({**values, "model_type": "llama", "vocab_size": 1})
    if is_address(recipe.parent) or not (Path(recipe.parent) / "config.json").is_file():
        return None
    return read_architecture(Path(recipe.parent))


def _missing_inputs(graph: Graph) -> Iterator[RecipeError]:
    """Stages that need what no stage before them makes and the recipe does not give."""
    for task in graph.tasks:
        missing = [
            name for name, declared in task.stage.inputs.items() if not declared.optional and name not in task.inputs
        ]
        if missing:
            yield RecipeError(
                f"stage {task.label} needs {' and '.join(missing)}, and nothing before it makes that",
                hint=f"{_way_out(missing)}, or set {task.label.partition('/')[0]}: null",
            )


OWN_FILES = {
    "corpus": ("own_corpus", "corpus"),
    "chats": ("own_chats", "sft.data"),
    "problems": ("own_problems", "rl.data"),
}
"""For each output of the data stage: the files of the user that it is made of, and where the recipe names them."""


def _missing_files(recipe: Recipe, graph: Graph) -> Iterator[RecipeError]:
    """What stages read that a user with own data does not give: the demo's world is never mixed into it."""
    given, whose = set(sources_of(recipe)), "files of your own"
    if recipe.data is not None and recipe.data.reasoning_gym:
        given, whose = given | {"own_chats", "own_problems"}, "data.reasoning_gym"
    if not any(source in given for source, _ in OWN_FILES.values()):
        return
    for output, (source, key) in OWN_FILES.items():
        readers = [task.label for task in graph.tasks if Made("data", output) in task.inputs.values()]
        needing = [label for label in readers if label != "eval"]
        if source not in given and needing:
            yield RecipeError(
                f"with {whose}, {', '.join(needing)} need{'' if len(needing) > 1 else 's'} {key} too",
                hint=f"give {key}, or leave out what reads it (null)",
            )


def _blend(recipe: Recipe) -> Iterator[RecipeError]:
    """Weights that are not one for each corpus, or too fine; an artifact may have several corpora in it."""
    weights = recipe.data.corpus_weights if recipe.data else ()
    if not weights:
        return
    if not any(map(is_address, map(str, recipe.corpus))) and len(weights) != len(recipe.corpus):
        yield RecipeError(
            f"data.corpus_weights has {len(weights)} weights, and corpus names {len(recipe.corpus)} corpora",
            hint="give one weight for each path of `corpus`, in the same order",
        )
    try:
        Blend(weights)
    except DataError as error:
        yield RecipeError(f"data.corpus_weights: {error.message}", hint=error.hint)


def _refused_tasks(recipe: Recipe) -> Iterator[InputError]:
    """Tasks that reasoning-gym does not have, or that refuse their settings, where it is installed."""
    tasks = recipe.data.reasoning_gym if recipe.data else {}
    try:
        if tasks:
            require_tasks({name: task.settings for name, task in tasks.items()}, "data.reasoning_gym")
    except MissingPackage:
        return
    except InputError as error:
        yield error


def _way_out(missing: list[str]) -> str:
    """What would give the missing inputs."""
    made_by_data = {"tokenizer", "corpus", "chats", "problems"}
    return (
        "leave the data stage in" if made_by_data.issuperset(missing) else "give a parent, or leave parent_pretrain in"
    )
