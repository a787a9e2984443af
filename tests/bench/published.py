"""What the papers and model cards of Puzzle, FFN Fusion and Llama-Nemotron say of speed and memory, and the models.

Sources: P, arXiv 2411.19146, table 2 (tokens a second for each H100, FP8 weights, activations and cache, TensorRT-LLM,
best tensor-parallel degree); F, arXiv 2503.18908, table 2 (one user, eight devices), section 5.2; L, arXiv 2505.00949,
section 2.1. The layers are those of the released `config.json` files; Nemotron-51B's are not published as a whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from components.core.model.accelerators import Dtype
from components.core.model.architecture import Architecture, BlockConfig

Run = tuple[int, int | None, int | None]
"""Equal layers: how many, KV heads, FFN channels."""


def model(hidden_size: int, heads: int, runs: list[Run]) -> Architecture:
    """A model of the Llama 3 family."""
    blocks = [BlockConfig(num_key_value_heads=kv, intermediate_size=width) for n, kv, width in runs for _ in range(n)]
    return Architecture(
        family="nemotron-nas",
        vocab_size=128_256,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        head_dim=128,
        blocks=tuple(blocks),
    )


LLAMA_70B = model(8192, 64, [(80, 8, 28672)])
LLAMA_405B = model(16384, 128, [(126, 8, 53248)])
SUPER_49B_RUNS: list[Run] = [
    *[(1, 8, 14336), (5, 8, 28672), (2, None, 14336), (3, 8, 28672), (1, None, 17920), (30, 8, 28672)],
    *[(1, None, 7168), (2, None, 14336), (1, None, 7168), (1, None, 28672), (1, None, 7168), (1, None, 14336)],
    *[(3, None, 7168), (1, 8, 28672), (1, None, 7168), (2, None, 5632), (1, None, 7168), (3, None, 5632)],
    *[(2, None, 7168), (2, None, 2816), (2, None, 5632), (2, None, 2816), (1, None, 5632), (2, None, 2816)],
    (9, 8, 28672),
]
SUPER_49B = model(8192, 64, SUPER_49B_RUNS)
FUSED = {399_360: 8, 425_984: 12, 343_040: 15, 301_056: 14}
"""Widths of the fused FFNs of the 253B, and how many FFNs each was."""
ULTRA_253B_RUNS: list[Run] = [
    *[(1, 8, 5376), (1, 8, 10752), (6, 8, 16128), (1, 8, 21504), (3, 8, 21504), (2, 8, 53248), (3, 8, 53248)],
    *[(3, 8, 53248), (1, 8, 26624), (3, 8, 21504), (1, None, 21504), (1, 8, 53248), (1, None, 53248), (4, 8, 53248)],
    *[(4, 8, 53248), (4, 8, 53248), (4, 8, 53248), (1, 8, 53248), (3, 8, 37376), (1, 8, 32000), (3, 8, 26624)],
    *[(2, None, 26624), (1, 8, 26624), (7, None, 26624), (1, 8, 26624), (1, 8, 32000), (1, 8, 53248)],
    *[(1, None, 53248), (1, 8, 53248), *[(1, None, width) for width in FUSED], (1, None, 21504), (1, 8, 21504)],
    *[(1, 8, 26624), (2, 8, 26624), (1, 8, 37376), (4, 8, 53248), (1, 8, 26624)],
]
"""Without the empty layers."""
ULTRA_253B = model(16384, 128, ULTRA_253B_RUNS)
UNFUSED_253B = model(
    16384, 128, [(FUSED.get(w or 0, n), kv, w and w // FUSED.get(w, 1)) for n, kv, w in ULTRA_253B_RUNS]
)
NEMOTRON_51B = model(8192, 64, [(40, 8, 22016), (40, None, 22016)])
"""Assumed: 51.5 billion parameters and half of the parent's KV cache, spread evenly."""


@dataclass(frozen=True)
class Figure:
    """A published number that a deployment can be predicted for.

    Attributes:
        name: of the row.
        model: which.
        value: as published.
        unit: `tok/s a device`, `tok/s` of one user, `tokens` in the cache.
        device: name.
        devices: that share every layer.
        prompt, new: lengths, tokens.
        batch: requests; None where it is not told: as many as fit, `MOST` at most.
        dtype: precision.
    """

    name: str
    model: Architecture
    value: float
    unit: str
    devices: int
    device: str = "H100"
    prompt: int = 1
    new: int = 2
    batch: int | None = None
    dtype: Dtype = "float8"


MOST = 384
"""The largest batch that P tells of."""


SCENARIOS = (
    ("chatbot", 128, 128, 5478, 1, 2645, 1, None),
    ("text generation", 128, 1024, 6472, 1, 2975, 4, 1274),
    ("long text generation", 128, 2048, 4910, 2, 2786, 4, None),
    ("inference-time compute", 128, 4096, 3855, 2, 1828, 4, None),
    ("summarisation", 2048, 128, 653, 1, 339, 4, 301),
    ("stress test", 2048, 2048, 2622, 2, 1336, 4, None),
)
"""P, table 2: lengths, 51B and its devices, 70B and its devices, 70B on one device."""


def figures() -> Iterator[Figure]:
    """All of them."""
    unit = "tok/s a device"
    for name, prompt, new, small, small_devices, large, large_devices, alone in SCENARIOS:
        yield Figure(f"P 51B {name}", NEMOTRON_51B, small, unit, small_devices, "H100", prompt, new)
        yield Figure(f"P 70B {name}", LLAMA_70B, large, unit, large_devices, "H100", prompt, new)
        if alone is not None:
            yield Figure(f"P 70B {name}", LLAMA_70B, alone, unit, 1, "H100", prompt, new)
    for name, shape, value, device in (  # F, table 2
        ("F 405B one user", LLAMA_405B, 41.44, "H100"),
        ("F 253B before fusion, one user", UNFUSED_253B, 63.38, "H100"),
        ("F 253B one user", ULTRA_253B, 70.92, "H100"),
        ("F 70B one user", LLAMA_70B, 94.03, "H100"),
        ("F 253B one user", ULTRA_253B, 90.05, "H200"),
    ):
        yield Figure(name, shape, value, "tok/s", 8, device, 128, 1024, batch=1)
    yield Figure("L 49B cached tokens", SUPER_49B, 300_000, "tokens", 1)
    yield Figure("L 253B cached tokens", ULTRA_253B, 3_000_000, "tokens", 8)
    yield Figure("L 253B cached tokens, bfloat16", ULTRA_253B, 600_000, "tokens", 8, dtype="bfloat16")


SPEEDUPS = (
    *((f"P 51B against 70B, {name}", f"P 51B {name}", f"P 70B {name}") for name, *_ in SCENARIOS),
    ("F 253B before fusion against 405B", "F 253B before fusion, one user", "F 405B one user"),
    ("F 253B against 405B", "F 253B one user", "F 405B one user"),
    ("F fusion of the 253B", "F 253B one user", "F 253B before fusion, one user"),
)
"""Rows of which one is told as so many times faster than the other."""


def super_speedups() -> Iterator[tuple[str, float, Figure, Figure]]:
    """What L says of the 49B against its parent; lengths are not told, text generation's are assumed here."""

    def load(shape: Architecture, devices: int) -> Figure:
        return Figure("", shape, 0.0, "tok/s a device", devices, "H100", 128, 1024)

    small = load(SUPER_49B, 1)
    yield "L 49B against 70B, one device each", 5.0, small, load(LLAMA_70B, 1)
    yield "L 49B on one device against 70B on four", 2.17, small, load(LLAMA_70B, 4)
