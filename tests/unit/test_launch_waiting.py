"""Waiting, status and cancel are correct while Slurm does not respond; a refused launch leaves nothing behind."""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from pathlib import Path, PurePosixPath

import pytest
from typer.testing import CliRunner

from g2rl_launch import monitor, submit
from g2rl_launch import run as runs
from g2rl_launch.monitor import QueryInterval, wait_for
from g2rl_launch.profile import Tunnel
from g2rl_launch.run import SILENT, LaunchedRun
from g2rl_launch.submit import Launch
from megatron_g2rl.cli import app
from megatron_g2rl.errors import UserError

CONFIG = Path(__file__).parents[1] / "data" / "run.yaml"
DEAD = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"


class Site:
    """A folder with a stand-in for each Slurm command, and one run."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "queue").write_text("")
        self.command("squeue", f"echo asked >> {folder}/asked; cat {folder}/queue")
        self.command("scancel", f"echo $@ >> {folder}/ended")

    def command(self, name: str, text: str) -> None:
        file = self.folder / "bin" / f"{name}.new"
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        file.replace(self.folder / "bin" / name)

    @property
    def launch_folder(self) -> Path:
        return self.folder / "runs" / "mine" / "launch"

    def launched(self, **more) -> LaunchedRun:
        self.launch_folder.mkdir(parents=True, exist_ok=True)
        run = LaunchedRun("mine", PurePosixPath(self.launch_folder.parent), Tunnel(), ("17",), **more)
        runs.remember(run)
        return run

    def launch(self, *lines: str) -> Launch:
        (self.folder / "site.yaml").write_text("\n".join(["account: mine", *lines]) + "\n")
        settings = [f"run.directory={self.folder}/runs", "run.name=mine"]
        return Launch(CONFIG, settings, str(self.folder / "site.yaml"))


@pytest.fixture
def site(tmp_path, monkeypatch) -> Site:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(monitor, "POLL_S", 0.01)
    monkeypatch.setattr(monitor, "GONE_S", 2.0)
    return Site(tmp_path)


def wait_until(true) -> None:
    deadline = time.monotonic() + 200
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_wait_continues_while_slurm_does_not_respond_and_reports_it_once(site):
    run, messages = site.launched(), []
    site.command("squeue", f"echo asked >> {site.folder}/asked; {DEAD}")
    codes: list[int] = []
    waiter = threading.Thread(target=lambda: codes.append(wait_for(run, messages.append)))
    waiter.start()
    asked = site.folder / "asked"
    wait_until(lambda: asked.exists() and asked.read_text().count("asked") > 3)
    assert waiter.is_alive() and len(messages) == 1 and "Unable to contact slurm controller" in messages[0]
    (site.folder / "queue").write_text("17|RUNNING|mine|(null)|None\n")
    site.command("squeue", f"cat {site.folder}/queue")
    wait_until(lambda: len(messages) > 1)
    assert waiter.is_alive() and messages[1:] == ["Slurm is responding again"]
    (site.launch_folder / "outcome").write_text("finished 0\n")
    waiter.join(200)
    assert codes == [0]


def test_an_outcome_visible_long_after_the_job_left_the_queue_is_used(site):
    run = site.launched()
    (site.launch_folder / "attempts.tsv").write_text("now\t16.0\t75\t0\t4\t0\n")  # of the previous segment
    late = threading.Timer(0.5, (site.launch_folder / "outcome").write_text, ["finished 0\n"])
    late.start()
    assert wait_for(run, print) == 0


def test_the_polling_interval_grows_to_half_a_minute(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    pace, asked = QueryInterval(3.0), []
    while now[0] < 3600:
        asked.append(now[0])
        now[0] += pace.pause_s()
    assert sum(at < 60 for at in asked) == 20 and sum(3000 <= at for at in asked) == 20


def test_an_unresponsive_slurm_is_not_an_empty_queue(site):
    site.launched()
    site.command("squeue", DEAD)
    shown = CliRunner().invoke(app, ["status"])
    assert shown.exit_code == 0 and "Slurm does not respond" in shown.output
    assert "mine: squeue failed: slurm_load_jobs error: Unable to contact" in shown.output
    with pytest.raises(UserError, match="mine is not submitted.*Unable to contact"):
        site.launch().prepare()


def test_why_a_run_failed_and_how_to_resume_a_stopped_one_is_shown_in_one_line(site):
    site.launched()
    (site.launch_folder / "attempts.tsv").write_text("now\t17.0\t75\t0\t4\t0\n")
    assert "mine: it saved and stopped" in CliRunner().invoke(app, ["status"]).output
    (site.launch_folder / "outcome").write_text("failed 1\n")
    (site.launch_folder / "log-17-0.out").write_text("RuntimeError: no luck\n\nsrun: error: n1: task 0\n")
    assert "mine: RuntimeError: no luck\n" in CliRunner().invoke(app, ["status"]).output
    (site.launch_folder / "reason").write_text("all retries are spent: no luck\n")
    assert "mine: all retries are spent: no luck\n" in CliRunner().invoke(app, ["status"]).output


def shown(*names: str) -> str:
    return CliRunner().invoke(app, ["status", *names]).output


def test_an_interrupted_attempt_is_not_reported_as_saved(site):
    site.launched()
    (site.launch_folder / "attempts.tsv").write_text("now\t17.0\t75\t0\t4\t0\n")
    (site.launch_folder / "running").write_text("17.1\n")
    (site.launch_folder.parent / "status.json").write_text('{"step": 25, "phase": "update", "time": 0}')
    site.command("sacct", "echo TIMEOUT")
    text = shown()
    assert (
        "lost" in text and "mine: job 17.1 was ended (TIMEOUT) before it could save" in text and "it saved" not in text
    )
    assert "raise stop_before_end_s" in text and "it was at step 25" in text


def test_a_waiting_run_shows_its_reason_and_how_its_last_attempt_ended(site):
    site.launched()
    (site.folder / "queue").write_text("17|PENDING|mine|(null)|PartitionNodeLimit\n")
    assert "mine: waiting for PartitionNodeLimit: it requests more nodes" in shown()
    (site.launch_folder / "attempts.tsv").write_text("now\t17.0\t1\t0\t0\t1\n")
    (site.launch_folder / "log-17-0.out").write_text("RuntimeError: no luck\n")
    (site.folder / "queue").write_text("17|PENDING|mine|(null)|BeginTime\n")
    text = shown("mine")
    assert (
        "waiting for BeginTime: a requeued job waits two minutes; attempt 1 ended with 1: RuntimeError: no luck" in text
    )


def test_the_time_since_the_last_sign_of_life_of_a_run_is_shown(site):
    site.launched()
    (site.folder / "queue").write_text("17|RUNNING|mine|(null)|None\n")
    then = time.time() - 600
    (site.launch_folder.parent / "status.json").write_text(f'{{"step": 5, "phase": "update", "time": {then}}}')
    assert "10 min ago" in shown()


def test_a_missing_folder_or_image_is_refused_before_queuing(site, monkeypatch):
    monkeypatch.setenv("G2RL_LAUNCH_PYTHON", "/bin/true")
    for line, message in (
        (f"folder: {site.folder}/misspelt", "folder: .*misspelt, the working folder of jobs, does not exist"),
        (f"container_image: g2rl.sqsh\ncontainer_mounts: [/:/]\nfolder: {site.folder}", "image: .*sqsh does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            site.launch(line).submit()


def test_slurm_commands_without_a_cluster_report_what_is_not_set(site):
    site.launched()
    site.command("squeue", "echo 'squeue: fatal: Could not establish a configuration source' >&2; exit 1")
    assert "SLURM_CONF is not set, or is not a file" in shown()


def test_slurm_is_queried_once_for_any_number_of_shown_runs(site):
    (site.folder / "queue").write_text("17|RUNNING|mine|(null)|None\n")
    for name in ("a", "b", "c"):
        run = site.launched()
        runs.remember(LaunchedRun(name, run.run_folder, Tunnel(), ("17",)))
    shown = CliRunner().invoke(app, ["status"])
    assert shown.output.count("running") == 4 and (site.folder / "asked").read_text().count("asked") == 1


def test_a_failed_cancel_is_reported(site):
    site.launched()
    site.command("squeue", DEAD)
    done = CliRunner().invoke(app, ["cancel", "mine"])
    assert done.exit_code == 1 and "mine is not cancelled: squeue failed: slurm_load_jobs error" in done.output
    assert not (site.launch_folder / "cancelled").exists() and not (site.folder / "ended").exists()
    (site.folder / "queue").write_text("17|RUNNING|mine|(null)|None\n")
    site.command("squeue", f"cat {site.folder}/queue")
    site.command("scancel", "echo 'Kill job error on job id 17: Access denied' >&2; exit 1")
    done = CliRunner().invoke(app, ["cancel", "mine"])
    assert done.exit_code == 1 and "Access denied" in done.output and "is not cancelled" in done.output
    site.command("scancel", f"echo $@ >> {site.folder}/ended")
    done = CliRunner().invoke(app, ["cancel", "mine"])
    assert done.exit_code == 0 and "cancelled 17" in done.output and (site.folder / "ended").read_text() == "17\n"


def test_a_host_that_ssh_cannot_reach_is_not_an_empty_folder(site):
    site.command("ssh", "echo 'ssh: connect to host login port 22: Connection refused' >&2; exit 255")
    tunnel = Tunnel(kind="ssh", host="login", job_folder="/jobs")
    away = LaunchedRun("away", PurePosixPath("/runs/away"), tunnel, ("17",))
    runs.remember(away)
    assert away.state() == SILENT
    shown = CliRunner().invoke(app, ["status"])
    assert shown.exit_code == 0 and "login cannot be reached: ssh: connect to host login" in shown.output
    done = CliRunner().invoke(app, ["cancel", "away"])
    assert done.exit_code == 1 and "Connection refused" in done.output


def files(folder: Path) -> dict[str, str]:
    return {str(file): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("message", ["nemo-run is not installed", "invalid partition specified: nope"])
def test_a_refused_launch_leaves_everything_unchanged(site, monkeypatch, message):
    def refuse(job):
        raise UserError(message)

    monkeypatch.setattr(submit, "submit_job", refuse)
    monkeypatch.setenv("G2RL_LAUNCH_PYTHON", "/nowhere" if "not installed" in message else sys.executable)
    launch = site.launch()
    before = files(site.folder)
    with pytest.raises(UserError, match=message):
        launch.submit()
    assert files(site.folder) == before and not (site.folder / "runs").exists() and runs.names() == []
    site.launched()
    for name, text in (("outcome", "failed 3\n"), ("jobs", "17\n"), ("launch_id", "first\n")):
        (site.launch_folder / name).write_text(text)
    launch = site.launch()
    before = files(site.folder)
    with pytest.raises(UserError, match=message):
        launch.submit()
    (site.folder / "asked").unlink(missing_ok=True)
    assert files(site.folder) == before and runs.find("mine").state() == "failed (3)"


def test_the_outcome_of_an_earlier_launch_is_not_used_for_a_new_one(site):
    site.launched()
    for name, text in (("outcome", "finished 0\n"), ("jobs", "17\n"), ("launch_id", "first\n")):
        (site.launch_folder / name).write_text(text)
    run = site.launch().prepare()
    (site.folder / "queue").write_text("18|PENDING|mine|(null)|Priority\n")
    run = LaunchedRun(run.name, run.run_folder, run.tunnel, ("18",), earlier=run.earlier)
    assert run.state() == "pending" and run.outcome() is None
    (site.launch_folder / "launch_id").write_text("second\n")
    (site.launch_folder / "outcome").write_text("failed 1\n")
    assert run.outcome() == ("failed", 1)


def test_a_run_is_launched_by_one_process_at_a_time(site, monkeypatch):
    monkeypatch.setenv("G2RL_LAUNCH_PYTHON", "/bin/true")
    with runs.launching("mine"), pytest.raises(UserError, match="being launched by another process"):
        site.launch().submit()
