"""The order of the stages, and what passes between them."""

import pytest

from components.core.base.config import digest_of
from components.core.base.errors import InputError, RecipeError
from components.core.runtime.runner import stage_key
from components.core.serving.serving_config import ServingConfig
from pipelines.recipe.checks import check, find_faults
from pipelines.recipe.graph import Made, Source
from pipelines.recipe.llama_nemotron import llama_nemotron
from pipelines.recipe.schema import Recipe


def recipe(**values: object) -> Recipe:
    return Recipe.parse({"name": "x", **values})


def test_the_whole_recipe_runs_every_stage_in_order() -> None:
    labels = [task.label for task in llama_nemotron(recipe()).items()]
    assert labels == [
        "data",
        "parent",
        "search/importance",
        "search/costs",
        "search/library-0",
        "search/library-1",
        "search/scores-0",
        "search/scores-1",
        "search",
        "distill",
        "pretrain",
        "sft",
        "rl",
        "eval",
        "deploy",
    ]


def test_every_input_is_made_before_it_is_read_and_known_to_its_stage() -> None:
    made: set[str] = set()
    for task in llama_nemotron(recipe()).tasks:
        for name, binding in task.inputs.items():
            assert name in task.stage.inputs
            assert isinstance(binding, Made)
            assert binding.task in made
        made.add(task.label)


def test_a_fan_out_has_one_item_a_shard_with_the_shard_in_its_configuration() -> None:
    graph = llama_nemotron(recipe(search={"shards": 3}))
    items = [item for item in graph.items() if item.label.startswith("search/library")]
    assert [item.config.model_dump()["shard"] for item in items] == ["0/3", "1/3", "2/3"]
    assert [item.label for item in items] == ["search/library-0", "search/library-1", "search/library-2"]


def test_earlier_libraries_go_to_the_library_alone() -> None:
    graph = llama_nemotron(recipe(search={"libraries": "run://first/library"}))
    readers = [task.label for task in graph.tasks if Source("own_libraries") in task.inputs.values()]
    assert readers == ["search/library"]
    assert graph.roles["library-1"] == Made("search/library-1", "library")


def search_keys(**settings: object) -> dict[str, str]:
    """Key of each task of the search, as if every artifact were named after the task that made it."""
    keys: dict[str, str] = {"data": digest_of("data"), "parent": digest_of("parent")}
    for task in llama_nemotron(recipe(search=settings)).items():
        if not task.label.startswith("search"):
            continue
        inputs: dict[str, str | list[str]] = {}
        for name, binding in task.inputs.items():
            several = binding if isinstance(binding, tuple) else (binding,)
            digests = [keys[one.task] for one in several if isinstance(one, Made)]
            inputs[name] = digests if isinstance(binding, tuple) else digests[0]
        keys[task.label] = stage_key(task.stage, task.config, inputs)
    return keys


LIBRARY = {"search/library-0", "search/library-1"}
SCORES = {"search/scores-0", "search/scores-1"}


@pytest.mark.parametrize(
    ("settings", "again"),
    [
        ({"limits": {"latency_ms": "50%"}}, set()),
        ({"scoring_batches": 5}, SCORES),
        ({"distillation": {"num_steps": 7}}, LIBRARY | SCORES),
        ({"importance_batches": 7}, {"search/importance"} | LIBRARY | SCORES),
        ({"measurement": {"rounds": 8}}, {"search/costs"}),
        ({"ffn_fractions": [1.0, 0.75]}, {"search/costs"} | LIBRARY | SCORES),
        ({"batch_size": 4}, {"search/importance"} | LIBRARY | SCORES),
    ],
)
def test_new_settings_run_again_what_they_change_and_what_follows(settings: dict[str, object], again: set[str]) -> None:
    before, after = search_keys(), search_keys(**settings)
    assert {label for label, key in after.items() if key != before[label]} == again | {"search"}


def test_a_given_parent_is_searched_in_place_of_a_trained_one() -> None:
    graph = llama_nemotron(recipe(parent="/model"))
    assert "parent" not in [task.label for task in graph.tasks]
    assert graph["search"].inputs["parent"] == Source("parent")
    assert graph["data"].inputs["parent"] == Source("parent")


def test_what_is_left_out_is_stepped_over() -> None:
    graph = llama_nemotron(recipe(search=None, distill=None, pretrain=None, rl=None))
    assert graph["sft"].inputs["model"] == Made("parent", "trained")
    assert graph["deploy"].inputs["model"] == Made("sft", "tuned")


