"""The folder that a vLLM server serves: weights, tokenizer, chat template and default sampling settings."""

import json
import shutil
from pathlib import Path

from components.deploy.config import DeployConfig
from components.deploy.standalone import add_configuration_file


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
