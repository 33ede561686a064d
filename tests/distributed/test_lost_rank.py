"""The error of a rank when one of its peers has exited."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_g2rl.config.sections.model import PolicyConfig
from megatron_g2rl.errors import UserError, as_lost_rank_error
from megatron_g2rl.policy import runtime


def test_a_rank_whose_peer_exited_reports_it_in_one_sentence(ranks):
    def talk(rank):
        runtime.start(PolicyConfig(device="cpu"), seed=0)
        try:
            # The other rank exits after its first message.
            for _ in range(1 + 1000 * (rank == 0)):
                dist.all_reduce(torch.ones(1))
        except RuntimeError as error:
            return as_lost_rank_error(error)

    talk.leaves_early = True
    error, nothing = ranks(2, talk)
    assert isinstance(error, UserError) and "another rank is lost" in str(error) and nothing is None


def test_other_errors_are_unchanged():
    error = RuntimeError("shapes do not match")
    assert as_lost_rank_error(error) is error
