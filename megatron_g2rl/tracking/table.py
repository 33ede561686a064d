"""The one table of metric names; writes docs/metrics.md: `python -m megatron_g2rl.tracking.table > docs/metrics.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby


@dataclass(frozen=True)
class Metric:
    """A number that a run writes once a step."""

    name: str
    """`subject/what`; a `*` stands for any text and makes a family of names."""
    unit: str
    meaning: str


METRICS = tuple(
    Metric(*row)
    for row in (
        ("reward/mean", "reward", "mean base reward, before shaping"),
        ("reward/pass_rate", "share", "correct responses"),
        ("reward/shaped_mean", "reward", "mean shaped reward r~; the base reward when nothing is explored"),
        ("reward/groups_used", "share", "groups that the updates use: those that were not dropped as uniform"),
        ("reward/*/mean", "reward", "of several `reward.functions`: mean reward by the one of this name, unweighted"),
        ("reward/*/std", "reward", "their standard deviation over the responses of the step"),
        ("reward/timeouts", "responses", "judged wrong because the answer took longer than `reward.deadline_s`"),
        ("reward/deaths", "responses", "judged wrong because the worker process died on them"),
        ("reward/answer_s_max", "s", "the slowest answer of the reward function"),
        ("response/count", "responses", "responses of the step, all rounds of dynamic sampling together"),
        ("response/tokens_mean", "tokens", "mean length, the end-of-sequence token included"),
        ("response/tokens_max", "tokens", "longest response"),
        ("response/cut_share", "share", "responses cut at `rollout.max_response_tokens`"),
        ("policy/entropy", "nats", "full-vocabulary entropy, mean over response tokens, of the weights that sampled"),
        ("exploration/score_mean", "0 to 1", "mean exploration score ν"),
        ("exploration/score_correct", "0 to 1", "mean ν of the correct responses; null when there is none"),
        ("exploration/score_wrong", "0 to 1", "mean ν of the other responses; null when there is none"),
        ("geometry/mean_cosine", "-1 to 1", "cosine of the features Φ of two responses of a group, mean over pairs"),
        ("geometry/cosine_p10", "-1 to 1", "one pair in ten, of all groups of the step, has a cosine below this"),
        ("geometry/cosine_median", "-1 to 1", "half of the pairs have a cosine below this"),
        ("geometry/cosine_p90", "-1 to 1", "nine pairs in ten have a cosine below this"),
        ("geometry/negative_share", "share", "pairs with a negative cosine"),
        ("geometry/orthogonal_share", "share", "pairs with a cosine between -0.1 and 0.1"),
        ("geometry/effective_rank", "directions", "effective rank of a group's features: 1 when all point one way"),
        ("mismatch/logprob_difference_mean", "nats", "trainer against sampler: mean absolute difference of log p"),
        ("mismatch/logprob_difference_max", "nats", "the largest such difference"),
        ("mismatch/kl", "nats", "KL divergence of sampler and trainer (k3), mean over tokens"),
        ("mismatch/truncated_share", "share", "tokens whose importance weight is above `algorithm.importance_cap`"),
        ("update/count", "updates", "optimizer updates of the step, skipped ones included"),
        ("update/skipped", "updates", "left out because loss or gradient was not finite"),
        ("update/loss", "loss", "the whole loss, mean over the updates of the step (as all below)"),
        ("update/policy_loss", "loss", "its clipped policy-gradient part"),
        ("update/kl", "nats", "KL to the frozen reference, by `algorithm.kl_estimator`; absent without a KL term"),
        ("update/entropy", "nats", "entropy in the update pass"),
        ("update/ratio_mean", "ratio", "mean importance ratio of the policy to the one that sampled"),
        ("update/approx_kl", "nats", "KL of the policy that sampled and the one that is trained (k3)"),
        ("update/clip_fraction_low", "share", "tokens with a negative advantage and a ratio below the clip range"),
        ("update/clip_fraction_high", "share", "tokens with a positive advantage and a ratio above the clip range"),
        ("update/dual_clip_fraction", "share", "tokens with a negative advantage and a ratio above the dual clip"),
        ("update/gradient_norm", "norm", "global gradient norm before clipping"),
        ("update/learning_rate", "rate", "learning rate"),
        ("evaluation/pass_at_*", "share", "held-out problems solved by one of so many responses, expected value"),
        ("evaluation/majority_at_*", "share", "held-out problems whose most frequent answer is right, ties drawn"),
        ("evaluation/tokens_mean", "tokens", "mean length of the responses of an evaluation"),
        ("evaluation/cut_share", "share", "of them cut at `rollout.max_response_tokens`"),
        ("evaluation/timeouts", "responses", "of them judged wrong because the answer took too long"),
        ("throughput/response_tokens_per_s", "tokens/s", "response tokens of the step by the time of the step"),
        ("time/step_s", "s", "the whole step: all phases below and what lies between them"),
        ("time/rollout_s", "s", "sampling the responses"),
        ("time/reward_s", "s", "judging them"),
        ("time/score_s", "s", "score pass: log p, entropy and Φ in one sweep (without Φ, not of the first update)"),
        ("time/reference_s", "s", "score pass of the frozen reference"),
        ("time/exploration_s", "s", "exploration scores, shaping and advantages"),
        ("time/update_s", "s", "all optimizer updates"),
        ("time/weights_s", "s", "giving the sampler the new weights"),
        ("time/evaluation_s", "s", "evaluation, in the steps that evaluate"),
        ("cost/features_s", "s", "Φ: its part of the score pass, or its estimate from the top K; slowest rank"),
        ("cost/reduce_s", "s", "summing Φ over ranks, without waiting for the slowest one"),
        ("cost/shaping_s", "s", "exploration scores ν and shaped rewards"),
        ("cost/exploration_s", "s", "all that exploration adds to a step: the three above; absent without Φ"),
        ("cost/per_response_ms", "ms", "the same per response"),
        ("cost/per_group_ms", "ms", "the same per group"),
        ("cost/step_share", "share", "the same as a share of `time/step_s`"),
    )
)

INTRODUCTION = """\
# Metrics

