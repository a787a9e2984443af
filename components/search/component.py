"""The KFP components of the search: its steps as tasks of their own, shards of the library and of the scores."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components.core.runtime.kfp_task import image


@dsl.component(install_kfp_package=False, base_image=image("search"))
def search_importance(
    config: str,
    label: str,
    store: str,
    run: str,
    sources: str,
    importance: Output[Artifact],
    parent: Input[Model] = None,  # type: ignore[assignment]
    corpus: Input[Dataset] = None,  # type: ignore[assignment]
) -> None:
    """Score FFN channels on calibration text."""
    from components.core.runtime.kfp_task import execute

    execute("components.search.declarations:IMPORTANCE", locals())


@dsl.component(install_kfp_package=False, base_image=image("search"))
def search_costs(
    config: str,
    label: str,
    store: str,
    run: str,
    sources: str,
    costs: Output[Artifact],
    parent: Input[Model] = None,  # type: ignore[assignment]
    own_costs: Input[Artifact] = None,  # type: ignore[assignment]
) -> None:
    """Measure what every sub-block costs."""
    from components.core.runtime.kfp_task import execute

    execute("components.search.declarations:COSTS", locals())


@dsl.component(install_kfp_package=False, base_image=image("search"))
def search_library(
    config: str,
    label: str,
    store: str,
    run: str,
    sources: str,
    shard: str,
    library: Output[Artifact],
    parent: Input[Model] = None,  # type: ignore[assignment]
    corpus: Input[Dataset] = None,  # type: ignore[assignment]
    importance: Input[Artifact] = None,  # type: ignore[assignment]
    earlier: Input[Artifact] = None,  # type: ignore[assignment]
) -> None:
    """Distil the alternative sub-blocks of a share of the layers."""
    from components.core.runtime.kfp_task import execute

    execute("components.search.declarations:LIBRARY", locals())


@dsl.component(install_kfp_package=False, base_image=image("search"))
def search_scores(
    config: str,
    label: str,
    store: str,
    run: str,
    sources: str,
    shard: str,
    scores: Output[Artifact],
    parent: Input[Model] = None,  # type: ignore[assignment]
    corpus: Input[Dataset] = None,  # type: ignore[assignment]
    library: Input[Artifact] = None,  # type: ignore[assignment]
    problems: Input[Dataset] = None,  # type: ignore[assignment]
) -> None:
    """Score the alternative sub-blocks of a share of the layers."""
    from components.core.runtime.kfp_task import execute

    execute("components.search.declarations:SCORES", locals())


@dsl.component(install_kfp_package=False, base_image=image("search"))
def search(
    config: str,
    label: str,
    store: str,
    run: str,
    sources: str,
    child: Output[Model],
    random_child: Output[Model],
    greedy_child: Output[Model],
    search_table: Output[Artifact],
    parent: Input[Model] = None,  # type: ignore[assignment]
    corpus: Input[Dataset] = None,  # type: ignore[assignment]
    importance: Input[Artifact] = None,  # type: ignore[assignment]
    libraries: Input[list[Artifact]] = None,  # type: ignore[assignment]
    scores: Input[list[Artifact]] = None,  # type: ignore[assignment]
    costs: Input[Artifact] = None,  # type: ignore[assignment]
    problems: Input[Dataset] = None,  # type: ignore[assignment]
    earlier: Input[Artifact] = None,  # type: ignore[assignment]
) -> None:
    """Choose a sub-block for every place within the limits, fuse FFN runs, assemble the child."""
    from components.core.runtime.kfp_task import execute

    execute("components.search.declarations:SEARCH", locals())
