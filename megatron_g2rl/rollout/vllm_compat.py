"""All uses of private or version-dependent parts of vLLM.

Starts vLLM inside the training process and shuts it down without side effects on that process. The rest of the package
uses only public names of `vllm`. A test compares `PRIVATE` with the source of the installed version.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import zlib
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_g2rl.config import vllm_version
from megatron_g2rl.config.shipped import shipped
from megatron_g2rl.config.world import undivided_ranks
from megatron_g2rl.rollout.engine import RolloutError, RolloutStopped, Stop

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput, SamplingParams

SUPPORTED = vllm_version.SUPPORTED
"""vLLM versions covered by the tests; defined in `config`, so that a configuration can be checked without torch."""

COMPARE_EVERY = 8
"""Engine steps between two comparisons of the tokens sampled by ranks that share an engine."""


class RanksDrewApart(RuntimeError):
    """Ranks that share an engine have sampled different tokens."""


PRIVATE = {
    "v1/request.py": ("self.output_token_ids",),
    "v1/core/sched/scheduler.py": ("self.requests:",),
    "v1/engine/core_client.py": ("self._finalizer", "self.engine_core ="),
    "v1/engine/core.py": (
        "self.batch_queue:",
        "self.scheduler",
        "self.structured_output_manager",
        "self.model_executor",
    ),
    "v1/engine/llm_engine.py": ("self.engine_core =", "def abort_request(", "internal: bool"),
    "v1/core/sched/interface.py": ("def has_requests(", "def shutdown("),
    "v1/structured_output/__init__.py": ("def clear_backend(",),
    "distributed/parallel_state.py": ("_WORLD:", "def destroy_model_parallel(", "def destroy("),
    "v1/worker/gpu_worker.py": ("def reload_weights(",),
}
"""vLLM source file -> text that it must contain for the private names used here, which vLLM may change."""


def check_version() -> None:
    """Refuse an untested vLLM version, without importing it.

    Raises:
        RolloutError: vLLM is not installed, or its version is not in `SUPPORTED`, with or without a GPU.
    """
    if problem := vllm_version.unsupported():
        raise RolloutError(problem)
    if vllm_version.installed() is None:
        raise RolloutError(vllm_version.unusable())


def import_vllm() -> bool:
    """Set vLLM's environment variables and import it; returns whether it is a CPU build.

    Raises:
        RolloutError: vLLM is not installed, fails to import, or its version is not supported.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in-process: weights are passed without a copy
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the policy's threads use the same cores
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    check_version()
    try:
        import vllm  # noqa: F401
    except Exception as error:  # a build for another torch raises RuntimeError, a missing library OSError
        why = f"does not import ({type(error).__name__}: {error}; see {shipped('docs/troubleshooting.md')})"
        raise RolloutError(vllm_version.unusable(why)) from error
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def start(**settings: Any) -> LLM:
    """Create the engine with the settings common to all uses."""
    from vllm import LLM

    llm = LLM(
        **settings,
        logprobs_mode="processed_logprobs",  # the default ignores the temperature
        enable_prefix_caching=True,
        generation_config="vllm",  # no sampling defaults from the checkpoint
        use_tqdm_on_load=False,
    )
    # otherwise dropping the engine, or leaving Python, destroys the trainer's torch.distributed world (see shut_down)
    llm.llm_engine.engine_core._finalizer.detach()
    return llm


def head_in_float32(dtype: torch.dtype) -> dict[str, Any]:
    """Settings that make 16-bit models compute float32 logits, like the policy's head.

    Logits in bf16 are rounded by up to 2**-9 of their size: hundredths of a nat in every log-prob.
    """
    return {} if dtype == torch.float32 else {"hf_overrides": {"head_dtype": "float32"}}


