"""From a dense model to a served reasoning model: the order of the stages, and what passes between them.

Source: arXiv 2505.00949; the search of arXiv 2411.19146.
"""

from components.data.config import STAGE as DATA
from components.deploy.config import STAGE as DEPLOY
from components.eval.config import STAGE as EVAL

from components.core.config import Config
from components.core.stage import Stage
from components.distill.config import STAGE as DISTILL
from components.pretrain.config import STAGE as PRETRAIN
from components.rl.config import STAGE as RL
from components.search.config import BLOCKS, PREPARE, SEARCH, BlocksConfig, PrepareConfig, SearchConfig
from components.sft.config import STAGE as SFT
from pipelines.graph import Binding, Graph, Made, Source, Task
from pipelines.recipe import Placed, Recipe, SearchSection


def llama_nemotron(recipe: Recipe) -> Graph:
    """The tasks of a recipe, each with the newest artifacts that stand before it."""
    pipeline = _Pipeline(recipe)
    roles = pipeline.graph.roles

    if recipe.parent is not None:
        roles["parent"] = Source("parent")
    if recipe.data is not None:
        own = {name: Source(name) for name in sources_of(recipe) if name.startswith("own_") and name != "own_costs"}
        data = pipeline.add("data", DATA, recipe.data, parent=roles.get("parent"), **own)
        roles |= {name: data[name] for name in DATA.outputs}
    text = {"tokenizer": roles.get("tokenizer"), "corpus": roles.get("corpus")}

    if recipe.parent is None:
        roles["parent"] = pipeline.add("parent", PRETRAIN, recipe.parent_pretrain, **text)["trained"]
    model = parent = roles["parent"]

    if recipe.search is not None:
        pipeline.search(recipe.search, parent, roles.get("corpus"))
        model = roles["child"]
    if recipe.distill is not None:
        inputs = {"teacher": parent, "student": model, "corpus": roles.get("corpus")}
        model = roles["distilled"] = pipeline.add("distill", DISTILL, recipe.distill, **inputs)["distilled"]
    if recipe.pretrain is not None:
        model = roles["pretrained"] = pipeline.add("pretrain", PRETRAIN, recipe.pretrain, model=model, **text)[
            "trained"
        ]
    if recipe.sft is not None:
        inputs = {"model": model, "tokenizer": roles.get("tokenizer"), "chats": roles.get("chats")}
        model = roles["sft"] = pipeline.add("sft", SFT, recipe.sft, **inputs)["tuned"]
    if recipe.rl is not None:
        inputs = {"model": model, "problems": roles.get("problems")}
        model = roles["rl"] = pipeline.add("rl", RL, recipe.rl, **inputs)["policy"]
    if recipe.eval is not None:
        models = {EVALUATED[role]: made for role, made in roles.items() if role in EVALUATED}
        inputs = {"problems": roles.get("problems"), **models}
        roles["metrics"] = pipeline.add("eval", EVAL, recipe.eval, **inputs)["metrics"]
    if recipe.deploy is not None:
        inputs = {"model": model, "metrics": roles.get("metrics")}
        roles["bundle"] = pipeline.add("deploy", DEPLOY, recipe.deploy, **inputs)["bundle"]
    return pipeline.graph


EVALUATED = {
    "parent": "parent",
    "child": "child",
    "random": "random_child",
    "greedy": "greedy_child",
    "distilled": "distilled",
    "pretrained": "pretrained",
    "sft": "sft",
    "rl": "rl",
}
"""Roles of models, and the input of the evaluation that takes each."""


def sources_of(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """What a recipe names of the user's own: input name to paths, or to the one address of an artifact."""
    named = {
        "parent": (recipe.parent,) if recipe.parent else (),
        "own_corpus": recipe.corpus,
        "own_chats": recipe.sft.data if recipe.sft else (),
        "own_problems": recipe.rl.data if recipe.rl else (),
        "own_costs": (recipe.search.costs,) if recipe.search and recipe.search.costs else (),
    }
    return {name: tuple(map(str, paths)) for name, paths in named.items() if paths}


class _Pipeline:
    """Adds tasks to a graph."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.graph = Graph(recipe.name, recipe.digest)

    def add(self, label: str, stage: Stage, section: Placed, **inputs: Binding | None) -> dict[str, Made]:
        """Add the task of a stage that is a component of its own; returns its outputs."""
        config = self.recipe.config(section, stage.config)
        return self._add(label, stage, f"components.{stage.name}.component:{stage.name}", config, section, inputs)

    def search(self, section: SearchSection, parent: Binding, corpus: Binding | None) -> None:
        """Add the search: importance and costs, the block library in shards, the solution."""
        config = self.recipe.config(section, SearchConfig)
        seen: dict[str, Binding | None] = {"parent": parent, "corpus": corpus}
        own = {"own_costs": Source("own_costs")} if section.costs else {}
        prepared = self._search("search/prepare", PREPARE, config.prepare(), section, {**seen, **own})
        shards = tuple(f"{index}/{section.shards}" for index in range(section.shards))
        inputs = {**seen, "importance": prepared["importance"]}
        blocks = self._search("search/blocks", BLOCKS, config.blocks(), section, inputs, shards)
        inputs |= {"libraries": blocks["library"], "scores": blocks["scores"], "costs": prepared["costs"]}
        found = self._search("search", SEARCH, config, section, inputs)
        self.graph.roles |= {
            "costs": prepared["costs"],
            "child": found["child"],
            "random": found["random_child"],
            "greedy": found["greedy_child"],
            "search": found["search_table"],
        }

    def _search(
        self,
        label: str,
        stage: Stage,
        config: PrepareConfig | BlocksConfig | SearchConfig,
        section: SearchSection,
        inputs: dict[str, Binding | None],
        shards: tuple[str, ...] = (),
    ) -> dict[str, Made]:
        """Add one of the three tasks of the search."""
        component = f"components.search.component:{stage.name.replace('-', '_')}"
        return self._add(label, stage, component, config, section, inputs, shards)

    def _add(
        self,
        label: str,
        stage: Stage,
        component: str,
        config: Config,
        section: Placed,
        inputs: dict[str, Binding | None],
        shards: tuple[str, ...] = (),
    ) -> dict[str, Made]:
        bound = {name: binding for name, binding in inputs.items() if binding is not None}
        self.graph.tasks.append(Task(label, stage, component, config, self.recipe.place(section), bound, shards))
        return {name: Made(label, name) for name in stage.outputs}
