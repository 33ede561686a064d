"""Jobs on a real Slurm, seen through its own commands."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from quickstart_model import quickstart_model

ROOT = Path(__file__).parents[1]
SMALL = [
    "data.max_rows=300",
    "trainer.steps=6",
    "trainer.prompts_per_step=4",
    "trainer.group_size=4",
    "trainer.responses_per_update=8",
    "trainer.tokens_per_microbatch=256",
    "rollout.max_response_tokens=12",
    "algorithm.drop_uniform_groups=false",
    "exploration.mapping=centered",
    "checkpoint.every_steps=2",
    "reward.workers=1",
    "reward.deadline_s=120",
]
LIMIT_S = 600
"""Limit in seconds of every wait, which takes a tenth of it on an idle machine."""
CONFIG = ROOT / "examples" / "quickstart" / "arithmetic.yaml"


SLOW = """
import os
import time
from pathlib import Path

from megatron_g2rl.rewards import math_reward


def slow_reward(text: str, answer: str) -> float:
    attempts = Path(os.environ["G2RL_LAUNCH"], "jobs").read_text().split()
    time.sleep(float(os.environ["SLEEP_S"]) if len(attempts) <= int(os.environ["SLOW_ATTEMPTS"]) else 0)
    return math_reward(text, answer)
"""
"""Module of a delayed math reward: 8 * SLEEP_S per step and rank, in the first SLOW_ATTEMPTS attempts."""


def install_g2rl(folder: Path, command: list[str] | None = None) -> list[str]:
    """Install a command `g2rl` that runs `command`; returns the `setup` lines that add it to the PATH of jobs."""
    (folder / "bin").mkdir(exist_ok=True)
    program = folder / "bin" / "g2rl"
    program.write_text(f'#!/bin/bash\nexec {shlex.join(command or [sys.executable, "-m", "megatron_g2rl.cli"])} "$@"\n')
    program.chmod(0o755)
    return [f"export PATH={shlex.quote(str(folder / 'bin'))}:$PATH"]


def settings(folder: Path) -> list[str]:
    return [*SMALL, f"model.path={quickstart_model()}", f"run.directory={folder}", "run.name=run"]


def arguments(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "megatron_g2rl.cli", "train", str(CONFIG), *settings(folder), *overrides]


def metrics(run: Path) -> list[dict]:
    """All metrics but times: the layout is the same, so all others must be equal."""
    timed = ("time/", "cost/", "throughput/", "reward/latency_s")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def read(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def wait_until(true, seconds: float, what: str, poll: float = 0.2):
    """The first truthy value of `true()`."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"waited {seconds} s: {what() if callable(what) else what}"
        time.sleep(poll)
    return value


def ended(process: subprocess.Popen, seconds: float = LIMIT_S) -> tuple[int, str]:
    """Exit code and complete output of a command of g2rl."""
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


class Run:
    """A launched run, as its folder and Slurm show it."""

    def __init__(self, folder: Path, process: subprocess.Popen):
        """Wait for its first job, which `process` submits."""
        self.folder, self.process = folder, process
        self.launch = folder / "launch"
        # A process that detaches ends with 0 before its job begins.
        wait_until(lambda: self.job_ids() or process.poll(), LIMIT_S, "the first job to begin")
        assert self.job_ids(), ended(process)

    def job_ids(self) -> list[str]:
        """Ids of the jobs of its attempts so far, in order."""
        jobs = self.launch / "jobs"
        return jobs.read_text().split() if jobs.is_file() else []

    @property
    def job(self) -> str:
        """Id of its latest job."""
        return self.job_ids()[-1]

    def attempts(self) -> list[dict[str, str]]:
        """Its finished attempts, from `RUN/launch/attempts.tsv`."""
        names = ("time", "attempt", "code", "before", "after", "spent")
        file = self.launch / "attempts.tsv"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [dict(zip(names, line.split("\t"), strict=True)) for line in lines]

    def wait_for_step(self, step: int, attempt: int = 1) -> None:
        """Wait until the attempt of that number has completed a step."""

        def done() -> bool:
            assert self.process.poll() is None, f"it has exited already: {ended(self.process)}\n{self.diagnostics()}"
            file = self.folder / "status.json"
            return len(self.job_ids()) >= attempt and file.is_file() and json.loads(file.read_text())["step"] >= step

        wait_until(done, LIMIT_S, self.diagnostics, poll=0.05)

    def end(self, seconds: float = LIMIT_S) -> str:
        """Wait for its success; returns the output of `g2rl launch --wait`."""
        try:
            code, output = ended(self.process, seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"waited {seconds} s for the end of the run: {self.diagnostics()}") from None
        assert code == 0, f"{output}\n{self.diagnostics()}"
        return output

    def diagnostics(self) -> str:
        """Logs and Slurm's state, for the message of a failure."""
        files = [self.launch / "attempts.tsv", *sorted(self.launch.glob("log-*.out"))]
        texts = [f"==> {file.name} <==\n{file.read_text()[-3000:]}" for file in files if file.is_file()]
        jobs = [read("scontrol", "show", "job", number) for number in dict.fromkeys(self.job_ids())]
        return "\n".join([read("sinfo", "--long", "--Node"), *jobs, *texts])
