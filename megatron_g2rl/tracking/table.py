"""The table of all metrics; generates docs/metrics.md: `python -m megatron_g2rl.tracking.table > docs/metrics.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby


@dataclass(frozen=True)
class Metric:
    """A number that a run writes once per step."""

    name: str
    """`subject/quantity`; `*` matches any text and makes a family of names."""
    unit: str
    meaning: str


METRICS = tuple(
    Metric(*row)
    for row in (
        ("reward/mean", "reward", "mean base reward, before shaping"),
        ("reward/pass_rate", "fraction", "correct responses"),
        ("reward/shaped_mean", "reward", "mean shaped reward r~; the base reward with `exploration.method=none`"),
        ("reward/groups_used_fraction", "fraction", "groups used by the updates, that is, not dropped as uniform"),
        ("reward/*/mean", "reward", "with `reward.functions`: mean reward by the function of this name, unweighted"),
        ("reward/*/std", "reward", "its standard deviation over the responses of the step"),
        ("reward/timeouts", "responses", "scored as incorrect because the call exceeded `reward.deadline_s`"),
        ("reward/worker_crashes", "responses", "scored as incorrect because the worker process died"),
        ("reward/latency_s_max", "s", "slowest call of the reward function"),
        ("response/count", "responses", "responses of the step, including all rounds of dynamic sampling"),
        ("response/truncated_fraction", "fraction", "responses truncated at `rollout.max_response_tokens`"),
        ("response_length/mean", "tokens", "mean response length, including the end-of-sequence token"),
        ("response_length/max", "tokens", "length of the longest response"),
        ("policy/entropy", "nats", "full-vocabulary entropy of the old policy, mean over response tokens"),
        ("exploration/novelty_mean", "0 to 1", "mean novelty ν"),
        ("exploration/novelty_correct", "0 to 1", "mean ν of the correct responses; null if there are none"),
        ("exploration/novelty_incorrect", "0 to 1", "mean ν of the incorrect responses; null if there are none"),
        (
            "exploration/swept_again_fraction",
            "fraction",
            "response tokens swept twice for Φ: rollout log-prob off by more than `exploration.prior_tolerance`",
        ),
        ("geometry/mean_cosine", "-1 to 1", "mean cosine of the features Φ of two responses of a group"),
        ("geometry/cosine_p10", "-1 to 1", "10% quantile of the cosines of all pairs within groups"),
        ("geometry/cosine_median", "-1 to 1", "median of these cosines"),
        ("geometry/cosine_p90", "-1 to 1", "90% quantile of these cosines"),
        ("geometry/negative_fraction", "fraction", "pairs with a negative cosine"),
        ("geometry/orthogonal_fraction", "fraction", "pairs with a cosine between -0.1 and 0.1"),
        ("geometry/effective_rank", "directions", "effective rank of the features of a group: 1 if all are parallel"),
        ("mismatch/logprob_difference_mean", "nats", "trainer and rollout engine: mean absolute log-prob difference"),
        ("mismatch/logprob_difference_max", "nats", "largest absolute log-prob difference"),
        ("mismatch/kl", "nats", "KL divergence between rollout engine and trainer (k3), mean over tokens"),
        ("mismatch/truncated_fraction", "fraction", "tokens with importance weight above `algorithm.importance_cap`"),
        ("update/count", "updates", "optimizer updates of the step, including skipped ones"),
        ("update/skipped", "updates", "updates skipped because the loss or gradient was not finite"),
        ("update/loss", "loss", "total loss, mean over the updates of the step (as all metrics below)"),
        ("update/policy_loss", "loss", "clipped policy-gradient part of the loss"),
        ("update/kl", "nats", "KL to the frozen reference, by `algorithm.kl_estimator`; absent without a KL term"),
        ("update/entropy", "nats", "entropy in the update pass"),
        ("update/ratio_mean", "ratio", "mean importance ratio of the current to the old policy"),
        ("update/approx_kl", "nats", "KL divergence between the old and the current policy (k3)"),
        ("update/clip_fraction_low", "fraction", "tokens with negative advantage and a ratio below the clip range"),
        ("update/clip_fraction_high", "fraction", "tokens with positive advantage and a ratio above the clip range"),
        ("update/dual_clip_fraction", "fraction", "tokens with negative advantage and a ratio above the dual clip"),
        ("update/gradient_norm", "norm", "global gradient norm before clipping"),
        ("update/learning_rate", "rate", "learning rate"),
        ("evaluation/pass_at_*", "fraction", "pass@n: problems with a correct response among n, expected value"),
        (
            "evaluation/maj_at_*",
            "fraction",
            "maj@n: problems whose most frequent answer is correct; ties count in part",
        ),
        ("evaluation/response_length_mean", "tokens", "mean response length in the evaluation"),
        ("evaluation/truncated_fraction", "fraction", "responses truncated at the length limit of the evaluation"),
        ("evaluation/timeouts", "responses", "responses scored as incorrect because the call timed out"),
        ("throughput/response_tokens_per_s", "tokens/s", "response tokens of the step divided by the step time"),
        ("time/step_s", "s", "total step time: all phases below and the time between them"),
        ("time/rollout_s", "s", "generating the responses"),
        ("time/reward_s", "s", "scoring the responses"),
        ("time/old_logprobs_s", "s", "old-log-prob pass: log p, entropy and Φ (without Φ, not for the first update)"),
        ("time/reference_s", "s", "log-prob pass of the frozen reference model"),
        ("time/exploration_s", "s", "novelty, shaping and advantages"),
        ("time/update_s", "s", "all optimizer updates"),
        ("time/weight_sync_s", "s", "sending the new weights to the rollout engine"),
        ("time/evaluation_s", "s", "evaluation, in steps that evaluate"),
        ("cost/features_s", "s", "Φ: its part of the old-log-prob pass, or its estimate from the top-K; slowest rank"),
        ("cost/reduce_s", "s", "sum of Φ over ranks, without waiting for the slowest one"),
        ("cost/shaping_s", "s", "novelty ν and shaped rewards"),
        ("cost/exploration_s", "s", "total time that exploration adds to a step: the three above; absent without Φ"),
        ("cost/per_response_ms", "ms", "`cost/exploration_s` per response"),
        ("cost/per_group_ms", "ms", "`cost/exploration_s` per group"),
        ("cost/step_fraction", "fraction", "`cost/exploration_s` as a fraction of `time/step_s`"),
    )
)

INTRODUCTION = """\
# Metrics

