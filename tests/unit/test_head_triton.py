"""The head's Triton kernel: its numbers in Triton's interpreter against float64, and what the compiler makes of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
CASES = 24

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: megatron-core installs it from Python 3.12 on, CUDA builds of torch always do",
)


def run(script: str, *arguments: str) -> list[dict]:
    """The JSON that a script beside the tests prints, in a process whose triton is imported with its environment."""
    path = os.pathsep.join(filter(None, (str(TESTS.parent), os.environ.get("PYTHONPATH"))))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TESTS / script), *arguments]
    done = subprocess.run(command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted() -> list[dict]:
    return run("triton_head.py", str(CASES))


@pytest.mark.parametrize("index", range(CASES))
def test_the_interpreted_kernel_agrees_with_float64(interpreted, index):
    found = interpreted[index]
    # float32 sums of up to 110 terms, relative to the largest number.
    for name in ("logprobs", "entropy", "without"):
        assert found[name] < 1e-5, found
    # Beyond what the tolerance allows; sums of up to 70 tokens.
    assert found["counts"] < 3e-5, found
    assert found["padding"] == 0, found
    assert found["swept_again"] >= found["above"] - 1, found


def test_the_cases_cover_all_kinds_of_priors(interpreted):
    assert {found["priors"] for found in interpreted} == {"near", "off", "broken", "masked"}
    assert any(found["swept_again"] for found in interpreted)


def test_the_interpreted_kernel_agrees_with_float64_on_two_vocabulary_shards():
    for errors in run("triton_head.py", "shards"):
        # float32 numbers of order 1 to 10.
        assert max(errors.values()) < 2e-5, errors


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    return {found["name"]: found for found in run("triton_compile.py")}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    "dtype, mode, variant",
    [
        ("bf16", "atomic", "sums and counts"),
        ("bf16", "atomic", "counts of some"),
        ("bf16", "deterministic", "sums and counts"),
        ("fp32", "atomic", "sums and counts"),
    ],
)
def test_the_kernel_compiles_for_every_device_within_its_resources(compiled, capability, dtype, mode, variant):
    found = compiled[f"sm_{capability} {dtype} {mode} {variant}"]
    # As compiled by triton 3.7.1, the kernel with float32 operands uses 8 bytes of a thread's stack on sm_80.
    allowed = 8 if (dtype, capability) == ("fp32", 80) else 0
    assert found["local"] == 0 and found["stack"] <= allowed, found
    # One block on a multiprocessor at least: 64k registers, and the shared memory of an A100, H100 or B200.
    assert found["registers"] * found["threads"] <= 65536
    assert found["shared"] <= {80: 163, 90: 227, 100: 227}[capability] * 1024
    if dtype == "bf16":
        assert found["instructions"][{80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]], found
    atomics = found["instructions"]["atom.global"] + found["instructions"]["red.global"]
    assert (atomics == 0) == (mode == "deterministic"), found
