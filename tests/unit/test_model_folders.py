"""Hugging Face folders that must be refused: duplicate, hidden, misplaced, lost and foreign contents."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import torch
from random_models import write_random_model
from safetensors.torch import load_file, save_file

from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.model_shape import read_model_shape
from megatron_g2rl.policy.hf.convert import hf_to_megatron, megatron_to_hf
from megatron_g2rl.policy.hf.tensor_folder import INDEX, TensorFolder, WeightsError
from megatron_g2rl.policy.hf.values import refuse_lost_numbers
from megatron_g2rl.policy.hf.weights import check_folder
from megatron_g2rl.policy.models.architecture import UnsupportedModel, read_architecture
from megatron_g2rl.rollout.engine import RolloutError
from megatron_g2rl.rollout.tokenizer import end_token_ids, load_tokenizer
from megatron_g2rl.rollout.transformers import TransformersEngine

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture
def folder(tmp_path):
    write_random_model(tmp_path / "model", **SMALL)
    return tmp_path / "model"


def refused(folder) -> str:
    with pytest.raises(WeightsError) as error:
        check_folder(folder)
    return str(error.value)


def write_index(folder, changes: dict) -> None:
    names = load_file(folder / "model.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors") | changes
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_tensor_in_two_files_is_refused(folder):
    save_file({"model.norm.weight": torch.ones(32)}, folder / "z_other.safetensors")
    assert "'model.norm.weight' is in model.safetensors and in z_other.safetensors" in refused(folder)


def test_a_tensor_missing_from_the_index_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.extra.weight": torch.ones(2)}, folder / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    assert "contains tensor 'model.extra.weight', which the index does not map to this file" in refused(folder)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\0.safetensors", 5, None]
)
def test_an_index_cannot_refer_to_files_outside_its_folder(folder, file):
    write_index(folder, {"model.norm.weight": file})
    assert "files outside the folder are not read" in refused(folder)


@pytest.mark.parametrize("text", ["[]", "null", '{"weight_map": null}', '{"weight_map": []}', "{", "[" * 100_000])
def test_a_corrupt_index_is_one_message(folder, text):
    (folder / INDEX).write_text(text)
    assert "not a valid index of weights" in refused(folder)


def test_a_pipe_is_not_opened(folder):
    (folder / "model.safetensors").rename(folder / "kept")
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(WeightsError, match="it is not a regular file"):
        TensorFolder(folder)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / INDEX)
    with pytest.raises(WeightsError, match="not a valid index of weights"):
        TensorFolder(folder)
    with pytest.raises(UnsupportedModel, match="is not a regular file"):
        check_folder(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_reported_by_convert(folder, tmp_path, value):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"'model.norm.weight' contains (nan|inf|-inf) at \[3\]"):
        hf_to_megatron(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_beyond_the_range_of_a_smaller_dtype_are_reported_by_convert_in_both_directions(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][2, 1] = 1e6
    save_file(tensors, folder / "model.safetensors")
    message = r"'model.layers.1.self_attn.o_proj.weight' contains 1e\+06 at \[2, 1\], beyond 65504"
    with pytest.raises(WeightsError, match=message):
        hf_to_megatron(folder, tmp_path / "half", dtype=torch.float16)
    hf_to_megatron(folder, tmp_path / "whole")
    with pytest.raises(WeightsError, match=message):
        megatron_to_hf(tmp_path / "whole", tmp_path / "half", dtype=torch.float16)
    megatron_to_hf(tmp_path / "whole", tmp_path / "bf16", dtype=torch.bfloat16)


def test_the_position_of_a_lost_value_is_found_after_many_others():
    tensor = torch.zeros(3, 2**21)
    tensor[2, 5] = torch.inf
    with pytest.raises(WeightsError, match=r"inf at \[2, 5\]"):
        refuse_lost_numbers(tensor, "x", "here")
    refuse_lost_numbers(torch.zeros(0), "x", "here")
    refuse_lost_numbers(torch.tensor(3.0), "x", "here")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_in_a_folder_is_not_run_and_causes_no_prompt(folder, name, monkeypatch):
    settings = json.loads((folder / name).read_text())
    code = {
        "AutoConfig": "evil.Config",
        "AutoTokenizer": ["evil.Tokenizer", None],
        "AutoModelForCausalLM": "evil.Model",
    }
    settings |= {"auto_map": code} | ({"model_type": "evil"} if name == "config.json" else {})
    settings |= {"tokenizer_class": "EvilTokenizer"} if name != "config.json" else {}
    (folder / name).write_text(json.dumps(settings))
    marker = folder / "code_ran"
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("somebody was asked"))
    if name == "config.json":
        with pytest.raises(UnsupportedModel):
            read_architecture(folder)
    else:
        with contextlib.suppress(RolloutError):
            load_tokenizer(str(folder))
    assert not marker.exists()


def test_the_index_of_a_complete_model_is_read(folder):
    write_index(folder, {})
    check_folder(folder)
    assert len(TensorFolder(folder).headers()) > 10


def test_a_tied_model_may_have_a_copy_of_its_embedding_but_no_other_head(tmp_path):
    folder = tmp_path / "model"
    write_random_model(folder, tie_word_embeddings=True, **SMALL)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    check_folder(folder)
    hf_to_megatron(folder, tmp_path / "copy")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    assert "'lm_head.weight' differs from 'model.embed_tokens.weight'" in refused(folder)
    with pytest.raises(WeightsError, match="tie_word_embeddings"):
        hf_to_megatron(folder, tmp_path / "other")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", "x"),
        ("num_attention_heads", 0),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**12),
        ("num_key_value_heads", None),
        ("max_position_embeddings", 1.5),
        ("num_experts", [1]),
    ],
)
def test_an_invalid_number_in_config_json_is_reported(folder, key, value):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {key: value}))
    with pytest.raises(ConfigError, match=key):
        read_model_shape(folder)


@pytest.mark.parametrize(
    "changes",
    [
        dict(dtype="evil"),
        dict(hidden_size="x"),
        dict(rope_parameters=5),
        dict(layer_types=["sliding_attention", "full_attention"], use_sliding_window=False),
        dict(layer_types=7),
        dict(tie_word_embeddings="maybe so"),
    ],
)
def test_an_invalid_config_json_is_one_message(folder, changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    try:
        read_architecture(folder)
    except UnsupportedModel as error:
        assert str(folder) in str(error) and len(str(error)) < 2000


@pytest.mark.parametrize(
    "changes",
    [
        dict(hidden_size=2**64),
        dict(num_hidden_layers=10**8),
        dict(num_attention_heads=0),
        dict(num_key_value_heads=3),
        dict(head_dim=-1),
        dict(vocab_size=True),
        dict(rms_norm_eps="x"),
        dict(rms_norm_eps=float("nan")),
        dict(rope_parameters={"rope_theta": 10**40, "rope_type": "default"}),
        dict(rope_parameters=[1]),
    ],
)
def test_a_model_of_impossible_size_is_refused_before_it_is_built(folder, changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    ((key, value),) = changes.items()
    key = "rope_theta" if isinstance(value, dict) else key
    with pytest.raises(UnsupportedModel, match=rf"\b{key}\b"):
        read_architecture(folder)


def test_a_tensor_whose_shape_contradicts_config_json_is_reported_before_the_model_is_built(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"intermediate_size": 10**8}))
    with pytest.raises(WeightsError, match=r"gate_proj\.weight' has shape .*100000000"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "z.safetensors"])
def test_a_pipe_in_a_model_folder_is_refused_without_opening_it(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ConfigError, match=f"{name} is not a regular file"):
        read_model_shape(folder)
    with pytest.raises(UnsupportedModel, match=f"{name} is not a regular file"):
        read_architecture(folder)


@pytest.mark.parametrize("changes", [dict(initializer_range="x"), dict(pad_token_id=10**6), dict(attention_dropout=[])])
def test_invalid_config_json_keys_that_only_transformers_reads_are_one_message(folder, changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    try:
        TransformersEngine(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    except RolloutError as error:  # any other exception fails this test
        assert str(folder) in str(error)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"eos_token_id": 1.5}', '{"eos_token_id": "x"}', '{"eos_token_id": [1, -5]}', "null", "\x00"]
)
def test_an_invalid_generation_config_is_one_message(folder, text):
    (folder / "generation_config.json").write_text(text)
    tokenizer = load_tokenizer(str(folder))
    with pytest.raises(RolloutError, match=r"generation_config\.json"):
        end_token_ids(str(folder), tokenizer)
