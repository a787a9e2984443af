"""Floating-point operations of a decoder in closed form. Imports no torch.

A product of matrices m x k and k x n counts as 2 m k n. Norms, rotary positions, activation functions and softmax are
left out. Attention counts all pairs of a row, although a causal kernel can leave half of them out: utilisation is
reported so in the field.

Source: arXiv 2001.08361, section 2.1, for 2 and 6 operations a weight and token; arXiv 2204.02311, appendix B, for
attention.
"""

from components.core.model.architecture import LINEAR, Architecture, BlockConfig

BACKWARD_PASSES = 2
"""A backward pass has two products, for the gradients of input and weight, where the forward pass has one."""


def forward_flops(shape: Architecture, tokens: int, seq_len: int, *, logits: int | None = None) -> int:
    """Operations of a forward pass: 2 for each weight that multiplies a token, and attention.

    Args:
        shape: the model.
        tokens: that go through the layers.
        seq_len: tokens of a row, all of which each token attends to.
        logits: tokens whose logits are computed; None: all.
    """
    head = 2 * shape.vocab_size * shape.hidden_size * (tokens if logits is None else logits)
    return sum(block_flops(shape, block, tokens, seq_len) for block in shape.blocks) + head


def training_flops(shape: Architecture, tokens: int, seq_len: int, *, checkpointing: bool = False) -> int:
    """Operations of forward and backward passes: 6 for each weight and token, and attention.

    Args:
        shape: the model.
        tokens: all of them count in the loss.
        seq_len: tokens of a row.
        checkpointing: the layers are computed a second time in the backward pass.
    """
    forward = forward_flops(shape, tokens, seq_len)
    again = 0
    if checkpointing:  # up to what the last product of each layer takes: nothing needs its output
        last = sum(_last_weights(shape, block) for block in shape.blocks)
        again = forward_flops(shape, tokens, seq_len, logits=0) - 2 * last * tokens
    return (1 + BACKWARD_PASSES) * forward + again


def block_flops(shape: Architecture, block: BlockConfig, tokens: int, seq_len: int) -> int:
    """Operations of one layer in a forward pass."""
    pairs = 4 * seq_len * shape.num_attention_heads * shape.head_dim if block.attends else 0
    return tokens * (2 * block_weights(shape, block) + pairs)


def block_weights(shape: Architecture, block: BlockConfig) -> int:
    """Weights of one layer that multiply every token: its matrices, without biases and norms."""
    hidden, heads, width = shape.hidden_size, block.num_key_value_heads, block.intermediate_size
    query = shape.num_attention_heads * shape.head_dim
    attention = 2 * hidden * (query + heads * shape.head_dim) if isinstance(heads, int) else _linear(heads, hidden)
    ffn = 3 * hidden * width if isinstance(width, int) else _linear(width, hidden)
    return attention + ffn


def _last_weights(shape: Architecture, block: BlockConfig) -> int:
    """Weights of the last matrix of a layer."""
    hidden, heads, width = shape.hidden_size, block.num_key_value_heads, block.intermediate_size
    if width is not None:
        return hidden * (width if isinstance(width, int) else hidden)
    query = shape.num_attention_heads * shape.head_dim
    return 0 if heads is None else hidden * (query if isinstance(heads, int) else hidden)


def _linear(size: str | None, hidden: int) -> int:
    """Weights of a part that is one matrix, or nothing."""
    return hidden * hidden if size == LINEAR else 0
