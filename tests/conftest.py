"""Settings that must hold before torch is imported, and the folders of data that tests read."""

from __future__ import annotations

import os

# Two processes with two threads each on two cores run 3-20x slower than with one each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Dynamo is imported by megatron-core: 30 s instead of 5 s.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Ranks that start late on a busy machine.
os.environ.setdefault("G2RL_RENDEZVOUS_SECONDS", "300")
# Tests must not access the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import shape_checks  # noqa: E402

shape_checks.install()

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder tests/data, whose README.md names the sources of its files."""
    return REPOSITORY / "tests/data"


@pytest.fixture(scope="session")
def large_data_folder() -> Path:
    """Files too large for the repository (tests/data/README.md), from the folder G2RL_TEST_DATA; skips without one."""
    if "G2RL_TEST_DATA" not in os.environ:
        pytest.skip("G2RL_TEST_DATA names no folder with the files that tests/data/README.md lists")
    return Path(os.environ["G2RL_TEST_DATA"])


@pytest.fixture
def unchecked_shapes():
    """For tests of inputs that the code itself refuses: annotations are not checked."""
    with shape_checks.disabled():
        yield
