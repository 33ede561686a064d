"""Job scripts run by a real bash: arguments arrive unchanged, attempts are counted, secrets stay out."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from g2rl_launch.job import Job, rank_script, render, sbatch_line
from g2rl_launch.profile import Profile, load_profile
from g2rl_launch.submit import Launch
from megatron_g2rl.config.errors import ConfigError

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "arithmetic.yaml"
HOSTILE = [
    "a b",
    "it's",
    'say "no"',
    "$HOME",
    "$(touch x)",
    "`id`",
    "two\nlines",
    "back\\slash\\n",
    "*",
    "",
    "é;&|<>!#~%j",
]

PROGRAM = """
import json, os, pathlib, sys
run = pathlib.Path(os.environ["G2RL_RUN"])
calls = run / "calls"
number = len(calls.read_text().split()) if calls.exists() else 0
with calls.open("a") as file:
    file.write(f"{number} ")
plan = json.loads(os.environ["PLAN"])
code, step = plan[min(number, len(plan) - 1)]
(run / "seen.json").write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
if step:
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}")
if "JOURNAL" in os.environ:
    (run / "rollouts").mkdir(exist_ok=True)
    with (run / "rollouts" / "step_0.rank_0.jsonl").open("a") as file:
        file.write("{}\\n")
print(os.environ.get("REPORT", f"attempt {number} reports a reason: code {code}").replace(" / ", "\\n"))
sys.exit(code)
"""


SRUN = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
[ "$1" = requeue ] && touch {0}/requeued && echo "$@"
"""
"""Knows no jobs; `run_script` repeats a job for which a requeue was requested."""


def command(folder: Path, name: str, text: str) -> None:
    """A command on the PATH of job scripts."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(text)
    (folder / "bin" / name).chmod(0o755)


def job(folder: Path, plan: list, arguments=("train",), **settings) -> Job:
    (folder / "run").mkdir(exist_ok=True)
    (folder / "program.py").write_text(PROGRAM)
    program = shlex.join([sys.executable, str(folder / "program.py")])
    command(folder, "g2rl", f'#!/bin/bash\nexec {program} "$@"\n')
    command(folder, "srun", SRUN)
    command(folder, "scontrol", SCONTROL.format(shlex.quote(str(folder))))
    environment = {"PLAN": json.dumps(plan), **settings.pop("environment", {})}
    return Job("run", folder / "run", folder, tuple(arguments), "cpu", Profile(environment=environment, **settings))


def run_script(
    folder: Path, text: str, name: str = "job.sh", cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """Run a job script as Slurm runs job 7, with the requeues it requests; returns its output and the attempts'."""
    cwd = cwd or folder
    (cwd / name).write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= {"SLURM_JOB_ID": "7", "PATH": f"{folder}/bin:{os.environ['PATH']}"} | variables
    for restart in range(20):
        environment["SLURM_RESTART_COUNT"] = str(restart)
        done = subprocess.run(["bash", name], env=environment, capture_output=True, text=True, timeout=60, cwd=cwd)
        if not (folder / "requeued").exists():
            break
        (folder / "requeued").unlink()
    done.stdout += log(folder)
    return done


def outcome(folder: Path) -> str:
    return (folder / "run" / "launch" / "outcome").read_text().strip()


def log(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted((folder / "run" / "launch").glob("log-*.out")))


def calls(folder: Path) -> int:
    return len((folder / "run" / "calls").read_text().split())


def test_hostile_arguments_and_values_arrive_unchanged(tmp_path):
    (folder := tmp_path / "a 'quoted' $folder").mkdir()
    done = run_script(folder, render(job(folder, [[0, 0]], HOSTILE, environment={"WEIRD": HOSTILE[0] + HOSTILE[3]})))
    assert done.returncode == 0, done.stderr
    arguments, environment = json.loads((folder / "run" / "seen.json").read_text())
    assert arguments == HOSTILE and environment["WEIRD"] == "a b$HOME"


def test_hostile_arguments_arrive_through_the_script_for_nemo_run(tmp_path):
    made = job(tmp_path, [[0, 0]], HOSTILE)
    (tmp_path / "run" / "launch").mkdir()
    text = f"export G2RL_RUN={tmp_path}/run G2RL_LAUNCH={tmp_path}/run/launch PLAN='[[0, 0]]'\n" + rank_script(made)
    assert run_script(tmp_path, text).returncode == 0
    assert json.loads((tmp_path / "run" / "seen.json").read_text())[0] == HOSTILE


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


