"""The table of all metrics: names, titles, units, order and meaning, for docs/metrics.md and `g2rl report`.

python -m megatron_g2rl.tracking.table > docs/metrics.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Metric:
    """A number that a run writes once per step."""

    name: str
    """`subject/quantity`; `*` matches any text and makes a family of names."""
    title: str
    """Name for readers; metrics of one section whose titles agree up to a colon are drawn in one chart."""
    unit: str
    meaning: str
    plotted: bool = True
    """Whether the report draws it, or only lists its values."""


@dataclass(frozen=True)
class Section:
    """Metrics under one heading."""

    title: str
    note: str
    metrics: tuple[Metric, ...]


def _section(title: str, note: str, *rows: tuple[str | bool, ...]) -> Section:
    return Section(title, note, tuple(Metric(*row) for row in rows))


LISTED = False
"""Marks metrics that the report does not draw."""

# fmt: off
SECTIONS = (
    _section(
        "Learning", "On the training problems of each step.",
        ("reward/pass_rate", "Pass rate", "fraction", "fraction of responses that are correct"),
        ("reward/mean", "Reward: base", "reward", "mean base reward, before shaping"),
        ("reward/shaped_mean", "Reward: shaped", "reward",
         "mean shaped reward r~, with the over-long penalty; the base reward with `exploration.method=none` and no "
         "penalty"),
        ("reward/overlong_penalty", "Penalty: over-long responses", "reward",
         "with `algorithm.overlong_buffer_tokens`: mean penalty, part of the shaped reward"),
        ("reward/kl_penalty", "Penalty: KL to the reference", "reward",
         "with `algorithm.use_kl_in_reward`: mean of what is added to the reward of a response, -β times the sum of "
         "the estimates of its tokens; not part of the shaped reward"),
        ("reward/groups_used_fraction", "Groups used", "fraction",
         "groups used by the updates, that is, not dropped as uniform and not completely masked"),
        ("reward/*/mean", "Reward function *: mean", "reward",
         "with `reward.functions`: mean reward by the function of this name, unweighted"),
        ("reward/*/std", "Reward function *: standard deviation", "reward",
         "its standard deviation over the responses of the step"),
        ("reward/timeouts", "Reward timeouts", "responses",
         "scored as incorrect because the call exceeded `reward.deadline_s`"),
        ("reward/worker_crashes", "Reward worker crashes", "responses",
         "scored as incorrect because the worker process died"),
        ("reward/latency_s_max", "Slowest reward call", "s", "slowest call of the reward function", LISTED),
    ),
    _section(
        "Evaluation set",
        "Problems that are not in the training set, evaluated periodically; step 0 is the model before training.",
        ("evaluation/pass_at_*", "pass@*", "fraction",
         "pass@n: expected fraction of problems with a correct response among n"),
        ("evaluation/maj_at_*", "maj@*", "fraction",
         "maj@n: fraction of problems whose most frequent answer is correct; ties averaged"),
        ("evaluation/mean_at_*", "mean@*", "fraction", "mean@k: fraction correct, as pass@1", LISTED),
        ("evaluation/distinct_correct_at_*", "Distinct correct solutions among *", "solutions",
         "different canonical forms of correct responses among n, expected value; with pass@n, if the reward function "
         "returns forms"),
        ("evaluation/response_length_mean", "Evaluation response length", "tokens",
         "mean response length in the evaluation"),
        ("evaluation/truncated_fraction", "Evaluation truncated responses", "fraction",
         "responses truncated at the length limit of the evaluation"),
        ("evaluation/unparsed_fraction", "Evaluation failures: no final answer", "fraction",
         "responses without a final answer"),
        ("evaluation/repetitive_fraction", "Evaluation failures: loop at the end", "fraction",
         "responses that end in a loop of the same tokens"),
        ("evaluation/confidently_incorrect_fraction", "Evaluation failures: incorrect majority", "fraction",
         "problems for which more than half of the responses agree on an incorrect answer"),
        ("evaluation/timeouts", "Evaluation timeouts", "responses",
         "responses scored as incorrect because the call timed out"),
        ("evaluation/*/pass_at_*", "*: pass@*", "fraction",
         "with `evaluation.benchmarks`: pass@n on the benchmark of this name"),
        ("evaluation/*/maj_at_*", "*: maj@*", "fraction", "maj@n on this benchmark"),
        ("evaluation/*/mean_at_*", "*: mean@*", "fraction", "mean@k on this benchmark", LISTED),
        ("evaluation/*/distinct_correct_at_*", "*: distinct correct solutions among *", "solutions",
         "different canonical forms of correct responses among n on this benchmark"),
        ("evaluation/*/response_length_mean", "Response length on *", "tokens", "mean length on this benchmark"),
        ("evaluation/*/truncated_fraction", "Truncated responses on *", "fraction",
         "truncated responses on this benchmark"),
        ("evaluation/*/unparsed_fraction", "Failures on *: no final answer", "fraction",
         "responses without a final answer on this benchmark"),
        ("evaluation/*/repetitive_fraction", "Failures on *: loop at the end", "fraction",
         "responses that end in a loop on this benchmark"),
        ("evaluation/*/confidently_incorrect_fraction", "Failures on *: incorrect majority", "fraction",
         "problems of this benchmark for which more than half of the responses agree on an incorrect answer"),
        ("evaluation/*/timeouts", "Timeouts on *", "responses",
         "responses scored as incorrect because the call timed out on this benchmark", LISTED),
    ),
    _section(
        "Exploration",
        "The feature Φ of a response is the direction in which training on it would move the model. By default, G2RL "
        "raises the rewards of correct responses whose direction differs from those of the other responses to the same "
        "problem (novelty ν); GRPO does not.",
        ("exploration/novelty_mean", "Novelty ν: mean", "0 to 1",
         "mean novelty ν: 1 for a direction that is unique in its group, 0 for one that repeats the others"),
        ("exploration/novelty_correct", "Novelty ν: correct", "0 to 1",
         "mean ν of the correct responses; null if there are none"),
        ("exploration/novelty_incorrect", "Novelty ν: incorrect", "0 to 1",
         "mean ν of the incorrect responses; null if there are none"),
        ("exploration/duplicate_correlation", "Novelty and copies", "-1 to 1",
         "correlation, over the responses of the step, of ν with the number of copies of a response in its group: "
         "negative if copies are less novel; absent if no response, or every response, is a copy"),
        ("exploration/covariance_mixed", "Pressure on the entropy: mixed groups", "nats",
         "covariance of advantage and log-prob of a response, mean over groups with correct and incorrect responses; "
         "to first order, an update lowers the entropy in proportion to it, or raises it if negative"),
        ("exploration/covariance_all_correct", "Pressure on the entropy: all correct", "nats",
         "the same over groups in which all responses are correct; absent if there are none"),
        ("exploration/covariance_all_incorrect", "Pressure on the entropy: all incorrect", "nats",
         "the same over groups in which all responses are incorrect; absent if there are none"),
        ("exploration/swept_again_fraction", "Tokens swept twice", "fraction",
         "response tokens swept twice for Φ, because their rollout log-prob misses `exploration.prior_tolerance`"),
        ("geometry/mean_cosine", "Mean cosine", "-1 to 1",
         "mean cosine of the features Φ of two responses of a group: 1 is the same direction, 0 unrelated"),
        ("geometry/cosine_p10", "Distribution of cosines: 10% quantile", "-1 to 1",
         "10% quantile of the cosines of all pairs within groups"),
        ("geometry/cosine_median", "Distribution of cosines: median", "-1 to 1", "median of these cosines"),
        ("geometry/cosine_p90", "Distribution of cosines: 90% quantile", "-1 to 1", "90% quantile of these cosines"),
        ("geometry/negative_fraction", "Pairs of responses: opposed", "fraction", "pairs with a negative cosine"),
        ("geometry/orthogonal_fraction", "Pairs of responses: unrelated", "fraction",
         "pairs with a cosine between -0.1 and 0.1"),
        ("geometry/effective_rank", "Effective rank", "directions",
         "effective rank of the features of a group: 1 if all are parallel, at most the group size"),
    ),
    _section(
        "Policy", "How the behavior of the model changes, and the updates that change it.",
        ("policy/entropy", "Entropy", "nats",
         "full-vocabulary entropy of the old policy, mean over response tokens; near 0, sampling no longer explores"),
        ("response/count", "Responses", "responses",
         "responses of the step, including all rounds of dynamic sampling", LISTED),
        ("response/truncated_fraction", "Truncated responses", "fraction",
         "responses truncated at `rollout.max_response_tokens`"),
        ("response/unparsed_fraction", "Failures: no final answer", "fraction",
         "responses without a final answer, that is, without a closed box"),
        ("response/repetitive_fraction", "Failures: loop at the end", "fraction",
         "responses that end in a loop: four or more copies of the same tokens"),
        ("response/confidently_incorrect_fraction", "Failures: incorrect majority", "fraction",
         "prompts for which more than half of the responses agree on an incorrect answer"),
        ("response/distinct_correct", "Distinct correct solutions", "solutions",
         "different canonical forms among the correct responses to a prompt, mean over prompts; absent if the reward "
         "function returns no forms"),
        ("response_length/mean", "Response length: mean", "tokens",
         "mean response length, including the end-of-sequence token"),
        ("response_length/max", "Response length: longest", "tokens", "length of the longest response"),
        ("update/count", "Updates", "updates", "optimizer updates of the step, including skipped ones", LISTED),
        ("update/skipped", "Skipped updates", "updates",
         "updates skipped because the loss or gradient was not finite"),
        ("update/loss", "Loss: total", "loss",
         "total loss, mean over the updates of the step (as all `update/` metrics below)", LISTED),
        ("update/policy_loss", "Loss: policy gradient", "loss", "clipped policy-gradient part of the loss", LISTED),
        ("update/kl", "KL to the reference", "nats",
         "KL to the frozen reference, by `algorithm.kl_estimator`; absent without a KL term"),
        ("update/entropy", "Entropy in the update", "nats", "entropy in the update pass", LISTED),
        ("update/ratio_mean", "Importance ratio", "ratio",
         "mean importance ratio of the current to the old policy", LISTED),
        ("update/approx_kl", "KL of the update", "nats",
         "KL divergence between the old and the current policy (k3)"),
        ("update/clip_fraction_low", "Clipped tokens: ratio too low", "fraction",
         "tokens with negative advantage and a ratio below the clip range"),
        ("update/clip_fraction_high", "Clipped tokens: ratio too high", "fraction",
         "tokens with positive advantage and a ratio above the clip range"),
        ("update/dual_clip_fraction", "Clipped tokens: dual clip", "fraction",
         "tokens with negative advantage and a ratio above the dual clip"),
        ("update/gradient_norm", "Gradient norm", "norm", "global gradient norm before clipping"),
        ("update/learning_rate", "Learning rate", "rate", "learning rate of the optimizer", LISTED),
    ),
    _section(
        "Critic", "With `algorithm.baseline=critic`.",
        ("critic/explained_variance", "Explained variance", "fraction",
         "1 - variance of return minus value / variance of the return, over the response tokens of the step before its "
         "updates: 1 is a perfect critic, 0 a constant one; null if all returns are equal"),
        ("critic/value_mean", "Values and returns: mean value", "reward", "mean value of the response tokens"),
        ("critic/return_mean", "Values and returns: mean return", "reward",
         "mean return of the response tokens, the target of the values"),
        ("critic/loss", "Loss of the critic", "loss",
         "half the squared error of the values, clipped by `algorithm.value_clip`; mean over the updates of the step"),
        ("critic/clip_fraction", "Clipped values", "fraction",
         "tokens whose error is that of the clipped value, which has no gradient"),
        ("critic/gradient_norm", "Gradient norm of the critic", "norm", "global gradient norm before clipping"),
        ("critic/learning_rate", "Learning rate of the critic", "rate", "learning rate of the critic's optimizer",
         LISTED),
        ("critic/skipped", "Skipped updates of the critic", "updates",
         "updates skipped because the loss or gradient was not finite"),
    ),
    _section(
        "Rollout engine and trainer",
        "The rollout engine and the trainer should assign the same probability to every token.",
        ("mismatch/logprob_difference_mean", "Log-prob difference: mean", "nats",
         "trainer and rollout engine: mean absolute log-prob difference"),
        ("mismatch/logprob_difference_max", "Log-prob difference: largest", "nats",
         "largest absolute log-prob difference"),
        ("mismatch/kl", "KL between engine and trainer", "nats",
         "KL divergence between rollout engine and trainer (k3), mean over tokens"),
        ("mismatch/truncated_fraction", "Truncated importance weights", "fraction",
         "tokens with importance weight above `algorithm.importance_cap`"),
        ("mismatch/rejected_fraction", "Rejected responses", "fraction",
         "with `algorithm.rejection_bounds`: responses whose probability ratio is outside of them"),
    ),
    _section(
        "Time", "Wall-clock time on the machine of each run; other work on that machine increases it.",
        ("throughput/response_tokens_per_s", "Throughput", "tokens/s",
         "response tokens of the step divided by the step time"),
        ("throughput/model_tflops_per_s", "Model FLOPs per second", "TFLOP/s",
         "operations of the models in the trainer's passes (old log-probs, reference, values, updates) divided by "
         "their time, "
         "per rank; counted from the architecture, without padding and repeated work"),
        ("throughput/mfu", "Model FLOPs utilization", "fraction",
         "`throughput/model_tflops_per_s` as a fraction of the GPU's peak in 16 bits; absent where it is not known"),
        ("time/step_s", "Step time", "s", "total step time: all phases and the time between them"),
        ("time/rollout_s", "Time per phase: rollout", "s", "generating the responses"),
        ("time/reward_s", "Time per phase: reward", "s", "scoring the responses"),
        ("time/old_logprobs_s", "Time per phase: old log-probs", "s",
         "old-log-prob pass: log p, entropy and Φ; not run for the first update unless Φ is computed in this pass"),
        ("time/reference_s", "Time per phase: reference", "s", "log-prob pass of the frozen reference model"),
        ("time/exploration_s", "Time per phase: exploration", "s", "novelty, shaping and advantages"),
        ("time/values_s", "Time per phase: values", "s", "values of the critic"),
        ("time/critic_update_s", "Time per phase: critic update", "s", "all optimizer updates of the critic"),
        ("time/update_s", "Time per phase: update", "s", "all optimizer updates"),
        ("time/weight_sync_s", "Time per phase: weight sync", "s", "sending the new weights to the rollout engine"),
        ("time/evaluation_s", "Time per phase: evaluation", "s", "evaluation, in steps that evaluate"),
        ("cost/features_s", "Cost of exploration: features Φ", "s",
         "computing Φ: part of the old-log-prob pass or of the update, or the estimate from the top-K; slowest rank"),
        ("cost/reduce_s", "Cost of exploration: sum over ranks", "s",
         "sum of Φ over ranks, without waiting for the slowest one"),
        ("cost/shaping_s", "Cost of exploration: novelty and rewards", "s", "novelty ν and shaped rewards"),
        ("cost/exploration_s", "Cost of exploration, total", "s",
         "total time that exploration adds to a step: the three above; absent without Φ", LISTED),
        ("cost/per_response_ms", "Cost of exploration per response", "ms", "`cost/exploration_s` per response", LISTED),
        ("cost/per_group_ms", "Cost of exploration per group", "ms", "`cost/exploration_s` per group", LISTED),
        ("cost/step_fraction", "Cost of exploration, fraction of the step", "fraction",
         "`cost/exploration_s` as a fraction of `time/step_s`"),
    ),
)
# fmt: on
METRICS = tuple(metric for section in SECTIONS for metric in section.metrics)

INTRODUCTION = """\
# Metrics

