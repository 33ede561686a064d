"""A checkpoint of one supported megatron-core resumes bitwise equal with the other; both convert to the same bytes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from package_sources import fetch, kept_folder, path_with
from random_models import write_random_model
from small_policy import differing

TESTS = Path(__file__).resolve().parents[1]
LAYOUTS = {
    "pp2": (2, dict(pipeline_parallel=2)),
    "bf16_overlap_dp2": (2, dict(precision="bf16", overlap_communication=True)),
    "replicated": (1, dict(distributed_optimizer=False)),
}


@pytest.fixture(scope="module")
def other(pytestconfig, tmp_path_factory):
    """The supported megatron-core that is not installed here: its version, and an environment that has it."""
    from megatron_g2rl.policy.megatron_compat import SUPPORTED

    if importlib.util.find_spec("triton") is None:
        pytest.skip("megatron-core 0.19.2 imports triton, which is not installed: run this with Python 3.12")
    wanted = next(one for one in SUPPORTED if one != version("megatron-core"))
    folder = fetch(wanted, kept_folder(pytestconfig, tmp_path_factory))
    return wanted, path_with(folder)


def run(work: str, environment: dict | None, **arguments):
    command = [sys.executable, str(TESTS / "other_version.py"), work, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(arguments["out"], weights_only=True)


@pytest.mark.parametrize("first", ["here", "other"])
def test_a_checkpoint_resumes_bitwise_equal_with_the_other_megatron(first, other, tmp_path):
    size = dict(num_hidden_layers=2, intermediate_size=101, tie_word_embeddings=True)
    shared = dict(folder=write_random_model(tmp_path / "model", **size), layouts=LAYOUTS)
    shared |= dict(checkpoints=str(tmp_path / "saved"))
    name, elsewhere = other
    environments = [None, elsewhere] if first == "here" else [elsewhere, None]
    writer, saved = run("save", environments[0], **shared, out=str(tmp_path / "one.pt"))
    reader, loaded = run("load", environments[1], **shared, out=str(tmp_path / "other.pt"))
    assert {writer, reader} == {name, version("megatron-core")}
    for layout in LAYOUTS:
        for (before, numbers, trained), (after, again, continued) in zip(saved[layout], loaded[layout], strict=True):
            assert before and all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
            assert again == numbers
            assert not differing(continued, trained)


def test_both_megatrons_convert_to_the_same_bytes(other, tmp_path):
    model = Path(write_random_model(tmp_path / "model", "qwen3_moe"))
    for place, environment in (("here", None), ("there", other[1])):
        convert("hf-to-megatron", model, tmp_path / place / "megatron", environment)
        convert("megatron-to-hf", tmp_path / "here" / "megatron", tmp_path / place / "hf", environment)
    for kind in ("*.safetensors", "*.distcp"):
        files = [path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob(kind)]
        assert files
        assert all((tmp_path / "there" / f).read_bytes() == (tmp_path / "here" / f).read_bytes() for f in files)


def convert(direction: str, source: Path, target: Path, environment: dict | None) -> None:
    target.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "megatron_g2rl.cli", "convert", direction, str(source), str(target)]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
