"""Converted checkpoints survive a round trip bit for bit, and mismatches are reported before anything is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from random_models import write_random_model
from safetensors.torch import load_file, save_file

from megatron_g2rl.errors import UserError
from megatron_g2rl.policy.hf import convert as conversion
from megatron_g2rl.policy.hf.conversion_folder import destination
from megatron_g2rl.policy.hf.convert import hf_to_megatron, megatron_to_hf
from megatron_g2rl.policy.hf.megatron_folder import MegatronTensors
from megatron_g2rl.policy.hf.tensor_folder import TensorFolder
from megatron_g2rl.policy.hf.weights import check_folder
from megatron_g2rl.policy.models.families import Family, Rule
from megatron_g2rl.registry import FAMILIES

MODELS = [(family, tied) for family in ("qwen3", "qwen2", "llama", "qwen3_moe") for tied in (True, False)]
VOCABULARY = 307


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(family, tied, dtype) -> a fresh copy of a random Hugging Face folder."""
    made = {}

    def get(family: str = "qwen3", tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
        if (family, tied, dtype) not in made:
            folder = tmp_path_factory.mktemp("model") / "hf"
            write_random_model(folder, family, vocab_size=VOCABULARY, noise=0.2, tie_word_embeddings=tied)
            rewrite(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
            (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
            made[family, tied, dtype] = folder
        copy = tmp_path_factory.mktemp("copy") / "hf"
        shutil.copytree(made[family, tied, dtype], copy)
        return copy

    return get


def rewrite(folder: Path, change) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder as safetensors' own reader gives them."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("family, tied", MODELS)
def test_a_round_trip_restores_every_tensor_bit_for_bit(family, tied, model, tmp_path):
    source = model(family, tied)
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", shard_bytes=100_000)
    before, after = loaded(source), loaded(tmp_path / "hf")
    assert before.keys() == after.keys() and ("lm_head.weight" in after) == (not tied)
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys() and len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_megatron_itself_loads_a_converted_folder_strictly(model, tmp_path):
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    hf_to_megatron(model(), tmp_path / "megatron")
    stored = MegatronTensors(tmp_path / "megatron").tensors()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain = dist_checkpointing.load_plain_tensors(str(tmp_path / "megatron" / "megatron"))
    finally:
        dist.destroy_process_group()
    assert plain.keys() == stored.keys()
    assert plain["embedding.word_embeddings.weight"].shape == (384, 64)


@pytest.mark.parametrize("block, file", [(1000, 50_000), (1 << 20, 1 << 30)], ids=["small", "large"])
def test_the_sizes_of_blocks_and_files_change_no_result(block, file, model, tmp_path, monkeypatch):
    from megatron_g2rl.policy.hf import megatron_folder

    monkeypatch.setattr(megatron_folder, "BLOCK_BYTES", block)
    monkeypatch.setattr(megatron_folder, "FILE_BYTES", file)
    source = model("llama")
    hf_to_megatron(source, tmp_path / "megatron")
    assert (len(list((tmp_path / "megatron" / "megatron").glob("*.distcp"))) > 1) == (file < 1 << 20)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    before, after = loaded(source), loaded(tmp_path / "hf")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_dtype_is_converted_and_written_to_the_configuration(model, tmp_path):
    source = model(dtype=torch.float32)
    hf_to_megatron(source, tmp_path / "megatron", dtype=torch.bfloat16)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", dtype=torch.float16)
    before, after = loaded(source), loaded(tmp_path / "hf")
    assert all(torch.equal(before[n].bfloat16().half(), after[n]) for n in before)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").dtype == torch.float16


def test_buffers_of_old_checkpoints_are_skipped(model, tmp_path):
    source = model("llama", True)
    before = loaded(source)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(source, lambda t: t | extra | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert loaded(tmp_path / "hf").keys() == before.keys()


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: {k: v for k, v in t.items() if k != NAME}, [NAME, "missing"]),
        (lambda t: t | {NAME: t[NAME][:-2]}, [NAME, "(126, 64)", "(128, 64)"]),
        (
            lambda t: t | {"model.layers.2.mlp.up_proj.weight": t[NAME].clone()},
            ["model.layers.2.mlp", "is not part of this architecture"],
        ),
        (lambda t: t | {NAME: t[NAME].float()}, [NAME, "--dtype"]),
        (lambda t: t | {NAME: t[NAME].to(torch.int8)}, [NAME, "I8", "quantized"]),
    ],
    ids=["missing", "shape", "extra", "mixed", "quantized"],
)
def test_a_mismatched_tensor_is_reported_before_anything_is_written(change, named, model, tmp_path):
    source = model()
    rewrite(source, change)
    with pytest.raises(UserError) as error:
        hf_to_megatron(source, tmp_path / "out" / "megatron")
    assert all(part in str(error.value) for part in named)
    assert not (tmp_path / "out").exists()


def test_an_existing_destination_is_refused_without_overwrite_and_replaced_only_after_success(model, tmp_path):
    source, target = model(), tmp_path / "megatron"
    hf_to_megatron(source, target)
    (target / "notes.md").write_text("")
    with pytest.raises(UserError, match="overwrite"):
        hf_to_megatron(source, target)
    whole = loaded(source)
    rewrite(source, lambda t: {k: v for k, v in t.items() if k != NAME})
    with pytest.raises(UserError, match="missing"):
        hf_to_megatron(source, target, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["megatron"] and (target / "notes.md").exists()
    rewrite(source, lambda t: whole)
    hf_to_megatron(source, target, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["megatron"] and not (target / "notes.md").exists()
    with pytest.raises(UserError, match="are the same folder or contain one another"):
        megatron_to_hf(target, target / "inside")


@pytest.mark.parametrize("found", ["runs/mine/metrics.jsonl", "thesis.tex", "trainer.json", "notes.txt"])
def test_a_folder_with_other_files_than_a_model_is_never_replaced(found, model, tmp_path):
    precious = tmp_path / "there" / found
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    if found != "notes.txt":
        (tmp_path / "there" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="never replaced"):
        hf_to_megatron(model(), tmp_path / "there", overwrite=True)
    assert precious.read_text() == "years of work"


def test_a_tensor_that_changes_while_it_is_written_is_reported_and_nothing_is_kept(model, tmp_path, monkeypatch):
    original = conversion.write_megatron

    def flip(folder, *rest):
        original(folder, *rest)
        file = folder / "__0_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(conversion, "write_megatron", flip)
    with pytest.raises(UserError, match="tensor '.*' differs from the source when read back|cannot be read"):
        hf_to_megatron(model(), tmp_path / "megatron")
    assert not any(tmp_path.iterdir())


def test_a_corrupt_megatron_folder_is_refused(model, tmp_path):
    hf_to_megatron(model(), tmp_path / "megatron")
    file = tmp_path / "megatron" / "megatron" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    damage = rf"^{tmp_path}/megatron is corrupt: megatron/__0_0.distcp "
    with pytest.raises(UserError, match=damage + "has changed: .*. Copy or convert it again$"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    damage = rf"^{tmp_path}/megatron is corrupt: .*. Copy or convert it again$"
    file.write_bytes(content[:100])
    with pytest.raises(UserError, match=damage):
        check_folder(tmp_path / "megatron")
    assert [p.name for p in tmp_path.iterdir()] == ["megatron"]


def test_the_folder_of_a_run_is_recognized_and_its_latest_checkpoint_suggested(model, tmp_path):
    run = tmp_path / "run"
    for step in (1, 12):
        hf_to_megatron(model(), run / "checkpoints" / f"step_{step:08d}")
    for source in (run, run / "checkpoints"):
        with pytest.raises(UserError, match=f"give its latest checkpoint, {run}/checkpoints/step_00000012$"):
            megatron_to_hf(source, tmp_path / "hf")
        with pytest.raises(UserError, match="are already Megatron folders, the latest is .*step_00000012$"):
            hf_to_megatron(source, tmp_path / "hf")


def test_a_destination_is_normalized(model, tmp_path):
    source = model()
    (tmp_path / "file").write_text("")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError) as refused:
        hf_to_megatron(source, tmp_path / "there" / ".." / "file" / "new")
    assert str(refused.value) == f"{tmp_path}/file/new cannot be written (File exists): choose another destination"


@pytest.mark.parametrize("number, room", [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)])
def test_disk_space_is_an_error_only_where_it_is_insufficient(number, room, tmp_path):
    with pytest.raises(UserError) as refused, destination(tmp_path / "source", tmp_path / "new", False) as folder:
        raise OSError(number, os.strerror(number), folder / "file")
    assert ("free disk space" in str(refused.value)) == room
    with pytest.raises(UserError, match="source/tokenizer.json cannot be read"):
        with destination(tmp_path / "source", tmp_path / "new", False):
            raise OSError(number, os.strerror(number), tmp_path / "source" / "tokenizer.json")


class MadeUpConfig(transformers.LlamaConfig):
    model_type = "made_up"


def test_a_new_family_needs_one_table(model, tmp_path, monkeypatch):
    base, layer, theirs = FAMILIES["llama"].rules, "decoder.layers.{l}.", "blocks.{l}."
    renamed = {
        "model.embed_tokens.weight": "wte.weight",
        "model.norm.weight": "ln_f.weight",
        "lm_head.weight": "out.weight",
    }
    rules = tuple(
        Rule(r.megatron, tuple(renamed.get(n, n.replace("model.layers.{l}.", theirs)) for n in r.hf), r.kind)
        for r in base
    )
    own_file = ModuleType("made_up_family")
    own_file.MADE_UP = Family(rules)
    monkeypatch.setitem(sys.modules, own_file.__name__, own_file)
    monkeypatch.setitem(FAMILIES.paths, "made_up", "made_up_family:MADE_UP")
    monkeypatch.setitem(
        transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content, "made_up", MadeUpConfig
    )
    source = model("llama")
    config = json.loads((source / "config.json").read_text()) | {"model_type": "made_up"}
    (source / "config.json").write_text(json.dumps(config))
    rewrite(source, lambda t: {renamed.get(k, k.replace("model.layers.", "blocks.")): v for k, v in t.items()})
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    before, after = loaded(source), loaded(tmp_path / "hf")
    assert "blocks.1.mlp.up_proj.weight" in after and all(torch.equal(before[n], after[n]) for n in before)
    assert layer + "mlp.linear_fc1.weight" in {rule.megatron for rule in rules}


def test_safetensors_reads_a_folder_of_tensors_of_any_dtypes(tmp_path):
    from megatron_g2rl.policy.hf.tensor_folder import Header, write_tensors

    tensors = {"a": torch.arange(3).bfloat16(), "b": torch.randn(5, 3), "c": torch.randn(7).half()}
    headers = {name: Header(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    write_tensors(tmp_path, headers, iter(tensors.items()), 10**9)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert TensorFolder(tmp_path).headers() == headers


def test_the_command_line_converts_both_ways_and_reports_errors(model, tmp_path):
    from typer.testing import CliRunner

    from megatron_g2rl.cli import app

    source, there, back = str(model()), str(tmp_path / "megatron"), str(tmp_path / "hf")
    done = CliRunner().invoke(app, ["convert", "hf-to-megatron", source, there, "--dtype", "float32"])
    assert done.exit_code == 0 and done.stdout == f"wrote and verified {there}\n", done.output
    assert {tensor.properties.dtype for tensor in MegatronTensors(there).tensors().values()} == {torch.float32}
    done = CliRunner().invoke(
        app, ["convert", "megatron-to-hf", there, back, "--dtype", "bf16", "--shard-size", "0.1MB"]
    )
    assert done.exit_code == 0, done.output
    before, after = loaded(Path(source)), loaded(Path(back))
    assert all(torch.equal(before[name], after[name]) for name in before)
    refused = CliRunner().invoke(app, ["convert", "hf-to-megatron", source, there])
    assert refused.exit_code == 1 and "--overwrite" in refused.output
    assert CliRunner().invoke(app, ["convert", "megatron-to-hf", there, back, "--shard-size", "5"]).exit_code == 2
    for direction, missing, message in [
        ("hf-to-megatron", "Qwen/Qwen3-0.6B", "hf download"),
        ("megatron-to-hf", source, "checkpoints/step_"),
    ]:
        refused = CliRunner().invoke(app, ["convert", direction, missing, str(tmp_path / "new")])
        assert refused.exit_code == 1 and message in refused.output


def test_engines_start_without_weights_from_a_megatron_folder(model, tmp_path):
    from megatron_g2rl.rollout.transformers import TransformersEngine

    hf_to_megatron(model(), tmp_path / "megatron")
    engine = TransformersEngine(str(tmp_path / "megatron"), dtype=torch.float32, device=torch.device("cpu"))
    engine.load_weights(loaded(model()).items())
