"""The folder that a vLLM server serves: weights, tokenizer, chat template and default sampling settings.

For servers without Tessera it can have a configuration class that transformers loads as remote code. This is off by
default, and Tessera's own servers never run code from a model folder.
"""

import json
import shutil
from pathlib import Path

from components.core.base.errors import CheckpointError
from components.core.model.architecture import Architecture
from components.deploy.config import DeployConfig


def write_bundle(model: Path, bundle: Path, config: DeployConfig) -> None:
    """Copy a model folder, and add the sampling settings.

    Args:
        model: a model folder with its tokenizer.
        bundle: an empty folder.
        config: sampling settings, and whether the bundle is to be readable by servers without Tessera.
    """
    shutil.copytree(model, bundle, dirs_exist_ok=True, copy_function=shutil.copyfile)
    generation = bundle / "generation_config.json"
    values = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    sampling: dict[str, bool | float] = {"do_sample": config.temperature > 0}
    if config.temperature > 0:
        sampling |= {"temperature": config.temperature, "top_p": config.top_p}
    generation.write_text(json.dumps(values | sampling, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if config.add_configuration_file:
        add_configuration_file(bundle)


FILE = "configuration_decilm.py"
SOURCE = '''"""Configuration of model type nemotron-nas, for servers without Tessera."""

from types import SimpleNamespace

from transformers import PretrainedConfig


class DeciLMConfig(PretrainedConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        self.block_configs = [
            SimpleNamespace(**{part: SimpleNamespace(**values) for part, values in block.items()})
            for block in block_configs or []
        ]
        super().__init__(**kwargs)

    def to_dict(self):
        values = super().to_dict()
        values["block_configs"] = [
            {part: dict(vars(inner)) for part, inner in vars(block).items()} for block in self.block_configs
        ]
        return values
'''


def add_configuration_file(bundle: Path) -> None:
    """Write the class, and name it in `config.json`; a dense model needs none and is not changed.

    Raises:
        CheckpointError: vLLM cannot run the model without Tessera.
    """
    path = bundle / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config["model_type"] != "nemotron-nas":
        return
    reason = Architecture.from_config(config).needs_plugin()
    if reason is not None:
        raise CheckpointError(
            f"{reason}: vLLM runs the model only with Tessera's plug-in, not on servers without it",
            hint="set deploy.add_configuration_file to false, or search without allow_plugin_only_blocks",
        )
    config["auto_map"] = {"AutoConfig": f"{FILE.removesuffix('.py')}.DeciLMConfig"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (bundle / FILE).write_text(SOURCE)
