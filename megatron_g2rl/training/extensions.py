"""Tries the code that a configuration names by import path before a model is built, so that errors appear early."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch

from megatron_g2rl.algorithm import group_advantages
from megatron_g2rl.config import Config
from megatron_g2rl.config.code_files import named_code
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.errors import UserError
from megatron_g2rl.exploration import shape_rewards
from megatron_g2rl.exploration.methods import load_method
from megatron_g2rl.policy.models.families import Family
from megatron_g2rl.registry import ENGINES, FAMILIES, ExtensionError

_SCORES, _REWARDS = torch.tensor([0.0, 0.25, 1.0]), torch.tensor([1.0, -1.0, 0.5])
"""A group of three responses to try a mapping and a baseline on."""


def _try_engine(path: str) -> None:
    if not callable(ENGINES.load(path)):
        raise ExtensionError("is not a function(config, model_path, device, endings) that returns a rollout engine")


def _try_family(path: str) -> None:
    if not isinstance(FAMILIES.load(path), Family):
        raise ExtensionError("is not a megatron_g2rl.policy.models.families.Family")


_TRIALS: dict[str, Callable[[str], object]] = {
    "exploration.method": load_method,
    "exploration.mapping": lambda path: shape_rewards(_REWARDS, _SCORES, path),
    "algorithm.baseline": lambda path: group_advantages(_REWARDS, torch.zeros(3, dtype=torch.long), baseline=path),
    "rollout.engine": _try_engine,
    "model.family": _try_family,
}
"""How the code that each key names is tried; `rewards.distribute` tries reward functions."""


def check_extensions(config: Config) -> None:
    """Import and try what `config` names by import path: exploration method and mapping, baseline, engine, family.

    Raises:
        ConfigError: names the key, and the error with its file and line.
    """
    for key, path in named_code(config):
        try:
            _TRIALS.get(key, lambda path: None)(path)
        except UserError as error:
            raise ConfigError(f"{key}={path}: {error}") from error
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{key}={path} raises {reason} ({last.filename}, line {last.lineno})") from error
