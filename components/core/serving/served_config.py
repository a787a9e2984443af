"""The configuration of the heterogeneous decoder as vLLM reads it."""

from typing import Any

from components.core.model.decoder import TesseraConfig, is_linear


class ServedConfig(TesseraConfig):
    """Linear parts are no-ops to vLLM's own code, which would look for heads and widths there; our layer adds them."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        for part in (part for block in self.block_configs for part in (block.attention, block.ffn)):
            part.no_op = part.no_op or is_linear(part)
