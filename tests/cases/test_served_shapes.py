"""Shapes that vLLM cannot run are refused before any work, where a stage needs vLLM."""

import json
from pathlib import Path

import pytest

from components.core.serving.settings import CPU_HEAD_SIZES
from pipelines.recipe.checks import find_faults
from pipelines.recipe.schema import Recipe
from tests.components.core import tiny_models

NOTHING = dict.fromkeys(("search", "distill", "pretrain", "sft", "rl", "eval", "deploy"))
KERNELS = "its heads have size 24, and vLLM has kernels for 32, 48, 64"


def faults(parent: Path, **stages: object) -> list[str]:
    values = {"name": "own", "parent": str(parent), **NOTHING, **stages}
    return [fault.message for fault in find_faults(Recipe.parse(values))]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent with heads of size 24."""
    return tiny_models.write(tiny_models.llama(0, head_dim=24), tmp_path_factory.mktemp("models") / "parent")


@pytest.mark.parametrize(
    ("stages", "named"),
    [
        ({"eval": {}}, "eval"),
        ({"search": {}, "eval": {}}, "search/costs, eval"),
        ({"search": {"measurement": {"device": "H100"}, "fusion": {"timing": "vllm"}}}, "search"),
        ({"search": {"measurement": {"device": "H100"}}}, None),
        ({"eval": {"placement": {"gpus": 1}}}, None),
        ({"pretrain": {}}, None),
    ],
)
def test_a_head_size_without_a_kernel(parent: Path, stages: dict[str, object], named: str | None) -> None:
    found = [message for message in faults(parent, **stages) if "vLLM" in message]
    assert found == [] if named is None else found[0].startswith(f"vLLM cannot run the parent in {named} on a CPU")
    assert named is None or KERNELS in found[0]


def test_a_hidden_size_that_heads_do_not_divide(parent: Path, tmp_path: Path) -> None:
    config = json.loads((parent / "config.json").read_text()) | {"hidden_size": 66}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = "vLLM cannot run the parent in eval: hidden_size=66 is no multiple of num_attention_heads=4"
    assert expected in faults(tmp_path, eval={})


def test_a_new_parent_is_checked_too() -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    values = {"name": "new", **NOTHING, "parent_pretrain": {"shape": shape}, "eval": {}}
    found = [fault.message for fault in find_faults(Recipe.parse(values))]
    assert [message for message in found if "its heads have size 16" in message] != []


def test_the_sizes_are_those_of_the_kernel() -> None:
    """A size is right where vLLM can plan the attention of one sequence with it."""
    pytest.importorskip("vllm")
    import torch
    from vllm import _custom_ops

    ends, lengths = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)

    def has_kernel(size: int) -> bool:
        instructions = "vec" if size % 32 == 0 or size % 16 else "vec16"
        try:
            _custom_ops.cpu_attn_get_scheduler_metadata(
                1, 2, 2, size, lengths, torch.float32, ends, True, -1, instructions, False
            )
        except RuntimeError:
            return False
        return True

    assert tuple(filter(has_kernel, range(8, 1025, 8))) == CPU_HEAD_SIZES
