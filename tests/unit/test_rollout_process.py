"""Side effects of an in-process vLLM on its process and machine are undone."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch
import torch.distributed as dist

from megatron_g2rl.rollout import shared_memory, vllm, vllm_compat
from megatron_g2rl.rollout.endings import Endings
from megatron_g2rl.rollout.engine import RolloutError
from megatron_g2rl.rollout.process_state import preserve_process_state
from megatron_g2rl.rollout.vllm import VllmEngine
from megatron_g2rl.rollout.vllm_compat import set_vllm_rank_env, translate_vllm_errors


def test_generators_threads_dtype_and_environment_are_restored(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    expected = random.random(), numpy.random.random(), torch.rand(1).item()
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    set_num_threads, dtype = torch.set_num_threads, torch.get_default_dtype()
    with preserve_process_state():
        random.seed(2), numpy.random.seed(2), torch.manual_seed(2)
        torch.set_num_threads = lambda count: None
        torch.set_default_dtype(torch.bfloat16)
        os.environ.update(LD_PRELOAD="libx.so", LOCAL_WORLD_SIZE="1", VLLM_DIST_IDENT="kept")
    assert (random.random(), numpy.random.random(), torch.rand(1).item()) == expected
    assert torch.set_num_threads is set_num_threads
    assert torch.get_default_dtype() is dtype
    assert os.environ["LOCAL_WORLD_SIZE"] == "4"
    assert "LD_PRELOAD" not in os.environ
    assert os.environ.pop("VLLM_DIST_IDENT") == "kept"


def test_only_shared_memory_mapped_by_no_process_is_removed(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    left, used, other = (tmp_path / name for name in ("-tp:0-[0-1]-cpushm_0", "-tp:0-[0-1]-cpushm_1", "sem.other"))
    for file in (left, used, other):
        file.write_bytes(bytes(4096))
    script = (
        "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); "
        "print('ready', flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", script, used], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        shared_memory.remove_leftovers()
        assert not left.exists() and f"removed {left}" in caplog.text
        assert used.exists()
        assert other.exists()
    finally:
        process.communicate(b"\n", timeout=120)
    caplog.clear()
    assert shared_memory.remove_unused() == [used] and not used.exists()
    assert not caplog.text, "a closed engine's own files are nothing to worry about"


@pytest.mark.parametrize("device, expected", [(0, "0"), (3, "3"), (None, "5")])
def test_vllm_gets_the_device_of_the_policy_even_if_a_rank_sees_only_one(device, expected, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(dist, "get_rank", lambda: 13)
    monkeypatch.setattr(dist, "get_world_size", lambda: 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
    monkeypatch.setenv("RANK", "13")
    set_vllm_rank_env(tensor_parallel=2)
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == ("13", expected)


@pytest.mark.parametrize("tensor_parallel, visible, disabled", [(2, 1, True), (2, 8, False), (1, 1, False)])
def test_ranks_that_see_one_gpu_each_do_not_test_peer_access(tensor_parallel, visible, disabled, monkeypatch):
    """vLLM's custom all-reduce asks for access to the devices of the other ranks, which do not exist in this rank."""
    given = {}
    model = SimpleNamespace(hf_text_config=SimpleNamespace(tie_word_embeddings=True))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(model_config=model))
    monkeypatch.setattr(vllm, "load_tokenizer", lambda path: None)
    monkeypatch.setattr(vllm, "import_vllm", lambda: False)
    monkeypatch.setattr(vllm, "start", lambda **settings: given.update(settings) or llm)
    monkeypatch.setattr(vllm, "_checkpoint_names", lambda path, tied: frozenset())
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for name, value in dict(is_available=True, device_count=visible, current_device=0).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    limits = dict(max_model_tokens=8, kv_cache_mb=1, gpu_memory_fraction=0.5, enforce_eager=True, seed=0)
    endings = Endings((1,))
    VllmEngine("m", dtype=torch.bfloat16, tensor_parallel=tensor_parallel, endings=endings, **limits)
    assert given.get("disable_custom_all_reduce", False) is disabled
    assert given["tensor_parallel_size"] == tensor_parallel
    assert given["load_format"] == "dummy", "the policy has read the weights already"


@pytest.mark.parametrize(
    "text",
    [
        "Free memory on device cuda:0 (31.2/79.1 GiB) on startup is less than desired GPU memory utilization (0.5, "
        "39.6 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing.",
    ],
)
def test_gpu_memory_errors_of_vllm_are_reported_with_our_key(text):
    with (
        pytest.raises(RolloutError, match=r"rollout\.gpu_memory_fraction"),
        translate_vllm_errors(512, 1024, on_cpu=False),
    ):
        raise ValueError(text)


def _llm(tokens):
    requests = {f"{i}-{os.getpid()}": SimpleNamespace(output_token_ids=drawn) for i, drawn in enumerate(tokens)}
    core = SimpleNamespace(scheduler=SimpleNamespace(requests=requests))
    return SimpleNamespace(llm_engine=SimpleNamespace(engine_core=SimpleNamespace(engine_core=core)))


def _compare(rank: int, store: str, tokens: list, queue) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    state = ModuleType("vllm.distributed.parallel_state")
    state.get_tp_group = lambda: SimpleNamespace(cpu_group=dist.group.WORLD)
    sys.modules |= {"vllm": ModuleType("vllm"), "vllm.distributed": ModuleType("d"), state.__name__: state}
    try:
        vllm_compat._compare_ranks(_llm(tokens))
        queue.put("equal")
    except vllm_compat.RanksDrewApart as error:
        queue.put(str(error))


@pytest.mark.parametrize("other", [[[1, 2], [3]], [[1, 2], [4]], [[1], [3]], [[1, 2]]])
def test_ranks_that_drew_different_tokens_stop_with_a_reason(tmp_path, other):
    context = multiprocessing.get_context("fork")
    queue, tokens = context.Queue(), [[1, 2], [3]]
    ranks = [context.Process(target=_compare, args=(r, str(tmp_path / "s"), (tokens, other)[r], queue)) for r in (0, 1)]
    for process in ranks:
        process.start()
    messages = [queue.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join()
    if other == tokens:
        assert messages == ["equal", "equal"]
    else:
        assert all("different tokens" in message and "rollout.tensor_parallel=1" in message for message in messages)
