"""Runs `g2rl train` on the built-in task, at a small size, in separate processes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from quickstart_model import quickstart_model

from tools.fuzz.forking import ForkedCommand, fork_ranks, wait_for_all

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart" / "arithmetic.yaml"
SMALL = [
    "data.max_rows=300",
    "trainer.steps=4",
    "trainer.prompts_per_step=4",
    "trainer.group_size=4",
    "trainer.responses_per_update=8",
    "trainer.tokens_per_microbatch=256",
    "rollout.max_response_tokens=12",
    # an untrained model does not end its responses
    "rollout.incomplete_responses=scored",
    "checkpoint.every_steps=2",
    "evaluation.prompts=3",
    "evaluation.responses_per_prompt=2",
    "evaluation.every_steps=2",
    "reward.workers=1",
    "reward.deadline_s=120",
]


def arguments(folder: Path, name: str, *overrides: str) -> list[str]:
    """Arguments of `g2rl`."""
    # Untrained models are nearly always incorrect: keep uniform groups and shape them, so that every step has updates
    # whose advantages depend on Φ.
    settings = [
        *SMALL,
        f"model.path={quickstart_model()}",
        "algorithm.drop_uniform_groups=false",
        "exploration.mapping=centered",
        f"run.directory={folder}",
        f"run.name={name}",
    ]
    if not any(override.startswith("reward.functions=") for override in overrides):
        # Scores arithmetic like the default, but its workers import math-verify only if an answer needs it.
        settings.append("reward.function=megatron_g2rl.rewards:task_reward")
    return ["train", str(QUICKSTART), *settings, *overrides]


def command(folder: Path, name: str, *overrides: str) -> list[str]:
    """Command line of a separate interpreter, as a user starts it."""
    return [sys.executable, "-m", "megatron_g2rl.cli", *arguments(folder, name, *overrides)]


@dataclass(frozen=True)
class Outcome:
    """Result of a run: `text` is the output of all its ranks."""

    code: int
    text: str


def start(folder: Path, name: str, environment: dict[str, str], *overrides: str, ranks: int = 1) -> list[ForkedCommand]:
    """Start the ranks of a run as a launcher of several machines does: each with its rank in environment variables.

    `trainer.ranks`, which starts ranks by torchrun, is for a `command`.
    """
    # two successive runs of one name write to different files
    number = len(list(folder.glob(f"{name}.*.output.0")))
    output = folder / f"{name}.{number}.output"
    return fork_ranks(ranks, arguments(folder, name, *overrides), folder, output, environment)


def attempt(folder: Path, name: str, environment: dict[str, str], *overrides: str, ranks: int = 1) -> Outcome:
    """Run until all ranks have exited."""
    started = start(folder, name, environment, *overrides, ranks=ranks)
    codes = wait_for_all(started, 600)
    return Outcome(max(codes, key=abs), "".join(process.read() for process in started))


def train(folder: Path, name: str, environment: dict[str, str], *overrides: str, ranks: int = 1) -> list[dict]:
    """Run to the end and check that the log has no progress bars or warnings; returns the lines of metrics.jsonl."""
    outcome = attempt(folder, name, environment, *overrides, ranks=ranks)
    check_log(outcome.code, outcome.text)
    return read_metrics(folder / name)


def train_by_command(folder: Path, name: str, environment: dict[str, str], *overrides: str) -> list[dict]:
    """`train` in a separate interpreter."""
    options = dict(env=environment, capture_output=True, text=True, timeout=600, cwd=folder)
    result = subprocess.run(command(folder, name, *overrides), **options)
    check_log(result.returncode, result.stderr)
    return read_metrics(folder / name)


def check_log(code: int, text: str) -> None:
    assert code == 0, text[-4000:]
    for noise in ("%|", "\r", "/dev/shm", "DEPRECATED", "full_param_layout"):
        assert noise not in text, text[-4000:]


def read_metrics(run: Path, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def without_times(metrics: list[dict]) -> list[dict]:
    """All metrics but wall-clock measurements."""
    timed = ("time/", "cost/", "throughput/", "reward/latency_s")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in metrics]


def read_status(run: Path) -> dict:
    """The status of a run; {} before it is written."""
    return json.loads((run / "status.json").read_text()) if (run / "status.json").is_file() else {}
