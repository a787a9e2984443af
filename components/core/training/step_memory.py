"""Memory that an optimizer step takes in one process, in closed form. Imports no torch.

It follows `loop.py`, `sharding.py`, `losses.py`, `attention.py` and `decoder.py`, and changes with them; a test
compares it with the tensors of real steps. Not counted: what the allocator keeps, workspaces of libraries, and the
process itself (`PROCESS_BYTES`).

Letters: D hidden size, W width of all query heads, K width of all key heads, F channels, V vocabulary.
"""

from dataclasses import dataclass, field, replace

from components.core.model.architecture import LINEAR, WEIGHT_BYTES, Architecture, BlockConfig, masks_by_blocks
from components.core.model.flops import block_weights
from components.core.training.train_config import Optimizer, TrainConfig

PROCESS_BYTES = 600 << 20
"""Python with torch and transformers loaded, resident."""
PAGED_SHARE = 0.5
"""Share of the memory that a model which only computes may take; the layers of a larger one are read one at a time."""
CHUNK_LOGITS = 1 << 25
"""Maximum number of logits in memory: 128 MiB in float32. With smaller chunks the matrix products are slower."""
OWN_GROUP_PARAMETERS = 1 << 20
"""Decoder layers, embeddings and heads with at least this many parameters are sharded and gathered one at a time."""
MOMENT_BLOCK = 256
"""Values of a row that share a scale where moments have 8 bits (`adamw_8bit`)."""
UPDATED_VALUES = 1 << 22
"""Values of a matrix that are updated at once there: 16 MiB in float32."""
UPDATE_BYTES = 20
"""Of each of these values: both moments, what is written of one of them, scaled, and its codes."""
UNREDUCED_FRACTION = 0.25
"""Share of a rank's memory that unsharded gradients may take."""
MASTER = 4
"""Bytes of a weight, of a gradient and of a moment: float32."""


