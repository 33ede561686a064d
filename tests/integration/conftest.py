"""Fixtures shared by all training runs of these tests."""

from __future__ import annotations

import fcntl
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from failing_runs import Place, make_place


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment variables of commands."""
    return os.environ | dict(OMP_NUM_THREADS="1")


@pytest.fixture
def shared_memory_alone() -> Iterator[None]:
    """Exclusive use of the names that vLLM engines over several ranks give their files on this machine."""
    with Path(tempfile.gettempdir(), "vllm_tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def run_tool(monkeypatch, repository) -> Callable[..., int]:
    """(name, *arguments) -> exit code of tools/NAME.py, run in this process, which has imported everything."""

    def run(name: str, *arguments: str) -> int:
        tools = repository / "tools"
        monkeypatch.syspath_prepend(str(tools))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(tools / f"{name}.py"), run_name="__main__")
        return int(ending.value.code or 0)

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The folder of a small random model."""
    from megatron_g2rl.data.tiny_model import make_random_model

    return make_random_model(tmp_path_factory.mktemp("tiny") / "model", "qwen3")


@pytest.fixture
def place(tmp_path, tiny_model) -> Iterator[Place]:
    """A folder in which `g2rl train` succeeds."""
    made = make_place(tmp_path, tiny_model)
    with made.closing:
        yield made
