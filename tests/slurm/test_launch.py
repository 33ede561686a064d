"""`g2rl launch` on a real two-node Slurm: through nemo-run, and by a rendered script without it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_jobs import CONFIG, ROOT, Run, ended, metrics, read, settings, wait_until

HOSTILE = 'data.system_prompt=it\'s "x" $HOME `id` $(id) \\ ; & | * %j !\n  {second} line'
SHOW_ARGUMENTS = (
    "import json, os, sys; open(f'{sys.argv[1]}.' + os.environ['SLURM_PROCID'], 'w').write(json.dumps(sys.argv[2:]))"
)
RECORD_PATH = """
import os
from pathlib import Path

from megatron_g2rl.rewards import math_reward


def reward(text: str, answer: str) -> float:
    Path(os.environ["G2RL_RUN"], "scored_in").write_text(__file__)
    return math_reward(text, answer)
"""
ASK_SERVER = """
import os, sys, time, urllib.request

for _ in range(1000):
    try:
        answer = urllib.request.urlopen(os.environ["G2RL_SERVERS"] + "/weights.txt", timeout=5).read().decode()
        break
    except OSError:
        time.sleep(0.2)
with open(sys.argv[1], "w") as file:
    file.write(f"{os.environ['G2RL_SERVERS']} {os.environ['SLURM_NTASKS']} {os.environ['SLURMD_NODENAME']} {answer}")
"""
SHOW_CONTAINER = """
import json, os, sys

