"""What is wrong with a recipe before any work starts."""

from collections.abc import Iterator

from components.core.errors import InputError, RecipeError
from pipelines.graph import Graph
from pipelines.llama_nemotron import llama_nemotron, sources_of
from pipelines.recipe import Recipe, is_address
from pipelines.sources import KINDS, files_of


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
    for name, paths in sources_of(recipe).items():
        if any(map(is_address, paths)):
            continue
        try:
            list(files_of(name, paths, KINDS[name]))
        except InputError as error:
            yield error


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


def _way_out(missing: list[str]) -> str:
    """What would give the missing inputs."""
    made_by_data = {"tokenizer", "corpus", "chats", "problems"}
    return (
        "leave the data stage in" if made_by_data.issuperset(missing) else "give a parent, or leave parent_pretrain in"
    )
