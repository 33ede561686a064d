"""Reads the shape of a model from its Hugging Face configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.model_shape import LARGEST_COUNT, MOST_LAYERS, read_model_shape
from megatron_g2rl.errors import UserError
from megatron_g2rl.policy.models.families import Family
from megatron_g2rl.registry import FAMILIES

_LARGEST_FLOAT = 3.4e38
"""Upper limit for settings used in float32, such as those of positions and norms."""


class UnsupportedModel(UserError):
    """The checkpoint's architecture has a feature that this package's models do not implement."""


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

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape of a Hugging Face tensor; None: its name is not one that all families have in common."""
        width, narrow = self.heads * self.head_dim, self.key_value_groups * self.head_dim
        parts = name.split(".")
        ffn = self.expert_ffn_hidden if "experts" in parts else self.ffn_hidden
        matrices = {
            "embed_tokens": (self.vocab_size, self.hidden),
            "lm_head": (self.vocab_size, self.hidden),
            "q_proj": (width, self.hidden),
            "k_proj": (narrow, self.hidden),
            "v_proj": (narrow, self.hidden),
            "o_proj": (self.hidden, width),
            "gate_proj": (ffn, self.hidden),
            "up_proj": (ffn, self.hidden),
            "down_proj": (self.hidden, ffn),
        }
        shape = matrices.get(parts[-2]) if len(parts) > 1 else None
        return shape[:1] if shape and parts[-1] == "bias" else shape

    def signature(self) -> dict[str, int | float | bool | None]:
        """All properties that distinguish two models, for comparison (JSON-serializable)."""
        properties = {name: value for name, value in vars(self).items() if name != "family"}
        return properties | {"qk_norm": self.family.qk_norm, "qkv_bias": self.family.qkv_bias}


def read_architecture(path: str | Path, family: str | None = None) -> Architecture:
    """The architecture of a Hugging Face checkpoint.

    Args:
        path: folder or Hub name.
        family: `model.family`; None: the registered one of the checkpoint's `model_type`.

    Raises:
        UnsupportedModel: the model type or family, its rope, attention or expert layout is not supported; the
            message names it.
    """
    try:
        read_model_shape(path)  # checked first: transformers allocates lists as long as the numbers in config.json
    except ConfigError as error:
        raise UnsupportedModel(str(error)) from error
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # any error in the file: a wrong type, a missing key, an unknown class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedModel(
            f"{path}: config.json does not describe a model that can be trained: {reason}"
        ) from error
    table = _family(path, config.model_type, family)
    _refuse_unfaithful(path, config, table)
    base, factor = _rope(path, config)
    hidden, heads = _count(path, config, "hidden_size"), _count(path, config, "num_attention_heads")
    groups = _count(path, config, "num_key_value_heads")
    if heads % groups:
        raise UnsupportedModel(
            f"{path}: num_attention_heads={heads} of config.json is not divisible by num_key_value_heads={groups}"
        )
    moe = table.experts
    return Architecture(
        family=table,
        layers=_count(path, config, "num_hidden_layers", MOST_LAYERS),
        hidden=hidden,
        ffn_hidden=_count(path, config, "intermediate_size"),
        heads=heads,
        key_value_groups=groups,
        head_dim=_count(path, config, "head_dim") if getattr(config, "head_dim", None) else hidden // heads,
        vocab_size=_count(path, config, "vocab_size"),
        max_positions=_count(path, config, "max_position_embeddings"),
        norm_epsilon=_positive(path, "rms_norm_eps", config.rms_norm_eps),
        rope_base=base,
        rope_scaling_factor=factor,
        tied=bool(config.tie_word_embeddings),
        experts=_count(path, config, moe.count, MOST_LAYERS) if moe else None,
        experts_per_token=_count(path, config, moe.per_token) if moe else 0,
        expert_ffn_hidden=_count(path, config, moe.ffn_hidden) if moe else 0,
    )


def _family(path: str | Path, model_type: str, chosen: str | None) -> Family:
    """The family that `model.family` names, else the registered one; a checkpoint cannot name code to import."""
    family = FAMILIES.load(chosen) if chosen else FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModel(
            f"{path}: model_type {model_type!r} is not one of {', '.join(sorted(FAMILIES))}; set model.family to the "
            "one that has the same layers, or to a family of your own (docs/extending.md)"
        )
    if not isinstance(family, Family):
        raise UnsupportedModel(f"model.family={chosen} is a {type(family).__name__}, not a Family")
    return family


def _count(path: str | Path, config: Any, name: str, most: int = LARGEST_COUNT) -> int:
    """A count in config.json."""
    value = getattr(config, name, None)
    if type(value) is not int or not 1 <= value <= most:
        raise UnsupportedModel(f"{path}: config.json has {value!r:.40} for {name}: not a count from 1 to {most}")
    return value


def _positive(path: str | Path, name: str, value: Any) -> float:
    """A finite number above 0 in config.json."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST_FLOAT:
        raise UnsupportedModel(f"{path}: config.json has {value!r:.40} for {name}: not a number above 0")
    return float(value)


def _refuse_unfaithful(path, config, family) -> None:
    """Refuse settings that would silently make the model compute another function."""
    problems = []
    if config.hidden_act != "silu":
        problems.append(f"hidden_act {config.hidden_act!r} (only silu)")
    if getattr(config, "use_sliding_window", False):
        problems.append("use_sliding_window true (only full attention)")
    elif any(kind != "full_attention" for kind in _layer_types(config)):
        problems.append("layer_types other than full_attention")
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


def _layer_types(config) -> list:
    kinds = getattr(config, "layer_types", None) or []
    return kinds if isinstance(kinds, list | tuple) else [kinds]


def _rope(path, config) -> tuple[float, float | None]:
    """(base, Llama 3 scaling factor or None), from the old or new format of transformers' configuration."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(rope, dict):
        raise UnsupportedModel(f"{path}: config.json has {rope!r:.40} for rope parameters: not a mapping")
    base = _positive(path, "rope_theta", rope.get("rope_theta") or getattr(config, "rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    fixed = (rope.get("low_freq_factor"), rope.get("high_freq_factor"), rope.get("original_max_position_embeddings"))
    if kind != "llama3" or fixed != (1.0, 4.0, 8192):
        raise UnsupportedModel(
            f"{path}: rope {rope} is not supported (default, or llama3 with factors 1, 4 and 8192 original positions)"
        )
    return base, _positive(path, "the factor of rope", rope.get("factor"))
