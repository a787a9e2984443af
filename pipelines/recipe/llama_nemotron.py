"""From a dense model to a served reasoning model: the order of the stages, and what passes between them.

Source: arXiv 2505.00949; the search of arXiv 2411.19146.
"""

from collections.abc import Mapping

from components.core.base.config import Config
from components.core.runtime.placement import Placement
from components.core.runtime.stage import Stage, item_label
from components.data.config import STAGE as DATA
from components.deploy.config import STAGE as DEPLOY
from components.distill.config import STAGE as DISTILL
from components.eval.config import ROLES as EVAL_INPUTS
from components.eval.config import STAGE as EVAL
from components.pretrain.config import STAGE as PRETRAIN
from components.rl.config import STAGE as RL
from components.search.config import CostsConfig, ImportanceConfig, LibraryConfig, ScoresConfig, SearchConfig
from components.search.declarations import COSTS, IMPORTANCE, LIBRARY, SCORES, SEARCH
from components.sft.config import STAGE as SFT
from pipelines.recipe.graph import Binding, Graph, Made, Source, Task
from pipelines.recipe.schema import Placed, Recipe, SearchSection


def llama_nemotron(recipe: Recipe) -> Graph:
    """The tasks of a recipe; each stage takes the newest artifacts that stand before it."""
    pipeline = _Pipeline(recipe)
    roles = pipeline.graph.roles

    if recipe.parent is not None:
        roles["parent"] = Source("parent")
    if recipe.data is not None:
        own = {name: Source(name) for name in sources_of(recipe) if name in DATA.inputs}
        roles |= pipeline.add("data", DATA, recipe.data, **{"parent": roles.get("parent"), **own})
    tokenizer, corpus = roles.get("tokenizer"), roles.get("corpus")
    chats, problems = roles.get("chats"), roles.get("problems")

    if recipe.parent is None and recipe.parent_pretrain is not None:
        made = pipeline.add("parent", PRETRAIN, recipe.parent_pretrain, tokenizer=tokenizer, corpus=corpus)
        roles["parent"] = made["trained"]
    model = parent = roles.get("parent")

    if recipe.search is not None:
        roles |= pipeline.search(recipe.search, parent, corpus, problems)
        model = roles["child"]
    if recipe.distill is not None:
        made = pipeline.add("distill", DISTILL, recipe.distill, teacher=parent, student=model, corpus=corpus)
        model = roles["distilled"] = made["distilled"]
    if recipe.pretrain is not None:
        made = pipeline.add("pretrain", PRETRAIN, recipe.pretrain, model=model, tokenizer=tokenizer, corpus=corpus)
        model = roles["pretrained"] = made["trained"]
    if recipe.sft is not None:
        made = pipeline.add("sft", SFT, recipe.sft, model=model, tokenizer=tokenizer, chats=chats)
        model = roles["sft"] = made["tuned"]
    if recipe.rl is not None:
        made = pipeline.add("rl", RL, recipe.rl, model=model, problems=problems)
        model = roles["rl"] = made["policy"]
    if recipe.eval is not None:
        models = {EVALUATED[role]: binding for role, binding in roles.items() if role in EVALUATED}
        tasks = {"task_files": Source("own_tasks")} if recipe.eval.task_files else {}
        roles |= pipeline.add("eval", EVAL, recipe.eval, problems=problems, corpus=corpus, **tasks, **models)
    if recipe.deploy is not None:
        roles |= pipeline.add("deploy", DEPLOY, recipe.deploy, model=model, metrics=roles.get("metrics"))
    return pipeline.graph


EVALUATED = {name.removesuffix("_child"): name for name in EVAL_INPUTS}
"""Roles of models, and the input of the evaluation that takes each."""
BASELINES = ("random", "greedy")
"""Roles of the children that were chosen without the solver, for comparison."""
MODELS = tuple(role for role in EVALUATED if role not in BASELINES)
"""Roles of the models on the way from the parent to the last one."""


def sources_of(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """What a recipe names of the user's own: input name to paths, or to the one address of an artifact."""
    named = {
        "parent": (recipe.parent,) if recipe.parent else (),
        "own_corpus": recipe.corpus,
        "own_chats": recipe.sft.data if recipe.sft else (),
        "own_problems": recipe.rl.data if recipe.rl else (),
        "own_tasks": (str(recipe.eval.task_files),) if recipe.eval and recipe.eval.task_files else (),
        "own_costs": (recipe.search.costs,) if recipe.search and recipe.search.costs else (),
        "own_libraries": recipe.search.libraries if recipe.search else (),
    }
    return {name: tuple(map(str, paths)) for name, paths in named.items() if paths}


class _Pipeline:
    """Adds tasks to a graph."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.graph = Graph(recipe.name, recipe.digest)

    def add(self, label: str, stage: Stage, section: Placed, **inputs: Binding | None) -> dict[str, Made]:
        """Add the task of a stage with a section of its own; returns its outputs."""
        config = self.recipe.config(section, stage.config)
        return self._add(label, stage, config, self.recipe.place(section), inputs)

    def search(
        self, section: SearchSection, parent: Binding | None, corpus: Binding | None, problems: Binding | None
    ) -> dict[str, Made]:
        """Add the search: importance and costs, library and scores in shards, the solution; returns its roles."""
        config = self.recipe.config(section, SearchConfig)
        shards = tuple(f"{index}/{section.shards}" for index in range(section.shards))
        width = config.measurement.tensor_parallel
        watched: dict[str, Binding | None] = {"parent": parent, "corpus": corpus}
        own = Source("own_costs") if section.costs else None
        asked = {"problems": problems if config.task.num_problems else None}
        earlier = Source("own_libraries") if section.libraries else None

        def add(
            stage: Stage, step: Config, inputs: Mapping[str, Binding | None], shards: tuple[str, ...] = ()
        ) -> dict[str, Made]:
            place = _one_process(self.recipe.place(section), width if stage in (COSTS, SEARCH) else 1)
            return self._add(stage.name.replace("-", "/"), stage, step, place, inputs, shards)

        made = add(IMPORTANCE, config.part(ImportanceConfig), watched)
        made |= add(COSTS, config.part(CostsConfig), {"parent": parent, "own_costs": own})
        taught = {**watched, "importance": made["importance"], "earlier": earlier}
        made |= add(LIBRARY, config.part(LibraryConfig), taught, shards)
        scored = {**watched, **asked, "library": made["library"]}
        made |= add(SCORES, config.part(ScoresConfig), scored, shards)
        whole = {name: made[name] for name in ("importance", "scores", "costs")} | {"libraries": made["library"]}
        found = add(SEARCH, config, {**watched, **asked, **whole})
        return {
            "costs": made["costs"],
            **{
                f"library-{index}": Made(item_label("search/library", index), "library")
                for index in range(section.shards)
            },
            "child": found["child"],
            "random": found["random_child"],
            "greedy": found["greedy_child"],
            "search": found["search_table"],
        }

    def _add(
        self,
        label: str,
        stage: Stage,
        config: Config,
        placement: Placement,
        inputs: Mapping[str, Binding | None],
        shards: tuple[str, ...] = (),
    ) -> dict[str, Made]:
        bound = {name: binding for name, binding in inputs.items() if binding is not None}
        self.graph.tasks.append(Task(label, stage, config, placement, bound, shards))
        return {name: Made(label, name) for name in stage.outputs}


def _one_process(place: Placement, num_devices: int) -> Placement:
    """The placement of a stage that runs as one process and uses so many GPUs, whatever other stages ask for."""
    return place.model_copy(update={"processes": 1, "gpus": min(place.gpus, num_devices)})
