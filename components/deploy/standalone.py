"""A bundle for vLLM servers without Tessera: a configuration class that transformers loads as remote code.

Off by default: Tessera's own servers never run code from a model folder.
"""

import json
from pathlib import Path

from components.core.base.errors import CheckpointError
from components.core.model.architecture import Architecture

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