def run_requests(
    llm: LLM, inputs: list[dict[str, list[int]]], parameters: list[SamplingParams], stop: Stop | None
) -> Generator[tuple[int, CompletionOutput]]:
    """Run requests; yields (position, completion) as each one finishes.

    An early exit, by an error in this generator or its consumer or because `stop` returns True, aborts the remaining
    requests: the engine can be used again and keeps no state of them.

    Args:
        llm: the engine; ranks that share it must make the same calls.
        inputs: prompts.
        parameters: sampling parameters of each prompt.
        stop: called before every engine step.

    Raises:
        RolloutStopped: `stop` returned True.
    """
    engine = llm.llm_engine
    ids = llm.enqueue(inputs, parameters, use_tqdm=False)
    # the engine appends random characters to its request numbers, and returns outputs under the bare number
    positions = {request.partition("-")[0]: position for position, request in enumerate(ids)}
    shared = engine.vllm_config.parallel_config.tensor_parallel_size > 1
    try:
        for step in itertools.count(1):
            if not engine.has_unfinished_requests():
                break
            if stop and stop():
                raise RolloutStopped
            for output in engine.step():
                if output.finished:
                    yield positions[output.request_id], output.outputs[0]
            if shared and step % COMPARE_EVERY == 0:
                _compare_ranks(llm)
    except RanksDrewApart:
        raise  # the ranks' batches no longer match: no further engine step is possible
    except BaseException:
        _abandon(llm, ids)
        raise
    _drain(llm)


def _compare_ranks(llm: LLM) -> None:
    """Raise if the ranks of an engine, which sample independently, have sampled different tokens.

    After one different token their batches differ: the results would be meaningless, or the ranks would hang.
    """
    from vllm.distributed.parallel_state import get_tp_group

    requests = llm.llm_engine.engine_core.engine_core.scheduler.requests
    # The engine appends different random characters on every rank.
    drawn = sorted(
        (name.partition("-")[0], len(r.output_token_ids), *r.output_token_ids[-COMPARE_EVERY:])
        for name, r in requests.items()
    )
    digest = zlib.crc32(repr(drawn).encode())
    bounds = torch.tensor([digest, -digest])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=get_tp_group().cpu_group)
    if bounds[0] != -bounds[1]:
        raise RanksDrewApart(
            "the ranks that share a vLLM engine have sampled different tokens: a kernel rounds differently on one of "
            "them; set rollout.tensor_parallel=1, or rollout.enforce_eager=true"
        )


def _abandon(llm: LLM, ids: list[str]) -> None:
    llm.llm_engine.abort_request(ids, internal=True)
    _drain(llm)
    # cached prompts would be reused by the next call, which changes results by rounding
    llm.reset_prefix_cache()


def _drain(llm: LLM) -> None:
    """Step until the engine is idle: aborted requests stay in the model runner's batch until the next step, and on a
    GPU a step may be in flight when the last request ends."""
    core = llm.llm_engine.engine_core.engine_core
    while core.scheduler.has_requests() or core.batch_queue:
        llm.llm_engine.step()


def shut_down(llm: LLM) -> None:
    """Free an engine and destroy vLLM's process groups, but not the default process group.

    vLLM's own shutdown also destroys the default process group, even the trainer's; these are its other steps.
    """
    from vllm.distributed import parallel_state

    core = llm.llm_engine.engine_core.engine_core
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()  # vLLM's start calls gc.freeze()
    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None


def set_vllm_rank_env(tensor_parallel: int) -> None:
    """Set the rank environment variables that vLLM reads, as torchrun would.

    vLLM uses LOCAL_RANK as its device index: it is set to the policy's device, also if a launcher makes only one device
    visible to each rank.

    Raises:
        RolloutError: the ranks cannot be divided into engines.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if problem := undivided_ranks(tensor_parallel, world_size):
        raise RolloutError(problem)
    os.environ["RANK"] = str(rank)
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    else:
        os.environ.setdefault("LOCAL_RANK", str(rank))


@contextlib.contextmanager
def translate_vllm_errors(max_model_tokens: int, kv_cache_mb: int, on_cpu: bool) -> Iterator[None]:
    """Translate vLLM's errors about its own arguments to keys of this package's configuration."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        length = "data.max_prompt_tokens + rollout.max_response_tokens"
        if any(words in text for words in ("KV cache", "kv cache", "No available memory for the cache blocks")):
            key = f"rollout.kv_cache_mb={kv_cache_mb}" if on_cpu else "rollout.gpu_memory_fraction"
            raise RolloutError(
                f"vLLM has no room for one sequence of {max_model_tokens} tokens ({length}): raise {key}, or lower "
                f"the lengths. vLLM's message: {text}"
            ) from error
        if "Free memory on device" in text:
            raise RolloutError(
                "the policy leaves less free memory on the device than rollout.gpu_memory_fraction gives vLLM: lower "
                f"it, or spread the policy over more ranks. vLLM's message: {text}"
            ) from error
        if "max_model_len" in text:
            raise RolloutError(
                f"the model does not support sequences of {max_model_tokens} tokens ({length}): lower the lengths. "
                f"vLLM's message: {text}"
            ) from error
        raise
