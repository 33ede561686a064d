"""What a rank says when another one has ended."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_g2rl.config.tree import PolicyConfig
from megatron_g2rl.errors import UserError, as_lost_rank_error
from megatron_g2rl.policy import runtime


def test_a_rank_whose_peer_ended_points_to_it_in_one_sentence(ranks):
    def talk(rank):
        runtime.start(PolicyConfig(device="cpu"), seed=0)
        try:
            # The other one ends after its first word.
            for _ in range(1 + 1000 * (rank == 0)):
                dist.all_reduce(torch.ones(1))
        except RuntimeError as error:
            return as_lost_rank_error(error)

    told, nothing = ranks(2, talk)
    assert isinstance(told, UserError) and "another rank is lost" in str(told) and nothing is None


def test_other_errors_stay_what_they_are():
    error = RuntimeError("shapes do not match")
    assert as_lost_rank_error(error) is error
