"""Attempts of a job script, run by a real bash: which ones use a retry, and how the run ends."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from importlib.resources import files

import pytest
from job_scripts import calls, command, fake_scontrol, job, log, outcome, reason, run_script

from g2rl_launch.job import render

ATTEMPTS = files("g2rl_launch").joinpath("attempts.sh").read_text()


def test_attempts_with_progress_use_no_retries_and_the_run_continues_to_its_end(tmp_path):
    done = run_script(tmp_path, render(job(tmp_path, [[75, 1], [1, 2], [75, 3], [137, 4], [0, 5]], retries=0)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert calls(tmp_path) == 5 and outcome(tmp_path) == "finished 0"


def test_attempts_without_progress_use_the_retries_and_the_last_error_is_shown(tmp_path):
    done = run_script(tmp_path, render(job(tmp_path, [[75, 1], [7, 0]], retries=2)))
    assert done.returncode == 7 and calls(tmp_path) == 1 + 3 and outcome(tmp_path) == "failed 7"
    assert "all retries are spent" in done.stdout and "attempt 3 reports a reason" in done.stdout
    spent = [line.split("\t")[5] for line in (tmp_path / "run/launch/attempts.tsv").read_text().splitlines()]
    assert spent == ["0", "1", "2", "3"]


def test_the_same_error_without_progress_uses_the_retries_and_is_reported_at_the_end(tmp_path):
    made = job(tmp_path, [[1, 1], [1, 1]], environment={"REPORT": "item 7 has no answer / Terminated"}, retries=2)
    done = run_script(tmp_path, render(made))
    assert done.returncode == 1 and calls(tmp_path) == 1 + 3 and outcome(tmp_path) == "failed 1"
    assert "item 7 has no answer" in reason(tmp_path) and "all retries are spent" in reason(tmp_path)


def test_a_kill_does_not_count_as_a_repeated_error(tmp_path):
    made = job(tmp_path, [[137, 0], [137, 0], [137, 0], [0, 1]], environment={"REPORT": "step 3"})
    assert run_script(tmp_path, render(made)).returncode == 0


def test_a_time_limit_too_short_for_a_step_is_reported_and_tried_only_twice(tmp_path):
    text = render(job(tmp_path, [[75, 0]], retries=9)).replace("g2rl_begin\n", "G2RL_SIGNAL_S=0\ng2rl_begin\n")
    done = run_script(tmp_path, text)
    assert done.returncode == 75 and calls(tmp_path) == 2 and outcome(tmp_path) == "failed 75"
    assert "leaves no time for a step" in reason(tmp_path) and "lower stop_before_end_s" in reason(tmp_path)


def test_a_stop_during_the_rollout_uses_no_retry_while_the_journal_grows(tmp_path):
    made = job(tmp_path, [[75, 0], [75, 0], [75, 0], [0, 1]], environment={"JOURNAL": "1"}, retries=0)
    assert run_script(tmp_path, render(made)).returncode == 0 and calls(tmp_path) == 4


def test_a_job_that_receives_a_stop_signal_uses_no_retry(tmp_path):
    text = render(job(tmp_path, [[75, 0]], retries=0)).replace("\nsrun ", "\nkill -TERM $$; srun ", 1)
    assert run_script(tmp_path, text).returncode == 75 and calls(tmp_path) == 1
    assert not (tmp_path / "run" / "launch" / "outcome").exists()
    assert (tmp_path / "run" / "launch" / "attempts.tsv").read_text().endswith("\t75\t0\t0\t0\n")


@pytest.mark.parametrize(
    "lines",
    [
        ("rank 1: the server has no such model", "SIGTERM: stopping; there is nothing to save yet"),
        (
            "rank 3: the server has no such model",
            "SIGTERM: saving and stopping at the next safe point",
            "rank 1: the connection to another rank is lost: that rank ended",
        ),
        ("SIGTERM: saving and stopping at the next safe point", "the server has no such model"),
    ],
)
def test_the_reason_of_a_failure_is_the_cause_and_not_what_followed_from_it(tmp_path, lines):
    made = job(tmp_path, [[1, 0]], retries=0)
    command(tmp_path, "g2rl", "#!/bin/bash\n" + "".join(f"echo '{line}'\n" for line in lines) + "exit 1\n")
    assert run_script(tmp_path, render(made)).returncode == 1
    assert reason(tmp_path) == "all retries are spent: the server has no such model\n"


def test_a_stopped_rank_that_cannot_say_so_has_not_finished_the_run(tmp_path):
    made = job(tmp_path, [[75, 0]], retries=0)
    command(tmp_path, "g2rl", '#!/bin/bash\nln -s /nowhere/file "$G2RL_LAUNCH/stopped" && exit 75\n')
    done = run_script(tmp_path, render(made))
    assert done.returncode == 75 and "finished" not in log(tmp_path)


@pytest.mark.parametrize(("time", "spent"), [("2026-11-22T23:24:01", "0"), ("None", "1")])
def test_a_preempted_job_uses_no_retry_although_only_its_ranks_are_signaled(tmp_path, time, spent):
    made = job(tmp_path, [[75, 0]])
    shown = f"echo JobId=7 PreemptEligibleTime=2026-11-22T23:23:58 PreemptTime={time} $*"
    command(tmp_path, "scontrol", f"#!/bin/bash\n{shown}\n")
    done = run_script(tmp_path, render(made))
    assert done.returncode == 75 and "requeue 7" in log(tmp_path)
    assert (tmp_path / "run" / "launch" / "attempts.tsv").read_text().endswith(f"\t75\t0\t0\t{spent}\n")


def test_an_attempt_that_does_not_end_before_the_time_limit_is_requeued_and_uses_a_retry(tmp_path):
    sleeps = f"import os, time; open('{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(600)"
    made = job(tmp_path, [[0, 0]])
    command(tmp_path, "g2rl", f"#!/bin/bash\nexec {shlex.join([sys.executable, '-c', sleeps])}\n")
    ends = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 4))
    fake_scontrol(tmp_path, f"EndTime={ends}")
    done = run_script(tmp_path, render(made), G2RL_REQUEUE_BEFORE_S="2")
    assert done.returncode == 143 and "requeue 7" in log(tmp_path)
    assert "Raise stop_before_end_s" in log(tmp_path)
    assert (tmp_path / "run" / "launch" / "attempts.tsv").read_text().endswith("\t143\t0\t0\t1\n")


def test_nothing_is_requeued_without_a_time_limit_or_if_the_attempt_ends_before_it(tmp_path):
    for ends in ("Unknown", time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 600))):
        started, made = time.monotonic(), job(tmp_path, [[0, 1]])
        fake_scontrol(tmp_path, f"EndTime={ends}")
        assert run_script(tmp_path, render(made)).returncode == 0
        assert "requeue" not in log(tmp_path) and time.monotonic() - started < 50
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("running", [True, False])
def test_a_second_job_of_a_run_yields_to_the_first(tmp_path, running):
    made = job(tmp_path, [[0, 0]])
    fake_scontrol(tmp_path, "EndTime=Unknown")
    command(tmp_path, "squeue", f"#!/bin/sh\n{'echo 6 main run R' if running else ''}\n")
    launch = tmp_path / "run" / "launch"
    launch.mkdir()
    (launch / "running").write_text("6.0\n")
    done = run_script(tmp_path, render(made))
    assert done.returncode == int(running)
    if running:
        assert "job 6 of this run is running" in done.stdout and not (tmp_path / "run" / "calls").exists()
        assert (launch / "running").read_text() == "6.0\n" and not (launch / "attempts.tsv").exists()
    else:
        assert outcome(tmp_path) == "finished 0"


@pytest.mark.parametrize(
    "answers, seen",
    [("Unable to contact slurm controller", 3), ("Requested operation is presently disabled for job 5", 1)],
)
def test_a_requeue_is_retried_while_the_controller_is_unreachable_but_not_if_disabled(tmp_path, answers, seen):
    made = job(tmp_path, [[75, 1]])
    text = f"echo x >> {tmp_path}/asked\n[ $(wc -l < {tmp_path}/asked) = 3 ] || {{ echo '{answers}' >&2; exit 1; }}"
    command(tmp_path, "scontrol", f'#!/bin/sh\n[ "$1" = requeue ] || exit 1\n{text}\n')
    assert run_script(tmp_path, render(made), G2RL_REQUEUE_S="0").returncode == 75
    assert (tmp_path / "asked").read_text().count("x") == seen
    assert (tmp_path / "run" / "launch" / "outcome").exists() == (seen == 1)


def test_an_invalid_configuration_is_not_retried(tmp_path):
    assert run_script(tmp_path, render(job(tmp_path, [[2, 0]]))).returncode == 2
    assert calls(tmp_path) == 1 and outcome(tmp_path) == "failed 2"


def test_segments_of_a_chain_continue_the_run_to_its_end_and_then_do_nothing(tmp_path):
    text = render(job(tmp_path, [[75, 1], [0, 2]], continuation="chain"), launch_id="one launch")
    assert [run_script(tmp_path, text).returncode for _ in range(4)] == [75, 0, 0, 0]
    assert calls(tmp_path) == 2


def test_a_job_that_vanished_uses_a_retry_unless_it_made_progress(tmp_path):
    text = render(job(tmp_path, [[0, 0]], retries=0, continuation="chain"), launch_id="one launch")
    launch = tmp_path / "run" / "launch"
    launch.mkdir()
    (launch / "launch_id").write_text("one launch\n")
    (launch / "best_step").write_text("4\n")
    (launch / "running").write_text("17.0\n")
    assert run_script(tmp_path, text).returncode == 1 and outcome(tmp_path) == "failed 1"
    assert "was lost with its node" in reason(tmp_path)
    (launch / "outcome").unlink()
    (launch / "spent").unlink()
    (launch / "running").write_text("18.0\n")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000008"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    assert run_script(tmp_path, text).returncode == 0 and outcome(tmp_path) == "finished 0"


def test_the_exit_code_is_that_of_the_first_failed_rank_not_of_those_killed_after_it(tmp_path):
    text = render(job(tmp_path, [[2, 0], [143, 0]]))
    done = run_script(tmp_path, text + text[text.index("\nsrun ") :])
    assert done.returncode == 2 and outcome(tmp_path) == "failed 2"


def test_an_attempt_that_cannot_be_counted_is_not_retried(tmp_path):
    made = job(tmp_path, [[9, 0]], retries=1)
    (tmp_path / "run" / "launch" / "spent.new").mkdir(parents=True)  # writing there fails, as on a full disk
    done = run_script(tmp_path, render(made))
    assert done.returncode == 9 and calls(tmp_path) == 1, done.stdout
    assert "retries cannot be counted" in done.stdout, done.stdout


@pytest.mark.parametrize("code", [0, 3])
def test_ranks_are_asked_to_stop_until_they_do_when_the_servers_end_before_them(tmp_path, code):
    launch = tmp_path / "launch"
    launch.mkdir()
    (launch / "running").touch()
    # The first request is lost, because the step of the ranks does not exist yet; the third ends them.
    asked = shlex.quote(str(tmp_path / "asked"))
    ends = f'echo "$@" >> {asked}; [ "$(wc -l < {asked})" -lt 3 ] || rm {shlex.quote(str(launch / "running"))}'
    functions = f"scancel() {{ {ends}; }}; sleep() {{ :; }}"
    names = f"G2RL_LAUNCH={shlex.quote(str(launch))} G2RL_SRUN_LOG=log-7-0.out SLURM_JOB_ID=7"
    done = run_script(tmp_path, f"{ATTEMPTS}\n{functions}\n{names}\ng2rl_server_ended {code}\n")
    assert done.returncode == 0 and (tmp_path / "asked").read_text() == "--signal=TERM 7\n" * 3
    assert f"servers ended with {code} while ranks ran: server-7-0.out" in (launch / "reason").read_text()


@pytest.mark.parametrize("code", [143, 137])
def test_servers_that_end_with_the_job_ask_nothing(tmp_path, code):
    (tmp_path / "running").touch()
    asked, running = (shlex.quote(str(tmp_path / name)) for name in ("asked", "running"))
    functions = f"scancel() {{ touch {asked}; rm {running}; }}; sleep() {{ :; }}"
    names = f"G2RL_LAUNCH={shlex.quote(str(tmp_path))}"
    done = run_script(tmp_path, f"{ATTEMPTS}\n{functions}\n{names}\ng2rl_server_ended {code}\n")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert not (tmp_path / "asked").exists() and not (tmp_path / "reason").exists()
