"""vLLM in the calling process: rollouts for reinforcement learning, and measurements of generation speed."""

import gc
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from components.core.base.processes import without_garbage_collection
from components.core.model.accelerators import Dtype
from components.core.model.inspection import stored_dtype
from components.core.runtime.hardware import vllm_uses_gpu
from components.core.serving.serving_config import ServingConfig
from components.core.serving.settings import (
    BATCHED_TOKENS,
    ENVIRONMENT,
    PLUGIN,
    kv_cache_bytes,
    require_servable,
    require_vllm,
)

DEFAULT = ServingConfig()
SHARED_GPU_FRACTION = 0.4
"""Fraction of a GPU's memory for weights and cache of an engine, where the settings give none: training needs the
rest."""
WARM_UP_TOKENS = 4
"""Decode steps of each request before a measurement."""


@dataclass(frozen=True)
class Sample:
    """One generated continuation.

    Attributes:
        token_ids: generated tokens, including the stop token that ended the sample.
        logprobs: log-probability of each token under the distribution that it was sampled from, nats: at the
            temperature and within the nucleus of the request, greedy ones at temperature 1. None if not requested.
        finish_reason: whether a stop token or the limit on tokens ended the sample.
        weight_version: version of the weights that generated it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: Literal["stop", "length"]
    weight_version: int


@dataclass(frozen=True)
class BatchTime:
    """Duration of one batch of requests that are generated together.

    Attributes:
        first_token_ms: time until every request has its first token, milliseconds.
        step_ms: mean time of the decode steps after that, milliseconds.
    """

    first_token_ms: float
    step_ms: float


class Engine:
    """A vLLM engine in this process, for any model folder that vLLM can read.

    On a CPU vLLM fixes the number of threads of the process: `torch.set_num_threads` does nothing after the first
    engine was opened. To close an engine ends `torch.distributed` in this process. A caller that uses
    `torch.distributed` therefore sets it up before it opens the engine, and closes the engine last.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_model_len: int,
        max_num_seqs: int = 256,
        seed: int = 0,
        serving: ServingConfig = DEFAULT,
        random_weights: bool = False,
    ) -> None:
        """Load a model folder.

        Args:
            folder: a Hugging Face model folder, dense or heterogeneous, with or without a tokenizer.
            max_model_len: maximum length of a prompt and its continuation together, tokens.
            max_num_seqs: maximum number of sequences that are generated at the same time.
            seed: seed of the engine; a request may have its own.
            serving: precision and devices; `float8` quantises weights that are stored in bfloat16.
            random_weights: make random weights in memory; the folder then needs no more than a `config.json`. For
                measurements of speed.

        Raises:
            MissingPackage: vLLM is not installed.
            CheckpointError: vLLM cannot run a model of this shape.
        """
        require_vllm()
        require_servable(folder)
        self.dtype: Dtype = serving.dtype or stored_dtype(folder)
        """Precision of weights, computation and KV cache."""
        self.weight_version = 0
        os.environ.update(ENVIRONMENT, VLLM_LOGGING_LEVEL="ERROR")

        with without_garbage_collection():
            from vllm import LLM

        gc.collect()
        gc.freeze()  # else vLLM's own collections, five of them, walk through all there is; closing undoes it
        self._llm = LLM(
            str(folder),
            load_format="dummy" if random_weights else "auto",
            skip_tokenizer_init=True,
            generation_config="vllm",  # sampling settings come from requests alone
            logprobs_mode="processed_logprobs",  # the learner of RL compares them with its own at that temperature
            **_precision(self.dtype),
            seed=seed,
            tensor_parallel_size=serving.tensor_parallel,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(BATCHED_TOKENS, max_model_len),
            weight_transfer_config={"backend": PLUGIN},
            use_tqdm_on_load=False,
            **_memory(folder, self.dtype, max_model_len, max_num_seqs, serving.gpu_memory_fraction),
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
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Continue each prompt `n` times.

        Args:
            prompts: token ids.
            n: samples per prompt.
            temperature: 0 is greedy.
            top_p: nucleus of the distribution to sample from.
            max_tokens: maximum number of new tokens per sample.
            seeds: one per prompt; sample i uses seed + i. Equal seed, prompt and weights give equal samples.
            stop_token_ids: tokens that end a sample, in addition to the model's own end of text.
            logprobs: whether to return the log-probabilities of the sampled tokens.

        Yields:
            Number of a prompt and its `n` samples, as soon as all of them are complete: the caller works on them
            while the others are generated.
        """
        options = {
            "n": n,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "stop_token_ids": list(stop_token_ids),
            "logprobs": 0 if logprobs else None,  # 0: the sampled token alone
        }
        each = [options] * len(prompts) if seeds is None else [{**options, "seed": seed} for seed in seeds]
        for number, result in self._run(prompts, each):
            yield number, [self._sample(completion) for completion in result.outputs]

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights by those of a model of the same architecture, in memory.

        Args:
            weights: tensors under their Hugging Face names, as `named_parameters` returns them.
            version: `weight_version` of the samples generated from now on.
        """
        with torch.no_grad():
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": {"tensors": weights}})
            self._llm.finish_weight_update(str(version))
            self._llm.reset_prefix_cache()  # vLLM keeps the keys and values of the old weights
        self.weight_version = version

    def batch_time(self, batch: int, prompt_tokens: int, new_tokens: int) -> BatchTime:
        """Measure generation, after a few warm-up steps that fill the processor's caches.

        Args:
            batch: sequences generated at the same time.
            prompt_tokens: length of each prompt; all prompts differ, so that the prefix cache is of no use.
            new_tokens: tokens generated per sequence, at least 2; an end of text is ignored.
        """
        generator = torch.Generator().manual_seed(0)
        self._moments(batch, prompt_tokens, min(new_tokens, WARM_UP_TOKENS), generator)
        moments = self._moments(batch, prompt_tokens, new_tokens, generator)
        first = moments[-new_tokens]  # each of the last steps yields one token; the steps before are prefill
        total_ms, first_ms = (1000 * (moment - moments[0]) for moment in (moments[-1], first))
        return BatchTime(first_ms, (total_ms - first_ms) / (new_tokens - 1))

    def _moments(self, batch: int, prompt_tokens: int, new_tokens: int, generator: torch.Generator) -> list[float]:
        """Clock readings at the start of generation and at the end of each step, seconds."""
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
        with _eager():
            moments = [time.perf_counter()]
            for number, prompt in enumerate(prompts):
                self._llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
            while self._llm.llm_engine.has_unfinished_requests():
                self._llm.llm_engine.step()
                moments.append(time.perf_counter())
        return moments

    def close(self) -> None:
        """Free the model and its cache, and end `torch.distributed` in this process."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, prompts: Sequence[Sequence[int]], options: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Any]]:
        """Number of each prompt and VLLM's result, in the order in which they end."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, running = self._llm.llm_engine, {str(number) for number in range(len(prompts))}
        for number, (prompt, option) in enumerate(zip(prompts, options, strict=True)):
            params = SamplingParams(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **option)
            engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, params)
        try:
            while running:
                with _eager():
                    results = engine.step()
                for result in results:
                    running.remove(result.request_id)
                    yield int(result.request_id), result
        finally:
            if running:  # the caller has ended before the engine: its next requests have the same numbers
                engine.abort_request(list(running))

    def _sample(self, completion: Any) -> Sample:
        """Convert one of vLLM's completions."""
        ids, logprobs = tuple(completion.token_ids), None
        if completion.logprobs is not None:
            logprobs = tuple(step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True))
        return Sample(ids, logprobs, completion.finish_reason, self.weight_version)


def _precision(dtype: str) -> dict[str, Any]:
    """VLLM's arguments for a precision."""
    if dtype == "float8":
        return {"dtype": "bfloat16", "quantization": "fp8", "kv_cache_dtype": "fp8"}
    return {"dtype": dtype}


def _memory(folder: Path, dtype: str, max_model_len: int, max_num_seqs: int, fraction: float | None) -> dict[str, Any]:
    """VLLM's arguments that differ between CPU and GPU."""
    if vllm_uses_gpu():
        return {"gpu_memory_utilization": fraction or SHARED_GPU_FRACTION}
    cache = kv_cache_bytes(folder, dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    return {"enforce_eager": True, "kv_cache_memory_bytes": cache}


def _eager() -> AbstractContextManager[Any]:
    """On a CPU, run vLLM's small kernels without compiling them: the first log-probabilities would wait 15 s."""
    return nullcontext() if vllm_uses_gpu() else torch.compiler.set_stance("force_eager")
