"""The KFP component of pretraining."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components.core.runtime.kfp_task import image


@dsl.component(install_kfp_package=False, base_image=image("pretrain"))
def pretrain(
    config: str,
    label: str,
    store: str,
    run: str,
    sources: str,
    trained: Output[Model],
    tokenizer: Input[Dataset] = None,  # type: ignore[assignment]
    corpus: Input[Dataset] = None,  # type: ignore[assignment]
    model: Input[Model] = None,  # type: ignore[assignment]
) -> None:
    """Train on text: a dense parent from scratch, or a child further."""
    from components.core.runtime.kfp_task import execute

    execute("components.pretrain.config:STAGE", locals())
