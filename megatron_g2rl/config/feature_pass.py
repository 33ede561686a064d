"""Which pass of a step computes Φ: the update itself, or an old-log-prob pass before it (docs/method.md, section 8).

Reads the configuration only, so that the batch ledger can report it before a run starts. No torch.
"""

from __future__ import annotations

from typing import Literal

from megatron_g2rl.config.tree import Config
from megatron_g2rl.config.world import data_parallel_size, longest_sequence

INCORRECT_UNCHANGED = ("correct_only", "product")
"""Registered mappings that do not change the rewards of incorrect responses."""


def update_cannot_compute_features(config: Config, ranks: int) -> str | None:
    """Why Φ cannot be computed in the updates of a run with an exact Φ; None: it can.

    Single steps can be exceptions (`steps_with_a_pass`).

    Args:
        config: with an exact Φ (`ExplorationConfig.is_exact`).
        ranks: ranks of the run.
    """
    trainer, rounds = config.trainer, config.algorithm.dynamic_sampling_rounds
    if config.exploration.method not in ("none", "gradient"):
        return f"exploration.method={config.exploration.method} computes novelty from more than a group's Φ"
    if config.exploration.source != "auto":
        return f"exploration.source={config.exploration.source}"
    if trainer.updates_per_step > 1:
        return f"{trainer.updates_per_step:,} updates per step: those after the first need old log-probs"
    if rounds:
        return f"algorithm.dynamic_sampling_rounds={rounds} requires the shaped rewards before the update"
    if config.algorithm.baseline == "critic":
        return "algorithm.baseline=critic needs values before the update"
    if config.algorithm.use_kl_in_reward:
        return "algorithm.use_kl_in_reward=true needs old log-probs before the update"
    copies = max(1, data_parallel_size(config, ranks))
    most = -(-trainer.prompts_per_step // copies)
    # A forward is about a third of an update: a worse balance costs more than the pass that it saves.
    if 3 * most * copies > 4 * trainer.prompts_per_step:
        return (
            f"{trainer.prompts_per_step:,} groups on {copies:,} data-parallel ranks, each group on one: the busiest "
            "rank would have more than 4/3 of the average"
        )
    return None


def steps_with_a_pass(config: Config) -> list[str]:
    """Properties of steps that have an old-log-prob pass where the updates of a run compute Φ; empty: no step has one.

    Args:
        config: a configuration for which `update_cannot_compute_features` returns None.
    """
    properties = []
    budget, largest = config.trainer.tokens_per_microbatch, largest_possible_group(config)
    if largest > budget:
        properties.append(
            f"a group of more than trainer.tokens_per_microbatch={budget:,} tokens (at most {largest:,} are possible)"
        )
    dropped = known_dropped_groups(config)
    if dropped != "none":
        # A fused update computes their backward, two thirds of it, for nothing.
        which = "dropped groups" if dropped == "uniform" else "dropped groups without a correct response"
        masked = ", or truncated and masked" if config.algorithm.mask_truncated_responses else ""
        properties.append(f"more than a third of its responses in {which}{masked}")
    return properties


def known_dropped_groups(config: Config) -> Literal["uniform", "incorrect", "none"]:
    """Which groups of equal base rewards are dropped whatever their Φ.

    Returns:
        "uniform": all of them; "incorrect": those without a correct response; "none": dropped groups are known only
        after shaping, or none is dropped.
    """
    if not config.algorithm.drop_uniform_groups:
        return "none"
    if config.exploration.method == "none" or config.exploration.uniform_groups == "base":
        return "uniform"
    return "incorrect" if config.exploration.mapping in INCORRECT_UNCHANGED else "none"


def largest_possible_group(config: Config) -> int:
    """Tokens of a group of the longest possible sequences, padding included."""
    return config.trainer.group_size * longest_sequence(config)
