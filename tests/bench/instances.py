"""Search problems made up for measurements: tables of layers as `tessera search solve` takes them, and limits."""

from typing import Any

import numpy as np

Table = dict[str, Any]
Limits = dict[str, float]

KV_HEADS = np.array([8, 4, 2, 1, 1, 0])
ATTENTION_PARAMETERS = np.array([1.0, 0.75, 0.625, 0.5625, 0.45, 0.0])
ATTENTION_MS = np.array([1.0, 0.8, 0.7, 0.65, 0.4, 0.0])
ATTENTION_HARM = np.array([0.0, 0.05, 0.12, 0.2, 0.7, 1.0])
FFN_WIDTHS = np.array([1.0, 0.87, 0.75, 0.5, 0.25, 0.2, 0.1, 0.03, 0.0])


def layered(seed: int, num_layers: int, *, tight: bool = False) -> tuple[Table, Limits]:
    """A search as the paper has it: 6 attentions x 9 FFNs a layer; layers differ in how much a change harms."""
    generator = np.random.default_rng(seed)

    def noise(size: int, spread: float) -> np.ndarray:
        return np.exp(spread * generator.normal(size=size))

    layers = []
    for _ in range(num_layers):
        attention = generator.gamma(1.0, 0.05) * ATTENTION_HARM * noise(6, 0.3)
        ffn = generator.gamma(1.5, 0.1) * (1 - FFN_WIDTHS) ** 1.7 * noise(9, 0.3)
        score = (attention[:, None] + ffn).ravel() * noise(54, 0.05)
        parameters = (150 * ATTENTION_PARAMETERS[:, None] + 705 * FFN_WIDTHS).ravel()
        kv = np.repeat(KV_HEADS, 9)
        ms = (0.4 * ATTENTION_MS[:, None] + 0.9 * FFN_WIDTHS).ravel() * noise(54, 0.03)
        layers.append(_layer(score, {"parameters": parameters, "kv": kv, "ms": ms}))
    parent = {name: sum(layer["options"][0]["costs"][name] for layer in layers) for name in ("parameters", "kv", "ms")}
    shares = (0.3, 0.2, 0.28) if tight else (0.6, 0.5, 0.55)
    return {"layers": layers}, {name: share * parent[name] for name, share in zip(parent, shares, strict=True)}


def independent(seed: int, num_layers: int, *, tight: bool = False, num_options: int = 54) -> tuple[Table, Limits]:
    """Scores and costs that know nothing of each other."""
    generator = np.random.default_rng(seed)
    costs = generator.random((num_layers, num_options, 3))
    layers = [
        _layer(generator.random(num_options), dict(zip("abc", costs[layer].T, strict=True)))
        for layer in range(num_layers)
    ]
    least, mean = costs.min(axis=1).sum(axis=0), costs.mean(axis=1).sum(axis=0)
    limits = least + (mean - least) * (0.5 if tight else 0.75)
    return {"layers": layers}, dict(zip("abc", limits.tolist(), strict=True))


def with_scores_times(table: Table, factor: float) -> Table:
    """The same table in another unit of score."""
    return {
        "layers": [
            {"options": [{**option, "score": option["score"] * factor} for option in layer["options"]]}
            for layer in table["layers"]
        ]
    }


def _layer(scores: np.ndarray, costs: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "options": [
            {
                "name": str(index),
                "score": score,
                "costs": {name: float(values[index]) for name, values in costs.items()},
            }
            for index, score in enumerate(scores.tolist())
        ]
    }
