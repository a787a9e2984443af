"""vLLM inside the process of its caller: rollouts of Reinforcement Learning, and measured generation speed."""

import gc
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch._dynamo
from torch import Tensor

from components.core.serving.settings import (
    BATCHED_TOKENS,
    ENVIRONMENT,
    PLUGIN,
    kv_cache_bytes,
    require_attention,
    require_vllm,
    vllm_uses_gpu,
)

WARM_UP_TOKENS = 4
"""Decode steps of each request before a measurement."""


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


@dataclass(frozen=True)
class BatchTime:
    """How long a batch of requests took, all of them answered together.

    Attributes:
        first_token_ms: from the prompts to the first token of every request, milliseconds.
        step_ms: mean of the decode steps that followed, milliseconds.
    """

    first_token_ms: float
    step_ms: float


class Engine:
    """A vLLM engine in this process, for any model folder that vLLM can read.

    One engine at a time: close it before opening the next. A caller that uses `torch.distributed` sets it up first
    (vLLM would otherwise set it up for itself alone) and closes the engine last. Each rank then has its own engine.
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
        gpu_memory_utilization: float = 0.4,
        tensor_parallel: int = 1,
    ) -> None:
        """Load a model folder.

        Args:
            folder: a Hugging Face folder, dense or heterogeneous; a tokenizer is not needed.
            max_model_len: most tokens of a prompt and its continuation together.
            max_num_seqs: most sequences generated at the same time.
            seed: seed of the engine; requests may have their own.
            dtype: of weights, computation and KV cache; `float8` quantises what is stored in bfloat16.
            threads: CPU threads while the engine works; the caller's own number is restored afterwards.
            gpu_memory_utilization: share of a GPU's memory for weights and cache; the caller's training needs the rest.
            tensor_parallel: devices that share every layer.

        Raises:
            MissingPackage: vLLM is not installed.
            CheckpointError: no layer has attention.
        """
        require_vllm()
        require_attention(folder)
        self.weight_version = 0
        self._threads = threads
        with _starting(threads):
            from vllm import LLM

            self._llm = LLM(
                str(folder),
                skip_tokenizer_init=True,
                generation_config="vllm",  # the caller's sampling settings alone
                **_precision(dtype),
                seed=seed,
                tensor_parallel_size=tensor_parallel,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                enable_chunked_prefill=False,
                max_num_batched_tokens=max(BATCHED_TOKENS, max_model_len),
                weight_transfer_config={"backend": PLUGIN},
                use_tqdm_on_load=False,
                **_memory(folder, dtype, max_model_len, max_num_seqs, gpu_memory_utilization),
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
            seeds: one a prompt; sample i of a prompt uses seed + i. Equal seed, prompt and weights give equal samples.
            stop_token_ids: tokens that end a sample, beside the model's own end of text.
            logprobs: whether to return the log-probabilities of the sampled tokens.

        Returns:
            For each prompt its `n` samples.
        """
        options = {
            "n": n,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "stop_token_ids": list(stop_token_ids),
            "logprobs": 0 if logprobs else None,  # 0 beside the sampled token's own
        }
        each = [options] * len(prompts) if seeds is None else [{**options, "seed": seed} for seed in seeds]
        return [[self._sample(completion) for completion in result.outputs] for result in self._run(prompts, each)]

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over all weights of a model of the same architecture, in memory.

        Args:
            weights: tensors under their Hugging Face names, as `named_parameters` gives them.
            version: what the samples made with them will carry.
        """
        with self._working(), torch.no_grad():
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": {"tensors": weights}})
            self._llm.finish_weight_update(str(version))
            # else what the old weights computed for a prompt's prefix would be used again
            self._llm.reset_prefix_cache()
        self.weight_version = version

    def batch_time(self, batch: int, prompt_tokens: int, new_tokens: int) -> BatchTime:
        """Time generation, after a few steps to warm up: what ran before has used the caches.

        Args:
            batch: sequences generated at the same time.
            prompt_tokens: length of each prompt; all prompts differ, so that none profits from another's cache.
            new_tokens: tokens generated a sequence, whatever they are; at least 2.
        """
        generator = torch.Generator().manual_seed(0)
        self._moments(batch, prompt_tokens, min(new_tokens, WARM_UP_TOKENS), generator)
        moments = self._moments(batch, prompt_tokens, new_tokens, generator)
        first = moments[-new_tokens]  # the last steps give one token each: what comes before is prefill
        whole_ms, first_ms = (1000 * (moment - moments[0]) for moment in (moments[-1], first))
        return BatchTime(first_ms, (whole_ms - first_ms) / (new_tokens - 1))

    def _moments(self, batch: int, prompt_tokens: int, new_tokens: int, generator: torch.Generator) -> list[float]:
        """When generation began and when each of its steps ended, by the clock, s."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        vocab_size = self._llm.model_config.get_vocab_size()
        prompts = torch.randint(vocab_size, (batch, prompt_tokens), generator=generator).tolist()
        with self._working():
            moments = [time.perf_counter()]
            for number, prompt in enumerate(prompts):
                self._llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
            while self._llm.llm_engine.has_unfinished_requests():
                self._llm.llm_engine.step()
                moments.append(time.perf_counter())
        return moments

    def close(self) -> None:
        """Free the model and its cache; another engine may be opened afterwards.

        With it vLLM ends `torch.distributed` in this process, also where the caller had set it up.
        """
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, prompts: Sequence[Sequence[int]], options: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Generate; results as vLLM gives them, in the order of the prompts."""
        from vllm import SamplingParams

        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        params = [SamplingParams(detokenize=False, **option) for option in options]
        with self._working():
            results: list[Any] = self._llm.generate(requests, params, use_tqdm=False)
        return results

    def _sample(self, completion: Any) -> Sample:
        """Take over one of vLLM's completions."""
        ids, logprobs = tuple(completion.token_ids), None
        if completion.logprobs is not None:
            logprobs = tuple(step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True))
        return Sample(ids, logprobs, completion.finish_reason, self.weight_version)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Compute with the engine's threads, then with as many as before."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with _uncompiled():
                yield
        finally:
            torch.set_num_threads(before)


