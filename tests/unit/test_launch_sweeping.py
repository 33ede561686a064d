"""Sweeps are submitted in lanes that keep the limit, every run once, even after kills."""

from __future__ import annotations

import os
import random
import re
import sys
from pathlib import Path

import pytest

from g2rl_launch import monitor, submit
from g2rl_launch.job import Job, sbatch_options
from g2rl_launch.sweep import Sweep
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.loading import dump_config
from megatron_g2rl.errors import UserError

CONFIG = Path(__file__).parents[1] / "data" / "run.yaml"


class Queue:
    """A stand-in for Slurm: jobs wait for their dependencies; squeue shows them."""

    def __init__(self, folder: Path):
        self.folder, self.jobs, self.number, self.most = folder, {}, 100, 0
        self.refuse_after: int | None = None
        self.show()

    def submit(self, job: Job) -> list[str]:
        if self.refuse_after == len(self.jobs):
            raise UserError("AssocMaxSubmitJobLimit")
        self.number += 1
        dependency = sbatch_options(job.profile, job.after).get("dependency", "")
        self.jobs[str(self.number)] = (job.name, set(re.findall(r"afterany:(\d+)", dependency)))
        self.show()
        return [str(self.number)]

    def running(self) -> list[str]:
        return [number for number, (_, after) in self.jobs.items() if not after & {*self.jobs}]

    def show(self) -> None:
        running = self.running()
        self.most = max(self.most, len(running))
        lines = []
        for number, (name, after) in self.jobs.items():
            left = ",".join(f"afterany:{other}(unfulfilled)" for other in sorted(after & {*self.jobs}))
            state = "RUNNING|" if number in running else "PENDING|"
            lines.append(f"{number}|{state}{name}|{left or '(null)'}|None")
        (self.folder / "queue").write_text("\n".join(lines) + "\n")

    def end(self, number: str, outcome: str) -> None:
        name, _ = self.jobs.pop(number)
        launch = self.folder / "runs" / name / "launch"
        launch.mkdir(parents=True, exist_ok=True)
        (launch / "outcome").write_text(f"{outcome}\n")
        (launch / f"log-{number}-0.out").write_text(
            "RuntimeError: no luck\nsrun: error: task 0\nslurmstepd-n1: error: STEP 6\n"
        )
        self.show()