names = ("STAND_IN_IMAGE", "STAND_IN_MOUNTS", "STAND_IN_ENV", "SLURMD_NODENAME", "OWN", "MASTER_ADDR")
seen = {name: os.environ.get(name) for name in names}
seen |= dict(folder=os.getcwd(), prompts=open("/prompts/first.txt").read(), arguments=sys.argv[2:])
open(f"{sys.argv[1]}.{os.environ['SLURM_PROCID']}", "w").write(json.dumps(seen))
"""


def test_a_copy_of_head_trains_on_two_nodes_and_uncommitted_files_are_refused_by_name(
    g2rl, nemo_run, expected, tmp_path
):
    def git(*words: str) -> None:
        who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "--quiet")
    (tmp_path / ".gitignore").write_text("/state\n/nemo\n/site.yaml\n/run\n/bin\n")
    (tmp_path / "mine.yaml").write_text(f"base: {CONFIG}\n")
    (tmp_path / "scorer.py").write_text(RECORD_PATH)
    git("add", "--all")
    git("commit", "--quiet", "--message=all")
    words = [
        "launch",
        "mine.yaml",
        "--cluster",
        "site.yaml",
        "--wait",
        *settings(tmp_path),
        "reward.function=scorer:reward",
    ]

    (tmp_path / "scorer.py").write_text("not committed")
    code, output = ended(g2rl(*words, packager="git"))
    assert code == 2 and "scorer.py" in output, output

    (tmp_path / "scorer.py").write_text(RECORD_PATH)
    run = Run(tmp_path / "run", g2rl(*words, packager="git"))
    run.end()
    assert metrics(run.folder) == expected
    assert [attempt["code"] for attempt in run.attempts()] == ["0"], run.diagnostics()
    assert Path((run.folder / "scored_in").read_text()).is_relative_to(tmp_path / "nemo"), "a copy, not the repository"


def test_a_job_that_keeps_failing_uses_its_retries_and_ends_with_its_exit_code_and_error(launch, nemo_run, tmp_path):
    code, output = ended(launch("--wait", retries=1, command=["bash", "-c", "echo the disk is on fire >&2; exit 3"]))
    assert code == 3 and "the disk is on fire" in output, output
    assert len((tmp_path / "run" / "launch" / "attempts.tsv").read_text().splitlines()) == 2


def test_hostile_arguments_arrive_unchanged_through_nemo_run(launch, nemo_run, tmp_path):
    code, output = ended(
        launch("--wait", HOSTILE, command=[sys.executable, "-c", SHOW_ARGUMENTS, str(tmp_path / "seen")])
    )
    assert code == 0, output
    check_seen(tmp_path)


def test_a_rendered_script_runs_without_nemo_run_and_keeps_arguments(launch, environment, tmp_path, monkeypatch):
    monkeypatch.setitem(environment, "G2RL_LAUNCH_PYTHON", "/nowhere/python")
    command = [sys.executable, "-c", SHOW_ARGUMENTS, str(tmp_path / "seen")]
    code, output = ended(launch("--render", str(tmp_path / "job.sh"), HOSTILE, command=command))
    assert code == 0, output
    found = read("sbatch", "--parsable", "--wait", f"--chdir={tmp_path}", str(tmp_path / "job.sh"))
    assert re.fullmatch(r"\d+", found), output
    check_seen(tmp_path)


def test_a_rendered_chain_queues_its_segments_which_run_as_one_launch(launch, ask, tmp_path):
    tried = 'if [ -e "$G2RL_LAUNCH/attempts.tsv" ]; then exit 0; else exit 75; fi'
    chain = dict(continuation="chain", segments=3, command=["bash", "-c", tried])
    code, output = ended(launch("--render", str(tmp_path / "job.sh"), **chain))
    assert code == 0, output
    done = subprocess.run(["bash", "job.sh"], cwd=tmp_path, capture_output=True, text=True)
    jobs = re.findall(r"job (\d+)", done.stdout)
    assert done.returncode == 0 and len(jobs) == 3, done
    wait_until(lambda: not read("squeue", "--noheader"), 60, lambda: read("squeue"))
    attempts = (tmp_path / "run" / "launch" / "attempts.tsv").read_text().splitlines()
    assert [line.split("\t")[1:3] for line in attempts] == [[f"{jobs[0]}.0", "75"], [f"{jobs[1]}.0", "0"]]
    assert "nothing to do: finished 0" in (tmp_path / f"run-{jobs[2]}.out").read_text()
    assert re.search(r"^run +finished ", ask("status", "run"), re.MULTILINE), ask("status", "run")


def check_seen(folder: Path) -> None:
    for rank in (0, 1):
        seen = json.loads((folder / f"seen.{rank}").read_text())
        assert HOSTILE in seen and seen[0] == "train" and seen[1].endswith("arithmetic.yaml")


def test_ranks_find_the_server_on_the_node_after_theirs_and_it_ends_with_the_job(launch, nemo_run, tmp_path):
    (tmp_path / "weights.txt").write_text("served")
    servers = dict(nodes=1, command=f"{sys.executable} -u -m http.server $G2RL_SERVER_PORT")
    command = [sys.executable, "-c", ASK_SERVER, str(tmp_path / "seen")]
    run = Run(tmp_path / "run", launch("--wait", nodes=1, servers=servers, command=command))
    run.end()
    found = re.fullmatch(r"http://(.*):(\d+) 1 n1 served", (tmp_path / "seen").read_text())
    assert found, (tmp_path / "seen").read_text()
    log = (run.launch / f"server-{run.job}-0.out").read_text()
    assert '"GET /weights.txt HTTP/1.1" 200' in log, log
    steps = read("sacct", "--noheader", f"--jobs={run.job}", "--parsable2", "--format=JobID,NodeList").splitlines()
    nodes = [line.split("|")[1] for line in steps if re.match(r"\d+\.\d", line)]
    assert sorted(nodes[-2:]) == ["n1", "n2"], steps  # an earlier step is nemo-run's own
    wait_until(lambda: not read("squeue", "--noheader"), 60, "the job ends")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((found[1], int(found[2])), timeout=5)


def test_ranks_do_not_wait_for_servers_that_exited(launch, nemo_run, tmp_path):
    servers = dict(nodes=1, command="echo no such model; exit 3")
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    code, output = ended(launch("--wait", nodes=1, servers=servers, command=command, retries=0))
    assert code == 143 and "servers ended with 3 while ranks ran" in output, output
    (log,) = (tmp_path / "run" / "launch").glob("server-*.out")
    assert "no such model" in log.read_text()


def test_a_launch_refused_by_slurm_is_reported_with_its_message_and_leaves_nothing_behind(launch, nemo_run, tmp_path):
    code, output = ended(launch(partition="nope"))
    assert code == 1 and "the job is not submitted" in output and "invalid partition specified: nope" in output, output
    assert not (tmp_path / "run").exists() and not [*(tmp_path / "state").rglob("*.json")]


def test_the_job_script_for_a_container_hands_image_mounts_and_environment_to_pyxis(launch, nemo_run, tmp_path):
    mounts = [f"{tmp_path}:{tmp_path}", f"{ROOT}:{ROOT}", "/data:/data:ro"]
    code, output = ended(
        launch("--dry-run", container_image="nvcr.io#nvidia/pytorch:25.09-py3", container_mounts=mounts)
    )
    assert code == 0, output
    assert re.search(r"srun [^\n]*--container-image[= ]'?nvcr.io#nvidia/pytorch:25.09-py3", output), output
    assert re.search(rf"--container-mounts[= ]'?{re.escape(mounts[0])}", output) and "/data:/data:ro" in output, output
    assert re.search(r"--container-env[= ]\S*XDG_CACHE_HOME", output), output


@pytest.fixture
def containers(slurm, tmp_path):
    """Adds the options of Pyxis to the local Slurm's srun for this test, by a stand-in: container_options.c."""
    if shutil.which("gcc") is None:
        pytest.skip("the stand-in for Pyxis is not compiled: there is no gcc")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces cannot be made here")
    include = Path("/usr/include")
    if not (include / "slurm" / "spank.h").is_file():
        # Unpacked, not installed: only the header is needed.
        get = "apt-get -qq -o APT::Sandbox::User=root download libslurm-dev"
        unpack = f"({get} || (apt-get -qq update && {get})) && dpkg-deb --extract *.deb headers"
        if subprocess.run(unpack, shell=True, cwd=tmp_path, capture_output=True).returncode:
            pytest.skip("slurm/spank.h is not here and apt-get cannot fetch it: install libslurm-dev")
        include = tmp_path / "headers" / "usr" / "include"
    source, library = Path(__file__).with_name("container_options.c"), tmp_path / "container_options.so"
    compiler = ["gcc", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{include}", "-o", str(library), str(source)]
    made = subprocess.run(compiler, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    plugins = slurm / "etc" / "plugstack.conf"
    plugins.write_text(f"required {library}\n")
    yield
    plugins.write_text("")


def test_a_job_in_a_container_gets_image_mounts_and_environment_through_srun(
    containers, launch, environment, nemo_run, tmp_path
):
    """Uses a stand-in that takes srun's container options, because Pyxis itself cannot run here."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "first.txt").write_text("1 + 1 =")
    image = "nvcr.io#nvidia/pytorch:25.09-py3"
    mounts = [f"{tmp_path}:{tmp_path}", f"{ROOT}:{ROOT}", f"{tmp_path}/prompts:/prompts:ro"]
    command = [sys.executable, "-c", SHOW_CONTAINER, str(tmp_path / "seen")]
    own = dict(OWN="a b'c", PYTHONPATH=environment["PYTHONPATH"])
    run = Run(
        tmp_path / "run",
        launch("--wait", HOSTILE, container_image=image, container_mounts=mounts, command=command, environment=own),
    )
    run.end()
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"seen.{rank}").read_text())
        assert seen["STAND_IN_IMAGE"] == image
        assert seen["STAND_IN_MOUNTS"].split(",")[:3] == mounts
        assert {"OWN", "PYTHONPATH", "MASTER_ADDR", "G2RL_LAUNCH"} <= set(seen["STAND_IN_ENV"].split(","))
        assert seen["OWN"] == own["OWN"] and seen["MASTER_ADDR"] and seen["SLURMD_NODENAME"] == f"n{rank + 1}"
        assert seen["prompts"] == "1 + 1 =", "the mount is at its target, inside alone"
        assert seen["folder"] == str(tmp_path) and HOSTILE in seen["arguments"]
    assert not os.path.exists("/prompts")
