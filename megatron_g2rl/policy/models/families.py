"""Model families: tables that map a Hugging Face architecture to Megatron.

A family consists of a few properties of its layers and a table of `Rule`s. To add one, write its table in a separate
file and register it in `registry.py` under the `model_type` of its config.json (docs/extending.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["replicated", "vocab", "column", "row", "qkv", "gated"]
"""How Megatron combines Hugging Face tensors into a tensor and splits it over tensor-parallel ranks:

replicated: complete on every rank. vocab: by rows, padded. column: by rows. row: by columns. qkv: q, k and v of each
key-value group adjacent, groups split over ranks. gated: gate and up projection, each split by rows, then concatenated.
"""


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors it holds. `{l}` is the layer, `{e}` the expert (global)."""

    megatron: str
    hf: tuple[str, ...]
    kind: Kind

    @property
    def expert(self) -> bool:
        return "{e}" in self.megatron


@dataclass(frozen=True)
class Experts:
    """Keys of a family's config.json that describe its mixture of experts."""

    count: str = "num_experts"
    per_token: str = "num_experts_per_tok"
    ffn_hidden: str = "moe_intermediate_size"


@dataclass(frozen=True)
class Family:
    """A model family."""

    rules: tuple[Rule, ...]
    qk_norm: bool = False
    """Queries and keys are normalized per head."""
    qkv_bias: bool = False
    experts: Experts | None = None
    """If not None, every layer is a mixture of experts."""

    def hf_names(self, layers: int, experts: int, tied: bool) -> list[str]:
        """The names of all tensors of a Hugging Face checkpoint; a tied model has no separate output embedding."""
        names: dict[str, None] = {}
        for rule in self.rules:
            if tied and rule.megatron == OUTPUT:
                continue
            for layer in range(layers) if "{l}" in rule.megatron else (None,):
                for expert in range(experts) if rule.expert else (None,):
                    names |= dict.fromkeys(name.format(l=layer, e=expert) for name in rule.hf)
        return list(names)

    def embedding_names(self) -> tuple[str, str]:
        """The Hugging Face names of the input and the output embedding."""
        names = {rule.megatron: rule.hf[0] for rule in self.rules}
        return names[EMBEDDING], names[OUTPUT]


EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_LAYER, _HF_LAYER = "decoder.layers.{l}.", "model.layers.{l}."
_ATTENTION, _HF_ATTENTION = _LAYER + "self_attention.", _HF_LAYER + "self_attn."
_QKV = ("q_proj", "k_proj", "v_proj")

BASE = (
    Rule(EMBEDDING, ("model.embed_tokens.weight",), "vocab"),
    Rule(OUTPUT, ("lm_head.weight",), "vocab"),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
    Rule(_LAYER + "input_layernorm.weight", (_HF_LAYER + "input_layernorm.weight",), "replicated"),
    Rule(_LAYER + "pre_mlp_layernorm.weight", (_HF_LAYER + "post_attention_layernorm.weight",), "replicated"),
    Rule(_ATTENTION + "linear_qkv.weight", tuple(f"{_HF_ATTENTION}{x}.weight" for x in _QKV), "qkv"),
    Rule(_ATTENTION + "linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), "row"),
)
DENSE_MLP = (
    Rule(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        "gated",
    ),
    Rule(_LAYER + "mlp.linear_fc2.weight", (_HF_LAYER + "mlp.down_proj.weight",), "row"),
)
_EXPERT, _HF_EXPERT = _LAYER + "mlp.experts.local_experts.{e}.", _HF_LAYER + "mlp.experts.{e}."
EXPERT_MLP = (
    Rule(_LAYER + "mlp.router.weight", (_HF_LAYER + "mlp.gate.weight",), "replicated"),
    Rule(_EXPERT + "linear_fc1.weight", (_HF_EXPERT + "gate_proj.weight", _HF_EXPERT + "up_proj.weight"), "gated"),
    Rule(_EXPERT + "linear_fc2.weight", (_HF_EXPERT + "down_proj.weight",), "row"),
)
QK_NORM = (
    Rule(_ATTENTION + "q_layernorm.weight", (_HF_ATTENTION + "q_norm.weight",), "replicated"),
    Rule(_ATTENTION + "k_layernorm.weight", (_HF_ATTENTION + "k_norm.weight",), "replicated"),
)
QKV_BIAS = (Rule(_ATTENTION + "linear_qkv.bias", tuple(f"{_HF_ATTENTION}{x}.bias" for x in _QKV), "qkv"),)

# The names of these tables and families are used by other files: `registry.py` lists the families by `model_type`.
QWEN3 = Family(BASE + DENSE_MLP + QK_NORM, qk_norm=True)
QWEN3_MOE = Family(BASE + EXPERT_MLP + QK_NORM, qk_norm=True, experts=Experts())
QWEN2 = Family(BASE + DENSE_MLP + QKV_BIAS, qkv_bias=True)
LLAMA = Family(BASE + DENSE_MLP)

# Transformer Engine fuses a norm into the linear layer that follows it, and all experts into one grouped layer.
_FUSED_NAMES = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_weight$"), "input_layernorm.weight"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_weight$"), "pre_mlp_layernorm.weight"),
    (re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$"), r"mlp.experts.local_experts.\2.\1.weight"),
)


def canonical_name(megatron_name: str) -> str:
    """The name of a parameter under the `torch` layer spec, given its name under either spec."""
    for pattern, replacement in _FUSED_NAMES:
        megatron_name = pattern.sub(replacement, megatron_name)
    return megatron_name


@dataclass(frozen=True)
class Mapped:
    """A rule applied to one local parameter."""

    rule: Rule
    hf: tuple[str, ...]


def map_parameter(family: Family, local_name: str, layer_numbers: list[int], first_expert: int) -> Mapped:
    """Find the Hugging Face tensors of one local Megatron parameter.

    Args:
        family: the model's family.
        local_name: parameter name inside this rank's model chunk.
        layer_numbers: global index (from 0) of each local layer.
        first_expert: global index of this rank's first expert.

    Raises:
        KeyError: no rule matches the parameter.
    """
    name = canonical_name(local_name)
    layer = expert = None
    if match := re.match(r"decoder\.layers\.(\d+)\.", name):
        layer = layer_numbers[int(match[1])]
        name = name.replace(match[0], "decoder.layers.{l}.", 1)
    if match := re.search(r"\.local_experts\.(\d+)\.", name):
        expert = first_expert + int(match[1])
        name = name.replace(match[0], ".local_experts.{e}.", 1)
    for rule in family.rules:
        if rule.megatron == name:
            return Mapped(rule, tuple(hf.format(l=layer, e=expert) for hf in rule.hf))
    raise KeyError(f"no rule of this model family maps Megatron's parameter {local_name!r} (as {name!r})")
