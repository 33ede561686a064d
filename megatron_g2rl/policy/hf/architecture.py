"""Reads the shape of a model from its Hugging Face configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from megatron_g2rl.errors import UserError
from megatron_g2rl.policy.hf.families import FAMILIES, Family


class UnsupportedModel(UserError):
    """The checkpoint's architecture has something that cannot be trained faithfully."""


@dataclass(frozen=True)
class Architecture:
    """Everything Megatron needs to build the model."""

    family: Family
    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    key_value_groups: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_epsilon: float
    rope_base: float
    rope_scaling_factor: float | None
    """Llama 3's frequency scaling, or None."""
    tied: bool
    experts: int | None = None
    experts_per_token: int = 0
    expert_ffn_hidden: int = 0

    def facts(self) -> dict[str, int | float | bool | None]:
        """Everything that makes two models different, for comparing (JSON-serialisable)."""
        facts = {name: value for name, value in vars(self).items() if name != "family"}
        return facts | {"qk_norm": self.family.qk_norm, "qkv_bias": self.family.qkv_bias}


def read_architecture(path: str | Path) -> Architecture:
    """The architecture of a Hugging Face checkpoint.

    Args:
        path: folder or hub name.

    Raises:
        UnsupportedModel: the model type, its rope, attention or expert layout is not one we map; the message names it.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever is wrong in the file: a type, a missing key, a class that nobody knows
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedModel(f"{path}: config.json is not of a model that can be trained: {reason}") from error
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModel(f"{path}: model_type {config.model_type!r} is not one of {', '.join(sorted(FAMILIES))}")
    _refuse_unfaithful(path, config, family)
    base, factor = _rope(path, config)
    heads = config.num_attention_heads
    moe = family.experts
    return Architecture(
        family=family,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn_hidden=config.intermediate_size,
        heads=heads,
        key_value_groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        rope_base=base,
        rope_scaling_factor=factor,
        tied=bool(config.tie_word_embeddings),
        experts=getattr(config, moe.count) if moe else None,
        experts_per_token=getattr(config, moe.per_token) if moe else 0,
        expert_ffn_hidden=getattr(config, moe.ffn_hidden) if moe else 0,
    )


def _refuse_unfaithful(path, config, family) -> None:
    """Settings that would change the function we compute without an error."""
    problems = []
    if config.hidden_act != "silu":
        problems.append(f"hidden_act {config.hidden_act!r} (only silu)")
    if getattr(config, "use_sliding_window", False):
        problems.append("use_sliding_window true (only full attention)")
    elif "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        problems.append("layer_types with sliding_attention (only full attention)")
    if getattr(config, "attention_bias", False) and not family.qkv_bias:
        problems.append("attention_bias true")
    if getattr(config, "mlp_bias", False):
        problems.append("mlp_bias true")
    if getattr(config, "mlp_only_layers", None):
        problems.append("mlp_only_layers not empty")
    if getattr(config, "decoder_sparse_step", 1) != 1:
        problems.append("decoder_sparse_step other than 1")
    if not getattr(config, "norm_topk_prob", True):
        problems.append("norm_topk_prob false")
    if problems:
        raise UnsupportedModel(f"{path}: config.json has {'; '.join(problems)}, which is not supported")


def _rope(path, config) -> tuple[float, float | None]:
    """(base, Llama 3 scaling factor or None), from either generation of transformers' configuration."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    base = float(rope.get("rope_theta") or getattr(config, "rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    fixed = (rope.get("low_freq_factor"), rope.get("high_freq_factor"), rope.get("original_max_position_embeddings"))
    if kind != "llama3" or fixed != (1.0, 4.0, 8192):
        raise UnsupportedModel(
            f"{path}: rope {rope} is not supported (default, or llama3 with factors 1, 4 and 8192 original positions)"
        )
    return base, float(rope["factor"])
