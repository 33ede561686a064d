"""Checkpoints of fused Adam, which needs a GPU: here a replacement with the same state, written with torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_policy import differing, export, load_policy, make_policy, save_policy, train


class FusedAdam(torch.optim.Optimizer):
    """Transformer Engine's FusedAdam as Megatron sees it: an integer step per group, state from step 1."""

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode, capturable=False):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=True))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            assert group["bias_correction"] and isinstance(group.get("step", 0), int)
            group["step"] = group.get("step", 0) + 1
            (one, two), rate = group["betas"], group["lr"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - one)
                state["exp_avg_sq"].mul_(two).addcmul_(p.grad, p.grad, value=1 - two)
                size = (state["exp_avg_sq"] / (1 - two ** group["step"])).sqrt_().add_(group["eps"])
                p.mul_(1 - rate * group["weight_decay"])
                p.addcdiv_(state["exp_avg"], size, value=-rate / (1 - one ** group["step"]))


def use_fused_adam() -> None:
    """Make Megatron treat it as Transformer Engine's."""
    import megatron.core.optimizer as chosen
    from megatron.core.optimizer import distrib_optimizer

    chosen.Adam = distrib_optimizer.Adam = FusedAdam
    chosen.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True


def save_and_continue(rank: int, folder: str, layout: dict, fused: bool, checkpoints: str, updates: int):
    if fused:
        use_fused_adam()
    policy = make_policy(folder, layout)
    train(policy, updates)
    save_policy(policy, Path(checkpoints), updates, {}, keep=1)
    return train(policy, 2), export(policy)


def load_and_continue(rank: int, folder: str, layout: dict, checkpoints: str):
    from megatron_g2rl.policy.checkpoint.checkpoints import latest

    use_fused_adam()
    policy = make_policy(folder, layout)
    load_policy(policy, latest(Path(checkpoints)))
    return train(policy, 2), export(policy)


@pytest.mark.parametrize("updates", [0, 2], ids=["before_a_step", "after_two"])
@pytest.mark.parametrize("layout", [{}, dict(precision="bf16", distributed_optimizer=False)], ids=["sharded", "full"])
def test_fused_adam_resumes_as_if_it_had_not_been_saved(layout, updates, ranks, model_folder, tmp_path):
    folder = model_folder("qwen3", True)
    numbers, weights = ranks(2, save_and_continue, folder, layout, True, str(tmp_path), updates)[0]
    again, loaded = ranks(2, load_and_continue, folder, layout, str(tmp_path))[0]
    assert again == numbers
    assert not differing(loaded, weights)


def test_fused_adam_resumes_from_the_state_of_torch_adam(ranks, model_folder, tmp_path):
    """From a CPU to a GPU; the two round slightly differently."""
    folder = model_folder("qwen3", True)
    (losses, rates), weights = ranks(1, save_and_continue, folder, {}, False, str(tmp_path), 2)[0]
    (again, new_rates), loaded = ranks(1, load_and_continue, folder, {}, str(tmp_path))[0]
    assert new_rates == rates
    assert again == pytest.approx(losses, rel=2e-5)
    assert not differing(loaded, weights, tolerance=3e-5)
