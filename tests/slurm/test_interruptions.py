"""What befalls trainings of days, on a real Slurm: each ends with the metrics of an uninterrupted one, bit for bit."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import psutil
from slurm_jobs import Run, ended, metrics, read, wait_until


def test_a_training_preempted_by_a_more_urgent_job_saves_is_requeued_and_spends_no_retry(
    train, ask, expected, tmp_path
):
    run = train(sleep_s=0.3)
    run.wait_for_step(2)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent"]
    number = read(*urgent, "--wrap=sleep 2")
    assert number.isdecimal(), read("sinfo")
    run.end()
    assert metrics(run.folder) == expected
    assert len(set(run.begun())) == 1, "it was requeued, not submitted again"
    assert [(attempt["code"], attempt["spent"]) for attempt in run.attempts()] == [("75", "0"), ("0", "0")], run.told()
    log = (run.launch / f"log-{run.job}-0.out").read_text()
    assert "SIGTERM: saving and stopping" in log, log
    assert "COMPLETED" in read("sacct", "--noheader", "--allocations", f"--jobs={number}", "--format=State")

    assert re.search(r"^run +finished .*\b6\b.*\b2 +0 ", ask("status", "run"), re.MULTILINE), ask("status", "run")
    logs = ask("logs", "run")
    assert logs.index(f"log-{run.job}-0.out") < logs.index(f"log-{run.job}-1.out"), logs
    assert "SIGTERM: saving and stopping" in logs


def test_a_training_that_loses_its_second_node_and_then_its_first_goes_on(train, expected, slurm):
    run = train(sleep_s=0.3, slow_attempts=2)
    for attempt, (node, step) in enumerate([("n2", 3), ("n1", 5)], start=1):
        run.wait_for_step(step, attempt)
        lose_node(node, slurm, run)
        wait_until(lambda: read("squeue", "--noheader", "--states=PENDING"), 60, run.told)
        subprocess.run(["slurmd", "-N", node], check=True)
        read("scontrol", "update", f"nodename={node}", "state=resume")
    run.end()
    assert metrics(run.folder) == expected
    assert len(run.begun()) == 3
    first, second, last = run.attempts()
    assert (first["after"], second["after"], last["code"]) == ("2", "4", "0"), run.told()
    assert second["code"] == "lost", "nothing of the first node could write down how it ended"
    assert last["spent"] == "0", "attempts that advanced are free"


def test_a_chain_of_jobs_under_a_time_limit_goes_on_until_the_run_is_done_and_then_does_nothing(
    train, expected, tmp_path
):
    # Slurm signals from 90 s to 30 s before the end: from 30 s to 90 s after the beginning. The first attempt is not
    # done by then, and a step and a save of it fit into the 30 s; or it is still loading, and leaves all to the second.
    segments = 4
    run = train(sleep_s=1.7, time="2", stop_before_end_s=30, continuation="chain", segments=segments)
    run.end()
    assert metrics(run.folder) == expected
    wait_until(lambda: not read("squeue", "--noheader"), 60, "the jobs after the last attempt end")
    codes = [attempt["code"] for attempt in run.attempts()]
    assert len(codes) >= 2 and codes[0] in ("75", "143") and codes[-1] == "0", run.told()
    assert len(set(run.begun())) == len(codes), "each attempt is a job of its own"
    rest = [str(int(run.job) + number) for number in range(1, segments - len(codes) + 1)]
    assert rest, run.told()
    for number in rest:
        state = read("sacct", "--noheader", "--allocations", f"--jobs={number}", "--format=JobName,State").split()
        assert state == ["run", "COMPLETED"], f"{number}: {state}"
        said = "".join(file.read_text() for file in tmp_path.rglob(f"*{number}.out"))
        assert "nothing to do: finished 0" in said, f"{number}: {said}"


def test_a_training_resumes_after_a_signal_and_after_it_was_cancelled_and_launched_again(train, ask, expected):
    run = train(sleep_s=0.4, slow_attempts=2)
    run.wait_for_step(2)
    read("scancel", "--signal=TERM", run.job)  # as before a time limit: to the ranks, not to the script
    run.wait_for_step(4, attempt=2)
    assert run.job in ask("cancel", "run")
    code, said = ended(run.process)
    assert code != 0 and "cancelled" in said, said
    assert [attempt["code"] for attempt in run.attempts()][0] == "75", run.told()
    assert re.search(r"^run +cancelled", ask("status", "run"), re.MULTILINE), ask("status", "run")

    run = train(sleep_s=0)
    run.end()
    assert metrics(run.folder) == expected
    assert re.search(r"^run +finished .*\b6\b", ask("status", "run"), re.MULTILINE), ask("status", "run")


def lose_node(node: str, slurm: Path, run: Run) -> None:
    """Kill the node's daemon and all that it runs of the job, at once, as a power cut does; Slurm is told."""
    daemon = psutil.Process(int((slurm / "run" / f"slurmd-{node}.pid").read_text()))
    lost = [process for process in psutil.process_iter() if _runs(process, node, run.job)]
    assert lost, run.told()
    keepers = {parent for process in lost for parent in process.parents() if parent.name() == "slurmstepd"}
    for process in [daemon, *keepers, *lost]:
        if process.is_running():
            process.send_signal(signal.SIGKILL)
    daemon.wait(10)
    read("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")


def _runs(process: psutil.Process, node: str, job: str) -> bool:
    try:
        variables = process.environ()
    except psutil.Error:
        return False
    return variables.get("SLURMD_NODENAME") == node and variables.get("SLURM_JOB_ID") == job
