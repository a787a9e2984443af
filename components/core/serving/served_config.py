"""The configuration class that vLLM uses for the heterogeneous decoder."""

from typing import Any

from components.core.model.decoder import TesseraConfig, is_linear


class ServedConfig(TesseraConfig):
    """Marks linear replacements as no-ops: vLLM would look for heads and widths there. `ServedLayer` adds them."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        for subblock in (subblock for block in self.block_configs for subblock in (block.attention, block.ffn)):
            subblock.no_op = subblock.no_op or is_linear(subblock)
