"""Transformer Engine's own choice of attention if it must be deterministic, and the warning that precedes a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from package_sources import fetch, kept_folder

TESTS = Path(__file__).resolve().parents[1]
VERSION = "2.20.2"
CHOOSE = """
import json, sys
from pathlib import Path
import torch
import transformer_engine_stub
transformer_engine_stub.install(Path(sys.argv[1]), sys.argv[2])
compiled = sys.modules["transformer_engine_torch"]
fused = compiled.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
compiled.get_fused_attn_backend = lambda *args: (fused, "")
torch.cuda.current_device = lambda: 0
from transformer_engine.pytorch.attention.dot_product_attention import utils
found = []
for hopper, context, sequences, heads, length, deterministic in json.loads(sys.argv[3]):
    utils.get_device_compute_capability = lambda hopper=hopper: (9, 0) if hopper else (8, 0)
    parameters = utils.AttentionParams(
        qkv_layout="thd_thd_thd", batch_size=sequences, num_heads=heads, num_gqa_groups=heads, max_seqlen_q=length,
        max_seqlen_kv=length, num_tokens_q=sequences * length, num_tokens_kv=sequences * length, head_dim_qk=128,
        head_dim_v=128, attn_mask_type="padding_causal", core_attention_bias_requires_grad=False,
        context_parallel=context > 1, cp_size=context, deterministic=deterministic, is_training=True)
    chosen = utils.get_attention_backend(parameters)
    # The other elements are versions and sub-backends.
    found.append([name for name, index in (("flash", 0), ("fused", 2), ("unfused", 4)) if chosen[index]])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_long_sequences_have_no_deterministic_fused_attention_without_flash_attn(tmp_path_factory, pytestconfig):
    """Unfused attention, which is what remains, has matrices of sequences x heads x length^2."""
    sources = fetch(VERSION, kept_folder(pytestconfig, tmp_path_factory), "transformer-engine")
    cases = {
        # Hopper, context-parallel ranks, sequences, heads, length, deterministic
        (True, 1, 1, 32, 4096, True): ["fused"],
        (True, 1, 2, 32, 4096, True): ["unfused"],
        (True, 2, 2, 32, 4096, True): [],
        (True, 1, 2, 32, 4096, False): ["fused"],
        (False, 1, 1, 32, 1024, True): ["unfused"],
        (False, 1, 1, 32, 1024, False): ["fused"],
    }
    command = [sys.executable, "-c", CHOOSE, str(sources), VERSION, json.dumps(list(cases))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=TESTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == list(cases.values())


@pytest.mark.parametrize(
    "variable, installed, rank, warned",
    [("0", False, "0", True), ("0", True, "0", False), ("0", False, "1", False), ("1", False, "0", False)],
)
def test_a_run_that_may_find_no_attention_warns_at_its_start(variable, installed, rank, warned, monkeypatch, caplog):
    from megatron_g2rl.policy import transformer_engine

    monkeypatch.setenv(transformer_engine.DETERMINISM, variable)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(transformer_engine.importlib.util, "find_spec", lambda name: object() if installed else None)
    transformer_engine.warn_without_deterministic_attention()
    assert ("flash-attn" in caplog.text) is warned


@pytest.mark.parametrize("spec, checked", [("te", True), ("torch", False)])
def test_only_models_with_layers_of_transformer_engine_are_checked(spec, checked, monkeypatch):
    from types import SimpleNamespace

    from megatron_g2rl.config.sections.model import PolicyConfig
    from megatron_g2rl.policy import model

    calls = []
    monkeypatch.setattr(model.transformer_engine, "warn_without_deterministic_attention", lambda: calls.append(spec))
    monkeypatch.setattr(model, "choose_layer_spec", lambda *_: spec)
    policy = PolicyConfig().model_copy(update=dict(virtual_stages=0))
    assert model.build_chunks(None, None, policy, SimpleNamespace(device=None)) == []
    assert bool(calls) is checked
