"""Lets Megatron's optimizers resume when their inner optimizer is torch.optim.AdamW (no Transformer Engine, no apex).

Megatron is written for fused Adam, which keeps one step count a parameter group. torch keeps one a parameter, as a
tensor, and that breaks resuming in three places: a fresh optimizer has no state to load into, the step count is missing
from what is loaded, and after loading all parameters share one step tensor, which then counts once a parameter.
"""

from __future__ import annotations

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def make_resumable(optimizer: MegatronOptimizer) -> None:
    """Adapt `optimizer` and those chained in it; fused Adam gets its state at once: it is saved before a step too."""
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(inner.optimizer, torch.optim.AdamW):
            _own_steps_after_loading(inner)
            _start_with_state(inner.optimizer)
            if isinstance(inner, DistributedOptimizer):
                _keep_steps_while_loading(inner)
        elif inner.optimizer is not None:
            inner.init_state_fn(inner.optimizer, inner.config)


def _start_with_state(adam: torch.optim.AdamW) -> None:
    """The state AdamW would create at its first step."""
    for group in adam.param_groups:
        for p in group["params"]:
            adam.state[p] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(p.data),
                "exp_avg_sq": torch.zeros_like(p.data),
            }


def _keep_steps_while_loading(inner: DistributedOptimizer) -> None:
    original = inner._set_main_param_and_optimizer_states

    @torch.no_grad()
    def set_states(model_param, tensors):
        group, order = inner.model_param_group_index_map[model_param]
        state = inner.optimizer.state[inner.optimizer.param_groups[group]["params"][order]]
        return original(model_param, tensors | {"step": state["step"]})

    inner._set_main_param_and_optimizer_states = set_states


def _own_steps_after_loading(inner: MegatronOptimizer) -> None:
    original = inner.load_state_dict

    def load(state_dict):
        stored = state_dict.get("optimizer", state_dict).get("state", {})
        if "common_step" not in stored:  # a step of 0 is left out
            for state in stored.values():
                state.setdefault("step", torch.tensor(0.0))
        original(state_dict)
        for state in inner.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    inner.load_state_dict = load
