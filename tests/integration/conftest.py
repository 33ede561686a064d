"""What all trainings of these tests share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """A cache of its own for the built-in model, made once."""
    return os.environ | dict(XDG_CACHE_HOME=str(tmp_path_factory.mktemp("cache")), OMP_NUM_THREADS="1")
