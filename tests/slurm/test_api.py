"""`g2rl_launch.executor` and `recipe` in a nemo-run script: the one shown in launch/README.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from slurm_jobs import CONFIG, ROOT, SLOW, Run, install_g2rl, metrics, read, settings, wait_until

from g2rl_launch.install import link

SCRIPT = re.search(
    r"^    import nemo_run as run\n(    .*\n|\n)+", (ROOT / "launch" / "README.md").read_text(), re.MULTILINE
)

COMMAND = "from nemo_run.__main__ import app; app()"
"""nemo-run's own command line, started as its console script does."""


@pytest.fixture
def nemo(slurm, environment, tmp_path, nemo_run):
    """Start a Python program of the launch environment, in which both packages are linked; returns the process."""
    (tmp_path / "packages").mkdir()
    link(tmp_path / "packages")
    own = environment | dict(PYTHONPATH=str(tmp_path / "packages"), SLURM_CONF=os.environ["SLURM_CONF"])
    own |= dict(
        XDG_STATE_HOME=str(tmp_path / "state"), XDG_CONFIG_HOME=str(tmp_path), NEMORUN_HOME=str(tmp_path / "nemo")
    )

    def started(*words: str) -> subprocess.Popen:
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen([os.environ["G2RL_LAUNCH_PYTHON"], *words], env=own, cwd=tmp_path, **pipes)

    yield started
    read("scancel", "--user=root")
    wait_until(lambda: not read("squeue", "--noheader"), 60, "jobs end")


def test_the_documented_script_trains_resumes_and_is_listed_by_both_command_lines(
    nemo, ask, expected, environment, tmp_path
):
    (tmp_path / "slow.py").write_text(SLOW)
    names = ("XDG_CACHE_HOME", "PYTHONPATH")
    profile = dict(account="local", time="00:10:00", nodes=1, ranks_per_node=1, stop_before_end_s=60)
    profile |= dict(setup=install_g2rl(tmp_path), environment={name: environment[name] for name in names})
    profile["environment"] |= dict(SLEEP_S="0.3", SLOW_ATTEMPTS="1")
    (tmp_path / "my_cluster.yaml").write_text(json.dumps(profile))
    keys = dict(text.split("=", 1) for text in [*settings(tmp_path), "reward.function=slow:slow_reward"])
    tree: dict = {"base": str(CONFIG)}
    for key, value in keys.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = json.loads(value) if re.fullmatch(r"[\d.]+|true|false", value) else value
    del tree["run"]["name"]  # the script sets it
    (tmp_path / "my.yaml").write_text(json.dumps(tree))
    script = re.sub("^    ", "", SCRIPT[0], flags=re.MULTILINE).replace('"steps": 1000', '"steps": 6')
    assert len(script.strip().splitlines()) <= 10

    run = Run(tmp_path / "first", nemo("-c", script))
    wait_until(lambda: (run.folder / "checkpoints" / "step_00000002" / "manifest.json").is_file(), 600, run.diagnostics)
    read("scancel", "--signal=TERM", run.job)  # as before a time limit: to the ranks, not to the script
    wait_until((run.launch / "outcome").is_file, 600, run.diagnostics)
    assert [attempt["code"] for attempt in run.attempts()] == ["75", "0"], run.diagnostics()
    assert metrics(run.folder) == expected
    assert re.search(r"^first +finished .*\b6\b.*\b2 +0 ", ask("status"), re.MULTILINE), ask("status")
    wait_until(lambda: not read("squeue", "--noheader"), 60, "the job ends")
    shown = nemo("-c", COMMAND, "experiment", "status", "first").communicate(timeout=120)[0]
    assert "SUCCEEDED" in shown and f"Job id: {run.job}" in shown, shown
    shown = nemo("-c", COMMAND, "experiment", "logs", "first").communicate(timeout=120)[0]
    assert "attempt ended with 0 at step 6" in shown, shown


def test_a_profile_in_the_users_folder_is_an_executor_for_the_nemo_run_command_line(nemo, tmp_path):
    (tmp_path / "g2rl" / "clusters").mkdir(parents=True)
    (tmp_path / "g2rl" / "clusters" / "home.yaml").write_text("account: mine\n")
    code = (
        "from nemo_run.cli.api import RunContext, _load_entrypoints; _load_entrypoints(); "
        "found = RunContext(name='x').parse_executor('home', 'nodes=3'); print(found.account, found.nodes)"
    )
    assert nemo("-c", code).communicate(timeout=120)[0].split() == ["mine", "3"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ('"my.yaml", executor("my_cluster.yaml", nodes=0)', "nodes is not allowed"),
        ('"my.yaml", executor("my_cluster.yaml", nodse=2)', "unknown key nodse. Nearest valid key: nodes"),
        (
            '"my.yaml", executor("my_cluster.yaml", nodes=3), policy={"tensor_parallel": 2}',
            "does not divide the 3 ranks",
        ),
        ('"my.yaml", executor("my_cluster.yaml"), trainer={"stepz": 2}', "unknown key trainer.stepz"),
        ('"my.yaml", executor("my_cluster.yaml"), trainer=2', "trainer=2 is not a section"),
    ],
)
def test_an_invalid_argument_is_reported_by_its_key_before_anything_is_queued(nemo, tmp_path, arguments, message):
    (tmp_path / "my_cluster.yaml").write_text("account: mine\n")
    (tmp_path / "my.yaml").write_text(f"base: {CONFIG}\n")
    output = nemo("-c", f"from g2rl_launch import *; recipe({arguments})").communicate(timeout=120)[0]
    assert message in output and "ConfigError" in output, output
    assert not Path(tmp_path / "nemo").exists()
