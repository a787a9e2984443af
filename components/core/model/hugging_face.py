"""What we take of transformers, loaded without what it would load for other models.

Its generation loads scikit-learn for a metric of assisted decoding, its losses load SciPy for the matching of boxes: on
two cores that is 3.7 of the 9 seconds that a training process needs to start, and nothing here uses either.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def _without(*packages: str) -> Iterator[None]:
    """The first import of transformers, inside, takes these optional packages for absent; it asks once for each."""
    may_hide = "transformers" not in sys.modules
    hidden: dict[str, ModuleType | None] = {name: None for name in packages if may_hide and name not in sys.modules}
    sys.modules.update(hidden)  # type: ignore[arg-type]  # None is how Python itself marks what must not be found
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


with _without("scipy", "sklearn"):
    from transformers import DynamicCache, GenerationMixin, LlamaConfig, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

__all__ = [
    "BaseModelOutputWithPast",
    "CausalLMOutputWithPast",
    "DynamicCache",
    "GenerationMixin",
    "LlamaConfig",
    "LlamaRotaryEmbedding",
    "PreTrainedModel",
    "PretrainedConfig",
    "apply_rotary_pos_emb",
]
