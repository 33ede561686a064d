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


@pytest.fixture(scope="module")
def exchanged(other, tmp_path_factory) -> dict[str, Path]:
    """Folders of two processes, one with each megatron-core, that continued from the files of the other."""
    root = tmp_path_factory.mktemp("exchange")
    size = dict(num_hidden_layers=2, intermediate_size=101, tie_word_embeddings=True)
    shared = dict(model=write_random_model(root / "model", **size), layouts=LAYOUTS)
    shared |= dict(experts=write_random_model(root / "experts", "qwen3_moe"))
    places, processes = {"here": root / "here", "there": root / "there"}, []
    for place, partner, environment in (("here", "there", None), ("there", "here", other[1])):
        places[place].mkdir()
        arguments = shared | dict(own=str(places[place]), partner=str(places[partner]))
        command = [sys.executable, str(TESTS / "other_version.py"), json.dumps(arguments)]
        with (places[place] / "output").open("w") as output:
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
    try:
        codes = [process.wait(850) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], [(folder / "output").read_text()[-3000:] for folder in places.values()]
    return places


def test_a_checkpoint_resumes_bitwise_equal_with_the_other_megatron(exchanged, other):
    results = {place: torch.load(folder / "result.pt", weights_only=True) for place, folder in exchanged.items()}
    assert {place: name for place, (name, _) in results.items()} == {
        "here": version("megatron-core"),
        "there": other[0],
    }
    for writer, reader in (("here", "there"), ("there", "here")):
        saved, loaded = results[writer][1]["saved"], results[reader][1]["loaded"]
        for layout in LAYOUTS:
            for (before, numbers, trained), (after, again, continued) in zip(
                saved[layout], loaded[layout], strict=True
            ):
                assert before and all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
                assert again == numbers
                assert not differing(continued, trained)


def test_both_megatrons_convert_to_the_same_bytes(exchanged):
    here, there = exchanged["here"], exchanged["there"]
    for folder, kind in (("hf", "*.safetensors"), ("megatron", "*.distcp")):
        files = [path.relative_to(here) for path in (here / folder).rglob(kind)]
        assert files
        assert all((there / file).read_bytes() == (here / file).read_bytes() for file in files)
