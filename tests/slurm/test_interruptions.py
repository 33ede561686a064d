"""Two ranks on two nodes of a real Slurm, started by a job script without a launcher, and what befalls long runs."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from slurm_jobs import Job, arguments, metrics, read, wait_until

# Whatever ends early is tried again three times. Ranks that saved exit with 75; that must not kill those still saving.
SCRIPT = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --requeue --open-mode=append
srun --kill-on-bad-exit=0 --wait=60 {command}
code=$?
echo "attempt ${{SLURM_RESTART_COUNT:-0}} exits $code"
[ $code = 0 ] || [ ${{SLURM_RESTART_COUNT:-0}} -ge 3 ] || scontrol requeue $SLURM_JOB_ID
exit $code
"""


@pytest.fixture
def submit(slurm, expected, tmp_path, environment):
    def submitted(*options: str) -> Job:
        script, log = tmp_path / "job.sh", tmp_path / "job.log"
        script.write_text(SCRIPT.format(command=shlex.join([*arguments(tmp_path)])))
        sbatch = ["sbatch", "--parsable", f"--output={log}", *options, str(script)]
        found = subprocess.run(sbatch, env=environment | dict(SLURM_CONF=os.environ["SLURM_CONF"]), check=True,
                               capture_output=True, text=True)  # fmt: skip
        jobs.append(Job(found.stdout.strip(), tmp_path / "run", log))
        return jobs[-1]

    jobs: list[Job] = []
    yield submitted
    for job in jobs:
        read("scancel", job.number)
        wait_until(lambda job=job: job.field("JobState") not in ("RUNNING", "COMPLETING", "PENDING"), 60, job.told)


def test_two_nodes_train_bit_for_bit_like_two_ranks_of_one_machine(submit, expected):
    job = submit()
    job.wait()
    assert metrics(job.run) == expected


def test_a_signal_before_the_limit_saves_and_the_requeued_job_ends_with_the_same_metrics(submit, expected):
    job = submit()
    job.wait_for_step(3)
    read("scancel", "--signal=USR1", job.number)  # as --signal=USR1@120 does; to the steps, not to the script
    job.wait()
    assert "attempt 0 exits 75" in job.log.read_text() and job.field("Restarts") == "1"
    assert metrics(job.run) == expected


def test_the_loss_of_a_node_ends_in_a_resume_with_the_same_metrics(submit, expected, slurm):
    job = submit()
    job.wait_for_step(3)
    lose_node("n2", slurm, job)
    read("scontrol", "update", "nodename=n2", "state=down", "reason=lost")
    wait_until(lambda: job.field("Restarts") not in ("", "0"), 60, job.told)
    subprocess.run(["slurmd", "-N", "n2"], check=True)
    read("scontrol", "update", "nodename=n2", "state=resume")
    job.wait()
    assert metrics(job.run) == expected


def lose_node(node: str, slurm: Path, job: Job) -> None:
    """Kill the node's daemon and all that it runs of the job, at once, as a power cut does."""
    daemon = psutil.Process(int((slurm / "run" / f"slurmd-{node}.pid").read_text()))
    ranks = [process for process in psutil.process_iter() if _runs(process, node, job)]
    assert ranks, job.told()
    keepers = [parent for rank in ranks for parent in rank.parents() if parent.name() == "slurmstepd"]
    for process in [daemon, *keepers, *ranks]:
        if process.is_running():
            process.send_signal(signal.SIGKILL)


def _runs(process: psutil.Process, node: str, job: Job) -> bool:
    try:
        variables = process.environ()
    except psutil.Error:
        return False
    return variables.get("SLURMD_NODENAME") == node and variables.get("SLURM_JOB_ID") == job.number
