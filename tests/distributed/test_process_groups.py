"""How many connections a rank of a large run opens, counted with Megatron's own groups of a simulated world."""

from __future__ import annotations

import os
import resource
import time

import pytest

from megatron_g2rl.errors import UserError

LAYOUTS = {
    "tp1": dict(),
    "tp4": dict(tensor_parallel=4),
    "tp8_pp4": dict(tensor_parallel=8, pipeline_parallel=4),
    "tp4_ep8": dict(tensor_parallel=4, expert_parallel=8),
    "tp2_cp4": dict(tensor_parallel=2, context_parallel=4),
}
WORLD = 512


def gloo_peers(rank: int, layout: dict, backend: str | None) -> int:
    """Connections of one rank: gloo connects all members of a group when it is created."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_g2rl.config.sections.model import PolicyConfig
    from megatron_g2rl.policy import runtime

    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    peers, new_group = [WORLD - 1], dist.new_group

    def counted(ranks=None, timeout=None, backend=None, **others):
        members = list(range(WORLD)) if ranks is None else list(ranks)
        if 0 in members and (backend is None or "gloo" in backend):
            peers.append(len(members) - 1)
        others.pop("pg_options", None)
        return new_group(members, timeout=timeout, backend="fake", **others)

    dist.new_group = counted
    runtime.make_groups(PolicyConfig(**layout), backend)
    return sum(peers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_512_ranks_have_the_connections_of_one_group(layout, ranks):
    from megatron_g2rl.policy.runtime import GROUP_BACKENDS

    assert ranks(1, gloo_peers, LAYOUTS[layout], GROUP_BACKENDS["cuda"]) == [WORLD - 1]


def test_gloo_in_addition_to_nccl_in_every_group_needs_thousands_of_connections(ranks):
    assert ranks(1, gloo_peers, dict(), None)[0] > 3_500


def limits(rank: int) -> tuple[int, int]:
    from megatron_g2rl.policy import runtime

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    runtime.raise_open_file_limit()
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def test_the_open_file_limit_of_a_rank_is_raised_to_the_hard_limit(ranks):
    soft, hard = ranks(1, limits)[0]
    assert soft == hard


def wait_for_rank_1(rank: int) -> tuple[float, str]:
    """How long rank 0 waits for a rank that works longer than the collective timeout, in two kinds of groups."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_g2rl.config.sections.model import PolicyConfig
    from megatron_g2rl.policy import runtime

    os.environ[runtime.TIMEOUT_VARIABLE] = "5"
    runtime.start(PolicyConfig(tensor_parallel=2), 0)
    started = time.monotonic()
    dist.barrier()  # rank 1 sleeps after rank 0 has begun to measure
    time.sleep(8.0 * rank)
    dist.barrier()
    dist.all_gather_object([None, None], rank)
    waited = time.monotonic() - started
    time.sleep(12.0 * rank)
    try:
        dist.all_reduce(torch.ones(1), group=parallel_state.get_tensor_model_parallel_group())
    except RuntimeError as error:
        return waited, str(error)
    return waited, ""


def test_work_of_one_rank_has_no_timeout_and_a_collective_of_a_step_has_one(ranks):
    waited, message = ranks(2, wait_for_rank_1)[0]
    assert waited > 7.9
    assert "5000" in message


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf", "1e9"])
def test_an_invalid_timeout_is_refused(monkeypatch, text):
    from megatron_g2rl.policy import runtime

    monkeypatch.setenv(runtime.TIMEOUT_VARIABLE, text)
    with pytest.raises(UserError, match=f"G2RL_COLLECTIVE_SECONDS={text}: give a number"):
        runtime.step_timeout()


def warnings_at_the_start(rank: int, device: str, reason: str | None) -> list[str]:
    import logging

    from megatron_g2rl.config.sections.model import PolicyConfig
    from megatron_g2rl.policy import runtime

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    runtime.log.addHandler(handler)
    runtime.unusable_gpu = lambda: reason
    runtime.start(PolicyConfig(device=device), 0)
    return [record.getMessage() for record in records]


@pytest.mark.parametrize(("device", "reason"), [("auto", "broken driver"), ("auto", None), ("cpu", "broken driver")])
def test_training_on_a_cpu_beside_an_unusable_gpu_warns_once(device, reason, ranks):
    first, second = ranks(2, warnings_at_the_start, device, reason)
    assert [reason in message for message in first] == ([True] if device == "auto" and reason else [])
    assert not second