@dataclass(frozen=True)
class Gathered:
    """Bytes of weights and gradients that a rank holds whole for a while, beside its part of them.

    Attributes:
        always: weights of the root with their gradients, or with those of all where they are added up once a step.
        layers: the two layers that are computed and fetched, gradients of one, and those of a head that wait for the
            embedding's, which it is tied to.
        vocabulary: an embedding or a head that is a unit of its own.
        at_end: gradients of that embedding after all layers, and the copy of them that is added up over the ranks; of a
            tied one those of head and lookup, and their sum.
    """

    always: int = 0
    layers: int = 0
    vocabulary: int = 0
    at_end: int = 0


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of a step, by what takes them.

    Attributes:
        state: weights and both moments of AdamW, of this rank.
        gradients: of this rank.
        activations: what the backward pass of a micro batch needs.
        loss: logits of one chunk, and gradients of hidden states and head.
        accumulates: whether gradients are summed over several micro batches: then they are there beside all
            activations, else they grow as activations are freed.
        gathered: what is whole for a while, where the model is sharded.
        teacher: weights and hidden states of the teacher.
        update: what the optimizer computes with, after activations are freed.
    """

    state: int
    gradients: int
    activations: int
    loss: int
    accumulates: bool
    gathered: Gathered = Gathered()
    teacher: int = 0
    update: int = 0

    @property
    def total(self) -> int:
        """The peak."""
        summed, whole = self.gradients if self.accumulates else 0, self.gathered
        in_loss = summed + self.activations + self.loss + whole.vocabulary
        in_layers = max(summed + self.activations, self.gradients) + whole.layers
        at_end = self.gradients + max(whole.at_end, self.update)
        return self.state + whole.always + self.teacher + max(in_loss, in_layers, at_end)


@dataclass(frozen=True)
class Step:
    """What decides the memory of a step.

    Attributes:
        micro_batch_size: rows that a rank computes at a time.
        rows: rows of a rank in a step.
        seq_len: tokens of a row.
        bfloat16: whether matrix products are in bfloat16, else in float32.
        num_ranks: ranks that share weights, gradients and moments.
        rank_bytes: memory that a rank may take, which decides how often gradients are added up over the ranks.
        checkpointing: whether activations are computed again in the backward pass.
        teacher: the model that is distilled from, if any.
        teacher_dtype: precision of its weights.
        on_gpu: where it is computed, which decides about the mask of packed rows.
        matches_states: whether the hidden states after each layer are compared with those of the teacher.
        optimizer: how moments are kept.
        offload: whether weights, gradients and moments are in the memory of the node, not of the device.
    """

    micro_batch_size: int
    rows: int
    seq_len: int
    bfloat16: bool
    num_ranks: int = 1
    rank_bytes: int = 0
    checkpointing: bool = False
    teacher: Architecture | None = field(default=None, repr=False)
    teacher_dtype: str = "float32"
    on_gpu: bool = False
    matches_states: bool = True
    optimizer: Optimizer = "adamw"
    offload: bool = False

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        num_ranks: int,
        stored: str,
        rank_bytes: int = 0,
        *,
        on_gpu: bool = False,
        offload: bool = False,
    ) -> "Step":
        """The step of a training of a model that is stored in a precision."""
        rows = -(-config.global_batch_size // num_ranks)
        bfloat16 = (config.dtype or stored) == "bfloat16"
        micro = min(config.micro_batch_size, rows)
        made = cls(micro, rows, config.seq_len, bfloat16, num_ranks, rank_bytes, config.activation_checkpointing)
        return replace(made, on_gpu=on_gpu, optimizer=config.optimizer, offload=offload)

    def distilled_from(self, teacher: Architecture, dtype: str, *, matches_states: bool = True) -> "Step":
        """The same step with a teacher."""
        return replace(self, teacher=teacher, teacher_dtype=dtype, matches_states=matches_states)

    @property
    def tokens(self) -> int:
        """Tokens of a micro batch."""
        return self.micro_batch_size * self.seq_len

    @property
    def accumulates(self) -> bool:
        """Whether there are several micro batches."""
        return self.rows > self.micro_batch_size

    def mask_tokens(self, shape: Architecture) -> int:
        """Keys that the mask has for each token: all of its row, or none where the mask is of blocks."""
        return 0 if masks_by_blocks(self.seq_len, shape.head_dim, on_gpu=self.on_gpu) else self.seq_len


def reduces_once(parameters: int, rank_bytes: int, num_ranks: int) -> bool:
    """Whether a rank has the memory to add up the gradients of the whole model over its micro batches."""
    return num_ranks > 1 and MASTER * parameters <= UNREDUCED_FRACTION * rank_bytes


def step_memory(shape: Architecture, step: Step) -> StepMemory:
    """The peak of the second step or a later one: the first has no moments yet."""
    shard = MASTER * shape.parameters // step.num_ranks
    return StepMemory(
        state=0 if step.offload else shard + _moment_bytes(shape, step),
        gradients=0 if step.offload else shard,
        activations=activation_bytes(shape, step),
        loss=loss_bytes(shape, step),
        accumulates=step.accumulates,
        gathered=_gathered(shape, step),
        teacher=_teacher_bytes(step),
        update=0 if step.offload else _update_bytes(shape, step),
    )


def offloaded_bytes(shape: Architecture, step: Step) -> int:
    """What a rank has in the memory of the node with `offload`: weights, gradients, moments, weights of the teacher."""
    if not step.offload:
        return 0
    own = 2 * MASTER * shape.parameters // step.num_ranks + _moment_bytes(shape, step) + _update_bytes(shape, step)
    if step.teacher is None:
        return own
    return own + WEIGHT_BYTES[step.teacher_dtype] * step.teacher.parameters // step.num_ranks


def _moment_bytes(shape: Architecture, step: Step) -> int:
    """Both moments of AdamW, of a rank."""
    own = shape.parameters // step.num_ranks
    if step.optimizer == "adamw":
        return 2 * MASTER * own
    return 2 * own + 2 * MASTER * own // MOMENT_BLOCK


def _update_bytes(shape: Architecture, step: Step) -> int:
    """What is computed of a piece of the largest matrix where moments are kept as codes."""
    if step.optimizer == "adamw":
        return 0
    widths = [block.intermediate_size for block in shape.blocks if isinstance(block.intermediate_size, int)]
    largest = shape.hidden_size * max(shape.vocab_size, shape.num_attention_heads * shape.head_dim, *widths)
    return UPDATE_BYTES * min(UPDATED_VALUES, largest // step.num_ranks)


def activation_bytes(shape: Architecture, step: Step) -> int:
    """What the forward pass of a micro batch keeps for its backward pass.

    With checkpointing the input of each layer, and all of the one layer that is computed again.
    """
    layers = [_block_bytes(shape, block, step) for block in shape.blocks]
    hidden = MASTER * step.tokens * shape.hidden_size
    outside = 2 * MASTER * step.tokens * shape.head_dim + step.tokens * step.mask_tokens(shape) + 2 * hidden
    if step.teacher is not None:  # pairs of states at the positions that count, and their norms
        outside += 3 * hidden * (len(shape.blocks) if step.matches_states else 1)
        outside += hidden * len(shape.blocks) * step.matches_states  # the states themselves
    if step.checkpointing:
        return outside + hidden * len(layers) + max(layers)
    return outside + sum(layers)


def _block_bytes(shape: Architecture, block: BlockConfig, step: Step) -> int:
    """What one layer keeps, with copies of its weights in bfloat16."""
    hidden, query = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    size = 2 if step.bfloat16 else MASTER
    heads, width = block.num_key_value_heads, block.intermediate_size
    normed = MASTER * hidden  # norms compute in float32

    def inputs(products: int) -> int:
        """Input of several products: autocast makes a copy for each of them."""
        return hidden * (2 * products if step.bfloat16 else MASTER)

    a_token = 0
    if isinstance(heads, int):
        key = heads * shape.head_dim
        a_token += normed + inputs(3) + size * (2 * query + 2 * key) + MASTER * shape.num_attention_heads
        a_token += size * step.mask_tokens(shape)  # the mask of packed rows as numbers
    elif heads == LINEAR:
        a_token += normed + inputs(1)
    if isinstance(width, int):
        a_token += normed + inputs(2) + 4 * size * width
    elif width == LINEAR:
        a_token += normed + inputs(1)
    copies = 2 * block_weights(shape, block) if step.bfloat16 else 0
    return a_token * step.tokens + copies


def loss_bytes(shape: Architecture, step: Step) -> int:
    """The loss of a micro batch: logits of one chunk, and the gradients that are computed with it."""
    chunks = -(-step.tokens // max(1, CHUNK_LOGITS // shape.vocab_size))
    logits = MASTER * shape.vocab_size * -(-step.tokens // chunks)
    # Beside a float32 loss's logits there is nothing; else what logsumexp makes of them, and the teacher's.
    copies = 1 + step.bfloat16 if step.teacher is None else 3
    hidden = step.tokens * shape.hidden_size
    cast = 2 * (hidden + shape.vocab_size * shape.hidden_size) if step.bfloat16 else 0
    return copies * logits + 2 * MASTER * hidden + MASTER * shape.vocab_size * shape.hidden_size + cast


def _gathered(shape: Architecture, step: Step) -> Gathered:
    """What FSDP holds whole."""
    if step.num_ranks == 1 and not step.offload:
        return Gathered()
    root, layer, vocabulary = (MASTER * parameters for parameters in _groups(shape))
    tied = shape.tie_word_embeddings
    if step.accumulates and reduces_once(shape.parameters, step.rank_bytes, step.num_ranks):
        return Gathered(root + MASTER * shape.parameters, 2 * layer, vocabulary, 2 * vocabulary)
    return Gathered(2 * root, 3 * layer + vocabulary * tied, vocabulary, (3 if tied else 2) * vocabulary)


def _groups(shape: Architecture) -> tuple[int, int, int]:
    """Parameters that are gathered together: the root's, and those of the largest layer and embedding of their own."""
    layers = [shape.attention_parameters(block) + shape.ffn_parameters(block) for block in shape.blocks]
    own = [size for size in layers if size >= OWN_GROUP_PARAMETERS]
    embedding = shape.vocab_size * shape.hidden_size
    vocabulary = embedding if embedding >= OWN_GROUP_PARAMETERS else 0
    root = shape.parameters - sum(own) - vocabulary * (1 if shape.tie_word_embeddings else 2)
    return root, max(own, default=0), vocabulary


def _teacher_bytes(step: Step) -> int:
    """The teacher's weights, sharded as the student's are, and its hidden states."""
    if step.teacher is None:
        return 0
    kept = 1 + len(step.teacher.blocks) * step.matches_states
    states = MASTER * step.tokens * step.teacher.hidden_size * kept
    weights = 0 if step.offload else step.teacher.parameters // step.num_ranks
    if step.num_ranks > 1 or step.offload:
        root, layer, vocabulary = _groups(step.teacher)
        weights += root + max(2 * layer + (vocabulary if step.teacher.tie_word_embeddings else 0), vocabulary)
    return WEIGHT_BYTES[step.teacher_dtype] * weights + states
