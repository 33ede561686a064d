"""Generates with vLLM inside the training process: the CPU build on a CPU, the CUDA build on a GPU.

Weights are streamed in under Hugging Face names. Log-probs are those of the sampling distribution (temperature
included). Every response is a separate request with its own seed; prefix caching prefills a shared prompt once.
Deliberately omitted: a server process, quantization, speculative decoding.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rl.config import Config
from megatron_g2rl.config.world import longest_generation
from megatron_g2rl.records import Response, ResponseGroup
from megatron_g2rl.rollout.endings import Endings
from megatron_g2rl.rollout.engine import GroupAssembly, RolloutRequest, Sampling
from megatron_g2rl.rollout.process_state import preserve_process_state
from megatron_g2rl.rollout.shared_memory import remove_leftovers, remove_unused
from megatron_g2rl.rollout.tokenizer import end_token_ids, load_tokenizer
from megatron_g2rl.rollout.vllm_compat import (
    head_in_float32,
    import_vllm,
    run_requests,
    set_vllm_rank_env,
    shut_down,
    start,
    translate_vllm_errors,
)

if TYPE_CHECKING:
    from vllm import CompletionOutput, SamplingParams

WEIGHTS, CACHE = "weights", "kv_cache"
"""vLLM's tags for the two kinds of memory that a sleeping engine has released."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PREFILL_TOKENS = 4096
"""Minimum number of prompt tokens per prefill pass on a CPU."""


def from_config(config: Config, model_path: str, device: torch.device, endings: Endings) -> VllmEngine:
    """The engine of `rollout.engine=vllm`; arguments as of `rollout.make_engine`."""
    rollout = config.rollout
    return VllmEngine(
        model_path,
        dtype=torch.bfloat16 if config.policy.precision == "bf16" else torch.float32,
        tensor_parallel=rollout.tensor_parallel,
        max_model_tokens=longest_generation(config),
        kv_cache_mb=rollout.kv_cache_mb,
        gpu_memory_fraction=rollout.gpu_memory_fraction,
        enforce_eager=rollout.enforce_eager,
        seed=config.run.seed,
        top_logprobs=config.exploration.top_logprobs,
        endings=endings,
    )


