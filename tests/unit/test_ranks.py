"""Ranks started by `g2rl` itself: they know their rank, receive signals once, and return exit codes.

Each test starts the real torchrun with a small program in place of the trainer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_g2rl.distributed import rank_reports, ranks
from megatron_g2rl.distributed.ranks import become_rank, first_host
from megatron_g2rl.errors import LOST_RANK_PREFIX

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.same_for_both]

STARTER = (
    "import sys; from megatron_g2rl.distributed.ranks import run_ranks; "
    "sys.exit(run_ranks(2, 'rank_program', sys.argv[1:]))"
)

PUBLISH = """
import os

def publish(path, text):
    # A test that waits for a file finds it complete: it appears with its text.
    with open(f"{path}.new", "w") as file:
        file.write(text)
    os.rename(f"{path}.new", path)
"""

SAVES_ON_SIGTERM = """
import os, pathlib, signal, sys, time
from publish import publish
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
def save(number, frame):
    with open(folder / f"signals{rank}", "a") as file:
        file.write(f"{number}\\n")
    time.sleep(float(sys.argv[2]))
    (folder / f"saved{rank}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
if "become_rank" in globals():
    become_rank()
publish(folder / f"ready{rank}", str(os.getpid()))
time.sleep(600)
"""


@pytest.fixture
def start(tmp_path, repository):
    started = []

    def start(program: str, *arguments: str) -> subprocess.Popen:
        (tmp_path / "publish.py").write_text(PUBLISH)
        (tmp_path / "rank_program.py").write_text(program)
        environment = {**os.environ, "PYTHONPATH": f"{repository}{os.pathsep}{tmp_path}"}
        command = [sys.executable, "-c", STARTER, str(tmp_path), *arguments]
        with (tmp_path / "errors").open("w") as errors:
            started.append(subprocess.Popen(command, env=environment, stderr=errors))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.terminate()
            process.wait(300)


def wait_for(condition, seconds: float = 300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 1)])
def test_ranks_know_their_rank_and_a_failure_is_propagated(start, tmp_path, code, expected):
    program = (
        "import os, pathlib, sys, time\nfrom publish import publish\n"
        "e, folder = os.environ, pathlib.Path(sys.argv[1])\n"
        "publish(folder / ('rank' + e['RANK']), e['WORLD_SIZE'] + ' ' + e['OMP_NUM_THREADS'])\n"
        "while not (folder / ('rank' + str(1 - int(e['RANK'])))).exists():\n"  # a failure ends the other rank
        "    time.sleep(0.01)\n"
        f"sys.exit({code})"
    )
    assert start(program).wait(300) == expected
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["2 1", "2 1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_every_rank_once_and_the_command_waits_for_the_save(start, tmp_path, number):
    process = start(SAVES_ON_SIGTERM, "2")
    wait_for(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists())
    process.send_signal(number)
    assert process.wait(300) == 128 + number
    for rank in (0, 1):
        assert (tmp_path / f"saved{rank}").exists()
        assert (tmp_path / f"signals{rank}").read_text() == f"{signal.SIGTERM}\n"
    assert "Traceback" not in (tmp_path / "errors").read_text()


def test_ranks_save_when_their_parent_command_is_killed(start, tmp_path):
    process = start(SAVES_ON_SIGTERM, "0")
    wait_for(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists())
    process.kill()
    wait_for(lambda: (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists())


def test_a_second_signal_kills_every_rank(start, tmp_path):
    process = start(SAVES_ON_SIGTERM, "600")
    wait_for(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists())
    process.send_signal(signal.SIGINT)
    wait_for(lambda: (tmp_path / "signals0").exists() and (tmp_path / "signals1").exists())
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 128 + signal.SIGINT
    pids = [int((tmp_path / f"ready{rank}").read_text()) for rank in (0, 1)]
    wait_for(lambda: not any(map(alive, pids)))
    assert not (tmp_path / "saved0").exists()


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "raise RuntimeError('a bug')"])
def test_a_rank_that_fails_first_is_a_failure_even_if_rank_0_saves_and_stops(start, end):
    program = (
        "import os, pathlib, signal, sys, time\n"
        "from megatron_g2rl.distributed.rank_reports import write_exit_code\n"
        "ready = pathlib.Path(sys.argv[1], 'ready0')\n"
        "def save(*_): write_exit_code(75), os._exit(75)\n"
        "if os.environ['RANK'] == '0':\n"
        "    signal.signal(signal.SIGTERM, save)\n"
        "    ready.touch(), time.sleep(300)\n"
        "while not ready.exists(): time.sleep(0.05)\n"
    )
    assert start(program + end).wait(300) == 1


def test_the_exit_code_of_the_command_is_that_of_rank_0(start):
    program = (
        "import os, pathlib, sys, time\n"
        "from megatron_g2rl.distributed.rank_reports import EXIT_CODE_FILE, write_exit_code\n"
        "write_exit_code(75)\n"
        "while not pathlib.Path(os.environ[EXIT_CODE_FILE]).exists(): time.sleep(0.01)\n"  # rank 1's end ends rank 0
        "sys.exit(75)"
    )
    assert start(program).wait(300) == 75


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("login", "login"),
        ("node[3-4]", "node3"),
        ("rack2n[007-9,12],login", "rack2n007"),
        ("gpu[12,14-20]-ib", "gpu12-ib"),
        ("r[1-2]n[05-06]", "r1n05"),
        ("a,b[1-2]", "a"),
    ],
)
def test_the_first_host_of_slurms_list_is_found_without_scontrol(hosts, first):
    assert first_host(hosts) == first


def test_under_srun_the_rank_of_a_process_is_that_of_slurm(monkeypatch, tmp_path):
    scontrol = tmp_path / "scontrol"  # stand-in for Slurm's own, which knows the address of a name that DNS does not
    scontrol.write_text('#!/bin/sh\n[ "$4" = node3.invalid ] && echo "NodeName=$4 NodeAddr=10.1.2.3 NodeHostName=n"\n')
    scontrol.chmod(0o755)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    slurm = dict(SLURM_PROCID="5", SLURM_LOCALID="1", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="8")
    slurm |= dict(
        SLURM_STEP_NODELIST="node[3-4].invalid", SLURM_JOB_ID="123456", PATH=f"{tmp_path}:{os.environ['PATH']}"
    )
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    become_rank()
    found = {n: os.environ[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    port = found.pop("MASTER_PORT")
    assert found == dict(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8", MASTER_ADDR="10.1.2.3")
    assert 20_000 <= int(port) < 26_000


def test_steps_of_one_allocation_and_jobs_of_one_node_have_separate_ports():
    ports = [ranks._port(job, step) for job in ("123456", "123457") for step in ("0", "1", "2")]
    assert len(set(ports)) == 6 and ports[0] == ranks._port("123456", "0")


def test_ranks_save_and_end_when_their_torchrun_is_killed_and_the_command_waits_for_them(start, tmp_path):
    import psutil

    process = start("from megatron_g2rl.distributed.ranks import become_rank\n" + SAVES_ON_SIGTERM + "\n", "2")
    wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)))
    (tmp_path / "rank_program.py").unlink()
    (torchrun,) = psutil.Process(process.pid).children()
    pids = [int((tmp_path / f"ready{rank}").read_text()) for rank in (0, 1)]
    torchrun.kill()
    assert process.wait(300) == 128 + signal.SIGKILL
    assert all((tmp_path / f"saved{rank}").exists() for rank in (0, 1))
    # Exited; the system needs a moment to reap them.
    wait_for(lambda: not any(map(alive, pids)))
    assert "Traceback" not in (tmp_path / "errors").read_text()


def test_several_ranks_leave_no_temporary_files_and_listen_only_on_the_loopback(start, tmp_path):
    import psutil

    program = (
        "import os, pathlib, sys, time\n"
        "from megatron_g2rl.distributed.ranks import become_rank\n"
        "become_rank()\n"
        "from megatron_g2rl.distributed import rendezvous\n"
        "store = rendezvous.meet('run')\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "(folder / f\"ready{os.environ['RANK']}\").touch()\n"
        "while not (folder / 'looked').exists(): time.sleep(0.05)\n"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    os.environ["TMPDIR"], before = str(temporary), os.environ.get("TMPDIR")
    try:
        process = start(program)
    finally:
        os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)
    wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)))
    family = psutil.Process(process.pid).children(recursive=True)
    listening = [c.laddr.ip for member in family for c in member.net_connections() if c.status == psutil.CONN_LISTEN]
    (tmp_path / "looked").touch()
    assert process.wait(300) == 0, (tmp_path / "errors").read_text()
    assert listening and set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening
    # Caches of compiled code, torch's and ours, have one name for all processes of a user.
    caches = ("torchinductor_", f"megatron_g2rl_{os.getuid()}")
    assert [path.name for path in temporary.iterdir() if not path.name.startswith(caches)] == []


def ended(program: str, environment: dict[str, str], seconds: float = 300) -> int:
    """The exit code of a Python program."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=os.environ | environment, timeout=seconds, capture_output=True).returncode


@pytest.fixture(scope="module")
def dead() -> str:
    """The process id of an exited process."""
    child = subprocess.Popen(["true"])
    child.wait()
    return str(child.pid)


def test_a_torchrun_and_a_rank_whose_launcher_exited_during_their_start_exit_too(dead, repository):
    environment = {"PYTHONPATH": str(repository), ranks.LAUNCHER: dead}
    torchrun = (
        "import sys; from megatron_g2rl.distributed.torchrun import main; sys.argv = ['torchrun', '-m', 'this']; main()"
    )
    assert ended(torchrun, environment) == -signal.SIGTERM
    rank = "import time; from megatron_g2rl.distributed.ranks import become_rank; become_rank(); time.sleep(100)"
    assert ended(rank, environment | dict(RANK="0", TORCHELASTIC_RUN_ID="run")) == -signal.SIGTERM


def test_a_stopped_torchrun_is_abandoned_when_its_ranks_have_exited(start, tmp_path):
    import psutil

    program = (
        "import os, pathlib, sys, time\nfrom megatron_g2rl.distributed.rank_reports import write_exit_code\n"
        "folder = pathlib.Path(sys.argv[1])\n(folder / ('ready' + os.environ['RANK'])).touch()\n"
        "while not (folder / 'stopped').exists(): time.sleep(0.05)\nwrite_exit_code(0)"
    )
    process = start(program)
    wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)))
    (torchrun,) = psutil.Process(process.pid).children()
    torchrun.suspend()
    (tmp_path / "stopped").touch()
    assert process.wait(300) == 0


