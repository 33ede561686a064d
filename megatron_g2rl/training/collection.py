"""Where exploration meets the loop: which Φ a step gets, what it does to rewards, and what that adds to the step."""

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
    """What has to be known of a step's responses before their rewards are shaped: Φ, from where `settings` takes it.

    A collective. The score pass over all responses is made only where it has to give Φ; see `updates` for the rest.
    """
    if settings.wants_features and settings.source == "exact":
        return policy.score(sequences_of(groups), features=True)
    none_yet = (None,) * len(responses_of(groups))
    if not settings.top_logprobs:
        return ScoredBatch(none_yet, none_yet, None)
    return ScoredBatch(none_yet, none_yet, *policy.features_from_topk(responses_of(groups)))


def without_top(groups: Sequence[ResponseGroup]) -> tuple[ResponseGroup, ...]:
    """The groups without the most probable tokens of their responses, which nothing needs once there is Φ."""

    def bare(group: ResponseGroup) -> ResponseGroup:
        return replace(group, responses=tuple(r.without_top() for r in group.responses))

    return tuple(map(bare, groups))


def shape(
    scored: ScoredBatch,
    rewards: Float[Tensor, "responses"],
    group: Int[Tensor, "responses"],
    settings: ExplorationConfig,
) -> tuple[Float[Tensor, "responses"], Float[Tensor, "responses"] | None, ScoredBatch]:
    """Shaped rewards, exploration scores ν, and `scored` with the seconds this took.

    Rewards stay as they are unless `exploration.method=gradient`; ν is None without features.
    """
    if scored.features is None:
        return rewards, None, scored
    start = time.perf_counter()
    options = dict(root=settings.root, mapping=settings.mapping, strength=settings.strength, clip=settings.reward_clip)
    shaped, scores = shape_groups(scored.features, rewards, group, **options)
    seconds = scored.explore_seconds | {"shaping": time.perf_counter() - start}
    return shaped if settings.method == "gradient" else rewards, scores, replace(scored, explore_seconds=seconds)


def cost_metrics(experience: Experience, step_seconds: float) -> dict[str, float]:
    """What exploration added to a step (`tracking/table.py`); nothing where there was none.

    Args:
        experience: the responses of the step, all rounds of dynamic sampling together.
        step_seconds: the whole step.
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
