"""Configuration keys and metrics that have another name than in earlier versions (CHANGELOG.md has the table).

An old key in a configuration is an error that names the new key; files of older runs are read under the new names.
"""

from __future__ import annotations

import re

KEYS = {"checkpoint.on_damage": "checkpoint.on_corruption"}
"""Old configuration key to new one."""
REMOVED = {
    "warm_start": "warm_start is no longer part of a run: `g2rl warm-start examples/quickstart/model.yaml` creates and "
    "fine-tunes the model before it; remove this section, and name the model's folder in model.path"
} | {
    f"rollout.{name}": f"rollout.{name} does not exist: training samples from the complete distribution, because the "
    "trainer scores responses by it; with truncated sampling the importance ratios of the first update would not be 1. "
    f"Evaluations can be truncated: evaluation.{name}"
    for name in ("top_p", "top_k", "min_p")
}
"""Section or key that does not exist to the reason, or to what replaces it."""
VALUES = {("checkpoint.best_metric", "majority_at_n"): "maj_at_n"}
"""New value of a key whose old value is no longer accepted."""
METRICS = {
    "reward/groups_used": "reward/groups_used_fraction",
    "reward/deaths": "reward/worker_crashes",
    "reward/answer_s_max": "reward/latency_s_max",
    "response/cut_share": "response/truncated_fraction",
    "response/tokens_mean": "response_length/mean",
    "response/tokens_max": "response_length/max",
    "exploration/score_mean": "exploration/novelty_mean",
    "exploration/score_correct": "exploration/novelty_correct",
    "exploration/score_wrong": "exploration/novelty_incorrect",
    "geometry/negative_share": "geometry/negative_fraction",
    "geometry/orthogonal_share": "geometry/orthogonal_fraction",
    "mismatch/truncated_share": "mismatch/truncated_fraction",
    "evaluation/tokens_mean": "evaluation/response_length_mean",
    "evaluation/cut_share": "evaluation/truncated_fraction",
    "time/score_s": "time/old_logprobs_s",
    "time/weights_s": "time/weight_sync_s",
    "cost/step_share": "cost/step_fraction",
}
"""Old metric name to new one; `evaluation/majority_at_N` is renamed for every N."""
_MAJORITY = re.compile(r"evaluation/majority_at_(\d+)")


def current_metric(name: str) -> str:
    """The name that a metric of any version has now."""
    return METRICS.get(name) or _MAJORITY.sub(r"evaluation/maj_at_\1", name)


def current_key(path: str) -> str:
    """The dotted name that a configuration key of any version has now."""
    return KEYS.get(path, path)
