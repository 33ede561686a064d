"""Counted operations agree with those that torch counts in transformers' models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from random_models import write_random_model
from torch.utils.flop_counter import FlopCounterMode

from megatron_g2rl.policy.models import flops
from megatron_g2rl.policy.models.architecture import read_architecture
from megatron_g2rl.policy.packing import TokenSequence


def counted_by_torch(model, tokens: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(tokens)[None] % 500)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama", "qwen2"])
def test_a_forward_pass_has_the_operations_that_torch_counts(family, tmp_path):
    sizes = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3)
    folder = write_random_model(tmp_path, family, **sizes)
    architecture = read_architecture(folder)
    # torch does not count the fused products of experts
    eager = dict(attn_implementation="eager") | (dict(experts_implementation="eager") if "moe" in family else {})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **eager)
    for tokens in (5, 64):
        # One prompt token: the head is needed at every position, as in the pass that torch counts.
        sequence = TokenSequence((1,), tuple(range(tokens)))
        # Eager attention computes all pairs of tokens, those in the future too.
        future = tokens**2 - tokens * (tokens + 1) // 2
        all_pairs = 4 * architecture.layers * architecture.heads * architecture.head_dim * future
        assert flops.sequence_flops(architecture, sequence) + all_pairs == counted_by_torch(model, tokens)


def test_the_head_counts_at_response_tokens_only(tmp_path):
    architecture = read_architecture(write_random_model(tmp_path))
    short, long = (TokenSequence((1,) * (100 - n), (2,) * (n + 1)) for n in (10, 60))
    assert short.length == long.length
    difference = flops.sequence_flops(architecture, long) - flops.sequence_flops(architecture, short)
    assert difference == 50 * 2 * architecture.hidden * architecture.vocab_size


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(name, peak):
    assert flops.peak_tflops(name) == peak


def test_utilization_is_reported_where_the_peak_is_known(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    gpu, cpu = SimpleNamespace(type="cuda"), torch.device("cpu")
    # 8 ranks at half their peak for 10 s
    work = int(8 * 156e12 * 10)
    assert flops.throughput(work, 10.0, 8, gpu, "bf16") == {
        "throughput/model_tflops_per_s": pytest.approx(156.0),
        "throughput/mfu": pytest.approx(0.5),
    }
    assert list(flops.throughput(work, 10.0, 8, gpu, "fp32")) == ["throughput/model_tflops_per_s"]
    assert list(flops.throughput(work, 10.0, 8, cpu, "bf16")) == ["throughput/model_tflops_per_s"]
    assert flops.throughput(work, 0.0, 8, cpu, "bf16") == {}
