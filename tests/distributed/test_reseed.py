"""Random states need not be saved: seed and step determine them."""

from __future__ import annotations

import random

import numpy
import torch

from megatron_g2rl.config.sections.model import PolicyConfig
from megatron_g2rl.policy import runtime


def test_random_states_are_a_function_of_seed_and_step(ranks):
    def draw(rank):
        runtime.start(PolicyConfig(device="cpu"), seed=0)
        found = []
        for seed, step in [(0, 1), (0, 2), (1, 1), (0, 1)]:
            runtime.reseed(seed, step)
            found.append((random.random(), numpy.random.rand(), torch.rand(3).tolist()))
        return found

    first, *others, again = ranks(1, draw)[0]
    assert first == again and first not in others and others[0] != others[1]