Generated from `megatron_g2rl/tracking/table.py` by `make docs`; edit that file, not this page.

Rank 0 writes the metrics of every step to `metrics.jsonl` in the run folder: one line per step, with `step` counted
from 0 and non-finite numbers as null. The same names are used in TensorBoard (`RUN/tensorboard`, unless
`logging.tensorboard=false`; view it with `tensorboard --logdir RUN/tensorboard`) and in Weights & Biases if
`logging.wandb_project` is set. The `evaluation/` metrics are in `evaluation.jsonl`, where `step` is the number of
training steps behind the evaluated weights. A resumed run discards the entries at or after the step from which it
resumes; only Weights & Biases keeps the old ones too. `CHANGELOG.md` lists renamed metrics. `g2rl report` reads old
and new names, and shows the titles of this page; metrics whose titles agree up to the colon share a chart.

Every `logging.responses_every_steps` steps, a few responses are written to `responses.jsonl`, one per line, and to
TensorBoard as text: from the first group with both correct and incorrect responses (else the first group), those with
the highest and the lowest novelty ν of each kind. Fields: `step`, `prompt`, `response`, `answer`, `reward` (base
reward), `correct`, `novelty` (ν, null if it is not computed), `shaped` (shaped reward), `finish_reason` (`stop` or
`length`).

