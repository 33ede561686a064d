"""The pool keeps its guarantees regardless of what a reward function does to its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatron_g2rl.rewards import RewardError, RewardPool
from megatron_g2rl.rewards.worker import ALARM_GRACE_S

FUNCTIONS = r'''
import os, signal, subprocess, time

not_a_function = 3

def by_length(text, answer):
    """Reward that identifies its item: its number, in the text."""
    if text == "hang in C":
        7 ** (10 ** 9)
    if text == "hang":
        time.sleep(3600)
    if text == "exit":
        os._exit(3)
    if text == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "memory":
        bytearray(64 * 2 ** 30)
    if text == "raise":
        raise KeyError("no such thing")
    if text == "string":
        return "good"
    if text == "nan":
        return float("nan")
    if text == "two":
        return 2.0
    if text == "pid":
        open(answer, "a").write(f"{os.getpid()}\n")
        time.sleep(3600)
    if text == "child":
        open(answer, "a").write(f"{subprocess.Popen(['sleep', '3600']).pid}\n")
        time.sleep(3600)
    if text == "fork":
        os.fork()
        return 0.5
    if text == "own session":
        child = subprocess.Popen(["setsid", "sh", "-c", "sleep 3600 & echo $! $$ >> " + answer + "; wait"])
        time.sleep(3600)
    if text in ("SIGKILL", "SIGSTOP", "SIGTERM"):  # as from outside, once
        first, _ = not os.path.exists(answer), open(answer, "a").close()
        if first:
            os.kill(os.getpid(), getattr(signal, text))
        return 0.75
    if text == "unreadable":
        return Unreadable(0.1)
    if text == "unshowable":
        return Unshowable(7.0)
    return float(text) / 1000


class Unreadable(float):
    def __float__(self):
        raise ValueError("no number today")


class Unshowable(float):
    def __repr__(self):
        raise RuntimeError("no words either")
'''


STARTS = r"""
import os, signal

place = os.environ["STARTS"]
open(place, "a").write("x")
lost = int(os.environ["LOST"])
if 1 < os.path.getsize(place) <= 1 + lost:
    os.kill(os.getpid(), signal.SIGKILL)

def score(text, answer):
    if text == "exit":
        os._exit(3)
    return 0.25
