"""`g2rl launch` on a real two-node Slurm: through nemo-run, and by a rendered script without it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_jobs import CONFIG, ROOT, Job, ended, metrics, read, settings, wait_until

HOSTILE = 'data.system_prompt=it\'s "x" $HOME `id` $(id) \\ ; & | * %j !\n  {second} line'
SHOW_ARGUMENTS = (
    "import json, os, sys; open(f'{sys.argv[1]}.' + os.environ['SLURM_PROCID'], 'w').write(json.dumps(sys.argv[2:]))"
)


@pytest.fixture
def launch(g2rl, tmp_path):
    """Start `g2rl launch` under a profile with these lines more; its process."""

    def started(*words: str, **profile) -> subprocess.Popen:
        return g2rl("launch", str(CONFIG), "--cluster", "site.yaml", *words, *settings(tmp_path), **profile)

    return started


def test_a_launched_training_is_stopped_by_a_signal_requeued_and_ends_like_an_uninterrupted_one(
    launch, nemo_run, expected, tmp_path
):
    process = launch("--wait")
    run = tmp_path / "run"
    jobs = run / "launch" / "jobs"
    wait_until(lambda: jobs.is_file() or process.poll() is not None, 60, "a job of its own")
    assert jobs.is_file(), ended(process)
    number = jobs.read_text().split()[0]
    job = Job(number, run, run / "launch" / f"log-{number}-0.out")
    job.wait_for_step(3)
    read("scancel", "--signal=USR1", number)
    code, said = ended(process)
    assert code == 0, said
    assert job.field("Restarts") == "1"
    assert metrics(run) == expected


def test_a_job_that_keeps_failing_spends_its_retries_and_ends_with_its_exit_code_and_error(launch, nemo_run, tmp_path):
    code, said = ended(launch("--wait", retries=1, command=["bash", "-c", "echo the disk is on fire >&2; exit 3"]))
    assert code == 3 and "the disk is on fire" in said, said
    assert len((tmp_path / "run" / "launch" / "attempts.tsv").read_text().splitlines()) == 2


def test_hostile_arguments_arrive_as_they_were_given_through_nemo_run(launch, nemo_run, tmp_path):
    code, said = ended(
        launch("--wait", HOSTILE, command=[sys.executable, "-c", SHOW_ARGUMENTS, str(tmp_path / "seen")])
    )
    assert code == 0, said
    check_seen(tmp_path)


def test_a_rendered_script_runs_without_nemo_run_and_keeps_arguments(launch, environment, tmp_path, monkeypatch):
    monkeypatch.setitem(environment, "G2RL_LAUNCH_PYTHON", "/nowhere/python")
    command = [sys.executable, "-c", SHOW_ARGUMENTS, str(tmp_path / "seen")]
    code, said = ended(launch("--render", str(tmp_path / "job.sh"), HOSTILE, command=command))
    assert code == 0, said
    found = read("sbatch", "--parsable", "--wait", f"--chdir={tmp_path}", str(tmp_path / "job.sh"))
    assert re.fullmatch(r"\d+", found), said
    check_seen(tmp_path)


def check_seen(folder: Path) -> None:
    for rank in (0, 1):
        seen = json.loads((folder / f"seen.{rank}").read_text())
        assert HOSTILE in seen and seen[0] == "train" and seen[1].endswith("arithmetic.yaml")


def test_the_job_script_for_a_container_hands_image_mounts_and_environment_to_pyxis(launch, nemo_run, tmp_path):
    mounts = [f"{tmp_path}:{tmp_path}", f"{ROOT}:{ROOT}", "/data:/data:ro"]
    code, said = ended(launch("--dry-run", container_image="nvcr.io#nvidia/pytorch:25.09-py3", container_mounts=mounts))
    assert code == 0, said
    assert re.search(r"srun [^\n]*--container-image[= ]'?nvcr.io#nvidia/pytorch:25.09-py3", said), said
    assert re.search(rf"--container-mounts[= ]'?{re.escape(mounts[0])}", said) and "/data:/data:ro" in said, said
    assert re.search(r"--container-env[= ]\S*XDG_CACHE_HOME", said), said
