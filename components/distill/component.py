"""The KFP component of distillation."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components.core.runtime.kfp_task import image


@dsl.component(install_kfp_package=False, base_image=image("distill"))
def distill(
    config: str,
    label: str,
    store: str,
    run: str,
    sources: str,
    distilled: Output[Model],
    student: Input[Model] = None,  # type: ignore[assignment]
    corpus: Input[Dataset] = None,  # type: ignore[assignment]
    teacher: Input[Model] = None,  # type: ignore[assignment]
) -> None:
    """Teach the child its parent's distributions and hidden states."""
    from components.core.runtime.kfp_task import execute

    execute("components.distill.config:STAGE", locals())
