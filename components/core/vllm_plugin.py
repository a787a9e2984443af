"""What every vLLM process learns from us when it starts (entry point group `vllm.general_plugins`).

A model folder thereby needs neither remote code nor an `auto_map`: the configuration class of heterogeneous models, the
reasoning parser and the way to hand over weights are installed beside vLLM instead.

Set `VLLM_PLUGINS=tessera` where other packages bring plug-ins of their own: vLLM loads all it finds, and some take half a
minute to import.
"""

from contextlib import suppress

NAME = "tessera"
"""Name of the plug-in, of the reasoning parser and of the weight-transfer backend."""


def register() -> None:
    """Register with vLLM and transformers; cheap, and harmless when called again."""
    from transformers import AutoConfig
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.reasoning import ReasoningParserManager

    with suppress(ModuleNotFoundError):
        from components.core.model import TesseraConfig

        AutoConfig.register(TesseraConfig.model_type, TesseraConfig, exist_ok=True)
    ReasoningParserManager.register_lazy_module(NAME, "components.core.reasoning_parser", "TesseraReasoningParser")
    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, "components.core.weight_transfer", "TesseraWeightTransfer")
