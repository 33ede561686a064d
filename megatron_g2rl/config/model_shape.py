"""The dimensions of a model that a parallel layout depends on, read from its config.json without transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.regular_files import special_files


@dataclass(frozen=True)
class ModelShape:
    """Dimensions that a parallel layout must fit."""

    layers: int
    """Transformer layers."""
    heads: int
    """Attention heads."""
    key_value_groups: int
    """Key and value heads (grouped-query attention)."""
    experts: int
    """Experts of each mixture-of-experts layer; 0 for a dense model."""
    max_positions: int
    """Longest sequence that the model supports, in tokens."""
    vocab_size: int
    """Rows of the output embedding."""


LARGEST_COUNT = 10**9
MOST_LAYERS = 10**4
"""Limit of layers and of experts per layer; lists of both are built."""
_KEYS = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key_value_groups": "num_key_value_heads",
    "experts": "num_experts",
    "max_positions": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
"""Names of the fields in config.json."""


def read_model_shape(path: str | Path) -> ModelShape | None:
    """The shape in `path`/config.json, or None when `path` is not a local folder (a Hub name).

    Raises:
        ConfigError: the folder has no config.json, or the file does not describe a causal language model.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    file = folder / "config.json"
    if special := next(special_files(folder), None):
        raise ConfigError(f"model.path={path}: {special} is not a regular file; remove it from the folder")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ConfigError(f"model.path={path}: {file} is not a JSON object: it does not describe a model")
        shape = ModelShape(
            layers=settings["num_hidden_layers"],
            heads=settings["num_attention_heads"],
            key_value_groups=settings.get("num_key_value_heads", settings["num_attention_heads"]),
            experts=settings.get("num_experts") or settings.get("num_local_experts") or 0,
            max_positions=settings["max_position_embeddings"],
            vocab_size=settings["vocab_size"],
        )
        for name, value in vars(shape).items():
            least = 0 if name == "experts" else 1
            most = MOST_LAYERS if name in ("layers", "experts") else LARGEST_COUNT
            if type(value) is not int or not least <= value <= most:
                raise ConfigError(
                    f"model.path={path}: {file} has {value!r:.40} for {_KEYS[name]}, which is not a valid count: the "
                    "file is corrupt or does not describe a model; copy it again"
                )
        return shape
    except FileNotFoundError:
        raise ConfigError(f"model.path={path} is a folder without config.json: it contains no model") from None
    except (ValueError, RecursionError) as error:  # invalid JSON, or not text
        raise ConfigError(f"model.path={path}: {file} is not valid JSON ({error}); copy it again") from error
    except OSError as error:
        raise ConfigError(f"model.path={path}: {file} cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise ConfigError(f"model.path={path}: {file} has no {error}: it describes no causal language model") from error
