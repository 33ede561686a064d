"""Transformer Engine's real Python layers in our model: names, attributes and checkpoints as with torch's layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from package_sources import fetch, kept_folder
from random_models import write_random_model

TESTS = Path(__file__).resolve().parents[1]
VERSIONS = ("2.11.0", "2.20.2")
FAMILIES = ("qwen3", "qwen3_moe", "qwen2", "llama")


@pytest.fixture(scope="module")
def built(tmp_path_factory, pytestconfig):
    """(version, family) -> output of `transformer_engine_layers`, computed once per version."""
    kept, made, folders = kept_folder(pytestconfig, tmp_path_factory), {}, {}

    def get(version: str, family: str) -> dict:
        if version not in made:
            sources = fetch(version, kept, "transformer-engine")
            for name in FAMILIES:
                if name not in folders:
                    folder = tmp_path_factory.mktemp(name)
                    folders[name] = write_random_model(folder, name, noise=0.3, tie_word_embeddings=name == "qwen3")
            models = [f"{name}={folder}" for name, folder in folders.items()]
            command = [sys.executable, str(TESTS / "transformer_engine_layers.py"), str(sources), version, *models]
            made[version] = subprocess.run(command, capture_output=True, text=True, timeout=300)
        done = made[version]
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])[family]

    return get


pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize(
        ("version", "family"),
        [(version, family) for version in VERSIONS for family in FAMILIES],
    ),
]


def test_the_layers_are_those_of_transformer_engine(built, version, family):
    found = built(version, family)
    assert "TEDotProductAttention" in found["te"]["engine"] or "DotProductAttention" in found["te"]["engine"]
    assert not found["torch"]["engine"]


def test_hugging_face_weights_survive_a_round_trip_bit_for_bit(built, version, family):
    for kind, found in built(version, family).items():
        assert found["names"] and found["changed"] == [], kind


def test_checkpoints_have_the_same_tensors(built, version, family):
    found = built(version, family)
    assert found["te"]["stored"] == found["torch"]["stored"]


def test_parameters_have_the_same_attributes(built, version, family):
    found = built(version, family)
    for mark in ("tensor_model_parallel", "sequence_parallel", "expert"):
        assert found["te"][mark] == found["torch"][mark], mark
    assert len(found["te"]["tensor_model_parallel"]) > 8 and found["te"]["sequence_parallel"]


def test_weight_gradients_are_summed_in_float32(built, version, family):
    assert built(version, family)["te"]["in_16_bit"] == []
