"""Exploration within a training step: obtain Φ, shape the rewards with it, and report the added time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float, Int
from torch import Tensor

from megatron_g2rl.config.tree import ExplorationConfig
from megatron_g2rl.experience import Experience, responses_of, sequences_of
from megatron_g2rl.exploration import shape_groups
from megatron_g2rl.policy.policy import Policy
from megatron_g2rl.records import ResponseGroup, ScoredBatch


def score_groups(policy: Policy, groups: Sequence[ResponseGroup], settings: ExplorationConfig) -> ScoredBatch:
    """Compute what reward shaping needs from a step's responses: Φ, from the source named in `settings`.

    A collective. A forward pass over all responses runs only when Φ comes from it; `updates` computes the other
    log-probs.
    """
    if settings.wants_features and settings.source == "exact":
        return policy.score(sequences_of(groups), features=True)
    none_yet = (None,) * len(responses_of(groups))
    if not settings.top_logprobs:
        return ScoredBatch(none_yet, none_yet, None)
    return ScoredBatch(none_yet, none_yet, *policy.features_from_topk(responses_of(groups)))


def drop_topk(groups: Sequence[ResponseGroup]) -> tuple[ResponseGroup, ...]:
    """The groups without the top-K tables of their responses, which are not needed once Φ is computed."""

    def bare(group: ResponseGroup) -> ResponseGroup:
        return replace(group, responses=tuple(r.drop_topk() for r in group.responses))

    return tuple(map(bare, groups))


def shape(
    scored: ScoredBatch,
    rewards: Float[Tensor, "responses"],
    group: Int[Tensor, "responses"],
    settings: ExplorationConfig,
) -> tuple[Float[Tensor, "responses"], Float[Tensor, "responses"] | None, ScoredBatch]:
    """Shaped rewards, novelty scores ν, and `scored` with the time of the shaping added.

    Rewards are returned unchanged unless `exploration.method=gradient`; ν is None without features.
    """
    if scored.features is None:
        return rewards, None, scored
    start = time.perf_counter()
    options = dict(root=settings.root, mapping=settings.mapping, strength=settings.strength, clip=settings.reward_clip)
    shaped, scores = shape_groups(scored.features, rewards, group, **options)
    seconds = scored.explore_seconds | {"shaping": time.perf_counter() - start}
    return shaped if settings.method == "gradient" else rewards, scores, replace(scored, explore_seconds=seconds)


def cost_metrics(experience: Experience, step_seconds: float) -> dict[str, float]:
    """Time that exploration added to a step, as metrics (`tracking/table.py`); empty without exploration.

    Args:
        experience: the responses of the step, from all rounds of dynamic sampling.
        step_seconds: duration of the step.
    """
    seconds = experience.scored.explore_seconds
    if not seconds:
        return {}
    total = sum(seconds.values())
    return {f"cost/{name}_s": value for name, value in seconds.items()} | {
        "cost/exploration_s": total,
        "cost/per_response_ms": 1000 * total / len(experience.responses),
        "cost/per_group_ms": 1000 * total / len(experience.groups),
        "cost/step_fraction": total / step_seconds,
    }