class VllmEngine:
    """A `RolloutEngine` over an in-process `vllm.LLM`; one instance on every rank."""

    def __init__(
        self,
        model_path: str,
        *,
        dtype: torch.dtype,
        tensor_parallel: int,
        max_model_tokens: int,
        kv_cache_mb: int,
        gpu_memory_fraction: float,
        enforce_eager: bool,
        seed: int,
        top_logprobs: int = 0,
        endings: Endings | None = None,
    ) -> None:
        """Start vLLM with dummy weights; call `load_weights` before the first `generate`.

        The policy has already read the weights; reading them again on every node would take as long again.

        With several ranks, torch.distributed must be initialized; `tensor_parallel` consecutive ranks form one engine
        and make every call with the same arguments.

        Args:
            model_path: Hugging Face checkpoint, folder or hub name, or a Megatron folder.
            dtype: dtype of weights and cache.
            tensor_parallel: ranks that share one engine.
            max_model_tokens: longest prompt plus response, in tokens.
            kv_cache_mb: size of the KV cache in MiB (CPU).
            gpu_memory_fraction: fraction of GPU memory used while awake (CUDA).
            enforce_eager: disable CUDA graphs and compilation.
            seed: seed of vLLM's own generators; each response has its own seed.
            top_logprobs: upper bound of `Sampling.top_logprobs`.
            endings: what ends a response; None: the end-of-sequence tokens of the checkpoint.

        Raises:
            RolloutError: vLLM is not installed, or refuses the settings; the message names the key to change.
        """
        self._max_model_tokens = max_model_tokens
        self._tokenizer = load_tokenizer(model_path)
        self._endings = endings or Endings(end_token_ids(model_path, self._tokenizer))
        self._owns_process_group = not dist.is_initialized()
        ranks = 1 if self._owns_process_group else dist.get_world_size()
        with preserve_process_state():
            on_cpu = import_vllm()
            self._on_gpu = not on_cpu
            memory: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_fraction, "enable_sleep_mode": True}
            if on_cpu:
                memory = {
                    "kv_cache_memory_bytes": kv_cache_mb << 20,
                    # chunked prefill would rewind the response's generator, which CPU generators do not support
                    "enable_chunked_prefill": False,
                    "max_num_batched_tokens": max(PREFILL_TOKENS, max_model_tokens),
                }
            elif tensor_parallel > 1 and torch.cuda.device_count() == 1:
                # Ranks that see only one device each cannot test peer access to the others.
                memory["disable_custom_all_reduce"] = True
            if ranks > 1:
                set_vllm_rank_env(tensor_parallel)
            self._shares_memory = on_cpu and tensor_parallel > 1
            if self._shares_memory:
                remove_leftovers()
                dist.barrier()  # a slow rank must not remove a fast rank's new file as a leftover
            with translate_vllm_errors(max_model_tokens, kv_cache_mb, on_cpu):
                self._llm = start(
                    model=model_path,
                    dtype=dtype,
                    load_format="dummy",
                    tensor_parallel_size=tensor_parallel,
                    distributed_executor_backend="uni" if ranks == 1 else "external_launcher",
                    max_model_len=max_model_tokens,
                    enforce_eager=enforce_eager,
                    seed=seed,
                    max_logprobs=top_logprobs,
                    **head_in_float32(dtype),
                    **memory,
                )
        self._loaded = False
        self._asleep: set[str] = set()
        """Tags released by `sleep`, which `wake` or `load_weights` must restore."""
        self._tied = bool(self._llm.llm_engine.model_config.hf_text_config.tie_word_embeddings)
        self._expected = _checkpoint_names(model_path, self._tied)

    def generate(self, request: RolloutRequest) -> list[ResponseGroup]:
        """Generate `sampling.group_size` responses to each prompt, in the order of `prompts`; see `RolloutEngine`.

        Groups are passed to `on_group` as they finish. Responses in `finished` are not generated again; the others then
        run in smaller batches, which changes their log-probs by floating-point noise (docs/internals/rollout.md).

        Raises:
            RolloutStopped: `stop` returned True.
            ValueError: a prompt leaves no room for `max_response_tokens`.
            RuntimeError: no weights were loaded, or none since the last sleep.
        """
        if not self._loaded or self._asleep:
            raise RuntimeError("vLLM has no weights: call load_weights first, also after each sleep")
        longest_response = request.sampling.max_response_tokens
        room = self._max_model_tokens - longest_response
        for prompt in request.prompts:
            if not 0 < len(prompt.token_ids) <= room:
                raise ValueError(
                    f"prompt {prompt.id} ({prompt.source}) has {len(prompt.token_ids)} tokens; with "
                    f"rollout.max_response_tokens={longest_response} the engine accepts 1 to {room}: "
                    "raise data.max_prompt_tokens"
                )
        with preserve_process_state():
            return self._draw(request)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load new weights, streamed as (Hugging Face name, full tensor), and reset the prefix cache of the old ones.

        vLLM keeps a reference to each tensor until its layer is complete: a tensor must not be overwritten after it was
        yielded, and memory use is low if the tensors of a layer arrive together. On a GPU the KV cache is allocated
        only after all weights are loaded, so that streaming can use its memory.

        Raises:
            ValueError: the stream lacked weights of the checkpoint; vLLM would generate from stale ones.
        """
        received: set[str] = set()
        with preserve_process_state(), torch.no_grad():
            stream = self._with_tied_head(weights, received)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
            self._wake(CACHE)
        # reload_weights keeps cached keys and values of the old weights, which long prompts would reuse
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM keeps part of the cache of the old weights: a request is still running")
        missing = sorted(self._expected - received)
        self._loaded = not missing
        if missing:
            raise ValueError(f"{len(missing)} weights were not sent and are stale: {', '.join(missing[:5])}")

    def sleep(self) -> None:
        """Free weights and cache on the GPU (no effect on a CPU); `load_weights` must follow `wake`."""
        if self._on_gpu and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep, self._loaded = {WEIGHTS, CACHE}, False

    def wake(self) -> None:
        """Allocate GPU memory for the weights (no effect on a CPU); `load_weights` allocates the KV cache."""
        self._wake(WEIGHTS)

    def _wake(self, what: str) -> None:
        if what in self._asleep:
            self._llm.wake_up(tags=[what])
            self._asleep.discard(what)

    def close(self) -> None:
        """Stop the engine, leave its process groups, and remove its shared-memory files."""
        with preserve_process_state():
            for what in (WEIGHTS, CACHE):
                self._wake(what)  # vLLM's allocator must not free unmapped memory
            shut_down(self._llm)
            del self._llm
            gc.collect()
            if self._owns_process_group:
                dist.destroy_process_group()
        if self._on_gpu:
            torch.cuda.empty_cache()
        elif self._shares_memory:
            remove_unused()  # the files of this engine, which is now closed

    def _draw(self, request: RolloutRequest) -> list[ResponseGroup]:
        """Generate one group per prompt; vLLM batches as many of the responses, its requests, as it can."""
        prompts, sampling = request.prompts, request.sampling
        assembly = GroupAssembly(request)
        requested = assembly.requested
        missing = [m for i in range(len(prompts)) for m in requested.members(i) if m not in requested.known]
        seeds = [sampling.seed(prompts[i], index) for i, index in missing]
        inputs = [{"prompt_token_ids": list(prompts[i].token_ids)} for i, _ in missing]
        parameters = [self._parameters(sampling, seed) for seed in seeds]
        # an error in `on_group` must abort the requests immediately, not at the next garbage collection
        with closing(run_requests(self._llm, inputs, parameters, request.stop)) as completions:
            for number, completion in completions:
                assembly.add(*missing[number], self._response(completion, seeds[number], sampling.top_logprobs))
        return assembly.groups()

    def _response(self, completion: CompletionOutput, seed: int, top: int) -> Response:
        # per token: first the sampled one, then the `top` most probable ones, which may include it
        return Response(
            tuple(completion.token_ids),
            tuple(completion.logprobs.logprobs[:: top + 1]),
            self._tokenizer.decode(completion.token_ids, skip_special_tokens=True),
            completion.finish_reason,
            seed,
            _top(completion.logprobs.token_ids, top, np.int32),
            _top(completion.logprobs.logprobs, top, np.float16),
        )

    def _parameters(self, sampling: Sampling, seed: int) -> SamplingParams:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_response_tokens,
            seed=seed,
            stop_token_ids=list(self._endings.token_ids),
            stop=list(self._endings.strings),
            logprobs=sampling.top_logprobs,  # in addition to that of the sampled token
            flat_logprobs=True,
            detokenize=bool(self._endings.strings),  # needed to find stop strings; the text is decoded in `_response`
        )

    def _with_tied_head(
        self, weights: Iterable[tuple[str, Tensor]], received: set[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Adapt the stream to vLLM and collect its names in `received`.

        On a CPU, vLLM packs the LM head of a tied model into a copy, which becomes stale unless it is streamed too.
        """
        for name, tensor in weights:
            if self._tied and name == HEAD:
                continue
            received.add(name)
            yield name, tensor
            if self._tied and not self._on_gpu and name == EMBEDDING:
                yield HEAD, tensor


def _top(values: list, top: int, dtype: type) -> np.ndarray | None:
    """Entries of the most probable tokens [tokens, top] from vLLM's flat list; None if top is 0."""
    return np.array(values, dtype).reshape(-1, top + 1)[:, 1:].copy() if top else None


def _checkpoint_names(model_path: str, tied: bool) -> frozenset[str]:
    """Names of the checkpoint's weights; empty if it has no safetensors files."""
    import json
    from pathlib import Path

    from safetensors import safe_open
    from transformers.utils import cached_file

    index = cached_file(model_path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    single = cached_file(model_path, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    names: set[str] = set()
    if index is not None:
        names.update(json.loads(Path(index).read_text())["weight_map"])
    elif single is not None:
        with safe_open(single, framework="pt") as file:
            names.update(file.keys())
    derived = {name for name in names if name.endswith("rotary_emb.inv_freq")}
    return frozenset(names - derived - ({HEAD} if tied else set()))
