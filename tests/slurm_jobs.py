"""Jobs on a real Slurm, seen through its own commands."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = [
    "warm_start.steps=2",
    "trainer.steps=6",
    "trainer.prompts_per_step=4",
    "trainer.group_size=4",
    "trainer.responses_per_update=8",
    "trainer.tokens_per_microbatch=256",
    "rollout.max_response_tokens=12",
    "algorithm.drop_uniform_groups=false",
    "checkpoint.every_steps=2",
    "reward.workers=1",
]
CONFIG = ROOT / "examples" / "quickstart" / "arithmetic.yaml"


def settings(folder: Path) -> list[str]:
    return [*SMALL, f"run.directory={folder}", "run.name=run"]


def arguments(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "megatron_g2rl.cli", "train", str(CONFIG), *settings(folder), *overrides]


def metrics(run: Path) -> list[dict]:
    """Everything that does not measure time: the layout is the same, so every other number has to be."""
    timed = ("time/", "cost/", "throughput/", "reward/answer_s")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def read(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def wait_until(true, seconds: float, what: str, poll: float = 0.2):
    """The first value of `true()` that counts as true."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"waited {seconds} s: {what() if callable(what) else what}"
        time.sleep(poll)
    return value


def ended(process: subprocess.Popen, seconds: float = 150) -> tuple[int, str]:
    """Exit code of a command of g2rl and all that it said."""
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


class Job:
    """A submitted job and the run it trains."""

    def __init__(self, number: str, run: Path, log: Path):
        self.number, self.run, self.log = number, run, log

    def field(self, name: str) -> str:
        """One field of what Slurm says of the job, such as JobState or Restarts."""
        text = read("scontrol", "show", "job", "--oneliner", self.number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word).get(name, "")

    def status(self) -> dict:
        file = self.run / "status.json"
        return json.loads(file.read_text()) if file.is_file() else {"step": -1, "phase": ""}

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: self.status()["step"] >= step, 90, self.told, poll=0.05)

    def wait(self, seconds: float = 120) -> None:
        """Wait for its end, which has to be a good one."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.field("JobState") in ended, seconds, self.told)
        assert self.field("JobState") == "COMPLETED", self.told()

    def told(self) -> str:
        return f"{read('scontrol', 'show', 'job', self.number)}\n{self.log.read_text() if self.log.is_file() else ''}"