Generated from `megatron_g2rl/tracking/table.py` by `make docs`; edit that file, not this page.

Rank 0 writes the metrics of every step to `metrics.jsonl` in the run folder: one line per step, with `step` counted
from 0 and non-finite numbers as null. The same names are used in TensorBoard (`RUN/tensorboard`, unless
`logging.tensorboard=false`; view it with `tensorboard --logdir RUN/tensorboard`) and in Weights & Biases if
`logging.wandb_project` is set. The `evaluation/` metrics are in `evaluation.jsonl`, where `step` is the number of
training steps behind the evaluated weights. A resumed run discards the entries at or after the step from which it
resumes; only Weights & Biases keeps both. `CHANGELOG.md` lists renamed metrics; `g2rl report` reads both names.

Every `logging.responses_every_steps` steps, a few responses are written to `responses.jsonl`, one per line, and to
TensorBoard as text: from the first group with both correct and incorrect responses (else the first group), those with
the highest and the lowest novelty ν of each kind. Fields: `step`, `prompt`, `response`, `answer`, `reward` (base
reward), `correct`, `novelty` (ν, null if it is not computed), `shaped` (shaped reward), `finish_reason` (`stop` or
`length`).

Fractions are between 0 and 1. docs/method.md explains groups, novelty and updates.
"""


def unknown_names(names: Iterable[str]) -> list[str]:
    """The names that are missing from the table."""
    return [name for name in names if not any(fnmatchcase(name, metric.name) for metric in METRICS)]


def metrics_page() -> str:
    """The Markdown page of all metrics."""
    sections = [INTRODUCTION]
    for subject, metrics in groupby(METRICS, key=lambda metric: metric.name.partition("/")[0]):
        rows = [f"| `{m.name}` | {m.unit} | {m.meaning} |" for m in metrics]
        sections.append("\n".join([f"## {subject}", "", "| name | unit | meaning |", "|---|---|---|", *rows, ""]))
    return "\n".join(sections)


if __name__ == "__main__":
    sys.stdout.write(metrics_page())