def reason(folder: Path) -> str:
    return (folder / "run" / "launch" / "reason").read_text()


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


@pytest.mark.parametrize(("time", "spent"), [("2026-11-22T23:24:01", "0"), ("None", "1")])
def test_a_preempted_job_uses_no_retry_although_only_its_ranks_are_signalled(tmp_path, time, spent):
    made = job(tmp_path, [[75, 0]])
    shown = f"echo JobId=7 PreemptEligibleTime=2026-11-22T23:23:58 PreemptTime={time} $*"
    command(tmp_path, "scontrol", f"#!/bin/bash\n{shown}\n")
    done = run_script(tmp_path, render(made))
    assert done.returncode == 75 and "requeue 7" in log(tmp_path)
    assert (tmp_path / "run" / "launch" / "attempts.tsv").read_text().endswith(f"\t75\t0\t0\t{spent}\n")


def fake_scontrol(folder: Path, message: str) -> None:
    """`scontrol show job` prints this; `scontrol requeue` ends the running job, as Slurm does."""
    text = f"""#!/bin/bash
if [ "$1" = requeue ]; then echo "$@"; [ ! -e {folder}/pid ] || kill $(cat {folder}/pid); exit; fi
echo "JobId=7 {message} "
"""
    command(folder, "scontrol", text)


def test_an_attempt_that_does_not_end_before_the_time_limit_is_requeued_and_uses_a_retry(tmp_path):
    sleeps = f"import os, time; open('{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(60)"
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
        assert "requeue" not in log(tmp_path) and time.monotonic() - started < 10
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


def test_a_failing_setup_line_ends_the_attempt_with_its_message(tmp_path):
    made = job(tmp_path, [[0, 0]], setup=("true", "module_of_nobody load cuda", "echo never"), retries=0)
    fake_scontrol(tmp_path, "EndTime=Unknown")
    done = run_script(tmp_path, render(made))
    assert done.returncode == 1 and outcome(tmp_path) == "failed 1" and not (tmp_path / "run" / "calls").exists()
    output = log(tmp_path)
    assert (
        "module_of_nobody: command not found" in output
        and "setup failed with 127: module_of_nobody load cuda" in output
    )
    assert "never" not in output.replace("echo never", "") and "module_of_nobody" in reason(tmp_path)


def test_setup_lines_may_load_secrets_from_a_file_of_the_cluster(tmp_path):
    (tmp_path / "secrets.sh").write_text("MY_TOKEN=hush-1234\n")
    made = job(tmp_path, [[0, 0]], secrets=("MY_TOKEN",), setup=(f". '{tmp_path}/secrets.sh'",))
    assert run_script(tmp_path, render(made)).returncode == 0
    assert json.loads((tmp_path / "run" / "seen.json").read_text())[1]["MY_TOKEN"] == "hush-1234"


def test_setup_lines_and_later_attempts_start_in_the_folder_of_the_job(tmp_path):
    made = job(tmp_path, [[75, 1], [0, 2]], setup=("echo here > set_up",))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    done = run_script(tmp_path, render(made), "my job.sh", elsewhere)
    assert done.returncode == 0 and calls(tmp_path) == 2, done.stdout + done.stderr
    assert (tmp_path / "set_up").is_file() and not (elsewhere / "set_up").exists()


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


def test_secrets_reach_ranks_by_name_and_are_in_no_script_and_no_output(tmp_path):
    made = job(tmp_path, [[0, 0]], secrets=("MY_TOKEN",))
    text = render(made)
    done = run_script(tmp_path, text, MY_TOKEN="hush-1234")
    assert done.returncode == 0
    assert json.loads((tmp_path / "run" / "seen.json").read_text())[1]["MY_TOKEN"] == "hush-1234"
    shutil.rmtree(tmp_path / "run" / "launch")
    traced = run_script(tmp_path, text.replace("#!/bin/bash", "#!/bin/bash\nset -x", 1), MY_TOKEN="hush-1234")
    assert "hush-1234" not in text + traced.stdout + traced.stderr + log(tmp_path)
    shutil.rmtree(tmp_path / "run" / "launch")
    missing = run_script(tmp_path, text)
    assert missing.returncode == 2 and "MY_TOKEN is not set" in missing.stdout and calls(tmp_path) == 2
    assert outcome(tmp_path) == "failed 2" and "MY_TOKEN is not set" in reason(tmp_path)


