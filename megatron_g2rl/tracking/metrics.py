"""Metrics of a step that are computed from its experience; `table.py` documents each one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from megatron_g2rl.algorithm import is_rejected, rollout_mismatch, sequence_ratio
from megatron_g2rl.config.sections.method import AlgorithmConfig
from megatron_g2rl.evaluation.summary import ends_in_loop, is_confidently_incorrect
from megatron_g2rl.exploration import geometry, similarity
from megatron_g2rl.records import Experience, Response, TokenStatistics
from megatron_g2rl.rewards.boxed import last_boxed


def experience_metrics(experience: Experience, old: TokenStatistics, algorithm: AlgorithmConfig) -> dict[str, float]:
    """Rewards, lengths, entropy, novelty, geometry and rollout mismatch of a step: means over responses or tokens.

    Args:
        experience: the responses of the step.
        old: their statistics under the old policy.
        algorithm: how the difference between trainer and rollout engine is corrected.
    """
    e = experience
    lengths = torch.tensor([len(r.token_ids) for r in e.responses], dtype=torch.float32)
    truncated = torch.tensor([r.finish_reason == "length" for r in e.responses], dtype=torch.float32)
    correct = e.correct
    metrics = {
        "reward/mean": e.rewards.mean(),
        "reward/pass_rate": correct.float().mean(),
        "reward/shaped_mean": e.shaped.mean(),
        "reward/groups_used_fraction": e.groups_kept / len(e.groups),
        "response/count": float(len(lengths)),
        "response_length/mean": lengths.mean(),
        "response_length/max": lengths.max(),
        "response/truncated_fraction": truncated.mean(),
        **_health_metrics(e),
        **distinct_correct(e),
        "policy/entropy": torch.cat(old.entropy).mean(),
    }
    if e.novelty is not None:
        metrics["exploration/novelty_mean"] = e.novelty.mean()
        metrics["exploration/novelty_correct"] = e.novelty[correct].mean()
        metrics["exploration/novelty_incorrect"] = e.novelty[~correct].mean()
        metrics |= duplicate_correlation(e)
    if e.features is not None:
        metrics |= _geometry_metrics(e)
    metrics |= entropy_pressure(e, old)
    for name, values in e.reward_parts.items():
        metrics |= spread_metrics(f"reward/{name}", values[~values.isnan()])
    metrics |= {f"reward/{name}_penalty": values.mean() for name, values in e.penalties.items()}
    metrics |= _mismatch_metrics(e, old, algorithm)
    return {name: float(value) for name, value in metrics.items()}


def prior_metrics(
    responses: Sequence[Response], old_logprobs: Sequence[Float[Tensor, "_tokens"]], tolerance: float
) -> dict[str, float]:
    """Fraction of the response tokens that are swept again because the rollout engine's log-probs are off.

    Args:
        responses: with the engine's log-probs.
        old_logprobs: the trainer's, per response.
        tolerance: of the sweep (`ExplorationConfig.prior_tolerance_in`); 0: it uses no prior, and there is no metric.
    """
    if tolerance == 0:
        return {}
    rollout = torch.cat([torch.tensor(r.logprobs) for r in responses])
    deviation = torch.expm1(rollout - torch.cat(tuple(old_logprobs))).abs()
    return {"exploration/swept_again_fraction": float((~(deviation <= tolerance)).float().mean())}


def _health_metrics(e: Experience) -> dict[str, float]:
    """Fractions of responses without a box or ending in a loop, and of prompts with a confident incorrect answer."""
    answers = [last_boxed(response.text) for response in e.responses]
    correct, confident, start = e.correct.tolist(), 0, 0
    for group in e.groups:
        end = start + len(group.responses)
        confident += is_confidently_incorrect(answers[start:end], correct[start:end])
        start = end
    loops = sum(ends_in_loop(response.token_ids) for response in e.responses)
    return {
        "response/unparsed_fraction": answers.count(None) / len(answers),
        "response/repetitive_fraction": loops / len(answers),
        "response/confidently_incorrect_fraction": confident / len(e.groups),
    }


def distinct_correct(e: Experience) -> dict[str, float]:
    """Different canonical forms among the correct responses of a group, mean over groups; absent without forms."""
    counts, start = [], 0
    for group in e.groups if e.forms is not None else ():
        forms = e.forms[start : start + len(group.responses)]
        start += len(group.responses)
        if any(form is not None for form in forms):
            counts.append(len({form for form in forms if form}))
    return {"response/distinct_correct": sum(counts) / len(counts)} if counts else {}


def spread_metrics(name: str, values: Float[Tensor, "responses"]) -> dict[str, Float[Tensor, ""]]:
    """Mean and population standard deviation of the rewards of one function; NaN if there are none."""
    mean = values.mean()
    return {f"{name}/mean": mean, f"{name}/std": (values - mean).square().mean().sqrt()}


def _geometry_metrics(e: Experience) -> dict[str, float]:
    """Means over groups of the geometry of their features, and quantiles of all pairwise cosines within groups."""
    ids = e.group_ids
    groups = [e.features[ids == i] for i in range(len(e.groups))]
    stats = [geometry(features) for features in groups]
    mean = lambda name: sum(float(getattr(s, name)) for s in stats) / len(stats)  # noqa: E731
    names = ("mean_cosine", "negative_fraction", "orthogonal_fraction", "effective_rank")
    return {f"geometry/{name}": mean(name) for name in names} | cosine_quantiles(groups)


def duplicate_correlation(e: Experience) -> dict[str, float]:
    """Correlation of the novelty with the number of copies of a response in its group; absent without copies."""
    copies, texts = [], [response.text for response in e.responses]
    for i in range(len(e.groups)):
        members = (e.group_ids == i).nonzero().flatten().tolist()
        counts = Counter(texts[j] for j in members)
        copies += [counts[texts[j]] for j in members]
    pairs = torch.stack([torch.tensor(copies).double(), e.novelty.double()])
    correlation = torch.corrcoef(pairs)[0, 1]
    return {"exploration/duplicate_correlation": float(correlation)} if correlation.isfinite() else {}


def entropy_pressure(e: Experience, old: TokenStatistics) -> dict[str, float]:
    """Covariance of advantage and log-prob of a response within its group, mean over groups of each kind.

    To first order, an update changes the entropy of the policy by minus this covariance: above 0 it sharpens. Groups
    are mixed, all correct or all incorrect; a kind without groups has no metric (docs/method.md, section 3).
    """
    logprobs = torch.stack([values.double().sum() for values in old.logprobs])
    found: dict[str, list[float]] = {}
    for i in range(len(e.groups)):
        members = e.group_ids == i
        correct, advantages = e.correct[members], e.advantages[members].double()
        if len(advantages) < 2:
            continue
        kind = "all_correct" if correct.all() else "mixed" if correct.any() else "all_incorrect"
        centered = logprobs[members] - logprobs[members].mean()
        found.setdefault(kind, []).append(float((centered * (advantages - advantages.mean())).mean()))
    return {f"exploration/covariance_{kind}": sum(values) / len(values) for kind, values in found.items()}


def cosine_quantiles(groups: list[Float[Tensor, "_responses hidden"]]) -> dict[str, float]:
    """10%, 50% and 90% quantiles of the cosines of all pairs within groups; zero features are excluded."""
    cosines = []
    for features in groups:
        matrix = similarity(features[features.norm(dim=1) > 0])
        cosines.append(matrix[torch.triu(torch.ones_like(matrix, dtype=torch.bool), 1)].float())
    pairs = torch.cat(cosines)
    if not len(pairs):
        return {}
    # torch.quantile accepts at most 2**24 values: the pairs of one group of 5,800 responses.
    values = numpy.quantile(pairs.numpy(), [0.1, 0.5, 0.9]).tolist()
    return dict(zip(("geometry/cosine_p10", "geometry/cosine_median", "geometry/cosine_p90"), values, strict=True))


def _mismatch_metrics(e: Experience, old: TokenStatistics, algorithm: AlgorithmConfig) -> dict[str, torch.Tensor]:
    trainer = torch.cat(old.logprobs)[None]
    rollout = torch.cat([torch.tensor(r.logprobs) for r in e.responses])[None]
    cap, by_sequence = algorithm.importance_cap, algorithm.importance_level == "sequence"
    everything = torch.ones_like(trainer, dtype=torch.bool)
    mismatch = rollout_mismatch(trainer, rollout, everything, None if by_sequence else cap)
    if by_sequence or algorithm.rejection_bounds is not None:
        lengths = torch.tensor([len(values) for values in old.logprobs])
        parts = zip(trainer.split(lengths.tolist(), 1), rollout.split(lengths.tolist(), 1), strict=True)
        ratio = torch.cat([sequence_ratio(*part, torch.ones_like(part[0], dtype=torch.bool))[0] for part in parts])
        if by_sequence:
            mismatch["truncated_fraction"] = lengths[ratio > cap].sum() / lengths.sum().clamp(min=1)
        if algorithm.rejection_bounds is not None:
            mismatch["rejected_fraction"] = is_rejected(ratio, algorithm.rejection_bounds).float().mean()
    return {f"mismatch/{name}": value for name, value in mismatch.items()}