@pytest.mark.parametrize(
    ("messages", "shown"),
    [
        ({0: "the disk is full", 1: f"{LOST_RANK_PREFIX}: it ended", 2: "a bug"}, ["rank 2: a bug"]),
        (
            {1: f"{LOST_RANK_PREFIX}: it ended", 2: f"{LOST_RANK_PREFIX}: it ended"},
            [f"rank 1: {LOST_RANK_PREFIX}: it ended"],
        ),
        ({0: f"{LOST_RANK_PREFIX}: here", 1: "the disk is full"}, ["rank 1: the disk is full"]),
        ({0: "", 1: "the disk is full", 2: ""}, ["rank 1: the disk is full"]),
        ({0: f"{LOST_RANK_PREFIX}: it ended", 1: f"{LOST_RANK_PREFIX}: it ended"}, [f"{LOST_RANK_PREFIX}: it ended"]),
    ],
)
def test_a_lost_rank_is_reported_only_when_no_rank_reports_a_cause(messages, shown, tmp_path, capsys):
    for rank, message in messages.items():
        (tmp_path / f"message_{rank:06d}").write_text(message)
    rank_reports.print_other_ranks_messages(tmp_path)
    assert capsys.readouterr().err.splitlines() == shown


def test_a_stopped_rank_is_killed_when_another_one_has_exited(start, tmp_path):
    program = (
        "import os, pathlib, signal, sys, time\nfrom publish import publish\nfolder = pathlib.Path(sys.argv[1])\n"
        "if os.environ['RANK'] == '1':\n    publish(folder / 'ready', str(os.getpid()))\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "while not (folder / 'ready').exists(): time.sleep(0.05)\nsys.exit(3)"
    )
    assert start(program).wait(300) == 1
    assert not alive(int((tmp_path / "ready").read_text()))
    assert "SIGKILL" not in (tmp_path / "errors").read_text()


def test_reports_that_cannot_be_written_leave_the_message_to_the_rank(monkeypatch):
    monkeypatch.setenv(rank_reports.EXIT_CODE_FILE, "/dev/null/exit_code")  # as on a full disk: an OSError
    monkeypatch.setenv("RANK", "1")
    assert not rank_reports.write_message("the cause")
    for report in (rank_reports.mark_failed, lambda: rank_reports.write_exit_code(2)):
        report()
    rank_reports.write_silent_rank(1)
    assert rank_reports.read_exit_code() is None


def test_an_exit_code_that_could_not_be_written_is_that_of_torchrun(monkeypatch):
    def write_empty_file(count, module, arguments, folder) -> int:
        (folder / "exit_code").touch()
        return 3

    monkeypatch.setattr(ranks, "_run_torchrun", write_empty_file)
    assert ranks.run_ranks(2, "program", []) == 3
