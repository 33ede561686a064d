"""Fixtures shared by all training runs of these tests."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
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
