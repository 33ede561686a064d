"""Stop requests, and the lock that excludes a second run from a folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from megatron_g2rl.distributed import rank_reports
from megatron_g2rl.errors import UserError
from megatron_g2rl.tracking.status import Status
from megatron_g2rl.training import run_lock
from megatron_g2rl.training.run_lock import RunFolderLost, RunIsBusy, RunLock
from megatron_g2rl.training.stopping import StopRequest, end_on_signals, seconds_of


@pytest.fixture(autouse=True)
def handlers():
    """Restores the previous signal handlers."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("text, seconds", [("90s", 90), ("3h50m", 13_800), ("2d12h", 216_000), ("1d1h1m1s", 90_061)])
def test_durations_are_parsed(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_asks_to_stop(number):
    stop = StopRequest(torch.device("cpu"))
    assert not stop.requested_anywhere()
    os.kill(os.getpid(), number)
    assert stop.requested_anywhere() and stop.requested_at <= time.time()


def test_a_second_ctrl_c_interrupts_immediately():
    stop = StopRequest(torch.device("cpu"))
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert stop.requested_here()


def test_a_signal_while_there_is_nothing_to_save_ends_the_process_as_stopped():
    end_on_signals()
    with pytest.raises(SystemExit) as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert stopped.value.code == 75


def report_invalid_configuration() -> None:
    rank_reports.write_message("the cause")
    rank_reports.write_exit_code(2)


FAILURES = {
    "message": (lambda: rank_reports.write_message("the cause"), 1),
    "traceback": (rank_reports.mark_failed, 1),
    "configuration": (report_invalid_configuration, 2),
}


@pytest.fixture(params=FAILURES)
def failed_rank(request, tmp_path, monkeypatch) -> int:
    """Rank 2 has failed, and torchrun ends this one, rank 0: the exit code of the run."""
    monkeypatch.setenv(rank_reports.EXIT_CODE_FILE, str(tmp_path / "exit_code"))
    monkeypatch.setenv("RANK", "2")
    fail, code = FAILURES[request.param]
    fail()
    monkeypatch.setenv("RANK", "0")
    return code


def test_a_rank_that_ends_because_another_failed_says_nothing_and_is_not_stopped(failed_rank, caplog):
    end_on_signals()
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert ended.value.code == failed_rank and not caplog.text


def test_a_rank_in_training_does_not_claim_to_save_because_another_failed(failed_rank, caplog):
    stop = StopRequest(torch.device("cpu"))
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested_here() and not caplog.text


@pytest.mark.parametrize("rank, lines", [("0", 1), ("1", 0), ("7", 0)])
def test_only_rank_0_reports_a_signal(rank, lines, monkeypatch, caplog):
    monkeypatch.setenv("RANK", rank)
    end_on_signals()
    with pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert len(caplog.records) == lines


def test_the_time_limit_counts_from_the_start_of_the_process():
    alive = time.time() - psutil.Process().create_time()
    assert StopRequest(torch.device("cpu"), f"{max(int(alive) - 1, 0)}s").requested_here()
    assert not StopRequest(torch.device("cpu"), f"{int(alive) + 100}s").requested_here()


def test_a_second_process_is_refused_while_the_first_lives_and_a_surviving_child_holds_no_lock(tmp_path):
    program = (
        "import os, sys, time, pathlib\nfrom megatron_g2rl.training.run_lock import RunLock\n"
        "lock = RunLock(pathlib.Path(sys.argv[1]))\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "time.sleep(60)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(first.stdout.readline())
    try:
        with pytest.raises(RunIsBusy, match=f'"process": {first.pid}'):
            RunLock(tmp_path)
        first.kill()
        first.wait()
        assert psutil.pid_exists(child)
        RunLock(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)


def failing_lockf(*numbers: int):
    """lockf that fails with each error number in turn, and then takes the lock."""
    left, real = list(numbers), fcntl.lockf

    def lockf(*arguments):
        if left:
            number = left.pop(0)
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    return lockf


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EDEADLK])
def test_a_lock_that_fails_in_the_file_system_is_reported_as_such(number, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock.fcntl, "lockf", failing_lockf(number))
    with pytest.raises(UserError) as error:
        RunLock(tmp_path)
    assert not isinstance(error.value, RunIsBusy) and os.strerror(number) in str(error.value)
    assert "run.lock cannot be locked" in str(error.value) and "in use" not in str(error.value)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_lock_that_another_process_holds_is_reported_as_in_use(number, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock.fcntl, "lockf", failing_lockf(number))
    with pytest.raises(RunIsBusy, match="in use by another run"):
        RunLock(tmp_path)


def test_an_interrupted_lock_is_retried(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock.fcntl, "lockf", failing_lockf(errno.EINTR, errno.EINTR))
    RunLock(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_reported_and_the_folder_is_still_monitored(
    number, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(run_lock.fcntl, "lockf", failing_lockf(number))
    lock = RunLock(tmp_path)
    assert os.strerror(number) in caplog.text and "no other run" in caplog.text
    lock.check()
    (tmp_path / "run.lock").unlink()
    with pytest.raises(RunFolderLost):
        lock.check()


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_a_removed_moved_or_replaced_folder_no_longer_belongs_to_the_run(moved, replaced, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lock = RunLock(run)
    lock.check()
    run.rename(tmp_path / "other") if moved else shutil.rmtree(run)
    if replaced:
        run.mkdir()
        RunLock(run)
    with pytest.raises(RunFolderLost, match="no longer the folder of this run"):
        lock.check()


def test_the_status_file_shows_the_progress_of_the_run(tmp_path):
    status = Status(tmp_path)
    status.write("loading")
    status.write("rollout", step=3)
    status.write("score")
    written = json.loads((tmp_path / "status.json").read_text())
    assert (written["step"], written["phase"], written["pid"]) == (3, "score", os.getpid())
    assert not list(tmp_path.glob("*.partial"))