def test_own_files_reach_the_data_stage_and_own_costs_the_search() -> None:
    graph = llama_nemotron(recipe(corpus="/a.txt", sft="/b.jsonl", rl="/c.jsonl", search={"costs": "/d.json"}))
    own = {name for name in graph["data"].inputs if name.startswith("own_")}
    assert own == {"own_corpus", "own_chats", "own_problems"}
    assert graph["search/costs"].inputs["own_costs"] == Source("own_costs")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": None}, "stage parent needs tokenizer and corpus, and nothing before it makes that"),
        ({"parent_pretrain": None}, "stage distill needs teacher, and nothing before it makes that"),
        ({"search": None}, "distill needs the child that search finds, and search is left out"),
        ({"corpus": "/absent.txt"}, "corpus: no such file or folder: /absent.txt"),
        ({"sft": "/absent.jsonl"}, "sft.data: no such file or folder: /absent.jsonl"),
        (
            {"search": {"num_key_value_heads": [3]}},
            "search.num_key_value_heads=3 does not divide the parent's 4 KV heads",
        ),
        ({"parent": "/absent"}, "parent: no such file or folder: /absent"),
        ({"corpus": "/a.txt", "rl": None}, "with files of your own, sft needs sft.data too"),
        (
            {stage: {"placement": {"nodes": 2}} for stage in ("sft", "rl", "eval")},
            "placement.nodes is more than 1 for rl; these run on one node",
        ),
        (
            {"eval": {"placement": {"processes": 3, "gpus": 4}, "serving": {"tensor_parallel": 2}}},
            "eval: 3 replicas of tensor_parallel=2 need 6 GPUs a node, and placement.gpus is 4",
        ),
        ({"rl": {"placement": {"gpus": 1, "offload": True}}}, "placement.offload is set for rl, which cannot use it"),
        (
            {"sft": {"placement": {"offload": True}}},
            "sft: placement.offload keeps a training out of the memory of a GPU, and placement.gpus is 0",
        ),
    ],
)
def test_what_cannot_work_is_told_before_any_work(values: dict[str, object], message: str) -> None:
    assert message in [fault.message for fault in find_faults(recipe(**values))]
    with pytest.raises(InputError) as caught:
        check(recipe(**values))
    assert message in caught.value.message


def test_every_stage_that_serves_does_it_as_the_recipe_says_and_as_its_own_section_says_besides() -> None:
    values: dict[str, object] = {"eval": {"serving": {"tensor_parallel": 2}}, "rl": {"serving": {"threads": 4}}}
    graph = llama_nemotron(recipe(serving={"dtype": "bfloat16", "threads": 3, "host": "0.0.0.0", "port": 9}, **values))
    at_home = ServingConfig().on_loopback()
    common = at_home.model_copy(update={"dtype": "bfloat16", "threads": 3})
    changes = {"eval": {"tensor_parallel": 2}, "rl": {"threads": 4}, "deploy": {}}
    for label, change in changes.items():
        assert graph[label].config.model_dump()["serving"] == {**common.model_dump(), **change}


def test_the_address_of_a_server_is_in_no_key() -> None:
    """A stage asks its servers itself, at an address of the machine that it runs on."""
    graphs = [llama_nemotron(recipe(serving={"port": port})) for port in (8000, 9000)]
    assert graphs[0]["eval"].config == graphs[1]["eval"].config


@pytest.mark.parametrize(
    ("place", "width", "replicas"),
    [({}, 1, 1), ({"gpus": 8}, 1, 8), ({"gpus": 8}, 4, 2), ({"gpus": 8, "processes": 2}, 1, 2), ({"gpus": 1}, 2, 1)],
)
def test_an_evaluation_has_as_many_replicas_as_its_gpus_are_enough_for(
    place: dict[str, int], width: int, replicas: int
) -> None:
    graph = llama_nemotron(recipe(eval={"placement": place, "serving": {"tensor_parallel": width}}))
    assert graph["eval"].placement.processes == replicas
    assert graph["deploy"].placement.processes == 1


@pytest.mark.parametrize("serving", [{"tensor_parallel": 2}, {"dtype": "float8"}])
def test_rl_refuses_an_engine_whose_weights_it_cannot_replace(serving: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=f"set rl.serving.{next(iter(serving))} to"):
        llama_nemotron(recipe(serving=serving))
    llama_nemotron(recipe(serving=serving, rl={"serving": {"tensor_parallel": 1, "dtype": None}}))


def test_the_search_is_one_process_and_each_shard_has_one_gpu_whatever_trainings_take() -> None:
    place = {"processes": 8, "gpus": 8, "threads": 4}
    search = {"shards": 8, "measurement": {"tensor_parallel": 2}}
    graph = llama_nemotron(recipe(placement=place, search=search))
    gpus = {task.label: task.placement.gpus for task in graph.tasks if task.label.startswith("search")}
    one = dict.fromkeys(("search/importance", "search/library", "search/scores"), 1)
    assert gpus == {**one, "search/costs": 2, "search": 2}
    assert {graph[label].placement.processes for label in gpus} == {1}
    assert (graph["distill"].placement.processes, graph["distill"].placement.gpus) == (8, 8)
    on_cpu = llama_nemotron(recipe(placement={"processes": 2}))
    assert (on_cpu["search/library"].placement.processes, on_cpu["search/library"].placement.gpus) == (1, 0)
