"""Run folders and evaluation results of several methods and seeds, synthesized for tests of the report.

PYTHONPATH=.:tests python -m synthetic_runs FOLDER [SEEDS [METHOD...]]
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_g2rl.config.loading import dump_config, load_config
from megatron_g2rl.config.tree import Config

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS, EVALUATED, PROBLEMS = 120, 20, 40
QUALITY = {"none": 0.40, "gradient": 0.52, "semantic": 0.46, "partition": 0.43, "elliptical": 0.44, "hidden": 0.45}
"""Final pass@1 by exploration method."""


def configuration(method: str, seed: int, *overrides: str) -> Config:
    """The configuration of a run."""
    keys = [f"exploration.method={method}", f"run.seed={seed}", f"trainer.steps={STEPS}"]
    if method == "semantic":
        keys.append("exploration.encoder=sentence-transformers/all-MiniLM-L6-v2")
    keys.append(f"run.name={method}_seed{seed}")
    return load_config(REPOSITORY / "examples/quickstart/arithmetic.yaml", [*keys, *overrides])


def write_run(folder: Path, method: str, seed: int, *overrides: str, steps: int = STEPS) -> Path:
    """Write the files of one run; the numbers depend on the method and the seed, and differ more between seeds."""
    draw = np.random.default_rng([seed, len(method)])
    run, quality = folder / f"{method}_seed{seed}", QUALITY[method] + 0.02 * draw.normal()
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(configuration(method, seed, *overrides)))
    rows = []
    for step in range(steps):
        progress = 1 - math.exp(-3 * step / STEPS)
        noise = dict(zip("abcdef", draw.normal(size=6), strict=True))
        cosine = 0.25 * (1 - 0.6 * progress * (method == "gradient")) + 0.02 * noise["b"]
        rows.append(
            {
                "step": step,
                "reward/pass_rate": min(1, max(0, 0.1 + quality * progress + 0.04 * noise["a"])),
                "reward/mean": 0.1 + quality * progress + 0.04 * noise["a"],
                "reward/groups_used_fraction": 0.8 - 0.3 * progress + 0.03 * noise["d"],
                "policy/entropy": 0.9 - (0.3 if method == "gradient" else 0.6) * progress + 0.02 * noise["c"],
                "geometry/mean_cosine": cosine,
                "geometry/negative_fraction": min(1, max(0, 0.3 - cosine + 0.02 * noise["d"])),
                "geometry/effective_rank": 3 + 2 * (method == "gradient") * progress + 0.2 * noise["e"],
                "geometry/cosine_p10": cosine - 0.2,
                "geometry/cosine_median": cosine,
                "geometry/cosine_p90": cosine + 0.25 + 0.02 * noise["f"],
                "response/count": 64,
                "response_length/mean": 200 + 80 * progress + 10 * noise["f"],
                "response/truncated_fraction": 0.25 if (method, seed) == ("gradient", 2) else 0.02,
                "time/step_s": 10 + (method != "none") + 0.3 * noise["e"],
                "time/rollout_s": 5 + 0.2 * noise["d"],
                "time/update_s": 4 + 0.1 * noise["c"],
                **({"cost/exploration_s": 0.4, "cost/step_fraction": 0.04} if method != "none" else {}),
            }
        )
    evaluations = [
        {
            "step": step,
            "evaluation/pass_at_1": 0.05 + quality * (1 - math.exp(-3 * step / STEPS)) + 0.01 * draw.normal(),
        }
        for step in range(0, steps + 1, EVALUATED)
    ]
    for evaluation in evaluations:
        evaluation["evaluation/pass_at_8"] = min(1, 1.4 * evaluation["evaluation/pass_at_1"] + 0.1)
    for name, lines in (("metrics", rows), ("evaluation", evaluations)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def write_result(folder: Path, method: str, seed: int, benchmark: str = "math500", *, step: int = STEPS) -> Path:
    """Write the summary.json of one evaluated checkpoint: problems differ in difficulty, and seeds in quality."""
    difficulty = np.random.default_rng(len(benchmark)).normal(size=PROBLEMS)
    draw = np.random.default_rng([seed, len(method), len(benchmark)])
    level = 2 * (QUALITY[method] - 0.4) + 0.1 * draw.normal()
    chance = 1 / (1 + np.exp(difficulty - level))
    correct = draw.binomial(8, chance) / 8
    values = {"pass_at_1": correct.tolist(), "maj_at_8": (correct > 0.5).astype(float).tolist()}
    content = {
        "benchmark": benchmark,
        "model": f"{method}_seed{seed}_step_{step:08}",
        "step": step,
        "training": json.loads(configuration(method, seed).model_dump_json()),
        "metrics": {name: float(np.mean(each)) for name, each in values.items()},
        "problem_ids": list(range(PROBLEMS)),
        "per_problem": values,
    }
    place = folder / content["model"] / benchmark
    place.mkdir(parents=True)
    (place / "summary.json").write_text(json.dumps(content))
    return place


def write_all(folder: Path, methods: Sequence[str], seeds: int) -> tuple[list[Path], Path]:
    """Runs and results of these methods; returns the runs and the folder of the results."""
    runs = [write_run(folder / "runs", method, seed) for method in methods for seed in range(seeds)]
    for method in methods:
        for seed in range(seeds):
            for benchmark in ("math500", "aime24"):
                write_result(folder / "evaluations", method, seed, benchmark)
    return runs, folder / "evaluations"


if __name__ == "__main__":
    write_all(Path(sys.argv[1]), sys.argv[3:] or ["none", "gradient"], int((sys.argv[2:] or [5])[0]))