@pytest.fixture
def queue(tmp_path, monkeypatch) -> Queue:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\ncat {tmp_path}/queue\n")
    (tmp_path / "bin" / "scancel").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scancelled\n')
    for program in ("squeue", "scancel"):
        (tmp_path / "bin" / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(monitor, "POLL_S", 0.01)
    made = Queue(tmp_path)
    monkeypatch.setattr(submit, "submit_job", made.submit)
    monkeypatch.setenv("G2RL_LAUNCH_PYTHON", sys.executable)  # a stand-in does not need nemo-run
    return made


def sweep(folder: Path, *lines: str, concurrency: int = 2, runs: int = 4, **profile) -> Sweep:
    settings = {"account": "mine", "retries": 1} | profile
    (folder / "site.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    seeds = ", ".join(map(str, range(runs)))
    text = [f"config: {CONFIG}", f"concurrency: {concurrency}", f"grid: {{run.seed: [{seeds}]}}", "name: s{seed}"]
    text += [f"cluster: {folder}/site.yaml", f"overrides: [run.directory={folder}/runs, trainer.steps=5]", *lines]
    (folder / "many.yaml").write_text("\n".join(text) + "\n")
    return Sweep(folder / "many.yaml")


def submitted(many: Sweep, **options) -> list[str]:
    messages: list[str] = []
    many.submit(options.get("retry_failed", False), messages.append)
    return [line.partition(":")[0] for line in messages]


def states(many: Sweep) -> list[str]:
    return [status.state for status in many.statuses().values()]


def test_at_most_the_limit_of_runs_is_running_regardless_of_the_order_in_which_they_end(queue, tmp_path):
    many = sweep(tmp_path, concurrency=3, runs=10)
    assert len(submitted(many)) == 10 and states(many) == ["running"] * 3 + ["waiting"] * 7
    draw = random.Random(0)
    while queue.jobs:
        queue.end(draw.choice(queue.running()), "finished 0")
        assert submitted(many) == []
    assert queue.most == 3 and set(states(many)) == {"finished"}


def test_an_interrupted_sweep_submits_the_missing_runs_after_the_queued_ones(queue, tmp_path):
    many = sweep(tmp_path, runs=6)
    queue.refuse_after = 4
    with pytest.raises(UserError, match="AssocMaxSubmitJobLimit"):
        submitted(many)
    queue.refuse_after = None
    queue.end("101", "finished 0")
    many = sweep(tmp_path, runs=6)
    assert submitted(many) == ["s4", "s5"] and submitted(many) == []
    while queue.jobs:
        queue.end(queue.running()[-1], "finished 0")
    assert queue.most == 2 and set(states(many)) == {"finished"}


def test_a_job_that_was_submitted_but_not_recorded_is_recognized_by_its_name(queue, tmp_path):
    many = sweep(tmp_path)
    queue.submit(many.launches["s0"].job)
    assert submitted(many) == ["s1", "s2", "s3"] and queue.most == 2


def test_canceling_a_sweep_ends_waiting_runs_before_their_dependencies(queue, tmp_path):
    many = sweep(tmp_path)
    submitted(many)
    running = queue.running()
    messages: list[str] = []
    many.cancel(messages.append)
    ended = (tmp_path / "scancelled").read_text().split()
    assert sorted(ended) == sorted(queue.jobs) and ended[2:] == running and len(messages) == 4
    queue.jobs.clear()
    queue.show()
    assert states(many) == ["cancelled"] * 4
    assert submitted(many) == ["s0", "s1", "s2", "s3"]


def test_a_lower_limit_joins_lanes(queue, tmp_path):
    assert len(submitted(sweep(tmp_path, concurrency=3, runs=3))) == 3
    assert submitted(sweep(tmp_path, concurrency=1, runs=4)) == ["s3"]
    for number in ("102", "101", "103"):
        assert "104" not in queue.running()
        queue.end(number, "finished 0")
    assert queue.running() == ["104"]


def test_failed_runs_are_shown_with_their_error_and_retried_only_on_request(queue, tmp_path):
    many = sweep(tmp_path, runs=2)
    submitted(many)
    queue.end("101", "failed 1")
    queue.end("102", "finished 0")
    assert submitted(many) == []
    status = many.statuses()["s0"]
    assert (status.state, status.note) == ("failed (1)", "RuntimeError: no luck")
    assert "1 failed (1), 1 finished" in many.table(many.statuses()).caption
    assert submitted(many, retry_failed=True) == ["s0"] and states(many) == ["running", "finished"]


def test_nothing_is_submitted_when_slurm_does_not_respond(queue, tmp_path):
    many = sweep(tmp_path)
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    with pytest.raises(UserError, match="Unable to contact"):
        submitted(many)
    assert queue.jobs == {}


def test_a_finished_run_continues_for_more_steps_but_not_with_other_values(queue, tmp_path):
    many = sweep(tmp_path, runs=1)
    submitted(many)
    queue.end("101", "finished 0")
    (tmp_path / "runs" / "s0" / "config.yaml").write_text(dump_config(many.configs["s0"]))
    assert submitted(many) == []
    assert submitted(sweep(tmp_path, "runs: [{trainer.steps: 9}]", runs=1)) == ["s0"]
    queue.end("102", "finished 0")
    with pytest.raises(ConfigError, match="optimizer.learning_rate"):
        submitted(sweep(tmp_path, "runs: [{optimizer.learning_rate: 3e-4}]", runs=1))


def test_an_error_in_one_run_is_reported_before_anything_is_submitted(queue, tmp_path):
    with pytest.raises(ConfigError, match="run s0: "):
        sweep(tmp_path, "runs: [{policy.tensor_parallel: 7}]")
