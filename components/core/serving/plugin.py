"""What every vLLM process learns from us when it starts (entry point group `vllm.general_plugins`).

A model folder thereby needs neither remote code nor an `auto_map`: the configuration class of heterogeneous models, the
reasoning parser and the way to hand over weights are installed beside vLLM instead.
"""

from components.core.serving.settings import PLUGIN, vllm_uses_gpu

SERVED_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "DeciLMForCausalLM")


def register() -> None:
    """Register with vLLM and transformers; cheap, and harmless when called again."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.reasoning import ReasoningParserManager

    from components.core.serving.served_config import ServedConfig

    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    ReasoningParserManager.register_lazy_module(
        PLUGIN, "components.core.serving.reasoning_parser", "TesseraReasoningParser"
    )
    if PLUGIN not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            PLUGIN, "components.core.serving.weight_transfer", "TesseraWeightTransfer"
        )
    ModelRegistry.register_model("DeciLMForCausalLM", "components.core.serving.decoder:ServedDecoder")
    if not vllm_uses_gpu():
        _import_served_classes()


def _import_served_classes() -> None:
    """Give vLLM the model classes themselves.

    By default it knows where they are, and lets a new process import all of vLLM, once a machine and class, to look at
    each: that keeps CUDA out of the main process, and takes as long as starting a server.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    for name in SERVED_CLASSES:
        known = ModelRegistry.models[name]
        if isinstance(known, _LazyRegisteredModel):
            ModelRegistry.register_model(name, known.load_model_cls())
