"""A rendered job script queues its segments as one launch; the run can be referred to by its name from then on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from g2rl_launch.run import find
from megatron_g2rl.cli import app

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "data" / "run.yaml"
SRUN = 'while [ "$1" != bash ]; do shift; done\nexec "$@"'
SBATCH = """
if [ -e {0}/limit ] && [ "$(wc -l < {0}/submitted)" -ge "$(cat {0}/limit)" ]; then
  echo "sbatch: error: limit" >&2
  exit 1
fi
for word; do
  case "$word" in --export=ALL,*=*) export "${{word#--export=ALL,}}" ;; esac
done
number=$((100 + $(cat {0}/submitted 2>/dev/null | wc -l)))
echo "$number $*" >> {0}/submitted
( export SLURM_JOB_ID=$number; bash "$word" > {0}/job-$number.out 2>&1; echo $? > {0}/job-$number.code )
case "$*" in *--parsable*) echo "$number;cluster" ;; *) echo "Submitted batch job $number" ;; esac
"""
"""Runs its argument immediately, as the job of the next number."""


@pytest.fixture
def g2rl(tmp_path, monkeypatch):
    """Call g2rl with a profile of these lines; returns its output. Slurm's commands are stand-ins."""
    (tmp_path / "bin").mkdir()
    answers = {"sbatch": SBATCH.format(tmp_path), "srun": SRUN, "scontrol": "exit 0", "squeue": f"cat {tmp_path}/queue"}
    for name, text in answers.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "queue").write_text("")
    (tmp_path / "submitted").write_text("")
    for name in [name for name in os.environ if name.startswith(("SLURM", "G2RL_LAUNCH"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def call(*words: str, **profile) -> str:
        program = profile.pop("program", "false")
        (tmp_path / "bin" / "g2rl").write_text(f"#!/bin/bash\n{program}\n")
        (tmp_path / "bin" / "g2rl").chmod(0o755)
        settings = {"account": "mine"} | profile
        (tmp_path / "site.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
        settings = ["run.directory=runs", "run.name=mine"] if words[0] == "launch" else []
        done = CliRunner().invoke(app, [*words, *settings])
        assert done.exit_code == 0, done.output
        return done.output

    return call


def render(g2rl, **profile) -> str:
    return g2rl("launch", str(CONFIG), "--cluster", "site.yaml", "--render", "a job.sh", **profile)


def bash(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "a job.sh"], cwd=folder, capture_output=True, text=True, timeout=60)


def test_segments_queued_by_a_script_have_one_retry_budget_and_a_second_call_has_a_new_one(g2rl, tmp_path):
    output = render(g2rl, continuation="chain", segments=4, retries=1)
    assert output.endswith("wrote a job.sh; submit its 4 segments with: bash 'a job.sh'\n")
    done = bash(tmp_path)
    assert done.returncode == 0 and "segment 4 of 4: job 103" in done.stdout, done.stderr
    launch = tmp_path / "runs" / "mine" / "launch"
    assert [line.split("\t")[5] for line in (launch / "attempts.tsv").read_text().splitlines()] == ["1", "2"]
    assert "nothing to do: failed 1" in (tmp_path / "job-103.out").read_text()
    assert (tmp_path / "submitted").read_text().count("singleton") == 0  # it is in the file
    assert "#SBATCH --dependency=singleton\n" in (tmp_path / "a job.sh").read_text()
    bash(tmp_path)
    assert [line.split("\t")[5] for line in (launch / "attempts.tsv").read_text().splitlines()] == ["1", "2", "1", "2"]


def test_each_sbatch_of_a_script_is_a_separate_launch_and_its_ranks_do_not_inherit_that(g2rl, tmp_path):
    render(g2rl, program=f"env > {tmp_path}/seen; exit 1", retries=0, continuation="chain", segments=2)
    for _ in range(2):
        assert subprocess.run(["sbatch", "a job.sh"], cwd=tmp_path, timeout=60).returncode == 0
    attempts = (tmp_path / "runs" / "mine" / "launch" / "attempts.tsv").read_text().splitlines()
    assert [line.split("\t")[5] for line in attempts] == ["1", "1"]
    bash(tmp_path)
    assert "G2RL_LAUNCH_ID" not in (tmp_path / "seen").read_text()


def test_a_refused_segment_is_reported_and_nothing_is_created_if_it_is_the_first(g2rl, tmp_path):
    render(g2rl, continuation="chain", segments=3)
    (tmp_path / "limit").write_text("0")
    done = bash(tmp_path)
    assert done.returncode == 1 and "limit" in done.stderr and "segment 1 of 3" in done.stderr
    assert not (tmp_path / "runs").exists()
    (tmp_path / "limit").write_text("2")
    done = bash(tmp_path)
    assert done.returncode == 1 and "segment 2 of 3: job 101" in done.stdout
    assert "segment 3 of 3" in done.stderr and "scancel removes them" in done.stderr


def test_a_script_does_not_queue_a_run_that_is_already_queued(g2rl, tmp_path):
    render(g2rl)
    (tmp_path / "queue").write_text("100 PENDING Priority\n")
    done = bash(tmp_path)
    assert done.returncode == 1 and "is queued or running" in done.stderr
    assert (tmp_path / "submitted").read_text() == ""


def test_a_rendered_run_can_be_referred_to_by_name_before_and_after_submission(g2rl, tmp_path):
    assert render(g2rl).endswith("wrote a job.sh; submit it with: sbatch 'a job.sh'\n")
    shown = g2rl("status", "mine")
    assert "mine  not submitted" in shown and "mine: none of its jobs has started" in shown
    assert "scancel --name=mine cancels one that is queued" in g2rl("cancel", "mine")
    subprocess.run(["sbatch", "a job.sh"], cwd=tmp_path, timeout=60)
    (tmp_path / "runs" / "mine" / "launch" / "outcome").unlink(missing_ok=True)
    (tmp_path / "queue").write_text("100|PENDING|mine|(null)|BeginTime\n")
    assert "mine  pending" in g2rl("status", "mine") and find("mine").jobs() == ["100"]


def test_the_shipped_profile_without_containers_can_be_rendered(g2rl, tmp_path, monkeypatch):
    profile = str(ROOT / "launch" / "clusters" / "bare.yaml")
    g2rl("launch", str(CONFIG), "--cluster", profile, "--render", "job.sh")
    text = (tmp_path / "job.sh").read_text()
    assert "g2rl_segments=4\n" in text and subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_dry_run_starts_with_a_summary_and_ends_with_the_script(g2rl, tmp_path, monkeypatch):
    checkpoint = tmp_path / "runs" / "mine" / "checkpoints" / "step_00000012"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    monkeypatch.setenv("G2RL_LAUNCH_PYTHON", "/nowhere/python")
    monkeypatch.delenv("MY_TOKEN", raising=False)
    output = g2rl(
        *("launch", str(CONFIG), "--cluster", "site.yaml", "--dry-run", "policy.device=cpu"),
        **{"nodes": 2, "gpus_per_node": 1, "time": "02:00:00", "secrets": "[MY_TOKEN]"},
    )
    parts = ["2 nodes x 1 rank = 2 ranks; 1 GPU per node; time limit 02:00:00", "the same job again",
             "log-JOB-RESTART.out", "after step 12", "policy.device=cpu uses none", "MY_TOKEN",
             "nemo-run is not installed", "prompts per step", "#!/bin/bash", "#SBATCH --nodes=2"]  # fmt: skip
    places = [" ".join(output.split()).find(" ".join(part.split())) for part in parts]
    assert -1 not in places, (parts[places.index(-1)], output[:4000])
    assert output.index("gpus_per_node") < output.index("#!/bin/bash") and sys.executable not in output.split("#!")[0]
