"""A real two-node Slurm on this machine for the test session (launch/local_slurm)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from slurm_jobs import CONFIG, ROOT, SLOW, Run, arguments, ended, install_g2rl, metrics, read, settings, wait_until

TOOLS = ROOT / "launch" / "local_slurm"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(1_800))


@pytest.fixture(scope="session")
def slurm():
    """The folder of a running Slurm; requeued jobs start without their delay of two minutes."""
    if os.geteuid() != 0:
        pytest.skip("launch/local_slurm needs root")
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        pytest.skip("slurmctld is not installed, and there is no apt-get to install it")
    folder = Path(tempfile.mkdtemp(prefix="g2rl-slurm-"))
    up = subprocess.run([TOOLS / "up.sh", folder], capture_output=True, text=True, timeout=280)
    if up.returncode and "packages cannot be installed" in up.stderr:
        pytest.skip(up.stderr.strip()[-300:])
    try:
        assert up.returncode == 0, up.stderr
        os.environ["SLURM_CONF"] = str(folder / "etc" / "slurm.conf")
        done = threading.Event()

        def hurry() -> None:
            # Not immediately: a node refuses a job that starts in the same second in which it ended there.
            seen: dict[str, float] = {}
            while not done.wait(0.5):
                lines = read("squeue", "--noheader", "--states=PENDING", "--format=%i %r").splitlines()
                waiting = [line.split()[0] for line in lines if line.endswith("BeginTime")]
                seen = {job: seen.get(job, time.monotonic()) for job in waiting}
                for job, since in seen.items():
                    if time.monotonic() - since > 3:
                        read("scontrol", "update", f"JobId={job}", "StartTime=now")

        thread = threading.Thread(target=hurry)
        thread.start()
        try:
            yield folder
        finally:
            done.set()
            thread.join()
    finally:
        subprocess.run([TOOLS / "down.sh", folder], check=False)
        os.environ.pop("SLURM_CONF", None)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    cache = str(tmp_path_factory.mktemp("cache"))
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "launch"), os.environ.get("PYTHONPATH")]))
    return os.environ | dict(XDG_CACHE_HOME=cache, OMP_NUM_THREADS="1", PYTHONPATH=path)


@pytest.fixture(scope="session")
def expected(tmp_path_factory, environment) -> list[dict]:
    """Metrics of two ranks on this machine without Slurm."""
    folder = tmp_path_factory.mktemp("local")
    done = subprocess.run(arguments(folder, "trainer.ranks=2"), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return metrics(folder / "run")


@pytest.fixture
def g2rl(slurm, environment, tmp_path):
    """Start a command of g2rl in `tmp_path`, where site.yaml is a profile with additional keys; returns the process.

    Ranks run `command`, or g2rl.
    """

    def started(*words: str, command: list[str] | None = None, **profile) -> subprocess.Popen:
        profile["setup"] = [*install_g2rl(tmp_path, command), *profile.get("setup", [])]
        (tmp_path / "site.yaml").write_text(json.dumps(site | profile))
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen([sys.executable, "-m", "megatron_g2rl.cli", *words], env=own, cwd=tmp_path, **pipes)

    folders = dict(XDG_STATE_HOME=str(tmp_path / "state"), NEMORUN_HOME=str(tmp_path / "nemo"))
    own = environment | folders | dict(SLURM_CONF=os.environ["SLURM_CONF"])
    site = dict(account="local", time="00:10:00", nodes=2, ranks_per_node=1, stop_before_end_s=60)
    site |= dict(environment={name: environment[name] for name in ("XDG_CACHE_HOME", "PYTHONPATH")})
    yield started
    read("scancel", "--user=root")
    wait_until(lambda: not read("squeue", "--noheader"), 60, "jobs end")


@pytest.fixture
def launch(g2rl, tmp_path):
    """Start `g2rl launch` of the small run under a profile with these additional keys; returns the process."""

    def started(*words: str, **profile) -> subprocess.Popen:
        return g2rl("launch", str(CONFIG), "--cluster", "site.yaml", *words, *settings(tmp_path), **profile)

    return started


@pytest.fixture
def train(launch, environment, tmp_path, nemo_run):
    """Launch a training whose first attempts take 8 * `sleep_s` longer per step; returns the started run."""

    def started(*words: str, sleep_s: float, slow_attempts: int = 1, **profile) -> Run:
        (tmp_path / "slow.py").write_text(SLOW)
        slow = dict(SLEEP_S=str(sleep_s), SLOW_ATTEMPTS=str(slow_attempts))
        slow |= {name: environment[name] for name in ("XDG_CACHE_HOME", "PYTHONPATH")}
        process = launch("--wait", *words, "reward.function=slow:slow_reward", environment=slow, **profile)
        return Run(tmp_path / "run", process)

    return started


@pytest.fixture
def ask(g2rl):
    """Output of a command of g2rl, which must succeed."""

    def asked(*words: str) -> str:
        code, output = ended(g2rl(*words))
        assert code == 0, output
        return output

    return asked


@pytest.fixture
def nemo_run():
    if not Path(os.environ.get("G2RL_LAUNCH_PYTHON", "")).is_file():
        pytest.skip("nemo-run is not installed: make launch-venv, G2RL_LAUNCH_PYTHON")
