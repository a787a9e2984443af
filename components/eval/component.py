"""The KFP component of the evaluation."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components.core.runtime.kfp_task import image


@dsl.component(install_kfp_package=False, base_image=image("eval"))
def eval(
    config: str,
    label: str,
    store: str,
    run: str,
    sources: str,
    metrics: Output[Artifact],
    problems: Input[Dataset] = None,  # type: ignore[assignment]
    parent: Input[Model] = None,  # type: ignore[assignment]
    child: Input[Model] = None,  # type: ignore[assignment]
    random_child: Input[Model] = None,  # type: ignore[assignment]
    greedy_child: Input[Model] = None,  # type: ignore[assignment]
    distilled: Input[Model] = None,  # type: ignore[assignment]
    pretrained: Input[Model] = None,  # type: ignore[assignment]
    sft: Input[Model] = None,  # type: ignore[assignment]
    rl: Input[Model] = None,  # type: ignore[assignment]
) -> None:
    """Measure every model so far in both modes, through a vLLM server."""
    from components.core.runtime.kfp_task import execute

    execute("components.eval.config:STAGE", locals())
