"""Names and shapes of the tensors of published model sizes, against those of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

from megatron_g2rl.policy.hf.megatron_plan import plan_model
from megatron_g2rl.policy.models.architecture import read_architecture


def qwen3(layers, hidden, ffn, heads, tied=False, **more):
    return ("Qwen3", dict(n=layers, h=hidden, f=ffn, a=heads, k=8, head_dim=128, v=151936, tied=tied, base=1e6, **more))


def qwen2(layers, hidden, ffn, heads, groups, vocabulary=152064, tied=False):
    return ("Qwen2", dict(n=layers, h=hidden, f=ffn, a=heads, k=groups, v=vocabulary, tied=tied, base=1e6))


def llama(layers, hidden, ffn, heads, factor, tied=False, **more):
    rope = dict(rope_theta=5e5, rope_type="default")
    if factor:
        rope = dict(rope_theta=5e5, rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0)
        rope["original_max_position_embeddings"] = 8192
    return ("Llama", dict(n=layers, h=hidden, f=ffn, a=heads, k=8, v=128256, tied=tied, rope_parameters=rope, **more))


PUBLISHED = {
    "Qwen3-0.6B": qwen3(28, 1024, 3072, 16, tied=True),
    "Qwen3-1.7B": qwen3(28, 2048, 6144, 16, tied=True),
    "Qwen3-4B": qwen3(36, 2560, 9728, 32, tied=True),
    "Qwen3-8B": qwen3(36, 4096, 12288, 32),
    "Qwen3-14B": qwen3(40, 5120, 17408, 40),
    "Qwen3-32B": qwen3(64, 5120, 25600, 64),
    "Qwen3-30B-A3B": ("Qwen3Moe", qwen3(48, 2048, 6144, 32)[1] | dict(k=4, experts=768)),
    "Qwen3-235B-A22B": ("Qwen3Moe", qwen3(94, 4096, 12288, 64)[1] | dict(k=4, experts=1536)),
    "Qwen2.5-0.5B": qwen2(24, 896, 4864, 14, 2, 151936, True),
    "Qwen2.5-1.5B": qwen2(28, 1536, 8960, 12, 2, 151936, True),
    "Qwen2.5-3B": qwen2(36, 2048, 11008, 16, 2, 151936, True),
    "Qwen2.5-7B": qwen2(28, 3584, 18944, 28, 4),
    "Qwen2.5-14B": qwen2(48, 5120, 13824, 40, 8),
    "Qwen2.5-32B": qwen2(64, 5120, 27648, 40, 8),
    "Qwen2.5-72B": qwen2(80, 8192, 29568, 64, 8),
    "Llama-3-8B": llama(32, 4096, 14336, 32, None),
    "Llama-3.1-8B": llama(32, 4096, 14336, 32, 8.0),
    "Llama-3.1-70B": llama(80, 8192, 28672, 64, 8.0),
    "Llama-3.2-1B": llama(16, 2048, 8192, 32, 32.0, tied=True, head_dim=64),
    "Llama-3.2-3B": llama(28, 3072, 8192, 24, 32.0, tied=True, head_dim=128),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tensors_of_published_models_are_those_of_transformers(name, tmp_path):
    kind, settings = PUBLISHED[name]
    config = published_config(kind, **settings)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(config)
    expected = dict(checkpoint_shapes(reference, settings["tied"]))
    architecture = read_architecture(tmp_path)
    assert plan_model(architecture).hf_shapes() == expected
    assert architecture.rope_scaling_factor == settings.get("rope_parameters", {}).get("factor")


def published_config(kind, *, n, h, f, a, k, v, tied, head_dim=None, base=None, experts=None, **more):
    settings = dict(
        num_hidden_layers=min(n, 3),  # all layers are alike: three are as good a test as ninety-four
        hidden_size=h,
        intermediate_size=f,
        num_attention_heads=a,
        num_key_value_heads=k,
        vocab_size=v,
        tie_word_embeddings=tied,
    )
    if head_dim:
        settings["head_dim"] = head_dim
    if base:
        settings["rope_parameters"] = dict(rope_type="default", rope_theta=base)
    if experts:
        settings |= dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=experts, norm_topk_prob=True)
    return getattr(transformers, f"{kind}Config")(**settings, **more)


def checkpoint_shapes(reference, tied):
    """Names and shapes as checkpoints have them; transformers 5 holds the experts of a layer in two tensors."""
    for name, tensor in reference.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if name.endswith("experts.gate_up_proj"):
            experts, rows, columns = tensor.shape
            for e in range(experts):
                for part in ("gate_proj", "up_proj"):
                    yield name.replace("gate_up_proj", f"{e}.{part}.weight"), (rows // 2, columns)
        elif name.endswith("experts.down_proj"):
            for e in range(tensor.shape[0]):
                yield name.replace("down_proj", f"{e}.down_proj.weight"), tuple(tensor.shape[1:])
        else:
            yield name, tuple(tensor.shape)
