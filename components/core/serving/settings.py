"""Settings that engines and servers share: environment variables, memory for the KV cache. Imports no torch."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

from components.core.base.errors import CheckpointError, MissingPackage
from components.core.model.architecture import KV_BYTES_PER_VALUE, WEIGHT_BYTES, Architecture
from components.core.model.inspection import read_architecture, read_config
from components.core.runtime.hardware import vllm_uses_gpu

PLUGIN = "tessera"
"""Name of our vLLM plug-in, of its reasoning parser and of its weight-transfer backend."""

ENVIRONMENT = {
    "VLLM_PLUGINS": PLUGIN,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Our plug-in alone (others that are installed can take half a minute to import), no worker process, no network."""

OWNER_VARIABLE = "TESSERA_VLLM_OWNER"
"""Environment variable with the id of the process that a vLLM server ends with."""

TORCHRUN_VARIABLE = re.compile(
    "((TORCHELASTIC|PET)_.*|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT))$"
)
"""Environment variables that torchrun, or a pod of a `TrainJob`, gives to a rank."""

BATCHED_TOKENS = 8192
"""Most tokens that the engine processes in one step. A prompt is processed whole: on a CPU vLLM cannot sample with a
seed of the request from a prompt that was split ("CPU Generator does not use offset")."""

CPU_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's attention for the CPU is compiled for."""

SMALL_CACHE_BYTES, LARGE_CACHE_BYTES = 64 << 20, 512 << 20


def require_vllm() -> None:
    """Raise MissingPackage unless vLLM is installed."""
    if find_spec("vllm") is None:
        raise MissingPackage(
            "this needs vLLM, which is not installed",
            hint="`make install`, or `pip install 'tessera[serve]'` (`tessera[serve-gpu]` with an NVIDIA GPU)",
        )


def require_servable(folder: Path) -> None:
    """Raise CheckpointError for a model of a shape that the installed vLLM cannot run."""
    shape = read_architecture(folder)
    if not any(block.attends for block in shape.blocks):
        raise CheckpointError(
            f"no layer of {folder.name} has attention, and vLLM cannot run such a model",
            hint="keep it in one layer: search.layers={0: {no_op_attention: false, linear_attention: false}}",
        )
    refuse_head_sizes(shape, folder.name, on_gpu=vllm_uses_gpu())


def refuse_head_sizes(shape: Architecture, name: str, *, on_gpu: bool) -> None:
    """Refuse heads that vLLM has no kernel for, or that transformers does not accept.

    Args:
        shape: the model.
        name: what the user calls it.
        on_gpu: whether vLLM would run on a GPU, whose kernels take any size that is a multiple of 8.

    Raises:
        CheckpointError: with the sizes.
    """
    hidden, heads, size = shape.hidden_size, shape.num_attention_heads, shape.head_dim
    if shape.family == "llama" and hidden % heads:
        raise CheckpointError(
            f"vLLM cannot run {name}: hidden_size={hidden} is no multiple of num_attention_heads={heads}",
            hint="start from another model, or leave out the stages that serve or measure it",
        )
    if not on_gpu and size not in CPU_HEAD_SIZES:
        raise CheckpointError(
            f"vLLM cannot run {name} on a CPU: its heads have size {size}, and vLLM has kernels for "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}",
            hint="start from a model with heads of one of these sizes, or serve and measure it on a GPU",
        )


def process_environment(threads: int, tensor_parallel: int = 1) -> dict[str, str]:
    """Environment variables for a vLLM process on `threads` CPU threads and `tensor_parallel` devices.

    On a CPU compiling takes longer than it saves: the first log-probabilities would wait 15 s.
    """
    compiler = {} if vllm_uses_gpu() else {"TORCH_COMPILE_DISABLE": "1"}
    # Else vLLM wants a memory node for each of several devices on a CPU.
    bind = {} if tensor_parallel == 1 else {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**bind, **inherited_environment(), **ENVIRONMENT, "OMP_NUM_THREADS": str(threads), **compiler}


def inherited_environment() -> dict[str, str]:
    """The environment variables of this process without torchrun's.

    A program that a rank starts is no rank: vLLM's own process group would wait for the store of our ranks.
    """
    return {name: value for name, value in os.environ.items() if not TORCHRUN_VARIABLE.match(name)}


def kv_cache_bytes(folder: Path, *, dtype: str, max_model_len: int | None, max_num_seqs: int) -> int:
    """Memory for the KV cache on a CPU, where vLLM would otherwise take most of the machine's memory.

    Enough for `max_num_seqs` sequences of full length between 64 and 512 MiB, and always enough for two.
    """
    per_token = read_architecture(folder).kv_bytes_per_token * WEIGHT_BYTES[dtype] // KV_BYTES_PER_VALUE
    sequence = (max_model_len or read_config(folder)["max_position_embeddings"]) * per_token
    return max(2 * sequence, SMALL_CACHE_BYTES, min(max_num_seqs * sequence, LARGE_CACHE_BYTES))
