"""The KFP component of reinforcement learning."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components.core.runtime.kfp_task import image


@dsl.component(install_kfp_package=False, base_image=image("rl"))
def rl(
    config: str,
    label: str,
    store: str,
    run: str,
    sources: str,
    policy: Output[Model],
    problems: Input[Dataset] = None,  # type: ignore[assignment]
    model: Input[Model] = None,  # type: ignore[assignment]
) -> None:
    """Reinforce right answers in the right format."""
    from components.core.runtime.kfp_task import execute

    execute("components.rl.config:STAGE", locals())
