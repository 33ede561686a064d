"""Runs `g2rl train` on the built-in task, small, as a user does: in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart" / "arithmetic.yaml"
SMALL = [
    "warm_start.steps=2",
    "trainer.steps=4",
    "trainer.prompts_per_step=4",
    "trainer.group_size=4",
    "trainer.responses_per_update=8",
    "trainer.tokens_per_microbatch=256",
    "rollout.max_response_tokens=12",
    "checkpoint.every_steps=2",
    "evaluation.prompts=3",
    "evaluation.responses_per_prompt=2",
    "evaluation.every_steps=2",
    "reward.workers=1",
]


def command(folder: Path, name: str, *overrides: str) -> list[str]:
    # Untrained models are nearly always wrong: keep uniform groups, so that every step has its updates.
    settings = [*SMALL, "algorithm.drop_uniform_groups=false", f"run.directory={folder}", f"run.name={name}"]
    return [sys.executable, "-m", "megatron_g2rl.cli", "train", str(QUICKSTART), *settings, *overrides]


def train(folder: Path, name: str, environment: dict, *overrides: str) -> list[dict]:
    """Run to the end, with a log that is free of progress bars and of worries; the lines of metrics.jsonl."""
    result = subprocess.run(
        command(folder, name, *overrides), env=environment, capture_output=True, text=True, timeout=280, cwd=folder
    )
    assert result.returncode == 0, result.stderr[-4000:]
    for noise in ("%|", "\r", "/dev/shm"):
        assert noise not in result.stderr, result.stderr[-4000:]
    return read_metrics(folder / name)


def read_metrics(run: Path, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def without_times(metrics: list[dict]) -> list[dict]:
    """Everything but wall-clock measurements."""
    timed = ("time/", "cost/", "throughput/", "reward/answer_s")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in metrics]


def read_status(run: Path) -> dict:
    """Where a run is; {} before it says so."""
    return json.loads((run / "status.json").read_text()) if (run / "status.json").is_file() else {}
