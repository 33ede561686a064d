"""Job scripts, some run by a real bash: arguments arrive unchanged, profiles are applied, secrets stay out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from job_scripts import HOSTILE, calls, fake_scontrol, job, log, outcome, reason, run_script

from g2rl_launch.job import rank_script, render, sbatch_line, shell_text
from g2rl_launch.profile import load_profile
from g2rl_launch.submit import Launch
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.run_files import MANIFEST, STOPPED

CONFIG = Path(__file__).parents[1] / "data" / "run.yaml"


def test_shell_files_know_the_manifest_and_the_exit_code_of_a_stopped_run():
    attempts, rank = shell_text("attempts.sh"), shell_text("rank.sh")
    assert f'[ -e "$folder/{MANIFEST}" ] || continue' in attempts
    assert f'[ "$1" = {STOPPED} ]' in attempts and f"code={STOPPED}" in attempts
    assert f'[ "$code" = {STOPPED} ]' in rank


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
        f"container_mounts: [{tmp_path}:{tmp_path}, {CONFIG.parents[2]}:{CONFIG.parents[2]}]",
        f"folder: {tmp_path}",
        "secrets: [HF_TOKEN]",
        "sbatch: {constraint: h100&nvlink, comment: two words}",
        "srun: [--cpu-bind=none]",
    )
    text = render(Launch(CONFIG, [], cluster).job)
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
        Launch(CONFIG, [], cluster)


def test_a_container_without_the_configuration_is_refused_with_the_folder_to_mount(tmp_path):
    cluster = slurm_profile(
        tmp_path, "container_image: x", f"container_mounts: [{tmp_path}:{tmp_path}]", f"folder: {tmp_path}"
    )
    folder = CONFIG.parent
    with pytest.raises(ConfigError, match=f"Add {re.escape(f'{folder}:{folder}')} "):
        Launch(CONFIG, [], cluster)


def test_the_layout_is_checked_against_the_ranks_of_the_job_before_it_is_queued(tmp_path):
    cluster = slurm_profile(tmp_path, "ranks_per_node: 3")
    with pytest.raises(ConfigError, match="does not divide the 3 ranks"):
        Launch(CONFIG, ["policy.tensor_parallel=2"], cluster)


def test_sbatch_options_that_cannot_be_parsed_are_refused():
    assert sbatch_line("comment", "a b") == '#SBATCH --comment="a b"'
    with pytest.raises(ConfigError, match="comment"):
        sbatch_line("comment", 'a "b"')


def test_no_secret_is_in_the_script_for_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hush-1234")
    launch = Launch(CONFIG, [], slurm_profile(tmp_path, "secrets: [HF_TOKEN]", "gpus_per_node: 2"))
    text = render(launch.job)
    assert "hush-1234" not in text and "export HF_TOKEN;" in text and "#SBATCH --gpus-per-node=2\n" in text
    assert load_profile(str(tmp_path / "cluster.yaml")).secrets == ("HF_TOKEN",)


def test_servers_get_the_nodes_after_those_of_the_ranks(tmp_path):
    cluster = slurm_profile(
        tmp_path, "nodes: 2", "ranks_per_node: 4", 'servers: {nodes: 3, command: "serve --port $G2RL_SERVER_PORT"}'
    )
    text = render(Launch(CONFIG, [], cluster).job)
    assert "#SBATCH --nodes=5\n" in text
    served, trained = re.findall(r"^ *srun .*", text, re.MULTILINE)
    assert "--nodes=3 --relative=2 --ntasks=3 --ntasks-per-node=1" in served and "g2rl_server_ended $?\n} &" in text
    assert "bash -c 'serve --port $G2RL_SERVER_PORT'" in served
    assert "--nodes=2 --relative=0 --ntasks=8" in trained
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
