"""Tessera's vLLM plug-in; vLLM calls it in every process that it starts (entry point group `vllm.general_plugins`).

A model folder then needs neither remote code nor an `auto_map`.
"""

import os
from contextlib import suppress

from components.core.base.processes import end_with_owner
from components.core.serving.settings import OWNER_VARIABLE, PLUGIN


def register() -> None:
    """Register the configuration class, the decoder, the reasoning parser and the weight-transfer engine.

    vLLM may call it more than once in a process.
    """
    if owner := os.environ.get(OWNER_VARIABLE):
        end_with_owner(int(owner))

    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.reasoning import ReasoningParserManager

    from components.core.serving.served_config import ServedConfig

    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    ModelRegistry.register_model("DeciLMForCausalLM", "components.core.serving.decoder:ServedDecoder")
    ReasoningParserManager.register_lazy_module(
        PLUGIN, "components.core.serving.reasoning_parser", "TesseraReasoningParser"
    )
    with suppress(ValueError):  # raised where it is registered already
        WeightTransferEngineFactory.register_engine(
            PLUGIN, "components.core.serving.weight_transfer", "TesseraWeightTransfer"
        )
