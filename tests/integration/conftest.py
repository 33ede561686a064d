"""What all trainings of these tests share."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """A cache of its own for the built-in model, made once."""
    return os.environ | dict(XDG_CACHE_HOME=str(tmp_path_factory.mktemp("cache")), OMP_NUM_THREADS="1")


@pytest.fixture
def shared_memory_alone() -> Iterator[None]:
    """While no other test of this machine has a vLLM engine over several ranks: they all call their files the same."""
    with Path(tempfile.gettempdir(), "vllm_tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
