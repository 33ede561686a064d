"""Collects a step's experience: from responses and their rewards to Φ, shaped rewards and advantages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_g2rl.algorithm import (
    generalized_advantages,
    group_advantages,
    has_spread,
    overlong_penalty,
    token_kl,
    whiten,
)
from megatron_g2rl.config import Config
from megatron_g2rl.config.sections.method import AlgorithmConfig, ExplorationConfig
from megatron_g2rl.exploration import shape_by_novelty
from megatron_g2rl.exploration.methods import StepInputs, load_method
from megatron_g2rl.policy.critic import Critic
from megatron_g2rl.policy.packing import sequences_of
from megatron_g2rl.policy.policy import Policy
from megatron_g2rl.records import (
    Experience,
    Response,
    ResponseGroup,
    ScoredBatch,
    TokenStatistics,
    ValueEstimates,
    group_ids,
    responses_of,
)
from megatron_g2rl.rewards.distribute import ScoredRewards
from megatron_g2rl.tracking.clock import Clock
from megatron_g2rl.training.providers import InputProviders


def make_experience(
    policy: Policy,
    groups: Sequence[ResponseGroup],
    outcome: ScoredRewards,
    config: Config,
    clock: Clock,
    providers: InputProviders,
    critic: Critic | None = None,
) -> Experience:
    """Compute Φ, novelty, shaped rewards and advantages of new responses; a collective.

    Args:
        policy: has the weights that generated the responses.
        groups: all responses, the same on every rank.
        outcome: their rewards.
        config: settings of the run.
        clock: measures the phases.
        providers: compute the inputs of the exploration method that no pass of the policy computes.
        critic: computes the values of the tokens; None: advantages compare the responses of a group.
    """
    with clock.phase("old_logprobs"):
        passed = compute_features(policy, groups, config.exploration)
        groups, old = drop_topk(groups), passed.old
        if old is None and config.algorithm.use_kl_in_reward:
            old = policy.score(sequences_of(groups), features=False)
    reference = compute_reference(policy, groups, config, clock)
    values = None
    if critic is not None:
        with clock.phase("values"):
            values = critic.values(sequences_of(groups))
    with clock.phase("exploration"):
        inputs = StepInputs(
            outcome.rewards,
            outcome.correct,
            group_ids(groups),
            features=passed.features,
            hidden=passed.hidden,
            root=config.exploration.root,
            **providers.inputs(groups),
        )
        kl = None
        if config.algorithm.use_kl_in_reward:
            kl = token_kl(old.logprobs, reference, config.algorithm.kl_estimator)
        signals = learning_signals(inputs, responses_of(groups), config, kl, values)
    return join_signals(groups, outcome, passed.features, passed.seconds, old, reference, signals)


@dataclass(frozen=True)
class LearningSignals:
    """Shaped rewards, novelty and advantages of complete groups, computed from their rewards and Φ."""

    shaped: Float[Tensor, "responses"]
    """Shaped rewards, with the over-long penalty."""
    novelty: Float[Tensor, "responses"] | None
    """ν; None if the inputs of the method were not computed."""
    advantages: Float[Tensor, "responses"]
    kept: Bool[Tensor, "responses"]
    """False for the responses of dropped groups and for masked ones."""
    penalties: dict[str, Float[Tensor, "responses"]]
    """As in `Experience`."""
    seconds: dict[str, float]
    """Time of novelty and shaping (`shaping`); empty without novelty."""
    estimates: ValueEstimates | None = None
    """As in `Experience`."""


def learning_signals(
    step: StepInputs,
    responses: Sequence[Response],
    config: Config,
    kl: Sequence[Float[Tensor, "_tokens"]] | None = None,
    values: Sequence[Float[Tensor, "_tokens"]] | None = None,
) -> LearningSignals:
    """Novelty, shaped rewards and advantages.

    Those of a group depend on its own responses only, unless the method compares responses of the complete step.

    Args:
        step: rewards and the inputs of the exploration method, on the host; groups are complete.
        responses: the responses themselves.
        config: settings of the run.
        kl: per response, KL estimates of its tokens, if they are part of the reward.
        values: per response, a critic's values of its tokens; None: advantages compare the responses of a group.
    """
    algorithm, ids = config.algorithm, step.group_ids
    shaped, novelty, seconds = shape(step, config.exploration)
    penalties = length_penalties(responses, config)
    shaped = shaped + penalties.get("overlong", 0.0)
    rewards = shaped
    if kl is not None:
        penalties["kl"] = -algorithm.kl_coefficient * torch.stack([values.sum() for values in kl])
        rewards = shaped + penalties["kl"]
    kept = usable_responses(has_spread(shaped, ids), responses, algorithm)
    if values is not None:
        estimates = estimate_advantages(shaped, values, kept, algorithm, kl)
        means = torch.stack([each.mean() if len(each) else torch.tensor(0.0) for each in estimates.advantages])
        return LearningSignals(shaped, novelty, means, kept, penalties, seconds, estimates)
    advantages = group_advantages(rewards, ids, normalize_std=algorithm.normalize_std, baseline=algorithm.baseline)
    return LearningSignals(shaped, novelty, advantages, kept, penalties, seconds)


def estimate_advantages(
    shaped: Float[Tensor, "responses"],
    values: Sequence[Float[Tensor, "_tokens"]],
    kept: Bool[Tensor, "responses"],
    algorithm: AlgorithmConfig,
    kl: Sequence[Float[Tensor, "_tokens"]] | None = None,
) -> ValueEstimates:
    """Advantages and targets of tokens: the shaped reward is that of the last token of a response.

    Args:
        shaped: shaped rewards, with the over-long penalty.
        values: per response, the critic's values of its tokens.
        kept: responses that the updates use; advantages are normalized over their tokens, and 0 elsewhere.
        algorithm: γ, λ, and whether to normalize.
        kl: per response, KL estimates of its tokens, if they are part of the reward.
    """
    lengths = torch.tensor([len(each) for each in values])
    table = pad_sequence([each.double() for each in values], batch_first=True)
    mask = torch.arange(table.shape[1])[None] < lengths[:, None]
    rewards = torch.zeros_like(table)
    if kl is not None:
        rewards -= algorithm.kl_coefficient * pad_sequence([each.double() for each in kl], batch_first=True)
    rows = lengths.nonzero().squeeze(1)
    rewards[rows, lengths[rows] - 1] += shaped[rows].double()
    advantages = generalized_advantages(rewards, table, mask, algorithm.gamma, algorithm.gae_lambda)
    returns = advantages + table
    if algorithm.normalize_std:
        advantages = whiten(advantages, mask & kept[:, None])
    tables = (x.float() for x in (returns, advantages))
    return ValueEstimates(
        tuple(values), *(tuple(row[:n] for row, n in zip(x, lengths.tolist(), strict=True)) for x in tables)
    )


def length_penalties(responses: Sequence[Response], config: Config) -> dict[str, Float[Tensor, "responses"]]:
    """The over-long penalty of each response as `overlong`; empty without one."""
    if config.algorithm.overlong_buffer_tokens is None:
        return {}
    lengths = torch.tensor([len(response.token_ids) for response in responses], dtype=torch.long)
    longest, buffer = config.rollout.max_response_tokens, config.algorithm.overlong_buffer_tokens
    return {"overlong": overlong_penalty(lengths, longest, buffer)}


def usable_responses(
    spread: Bool[Tensor, "responses"], responses: Sequence[Response], algorithm: AlgorithmConfig
) -> Bool[Tensor, "responses"]:
    """Whether the updates use each response: its group is not dropped as uniform, and it is not masked.

    Args:
        spread: whether the shaped rewards of its group differ, with the over-long penalty.
        responses: the responses themselves.
        algorithm: which are dropped and masked.
    """
    kept = spread | (not algorithm.drop_uniform_groups)
    if algorithm.mask_truncated_responses:
        kept = kept & torch.tensor([response.finish_reason != "length" for response in responses], dtype=torch.bool)
    return kept


def join_signals(
    groups: tuple[ResponseGroup, ...],
    outcome: ScoredRewards,
    features: Float[Tensor, "responses hidden"] | None,
    seconds: dict[str, float],
    old: TokenStatistics | None,
    reference: tuple[Float[Tensor, "_tokens"], ...] | None,
    signals: LearningSignals,
) -> Experience:
    """The experience of `groups`; `seconds` is the time of Φ, the other arguments are named as in `Experience`."""
    return Experience(
        groups=groups,
        rewards=outcome.rewards,
        correct=outcome.correct,
        shaped=signals.shaped,
        advantages=signals.advantages,
        kept=signals.kept,
        features=features,
        novelty=signals.novelty,
        old_statistics=old,
        reference_logprobs=reference,
        reward_parts=outcome.parts,
        forms=outcome.forms,
        estimates=signals.estimates,
        penalties=signals.penalties,
        exploration_seconds=seconds | signals.seconds,
    )


def compute_reference(
    policy: Policy, groups: Sequence[ResponseGroup], config: Config, clock: Clock
) -> tuple[Float[Tensor, "_tokens"], ...] | None:
    """Log-probs of all responses under the reference weights, or None without a KL term; a collective."""
    with clock.phase("reference"):
        if not config.algorithm.kl_coefficient:
            return None
        with policy.reference_weights():
            return policy.score(sequences_of(groups), features=False).logprobs


@dataclass(frozen=True)
class PassedResponses:
    """What exploration uses of the policy's pass over the responses of a step."""

    features: Float[Tensor, "responses hidden"] | None = None
    """Φ; None if it is not used."""
    hidden: Float[Tensor, "responses hidden"] | None = None
    """Mean hidden states; None unless the method needs them."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of Φ in seconds (`ScoredBatch.feature_seconds`)."""
    old: TokenStatistics | None = None
    """Statistics of the pass; None if none was necessary."""


