"""Collects a step's experience: from responses and their rewards to Φ, shaped rewards and advantages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float, Int
from torch import Tensor

from megatron_g2rl.algorithm import group_advantages, has_spread
from megatron_g2rl.config import Config
from megatron_g2rl.config.sections.method import ExplorationConfig
from megatron_g2rl.exploration import shape_groups
from megatron_g2rl.policy.packing import sequences_of
from megatron_g2rl.policy.policy import Policy
from megatron_g2rl.records import Experience, ResponseGroup, ScoredBatch, TokenStatistics, group_ids, responses_of
from megatron_g2rl.rewards.distribute import ScoredRewards
from megatron_g2rl.tracking.clock import Clock


def make_experience(
    policy: Policy, groups: Sequence[ResponseGroup], outcome: ScoredRewards, config: Config, clock: Clock
) -> Experience:
    """Compute Φ, novelty, shaped rewards and advantages of new responses; a collective.

    Args:
        policy: has the weights that generated the responses.
        groups: all responses, the same on every rank.
        outcome: their rewards.
        config: settings of the run.
        clock: measures the phases.
    """
    with clock.phase("old_logprobs"):
        features, seconds, old = compute_features(policy, groups, config.exploration)
        groups, ids = drop_topk(groups), group_ids(groups)
    with clock.phase("reference"):
        reference = None
        if config.algorithm.kl_coefficient:
            with policy.reference_weights():
                reference = policy.score(sequences_of(groups), features=False).logprobs
    with clock.phase("exploration"):
        shaped, novelty, shaping_seconds = shape(features, outcome.rewards, ids, config.exploration)
        advantages = group_advantages(
            shaped, ids, normalize_std=config.algorithm.normalize_std, baseline=config.algorithm.baseline
        )
        kept = has_spread(shaped, ids) | (not config.algorithm.drop_uniform_groups)
    return Experience(
        groups=groups,
        rewards=outcome.rewards,
        correct=outcome.correct,
        shaped=shaped,
        advantages=advantages,
        kept=kept,
        features=features,
        novelty=novelty,
        old_statistics=old,
        reference_logprobs=reference,
        reward_parts=outcome.parts,
        exploration_seconds=seconds | shaping_seconds,
    )


def compute_features(
    policy: Policy, groups: Sequence[ResponseGroup], settings: ExplorationConfig
) -> tuple[Float[Tensor, "responses hidden"] | None, dict[str, float], TokenStatistics | None]:
    """Φ from the source named in `settings`, its time in seconds, and the token statistics of its forward pass.

    A collective. Φ is None if it is not used; the statistics are None if Φ needs no forward pass over the responses.
    """
    if settings.wants_features and settings.source == "exact":
        batch: ScoredBatch = policy.score(
            sequences_of(groups),
            features=True,
            prior_logprobs=[r.logprobs for r in responses_of(groups)],
            prior_tolerance=settings.prior_tolerance_in(policy.settings.precision),
        )
        return batch.features, batch.feature_seconds, TokenStatistics(batch.logprobs, batch.entropy)
    if settings.top_logprobs:
        return *policy.features_from_topk(responses_of(groups)), None
    return None, {}, None


def drop_topk(groups: Sequence[ResponseGroup]) -> tuple[ResponseGroup, ...]:
    """The groups without the top-K tables of their responses, which are not needed once Φ is computed."""

    def bare(group: ResponseGroup) -> ResponseGroup:
        return replace(group, responses=tuple(r.drop_topk() for r in group.responses))

    return tuple(map(bare, groups))


def shape(
    features: Float[Tensor, "responses hidden"] | None,
    rewards: Float[Tensor, "responses"],
    ids: Int[Tensor, "responses"],
    settings: ExplorationConfig,
) -> tuple[Float[Tensor, "responses"], Float[Tensor, "responses"] | None, dict[str, float]]:
    """Shaped rewards, novelty ν, and the time of their computation in seconds (`shaping`).

    Rewards are returned unchanged unless `exploration.method=gradient`; without features, ν is None and no time is
    measured.
    """
    if features is None:
        return rewards, None, {}
    start = time.perf_counter()
    options = dict(root=settings.root, mapping=settings.mapping, strength=settings.strength, clip=settings.reward_clip)
    shaped, novelty = shape_groups(features, rewards, ids, **options)
    seconds = {"shaping": time.perf_counter() - start}
    return shaped if settings.method == "gradient" else rewards, novelty, seconds


def cost_metrics(experience: Experience, step_seconds: float) -> dict[str, float]:
    """Time that exploration added to a step, as metrics (`tracking/table.py`); empty without exploration.

    Args:
        experience: the responses of the step, from all rounds of dynamic sampling.
        step_seconds: duration of the step.
    """
    seconds = experience.exploration_seconds
    if not seconds:
        return {}
    total = sum(seconds.values())
    return {f"cost/{name}_s": value for name, value in seconds.items()} | {
        "cost/exploration_s": total,
        "cost/per_response_ms": 1000 * total / len(experience.responses),
        "cost/per_group_ms": 1000 * total / len(experience.groups),
        "cost/step_fraction": total / step_seconds,
    }
