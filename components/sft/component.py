"""The KFP component of supervised fine-tuning."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components.core.runtime.kfp_task import image


@dsl.component(install_kfp_package=False, base_image=image("sft"))
def sft(
    config: str,
    label: str,
    store: str,
    run: str,
    sources: str,
    tuned: Output[Model],
    tokenizer: Input[Dataset] = None,  # type: ignore[assignment]
    chats: Input[Dataset] = None,  # type: ignore[assignment]
    model: Input[Model] = None,  # type: ignore[assignment]
) -> None:
    """Teach both modes of detailed thinking."""
    from components.core.runtime.kfp_task import execute

    execute("components.sft.config:STAGE", locals())