def compute_features(policy: Policy, groups: Sequence[ResponseGroup], settings: ExplorationConfig) -> PassedResponses:
    """Φ from the source named in `settings`, and mean hidden states if its method needs them; a collective."""
    hidden, found = "hidden" in load_method(settings.method).needs, PassedResponses()
    if settings.is_exact or hidden:
        batch: ScoredBatch = policy.score(
            sequences_of(groups),
            features=settings.is_exact,
            hidden=hidden,
            prior_logprobs=[r.logprobs for r in responses_of(groups)],
            prior_tolerance=settings.prior_tolerance_in(policy.settings.precision),
        )
        statistics = TokenStatistics(batch.logprobs, batch.entropy)
        found = PassedResponses(batch.features, batch.hidden, batch.feature_seconds, statistics)
    if settings.top_logprobs:
        features, seconds = policy.features_from_topk(responses_of(groups))
        found = replace(found, features=features, seconds=seconds)
    return found


def drop_topk(groups: Sequence[ResponseGroup]) -> tuple[ResponseGroup, ...]:
    """The groups without the top-K tables of their responses, which are not needed once Φ is computed."""

    def bare(group: ResponseGroup) -> ResponseGroup:
        return replace(group, responses=tuple(r.drop_topk() for r in group.responses))

    return tuple(map(bare, groups))


def shape(
    step: StepInputs, settings: ExplorationConfig
) -> tuple[Float[Tensor, "responses"], Float[Tensor, "responses"] | None, dict[str, float]]:
    """Shaped rewards, novelty ν, and the time of their computation in seconds (`shaping`).

    With `exploration.method=none`, rewards are returned unchanged, and ν is that of Φ, if it was computed; otherwise it
    is None and no time is measured.
    """
    method = load_method(settings.method)
    if method.mapping is None and step.features is None:
        return step.rewards, None, {}
    start = time.perf_counter()
    novelty = method.novelty(step)
    shaped = step.rewards
    if method.mapping is not None:
        options = dict(mapping=settings.mapping or method.mapping, clip=settings.reward_clip, correct=step.correct)
        shaped = shape_by_novelty(novelty, step.rewards, step.group_ids, strength=settings.strength, **options)
    if settings.uniform_groups == "base":
        shaped = shaped.where(has_spread(step.rewards, step.group_ids), step.rewards)
    return shaped, novelty, {"shaping": time.perf_counter() - start}


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
