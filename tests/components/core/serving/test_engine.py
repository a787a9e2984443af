import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm")

from components.core.base.errors import CheckpointError, MissingPackage
from components.core.model.checkpoint import save_model
from components.core.serving.engine import Engine, Sample
from tests.components.core import tiny_models
from tests.components.core.tiny_models import EOS

PROMPTS = [[5, 6, 7, 8], [9, 3, 2], [40, *range(10, 60), *range(60)]]
"""The last is long enough for vLLM's prefix cache."""
NEW_TOKENS = 20
LOGPROB_TOLERANCE = 1e-4


class Case(NamedTuple):
    """An open engine, the model in its folder and another of the same architecture."""

    engine: Engine
    model: nn.Module
    other: nn.Module


LINEAR: tiny_models.Shapes = [("linear", 40), (2, "linear"), (None, 100), ("linear", "linear"), (4, 17)]
"""Linear replacements of attention and FFN, and a first layer without attention."""


HEADS = ("tied, stored twice", "tied, other head")
"""Llamas whose configuration says that they are tied, and which store a head: an equal one, and one of their own."""


WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}
"""Has a matrix of 192 x 128, which the kernels pack differently for one thread and for two."""


@pytest.fixture(scope="module", params=["llama", "heterogeneous", "tied", "linear", "gaps", *HEADS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """One engine after the other in this process: each is closed before the next is opened."""
    folder = tmp_path_factory.mktemp("engine") / request.param
    model, other = models(request.param, folder)
    torch.set_num_threads(1)
    with Engine(folder, max_model_len=256, max_num_seqs=16) as engine:
        yield Case(engine, model, other)


def models(kind: str, folder: Path) -> tuple[nn.Module, nn.Module]:
    """Two models of a kind, the first of which is written to `folder`."""
    if kind in ("llama", "wide"):
        changes = {} if kind == "llama" else WIDE
        llama = tiny_models.llama(0, **changes)
        llama.save_pretrained(folder)
        return llama, tiny_models.llama(1, **changes)
    if kind in HEADS:
        return tied_llama(0, kind, folder), tied_llama(1, kind, folder / "other")
    shapes = LINEAR if kind == "linear" else tiny_models.DIFFERENT
    numbers = [2 * place + 1 for place in range(len(shapes))] if kind == "gaps" else None
    tied = {"tie_word_embeddings": kind == "tied", "qkv_bias": kind == "tied"}
    model = tiny_models.heterogeneous(0, shapes, **tied)
    save_model(model, folder, tokenizer=None, by_block=kind == "gaps", numbers=numbers)
    return model, tiny_models.heterogeneous(1, shapes, **tied)


def tied_llama(seed: int, kind: str, folder: Path) -> nn.Module:
    """A Llama as transformers reads its folder, which stores its head."""
    tiny_models.llama(seed, tie_word_embeddings=True).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    head = embedding.flip(0).contiguous() if kind == "tied, other head" else embedding.clone()
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model


def in_order(finished: Iterable[tuple[int, list[Sample]]]) -> list[list[Sample]]:
    return [samples for _, samples in sorted(finished)]


def greedy(engine: Engine) -> list[Sample]:
    samples = in_order(engine.generate(PROMPTS, temperature=0.0, max_tokens=NEW_TOKENS, logprobs=True))
    return [sample for (sample,) in samples]


def check(model: nn.Module, samples: list[Sample]) -> None:
    """The tokens and log-probabilities are those of `model`."""
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        ids = [*prompt, *sample.token_ids]
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        best = logprobs_TV.max(-1)
        assert sample.token_ids == tuple(best.indices.tolist())
        assert sample.logprobs == pytest.approx(best.values.tolist(), abs=LOGPROB_TOLERANCE)
        ended = sample.token_ids[-1] == EOS
        assert sample.finish_reason == ("stop" if ended else "length")
        assert ended or len(sample.token_ids) == NEW_TOKENS


def test_greedy_tokens_and_logprobs_are_those_of_torch(case: Case) -> None:
    check(case.model, greedy(case.engine))


def test_new_weights_give_the_samples_of_the_new_model_and_old_weights_the_old_ones(case: Case) -> None:
    before = greedy(case.engine)
    case.engine.update_weights(case.other.named_parameters(), version=1)
    after = greedy(case.engine)
    check(case.other, after)
    assert {sample.weight_version for sample in after} == {1}
    case.engine.update_weights(case.model.named_parameters(), version=2)
    again = greedy(case.engine)
    assert [(sample.token_ids, sample.logprobs) for sample in again] == [
        (sample.token_ids, sample.logprobs) for sample in before
    ]


def test_short_answers_come_while_long_ones_are_generated_and_the_rest_can_be_left(case: Case) -> None:
    numbers = [number for number, _ in case.engine.generate(PROMPTS, temperature=0.0, max_tokens=NEW_TOKENS)]
    assert sorted(numbers) == list(range(len(PROMPTS)))
    for _ in range(2):  # the requests that are left do not come back with the next ones
        assert len(next(case.engine.generate(PROMPTS, temperature=0.0, max_tokens=NEW_TOKENS))[1]) == 1


def test_a_seed_gives_the_same_samples_in_any_batch(case: Case) -> None:
    def sample(prompts: list[list[int]], seeds: list[int]) -> list[list[tuple[int, ...]]]:
        found = in_order(case.engine.generate(prompts, n=3, temperature=1.0, max_tokens=6, seeds=seeds))
        return [[one.token_ids for one in samples] for samples in found]

    first, second = sample(PROMPTS[:2], [7, 8])
    assert sample([PROMPTS[1]], [8]) == [second]
    assert sample([PROMPTS[0]], [7]) == [first]
    assert len(set(first)) == 3
    assert sample([PROMPTS[0]], [70]) != [first]


def test_a_stop_token_ends_a_sample_and_is_part_of_it(case: Case) -> None:
    ((_, (whole,)),) = case.engine.generate([PROMPTS[0]], temperature=0.0, max_tokens=NEW_TOKENS)
    stop = whole.token_ids[2]
    request = case.engine.generate([PROMPTS[0]], temperature=0.0, max_tokens=NEW_TOKENS, stop_token_ids=[stop])
    ((_, (cut,)),) = request
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
    assert cut.finish_reason == "stop"
    assert cut.logprobs is None


def test_generation_is_timed(case: Case) -> None:
    time = case.engine.batch_time(batch=4, prompt_tokens=8, new_tokens=8)
    assert time.first_token_ms > 0
    assert time.step_ms > 0


TWO_THREADS = """
import sys
from pathlib import Path
import torch
from components.core.serving.engine import Engine
from tests.components.core.serving.test_engine import check, greedy, models

assert torch.get_num_threads() == 2
model, other = models("wide", Path(sys.argv[1]))
with Engine(Path(sys.argv[1]), max_model_len=256, max_num_seqs=16) as engine:
    check(model, greedy(engine))
    engine.update_weights(other.named_parameters(), version=1)
    check(other, greedy(engine))
"""


def test_new_weights_are_packed_for_the_threads_of_the_process(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", TWO_THREADS, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


BFLOAT16 = """
import sys
from pathlib import Path
import torch
from components.core.model.checkpoint import save_model
from components.core.serving.engine import Engine
from tests.components.core import tiny_models
from tests.components.core.serving.test_engine import PROMPTS, greedy

folder = Path(sys.argv[1])
save_model(tiny_models.heterogeneous(0, tiny_models.DIFFERENT), folder, tokenizer=None, dtype=torch.bfloat16)
masters = tiny_models.heterogeneous(1, tiny_models.DIFFERENT)
with Engine(folder, max_model_len=256, max_num_seqs=16) as engine:
    assert engine.dtype == "bfloat16", engine.dtype
    engine.update_weights(masters.named_parameters(), version=1)
    samples = greedy(engine)
for prompt, sample in zip(PROMPTS, samples, strict=True):
    ids = torch.tensor([[*prompt, *sample.token_ids]])
    with torch.no_grad():
        logprobs_TV = masters(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected_T = logprobs_TV.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(sample.logprobs), expected_T, atol=0.2, rtol=0.1)
"""


def test_an_engine_has_the_precision_of_its_folder_and_takes_float32_weights_of_a_learner(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", BFLOAT16, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_model_without_attention_is_refused_with_the_way_to_keep_some(tmp_path: Path) -> None:
    save_model(tiny_models.heterogeneous(0, [("linear", 8), (None, "linear")]), tmp_path / "model", tokenizer=None)
    with pytest.raises(CheckpointError, match=r"no layer of model has attention.*\n.*search\.layers"):
        Engine(tmp_path / "model", max_model_len=8)


def test_without_vllm_the_way_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("components.core.serving.settings.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="make install"):
        Engine(tmp_path, max_model_len=8)