def _precision(dtype: str) -> dict[str, Any]:
    """Settings of vLLM for a served precision."""
    if dtype == "float8":
        return {"dtype": "bfloat16", "quantization": "fp8", "kv_cache_dtype": "fp8"}
    return {"dtype": dtype}


def _memory(folder: Path, dtype: str, max_model_len: int, max_num_seqs: int, share: float) -> dict[str, Any]:
    """Settings of vLLM that differ between CPU and GPU."""
    if vllm_uses_gpu():
        return {"gpu_memory_utilization": share}
    cache = kv_cache_bytes(folder, dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    return {"enforce_eager": True, "kv_cache_memory_bytes": cache}


@contextmanager
def _starting(threads: int) -> Iterator[None]:
    """Let vLLM start as it must inside another program, and undo what it does to that program's torch.

    Weights are packed for the kernels by as many threads as new ones will be later: the packing depends on that number,
    and kernels that were made for the first one read any other wrongly.
    """
    set_num_threads, before = torch.set_num_threads, torch.get_num_threads()
    torch.set_num_threads(threads)
    os.environ.update(ENVIRONMENT, VLLM_LOGGING_LEVEL="ERROR")
    collecting = gc.isenabled()
    gc.disable()  # collections while importing find nothing, and take a fifth of the time
    try:
        with warnings.catch_warnings(action="ignore"), _uncompiled():
            yield
    finally:
        if collecting:
            gc.enable()
        torch.set_num_threads = set_num_threads  # on a CPU vLLM replaces it by a function that does nothing
        torch.set_num_threads(before)


def _uncompiled() -> AbstractContextManager[None]:
    """Leave vLLM's small kernels uncompiled on a CPU: the first log-probabilities would wait 15 s for a compiler."""
    patch: AbstractContextManager[None] = torch._dynamo.config.patch(disable=True)
    return nullcontext() if vllm_uses_gpu() else patch
