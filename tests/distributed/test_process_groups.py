"""How many connections a rank of a large run opens, counted with Megatron's own groups of a world that is not there."""

from __future__ import annotations

import resource

import pytest

LAYOUTS = {
    "tp1": dict(),
    "tp4": dict(tensor_parallel=4),
    "tp8_pp4": dict(tensor_parallel=8, pipeline_parallel=4),
    "tp4_ep8": dict(tensor_parallel=4, expert_parallel=8),
    "tp2_cp4": dict(tensor_parallel=2, context_parallel=4),
}
WORLD = 512


def gloo_peers(rank: int, layout: dict, backend: str | None) -> int:
    """Connections of one rank: gloo connects all members of a group when it is made."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_g2rl.config.tree import PolicyConfig
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


def test_with_gloo_beside_nccl_in_every_group_there_were_thousands(ranks):
    assert ranks(1, gloo_peers, dict(), None)[0] > 3_500


def limits(rank: int) -> tuple[int, int]:
    from megatron_g2rl.policy import runtime

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    runtime.raise_open_file_limit()
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def test_a_rank_may_open_as_many_files_as_the_system_allows(ranks):
    soft, hard = ranks(1, limits)[0]
    assert soft == hard
