"""The KFP components of the search: preparation, one shard of the block library, the search itself."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components.core.kubeflow import image


@dsl.component(install_kfp_package=False, base_image=image("search"))
def search_prepare(
    config: str,
    label: str,
    store: str,
    run: str,
    sources: str,
    importance: Output[Artifact],
    costs: Output[Artifact],
    parent: Input[Model] = None,  # type: ignore[assignment]
    corpus: Input[Dataset] = None,  # type: ignore[assignment]
    own_costs: Input[Artifact] = None,  # type: ignore[assignment]
) -> None:
    """Score FFN channels, and measure what every sub-block costs."""
    from components.core.kubeflow import execute

    execute("components.search.config:PREPARE", locals())


@dsl.component(install_kfp_package=False, base_image=image("search"))
def search_blocks(
    config: str,
    label: str,
    store: str,
    run: str,
    sources: str,
    shard: str,
    library: Output[Artifact],
    scores: Output[Artifact],
    parent: Input[Model] = None,  # type: ignore[assignment]
    corpus: Input[Dataset] = None,  # type: ignore[assignment]
    importance: Input[Artifact] = None,  # type: ignore[assignment]
) -> None:
    """Distil and score the alternative sub-blocks of a share of the layers."""
    from components.core.kubeflow import execute

    execute("components.search.config:BLOCKS", locals())


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
) -> None:
    """Choose a sub-block for every place within the limits, fuse FFN runs, assemble the child."""
    from components.core.kubeflow import execute

    execute("components.search.config:SEARCH", locals())