Fractions are between 0 and 1. docs/method.md explains groups, novelty and updates.
"""


def members(metric: Metric, names: Iterable[str]) -> list[Metric]:
    """The metrics of one row of the table that are among `names`, with the text that `*` stands for in their titles."""
    found = []
    for name in sorted(filter(lambda name: fnmatchcase(name, metric.name), names), key=_natural):
        pattern = "(.*)".join(map(re.escape, metric.name.split("*")))
        title = metric.title
        for matched in re.fullmatch(pattern, name).groups():
            title = title.replace("*", matched, 1)
        found.append(replace(metric, name=name, title=title))
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts pass_at_8 before pass_at_16."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def unknown_names(names: Iterable[str]) -> list[str]:
    """The names that are missing from the table."""
    return [name for name in names if not any(fnmatchcase(name, metric.name) for metric in METRICS)]


def metrics_page() -> str:
    """The Markdown page of all metrics."""
    parts = [INTRODUCTION]
    for section in SECTIONS:
        rows = [f"| `{m.name}` | {m.title} | {m.unit} | {m.meaning} |" for m in section.metrics]
        head = ["| name | title | unit | meaning |", "|---|---|---|---|"]
        parts.append("\n".join([f"## {section.title}", "", section.note, "", *head, *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(metrics_page())
