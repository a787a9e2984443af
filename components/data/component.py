"""The KFP component of the data stage."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components.core.runtime.kfp_task import image


@dsl.component(install_kfp_package=False, base_image=image("data"))
def data(
    config: str,
    label: str,
    store: str,
    run: str,
    sources: str,
    tokenizer: Output[Dataset],
    corpus: Output[Dataset],
    chats: Output[Dataset],
    problems: Output[Dataset],
    parent: Input[Model] = None,  # type: ignore[assignment]
    own_corpus: Input[Dataset] = None,  # type: ignore[assignment]
    own_chats: Input[Dataset] = None,  # type: ignore[assignment]
    own_problems: Input[Dataset] = None,  # type: ignore[assignment]
) -> None:
    """Make the demo's world of arithmetic, or read a user's own files, and settle the tokenizer."""
    from components.core.runtime.kfp_task import execute

    execute("components.data.config:STAGE", locals())