"""


@pytest.fixture
def function(tmp_path, monkeypatch) -> str:
    (tmp_path / "own_rewards.py").write_text(FUNCTIONS)
    (tmp_path / "broken_rewards.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "own_rewards:by_length"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.05)
    return condition()


def pids_in(file: Path, count: int) -> list[int]:
    assert wait_until(lambda: file.exists() and file.read_text().count("\n") == count, 120)
    return [int(line) for line in file.read_text().split()]


def test_a_user_function_is_applied_in_order(function):
    items = [(str(i), "") for i in range(500)]
    with RewardPool(function, workers=2, deadline_s=5) as pool:
        result = pool.score(items)
        assert pool.score([]).rewards == []
    assert result.rewards == [i / 1000 for i in range(500)]
    assert result.metrics()["timeouts"] == result.metrics()["deaths"] == 0


def test_one_bad_response_affects_only_itself(function):
    bad = {7: "hang in C", 20: "exit", 21: "segfault", 33: "memory", 40: "hang"}
    items = [(bad.get(i, str(i)), "") for i in range(60)]
    with RewardPool(function, workers=2, deadline_s=5) as pool:
        result = pool.score(items)
        again = pool.score([("5", "")])
    assert result.rewards == [-1.0 if i in bad else i / 1000 for i in range(60)]
    assert [i for i, late in enumerate(result.timed_out) if late] == [7, 40]
    assert [i for i, dead in enumerate(result.died) if dead] == [20, 21, 33]
    assert result.metrics()["timeouts"] == 2
    assert result.metrics()["deaths"] == 3
    # The deadline is hard, although C code runs no signal handler; the rest allows for a busy machine.
    assert 5 <= max(result.answer_seconds) < 60
    assert again.rewards == [0.005]


@pytest.mark.parametrize(
    ("text", "names"), [("raise", "KeyError: 'no such thing'"), ("string", "'good'"), ("nan", "nan"), ("two", "2.0")]
)
def test_a_failing_function_stops_the_run_with_the_location_of_the_error(function, text, names):
    with RewardPool(function, workers=2, deadline_s=5) as pool:
        with pytest.raises(RewardError, match="item 3") as error:
            pool.score([("1", "")] * 3 + [(text, "the gold")] + [("1", "")] * 3)
        assert all(part in str(error.value) for part in ("own_rewards:by_length", "the gold", names))
        assert pool.score([("5", "")]).rewards == [0.005]


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("own_rewards:absent", "has no function absent"),
        ("own_rewards:not_a_function", "not a function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("broken_rewards:f", "No module named 'nothing_of_this_name'"),
        ("own_rewards", "package.module:name"),
    ],
)
def test_a_function_that_cannot_be_imported_is_an_error_before_the_run(function, path, names):
    with pytest.raises(RewardError, match=r"reward\.function") as error:
        RewardPool(path, workers=1, deadline_s=5)
    assert names in str(error.value)


def test_a_closed_pool_raises_and_leaves_no_process(function):
    pool = RewardPool(function, workers=2, deadline_s=5)
    pids = [worker.process.pid for worker in pool._workers]
    pool.close()
    pool.close()
    assert not any(map(alive, pids))
    with pytest.raises(RewardError, match="closed"):
        pool.score([("1", "")])


def test_child_processes_of_a_killed_worker_end_with_it(function, tmp_path):
    with RewardPool(function, workers=1, deadline_s=10) as pool:
        assert pool.score([("child", str(tmp_path / "pids"))]).timed_out == [True]
    (child,) = pids_in(tmp_path / "pids", 1)
    assert wait_until(lambda: not alive(child), 120)


def start_parent(
    tmp_path: Path, function: str, items: list[tuple[str, str]], deadline_s: float = 120
) -> subprocess.Popen:
    """A process with a pool, whose unguarded main module runs again in any worker that imports it."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import signal, sys
        from megatron_g2rl.rewards import RewardPool
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in background jobs
        open({str(tmp_path / "mains")!r}, "a").write("ran\\n")
        pool = RewardPool({function!r}, workers=2, deadline_s={deadline_s})
        open({str(tmp_path / "workers")!r}, "a").writelines(f"{{worker.process.pid}}\\n" for worker in pool._workers)
        pool.score({items!r})
        """)
    )
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(tmp_path)])}
    return subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.PIPE, text=True)


def test_workers_end_when_their_parent_is_killed_even_while_they_hang(function, tmp_path):
    parent = start_parent(tmp_path, function, [("hang in C", ""), ("pid", str(tmp_path / "pids"))], deadline_s=10)
    (hanging,) = pids_in(tmp_path / "pids", 1)
    workers = pids_in(tmp_path / "workers", 2)
    assert hanging in workers
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not any(map(alive, workers)), 10 + ALARM_GRACE_S + 60)
    assert (tmp_path / "mains").read_text() == "ran\n"


def test_ctrl_c_stops_the_parent_and_its_workers(function, tmp_path):
    parent = start_parent(tmp_path, function, [("pid", str(tmp_path / "pids"))])
    pids_in(tmp_path / "pids", 1)
    for worker in pids_in(tmp_path / "workers", 2):
        os.kill(worker, signal.SIGINT)
    time.sleep(0.2)
    assert all(map(alive, pids_in(tmp_path / "workers", 2))), "a worker leaves Ctrl-C to its parent"
    parent.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in parent.communicate(timeout=120)[1]
    assert wait_until(lambda: not any(map(alive, pids_in(tmp_path / "workers", 2))), 120)


def test_workers_do_not_import_the_modules_of_the_parent(tmp_path, monkeypatch):
    (tmp_path / "spy_rewards.py").write_text(
        "import sys\ndef torch_loaded(text, answer):\n    return float('torch' in sys.modules)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import torch  # noqa: F401

    with RewardPool("spy_rewards:torch_loaded", workers=1, deadline_s=5) as pool:
        assert pool.score([("", "")]).rewards == [0.0]


def test_a_function_that_forks_returns_one_result_per_call(function):
    with RewardPool(function, 1, 5.0) as pool:
        for _ in range(3):
            assert pool.score([("fork", ""), ("100", ""), ("fork", ""), ("200", "")]).rewards == [0.5, 0.1, 0.5, 0.2]


@pytest.mark.parametrize(("text", "names"), [("unreadable", "no number today"), ("unshowable", "no words either")])
def test_a_result_that_raises_is_an_error_with_its_reason(function, text, names):
    with RewardPool(function, 1, 5.0) as pool, pytest.raises(RewardError, match=names):
        pool.score([(text, "")])


def test_child_processes_in_a_new_session_end_with_the_worker(function, tmp_path):
    place = tmp_path / "pids"
    with RewardPool(function, 1, 10.0) as pool:
        assert pool.score([("own session", str(place))]).timed_out == [True]
    pids = [int(word) for word in place.read_text().split()]
    assert len(pids) == 2 and wait_until(lambda: not any(map(alive, pids)), 120)


@pytest.mark.parametrize("lost", [2, 9])
def test_a_replacement_killed_during_its_start_is_replaced_a_limited_number_of_times(tmp_path, monkeypatch, lost):
    (tmp_path / "slow_starts.py").write_text(STARTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("STARTS", str(tmp_path / "starts")), monkeypatch.setenv("LOST", str(lost))
    with RewardPool("slow_starts:score", 1, 20.0) as pool:
        if lost > 3:
            with pytest.raises(RewardError, match="while importing"):
                pool.score([("exit", ""), ("x", "")])
        else:
            assert pool.score([("exit", ""), ("x", "")]).rewards == [-1.0, 0.25]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP", "SIGTERM"])
def test_a_worker_killed_stopped_or_terminated_from_outside_loses_no_result(function, tmp_path, name):
    with RewardPool(function, 1, 10.0) as pool:
        result = pool.score([("100", ""), (name, str(tmp_path / "there")), ("200", "")])
    assert result.rewards == [0.1, 0.75, 0.2] and not any(result.timed_out) and not any(result.died)


def test_child_processes_of_a_reward_function_end_when_the_parent_is_killed(function, tmp_path):
    parent = start_parent(tmp_path, function, [("own session", str(tmp_path / "pids"))])
    assert wait_until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith("\n"), 120)
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not any(map(alive, pids)), 120)