def slurm_profile(folder: Path, *lines: str) -> str:
    (folder / "cluster.yaml").write_text("\n".join(["account: mine", *lines]) + "\n")
    return str(folder / "cluster.yaml")


def test_the_script_for_slurm_contains_the_profile_and_is_valid_bash(tmp_path):
    cluster = slurm_profile(
        tmp_path,
        "partition: gpu",
        "nodes: 2",
        "gpus_per_node: 8",
        "cpus_per_rank: 4",
        "container_image: some/image",
        f"container_mounts: [{tmp_path}:{tmp_path}, {QUICKSTART.parents[2]}:{QUICKSTART.parents[2]}]",
        f"folder: {tmp_path}",
        "secrets: [HF_TOKEN]",
        "sbatch: {constraint: h100&nvlink, comment: two words}",
        "srun: [--cpu-bind=none]",
    )
    text = render(Launch(QUICKSTART, [], cluster).job)
    for line in ("--partition=gpu", "--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8", "--cpus-per-task=4",
                 '--constraint="h100&nvlink"', '--comment="two words"', "--signal=TERM@300", "--requeue"):  # fmt: skip
        assert f"\n#SBATCH {line}\n" in text
    srun = re.search(r"^srun .*(?:\\\n.*)?", text, re.MULTILINE)[0]
    for word in ("--container-image=some/image", f"--container-mounts={tmp_path}:{tmp_path},", "--cpu-bind=none"):
        assert word in srun
    assert "HF_TOKEN" in re.search(r"--container-env=(\S+)", srun)[1].split(",")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_container_without_the_folder_of_the_runs_is_refused(tmp_path):
    cluster = slurm_profile(tmp_path, "container_image: x", "container_mounts: [/data:/data]", f"folder: {tmp_path}")
    with pytest.raises(ConfigError, match="would not see the folder of runs"):
        Launch(QUICKSTART, [], cluster)


def test_a_container_without_the_configuration_is_refused_with_the_folder_to_mount(tmp_path):
    cluster = slurm_profile(
        tmp_path, "container_image: x", f"container_mounts: [{tmp_path}:{tmp_path}]", f"folder: {tmp_path}"
    )
    folder = QUICKSTART.parent
    with pytest.raises(ConfigError, match=f"Add {re.escape(f'{folder}:{folder}')} "):
        Launch(QUICKSTART, [], cluster)


def test_the_layout_is_checked_against_the_ranks_of_the_job_before_it_is_queued(tmp_path):
    cluster = slurm_profile(tmp_path, "ranks_per_node: 3")
    with pytest.raises(ConfigError, match="does not divide the 3 ranks"):
        Launch(QUICKSTART, ["policy.tensor_parallel=2"], cluster)


def test_sbatch_options_that_cannot_be_parsed_are_refused():
    assert sbatch_line("comment", "a b") == '#SBATCH --comment="a b"'
    with pytest.raises(ConfigError, match="comment"):
        sbatch_line("comment", 'a "b"')


def test_no_secret_is_in_the_script_for_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hush-1234")
    launch = Launch(QUICKSTART, [], slurm_profile(tmp_path, "secrets: [HF_TOKEN]", "gpus_per_node: 2"))
    text = render(launch.job)
    assert "hush-1234" not in text and "export HF_TOKEN;" in text and "#SBATCH --gpus-per-node=2\n" in text
    assert load_profile(str(tmp_path / "cluster.yaml")).secrets == ("HF_TOKEN",)


def test_servers_get_the_nodes_after_those_of_the_ranks(tmp_path):
    cluster = slurm_profile(
        tmp_path, "nodes: 2", "ranks_per_node: 4", 'servers: {nodes: 3, command: "serve --port $G2RL_SERVER_PORT"}'
    )
    text = render(Launch(QUICKSTART, [], cluster).job)
    assert "#SBATCH --nodes=5\n" in text
    served, trained = re.findall(r"^ *srun .*", text, re.MULTILINE)
    assert "--nodes=3 --relative=2 --ntasks=3 --ntasks-per-node=1" in served and "g2rl_server_ended $?\n} &" in text
    assert "bash -c 'serve --port $G2RL_SERVER_PORT'" in served
    assert "--nodes=2 --relative=0 --ntasks=8" in trained
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


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
