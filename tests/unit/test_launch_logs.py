"""Logs of runs are shown completely, by their last lines, or as they are written, over all attempts."""

from __future__ import annotations

import io
import os
import threading
import time
from pathlib import Path, PurePosixPath

import pytest

from g2rl_launch import monitor
from g2rl_launch.monitor import follow_logs, show_logs
from g2rl_launch.profile import Tunnel
from g2rl_launch.run import LaunchedRun


@pytest.fixture(params=["local", "ssh"])
def run(request, tmp_path, monkeypatch) -> LaunchedRun:
    """A run of job 17, which is in the file `queue`; also through a stand-in for ssh."""
    (tmp_path / "bin").mkdir()
    answers = {"squeue": f"cat {tmp_path}/queue", "ssh": f'[ -e {tmp_path}/down ] && exit 255\nsh -c "$last"'}
    for name, text in answers.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\nfor last; do :; done\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(monitor, "GONE_S", 0.1)
    monkeypatch.setattr(monitor, "POLL_S", 0.02)
    (tmp_path / "queue").write_text("17|RUNNING|mine|(null)|None\n")
    (tmp_path / "mine" / "launch").mkdir(parents=True)
    tunnel = Tunnel(kind="ssh", host="login", job_folder="/jobs") if request.param == "ssh" else Tunnel()
    return LaunchedRun("mine", PurePosixPath(tmp_path / "mine"), tunnel, ("17",))


def write(run: LaunchedRun, restart: int, text: str) -> None:
    with (Path(run.launch_folder) / f"log-17-{restart}.out").open("a") as file:
        file.write(text)


def test_the_last_lines_are_those_of_all_attempts_combined(run):
    write(run, 0, "".join(f"first {number}\n" for number in range(5)))
    write(run, 1, "second 0\nsecond 1, truncated")
    for restart in (0, 1):
        os.utime(Path(run.launch_folder) / f"log-17-{restart}.out", (restart, restart))
    into = io.BytesIO()
    show_logs(run, 4, into)
    assert into.getvalue().decode().splitlines() == [
        "==> log-17-0.out <==",
        "first 3",
        "first 4",
        "==> log-17-1.out <==",
        "second 0",
        "second 1, truncated",
    ]
    into = io.BytesIO()
    show_logs(run, 1, into)
    assert into.getvalue().decode().splitlines() == ["==> log-17-1.out <==", "second 1, truncated"]


class Screen(io.BytesIO):
    """The output so far."""

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in self.getvalue().decode():
            assert time.monotonic() < deadline, self.getvalue().decode()
            time.sleep(0.01)


def test_following_shows_every_byte_once_over_all_attempts_and_ends_with_the_run(run, tmp_path):
    screen, messages = Screen(), []
    follower = threading.Thread(target=follow_logs, args=(run, 2, screen, messages.append))
    follower.start()
    while not messages:
        time.sleep(0.01)
    assert "waiting for its first output" in messages[0]
    write(run, 0, "a\nb\nc\nhalf of ")
    screen.wait_for("half of ")
    write(run, 0, "a line\n")
    screen.wait_for("a line")
    (tmp_path / "down").touch()  # the connection, for the run over ssh
    write(run, 0, "written while disconnected\n")
    time.sleep(0.2)
    (tmp_path / "down").unlink()
    screen.wait_for("while disconnected")
    write(run, 1, "again\n")
    screen.wait_for("again")
    write(run, 1, "the end\n")
    (Path(run.launch_folder) / "outcome").write_text("finished 0\n")
    follower.join(120)
    assert not follower.is_alive() and messages[-1] == "mine: finished"
    shown = screen.getvalue().decode()
    start = shown.index("half of ")
    assert shown[start:] == (
        "half of a line\nwritten while disconnected\n==> log-17-1.out <==\nagain\nthe end\n"
    ) and shown.startswith("==> log-17-0.out <==\n")


def test_following_ends_when_the_jobs_are_gone(run, tmp_path):
    write(run, 0, "one\ntwo\nthree\n")
    (tmp_path / "queue").write_text("")
    screen, messages = Screen(), []
    follow_logs(run, 2, screen, messages.append)
    assert screen.getvalue().decode() == "==> log-17-0.out <==\ntwo\nthree\n" and messages == ["mine: lost"]
