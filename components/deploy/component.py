"""The KFP component of the deployment."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Model, Output

from components.core.runtime.kfp_task import image


@dsl.component(install_kfp_package=False, base_image=image("deploy"))
def deploy(
    config: str,
    label: str,
    store: str,
    run: str,
    sources: str,
    bundle: Output[Model],
    model: Input[Model] = None,  # type: ignore[assignment]
    metrics: Input[Artifact] = None,  # type: ignore[assignment]
) -> None:
    """Check the model against its gate, bundle it, and smoke-test it in a running vLLM server."""
    from components.core.runtime.kfp_task import execute

    execute("components.deploy.config:STAGE", locals())
