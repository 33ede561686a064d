"""Interruptions of long trainings on a real Slurm: each ends bitwise equal to the metrics of an uninterrupted one."""

from __future__ import annotations

import functools
import re
import signal
import subprocess
from pathlib import Path

import psutil
from slurm_jobs import Run, ended, metrics, read, wait_until


def test_a_preempted_training_saves_is_requeued_and_uses_no_retry(train, ask, expected, tmp_path):
    run = train(sleep_s=0.5)
    run.wait_for_step(2)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent"]
    number = read(*urgent, "--wrap=sleep 2")
    assert number.isdecimal(), read("sinfo")
    run.end()
    assert metrics(run.folder) == expected
    assert len(set(run.job_ids())) == 1, "requeued, not submitted again"
    assert [(attempt["code"], attempt["spent"]) for attempt in run.attempts()] == [("75", "0"), ("0", "0")], (
        run.diagnostics()
    )
    log = (run.launch / f"log-{run.job}-0.out").read_text()
    assert "SIGTERM: saving and stopping" in log, log
    assert "COMPLETED" in read("sacct", "--noheader", "--allocations", f"--jobs={number}", "--format=State")

    assert re.search(r"^run +finished .*\b6\b.*\b2 +0 ", ask("status", "run"), re.MULTILINE), ask("status", "run")
    logs = ask("logs", "run")
    assert logs.index(f"log-{run.job}-0.out") < logs.index(f"log-{run.job}-1.out"), logs
    assert "SIGTERM: saving and stopping" in logs


def test_a_training_that_loses_its_second_node_and_then_its_first_resumes(train, expected, slurm):
    run = train(sleep_s=0.5, slow_attempts=2)
    for attempt, (node, step) in enumerate([("n2", 3), ("n1", 5)], start=1):
        run.wait_for_step(step, attempt)
        lose_node(node, slurm, run)
        wait_until(lambda: read("squeue", "--noheader", "--states=PENDING"), 60, run.diagnostics)
        subprocess.run(["slurmd", "-N", node], check=True)
        read("scontrol", "update", f"nodename={node}", "state=resume")
    run.end()
    assert metrics(run.folder) == expected
    assert len(run.job_ids()) == 3
    first, second, last = run.attempts()
    assert (first["after"], second["after"], last["code"]) == ("2", "4", "0"), run.diagnostics()
    assert second["code"] == "lost", "nothing of the first node could write down how it ended"
    assert last["spent"] == "0", "attempts that advanced are free"


def test_a_chain_of_jobs_with_a_time_limit_continues_the_run_to_its_end_and_then_does_nothing(
    train, expected, tmp_path
):
    # Slurm signals from 90 s to 30 s before the end: from 30 s to 90 s after the start. The first attempt is not
    # done by then, and one step and a save fit into the 30 s; or it is still loading, and a later one does the work: on
    # a busy machine several, and jobs that find the run finished cost nothing.
    segments = 8
    run = train(sleep_s=1.7, time="2", stop_before_end_s=30, continuation="chain", segments=segments)
    run.end()
    assert metrics(run.folder) == expected
    wait_until(lambda: not read("squeue", "--noheader"), 60, "the jobs after the last attempt end")
    codes = [attempt["code"] for attempt in run.attempts()]
    assert len(codes) >= 2 and codes[0] in ("75", "143") and codes[-1] == "0", run.diagnostics()
    assert len(set(run.job_ids())) == len(codes), "each attempt is a separate job"
    rest = [str(int(run.job) + number) for number in range(1, segments - len(codes) + 1)]
    assert rest, run.diagnostics()
    for number in rest:
        wait_until(functools.partial(_completed, number), 60, functools.partial(read, "sacct", f"--jobs={number}"))
        output = "".join(file.read_text() for file in tmp_path.rglob(f"*{number}.out"))
        assert "nothing to do: finished 0" in output, f"{number}: {output}"


def test_a_training_resumes_after_a_signal_and_after_it_was_cancelled_and_launched_again(train, ask, expected):
    run = train(sleep_s=0.8, slow_attempts=2)
    run.wait_for_step(2)
    read("scancel", "--signal=TERM", run.job)  # as before a time limit: to the ranks, not to the script
    run.wait_for_step(3, attempt=2)
    assert run.job in ask("cancel", "run")
    code, output = ended(run.process)
    assert code != 0 and "cancelled" in output, output
    assert [attempt["code"] for attempt in run.attempts()][0] == "75", run.diagnostics()
    assert re.search(r"^run +cancelled", ask("status", "run"), re.MULTILINE), ask("status", "run")

    run = train(sleep_s=0)
    run.end()
    assert metrics(run.folder) == expected
    assert re.search(r"^run +finished .*\b6\b", ask("status", "run"), re.MULTILINE), ask("status", "run")


def lose_node(node: str, slurm: Path, run: Run) -> None:
    """Kill the node's daemon and its processes of the job together, as a power failure does, and notify Slurm."""
    daemon = psutil.Process(int((slurm / "run" / f"slurmd-{node}.pid").read_text()))
    lost = [process for process in psutil.process_iter() if _runs(process, node, run.job)]
    assert lost, run.diagnostics()
    keepers = {parent for process in lost for parent in process.parents() if parent.name() == "slurmstepd"}
    for process in [daemon, *keepers, *lost]:
        if process.is_running():
            process.send_signal(signal.SIGKILL)
    daemon.wait(10)
    read("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")


def _completed(number: str) -> bool:
    """Whether a job of the run has completed in the accounting database, which is updated later than the queue."""
    state = read("sacct", "--noheader", "--allocations", f"--jobs={number}", "--format=JobName,State").split()
    return state == ["run", "COMPLETED"]


def _runs(process: psutil.Process, node: str, job: str) -> bool:
    try:
        variables = process.environ()
    except psutil.Error:
        return False
    return variables.get("SLURMD_NODENAME") == node and variables.get("SLURM_JOB_ID") == job
