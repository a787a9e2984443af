"""Which documents of a corpus folder are of which of the user's corpora, and how they are weighted."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

BLEND = "blend.json"
"""In the folder of a corpus that is a blend: the weights, and how many documents of each split are of each corpus."""


def write_parts(corpus: Path, weights: Sequence[float], documents: Mapping[str, Sequence[int]]) -> None:
    """Write the weights, and the documents of each corpus in each split, which follow one another in the files."""
    text = json.dumps({"weights": list(weights), "documents": {key: list(value) for key, value in documents.items()}})
    (corpus / BLEND).write_text(text + "\n", encoding="utf-8")


def corpus_parts(corpus: Path, split: str, num_documents: int) -> tuple[list[float], list[range]]:
    """Weight and documents of each part of a split; one part where the corpus is no blend.

    A part without documents in this split is left out.
    """
    if not (corpus / BLEND).is_file():
        return [1.0], [range(num_documents)]
    blend = json.loads((corpus / BLEND).read_text(encoding="utf-8"))
    weights, parts, start = [], [], 0
    for weight, count in zip(blend["weights"], blend["documents"][split], strict=True):
        if count:
            weights.append(float(weight))
            parts.append(range(start, start + count))
        start += count
    return weights, parts
