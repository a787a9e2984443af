"""The steps of the search as stages: inputs, outputs, entry points. Light: no torch."""

from collections.abc import Mapping

from components.core.runtime.stage import Input, Output, Stage
from components.search.config import CostsConfig, ImportanceConfig, LibraryConfig, ScoresConfig, SearchConfig

PARENT = Input("model", "the dense parent")
CORPUS = Input("data", "train.jsonl and validation.jsonl with rows {text} or {prompt, completion}")
PROBLEMS = Input(
    "data",
    "validation.jsonl with rows {id, question, prompt, answer}, where task.num_problems asks for it",
    optional=True,
)
EARLIER = Input(
    "library",
    "an earlier search's library, or several in folders: what it trained is reused or begun from",
    optional=True,
)


def _measures_costs(config: CostsConfig, inputs: Mapping[str, object]) -> bool:
    """Whether sub-blocks are timed: not where times are predicted, or come with the costs of an earlier run."""
    return config.measurement.device is None and not inputs.get("own_costs")


def _measures_children(config: SearchConfig, inputs: Mapping[str, object]) -> bool:
    """Whether children or fused layers are timed, or the sub-blocks because no stage has done that."""
    times_models = config.latency_feedback.max_rounds > 0 or config.fusion.timing is not None
    return times_models or (config.measurement.device is None and not inputs.get("costs"))


IMPORTANCE = Stage(
    name="search-importance",
    config=ImportanceConfig,
    inputs={"parent": PARENT, "corpus": CORPUS},
    outputs={"importance": Output("library", "importance.safetensors: the contribution of every FFN channel")},
    entry="components.search.stages.library_step:importance",
    doc="Score FFN channels on calibration text.",
    source="arXiv 2411.19146, appendix A",
)

COSTS = Stage(
    name="search-costs",
    config=CostsConfig,
    inputs={
        "parent": PARENT,
        "own_costs": Input("table", "costs.json of an earlier run; replaces the measurement", optional=True),
    },
    outputs={"costs": Output("table", "costs.json: parameters, KV bytes and latency of every sub-block")},
    entry="components.search.stages.costs_step:costs",
    doc="Count, and measure on this machine, what every sub-block costs.",
    source="arXiv 2411.19146, section 4.1",
    measures_time=_measures_costs,
)

LIBRARY = Stage(
    name="search-library",
    config=LibraryConfig,
    inputs={
        "parent": PARENT,
        "corpus": CORPUS,
        "importance": Input("library", "importance of FFN channels, from search-importance"),
        "earlier": EARLIER,
    },
    outputs={
        "library": Output(
            "library", "layer-<i>/<variant>.safetensors: trained sub-blocks of this shard's layers; library.json"
        )
    },
    entry="components.search.stages.library_step:library",
    doc="Distil each alternative sub-block against the parent's own.",
    source="arXiv 2411.19146, section 3",
)

SCORES = Stage(
    name="search-scores",
    config=ScoresConfig,
    inputs={
        "parent": PARENT,
        "corpus": CORPUS,
        "library": Input("library", "trained sub-blocks of the same layers, from search-library"),
        "problems": PROBLEMS,
    },
    outputs={"scores": Output("table", "scores.json: replace-one-block KL of every sub-block of this shard's layers")},
    entry="components.search.stages.scores_step:scores",
    doc="Score each alternative sub-block by the KL of replacing just it.",
    source="arXiv 2411.19146, section 4.2",
)

SEARCH = Stage(
    name="search",
    config=SearchConfig,
    inputs={
        "parent": PARENT,
        "corpus": CORPUS,
        "importance": Input("library", "from search-importance; computed here where absent", optional=True),
        "libraries": Input(
            "library", "one a shard of search-library; trained here where absent", optional=True, many=True
        ),
        "scores": Input("table", "one a shard of search-scores; computed here where absent", optional=True, many=True),
        "costs": Input("table", "from search-costs, or own; measured here where absent", optional=True),
        "problems": PROBLEMS,
        "earlier": EARLIER,
    },
    outputs={
        "child": Output("model", "the best child within the limits, FFN runs fused"),
        "random_child": Output("model", "a random choice from the library at the same limits"),
        "greedy_child": Output("model", "a greedy choice at the same limits"),
        "search_table": Output("table", "search.json: options, choice, predictions, Pareto front, baselines, fusion"),
    },
    entry="components.search.stages.search_step:search",
    doc="Choose one attention and one FFN a layer exactly within the limits, fuse FFN runs, write the child.",
    source="arXiv 2411.19146, section 4; arXiv 2503.18908, section 3",
    measures_time=_measures_children,
)
