"""Launched runs are monitored by name, from the files of their jobs."""

from __future__ import annotations

import io
import os
from pathlib import Path, PurePosixPath

import pytest

from g2rl_launch import monitor
from g2rl_launch import run as runs
from g2rl_launch.monitor import last_error, show_logs, wait_for
from g2rl_launch.monitor import status as status_of
from g2rl_launch.profile import Tunnel
from g2rl_launch.run import LaunchedRun
from megatron_g2rl.errors import UserError


@pytest.fixture
def run(tmp_path, monkeypatch) -> LaunchedRun:
    """A registered run, and a squeue that prints the file `queue`."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "bin").mkdir()
    for name, text in (("squeue", f"cat {tmp_path}/queue"), ("scancel", f'echo "$@" > {tmp_path}/cancelled')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(monitor, "POLL_S", 0.01)
    monkeypatch.setattr(monitor, "GONE_S", 0.1)
    (tmp_path / "queue").write_text("")
    (tmp_path / "mine" / "launch").mkdir(parents=True)
    launched = LaunchedRun("mine", PurePosixPath(tmp_path / "mine"), Tunnel(), ("17",))
    runs.remember(launched)
    return runs.find("mine")


def launch_folder(run: LaunchedRun) -> Path:
    return Path(run.launch_folder)


def shown(run: LaunchedRun, lines: int | None = None) -> str:
    into = io.BytesIO()
    show_logs(run, lines, into)
    return into.getvalue().decode()


def test_a_run_is_found_by_name_and_an_unknown_name_is_reported_with_the_known_ones(run):
    assert run.submitted == ("17",) and runs.names() == ["mine"]
    with pytest.raises(UserError, match="the nearest names are: mine"):
        runs.find("yours")


def test_the_state_comes_from_the_queue_until_the_outcome_is_written(run, tmp_path):
    (tmp_path / "queue").write_text("16|RUNNING|other|(null)|None\n17|PENDING|mine|(null)|BeginTime\n")
    assert run.state() == "pending" and [*run.queued()] == ["17"] and run.queued()["17"].reason == "BeginTime"
    (launch_folder(run) / "outcome").write_text("failed 7\n")
    assert run.state() == "failed (7)" and wait_for(run, print) == 7


def test_jobs_that_disappeared_without_an_outcome_are_no_success(run):
    assert run.state() == "lost"
    with pytest.raises(UserError, match="left no outcome"):
        wait_for(run, print)


def test_a_chain_without_remaining_segments_ends_as_stopped(run):
    (launch_folder(run) / "attempts.tsv").write_text("now\t17.0\t75\t0\t4\t0\n")
    assert run.state() == "stopped (75)" and wait_for(run, print) == 75


def test_cancel_ends_queued_jobs_and_prevents_segments_from_starting(run, tmp_path):
    (tmp_path / "queue").write_text("17|PENDING|mine|singleton(unfulfilled)|Dependency\n")
    assert run.cancel() == ["17"] and (tmp_path / "cancelled").read_text() == "17\n"
    (tmp_path / "queue").write_text("")
    assert (launch_folder(run) / "cancelled").exists() and run.state() == "cancelled" and wait_for(run, print) == 1


@pytest.mark.parametrize(
    "command, message", [("sacct", "CANCELLED by 0"), ("scontrol", "JobId=17 JobState=CANCELLED x=1")]
)
def test_an_external_scancel_is_shown_as_cancelled_with_and_without_accounting(run, tmp_path, command, message):
    for program, text in {"sacct": "exit 1", command: f"echo '{message}'"}.items():
        (tmp_path / "bin" / program).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / program).chmod(0o755)
    (launch_folder(run) / "attempts.tsv").write_text("now\t17.0\t75\t0\t4\t0\n")
    assert run.state() == "cancelled" and wait_for(run, print) == 1


def test_logs_show_every_restart_and_the_last_error_is_that_of_the_latest_attempt(run):
    with pytest.raises(UserError, match="no log yet"):
        shown(run)
    for restart, seconds in ((0, 100), (1, 200)):
        log = launch_folder(run) / f"log-17-{restart}.out"
        log.write_text(f"error of restart {restart}\n")
        os.utime(log, (seconds, seconds))
    assert shown(run).splitlines()[1::2] == ["error of restart 0", "error of restart 1"]
    assert "restart 1" in last_error(run) and "restart 0" not in last_error(run)


def test_commands_go_through_ssh_as_one_quoted_word(monkeypatch, tmp_path):
    (tmp_path / "ssh").write_text('#!/bin/sh\n[ "$1" = -G ] && exit\nfor last; do :; done\nsh -c "$last"\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tunnel = Tunnel(kind="ssh", host="login", user="me", job_folder=tmp_path)
    away = LaunchedRun("away", PurePosixPath(tmp_path), tunnel)
    (tmp_path / "a 'b' $c").write_text("there")
    assert away.read(PurePosixPath(tmp_path / "a 'b' $c")) == "there"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run_folder": 5}', '{"run_folder": "a", "tunnel": {}, "jobs": [7]}'])
def test_an_invalid_record_of_a_launched_run_is_reported(run, tmp_path, text):
    file = tmp_path / "state" / "g2rl" / "launched" / "mine.json"
    file.write_text(text)
    with pytest.raises(UserError, match=f"{file} is not a record of a launched run"):
        runs.find("mine")


@pytest.mark.parametrize("status", ["[]", "5", '{"step": [1], "time": "x", "phase": {}}', "\0", "[" * 5000])
def test_malformed_files_of_a_run_are_ignored(run, status):
    (launch_folder(run).parent / "status.json").write_text(status)
    (launch_folder(run) / "attempts.tsv").write_text("7\n\n\t\t\n")
    (launch_folder(run) / "outcome").write_text("finished x\n")
    assert run.step() == {} and run.attempts() == [] and run.outcome() is None
    assert status_of(["mine"])[0].row_count == 1