Made from `megatron_g2rl/tracking/table.py` by `make docs`; edit that file, not this page.

Rank 0 writes the numbers of every step to `metrics.jsonl` in the folder of the run: one line a step, `step` counted
from 0, a number that is not finite as null. The same names go to TensorBoard (`RUN/tensorboard`, unless
`logging.tensorboard=false`: `tensorboard --logdir RUN/tensorboard`) and to Weights & Biases when
`logging.wandb_project` is set. The `evaluation/` numbers of a run that evaluates stand in `evaluation.jsonl`, where
`step` is the number of steps behind the weights. A run that is resumed takes back what it wrote after the step it goes
on from; only Weights & Biases keeps both.

Every `logging.responses_every_steps` steps a few responses go to `responses.jsonl`, one a line, and to TensorBoard as
text: of the first group that holds both correct and wrong responses (else the first group) those with the highest and
the lowest exploration score ν of either kind. Fields: `step`, `prompt`, `response`, `answer`, `reward` (base reward),
`correct`, `score` (ν, null when it is not computed), `shaped` (shaped reward), `finish_reason` (`stop` or `length`).

Shares are between 0 and 1. What a group, a score or an update is, docs/method.md explains.
"""


def unknown_names(names: Iterable[str]) -> list[str]:
    """Those of `names` that the table lacks."""
    return [name for name in names if not any(fnmatchcase(name, metric.name) for metric in METRICS)]


def metrics_page() -> str:
    """The Markdown page of all metrics."""
    sections = [INTRODUCTION]
    for subject, metrics in groupby(METRICS, key=lambda metric: metric.name.partition("/")[0]):
        rows = [f"| `{m.name}` | {m.unit} | {m.meaning} |" for m in metrics]
        sections.append("\n".join([f"## {subject}", "", "| name | unit | what it is |", "|---|---|---|", *rows, ""]))
    return "\n".join(sections)


if __name__ == "__main__":
    sys.stdout.write(metrics_page())
