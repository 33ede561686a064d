"""A policy of a small random model on the CPU, and a few updates of it, for the tests of checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from layout_cases import sequences, weighted_loss

from megatron_g2rl.config.sections.model import OptimizerConfig, PolicyConfig


def make_policy(folder: str, layout: dict, keep_reference: bool = False, **optimizer):
    from megatron_g2rl.policy import runtime
    from megatron_g2rl.policy.policy import Policy

    settings = PolicyConfig(**(dict(precision="fp32", device="cpu") | layout))
    return Policy(
        folder,
        settings,
        OptimizerConfig(**(dict(learning_rate=1e-3, schedule="linear", warmup_updates=2) | optimizer)),
        runtime.start(settings, seed=0),
        temperature=1.0,
        tokens_per_microbatch=64,
        total_updates=20,
        keep_reference=keep_reference,
    )


def train(policy, updates: int):
    batch = sequences(policy.architecture.vocab_size)
    results = [policy.update(batch, weighted_loss) for _ in range(updates)]
    return [metrics["loss"] for _, metrics, _ in results], [r.learning_rate for r, *_ in results]


def open_checkpoints(policy, folder: str | Path, *, keep: int, asynchronous: bool):
    """The `Checkpoints` of the policy in `folder`."""
    from megatron_g2rl.policy.checkpoint.save import Checkpoints

    return Checkpoints(policy, Path(folder), keep=keep, asynchronous=asynchronous)


def save_policy(policy, folder: str | Path, step: int, state: dict, keep: int) -> Path:
    """Save a checkpoint, wait until it is complete, and return its folder."""
    checkpoints = open_checkpoints(policy, folder, keep=keep, asynchronous=False)
    checkpoints.save(step, state)
    return checkpoints.finish(wait=True)


def load_policy(policy, checkpoint: Path, **options) -> dict:
    """Restore the policy from a checkpoint; returns the trainer state."""
    from megatron_g2rl.policy.checkpoint.checkpoints import load

    return load(checkpoint, policy, **options)


def export(policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.hf_weights()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> list[str]:
    """Names of the tensors with a difference above `tolerance`."""
    assert one.keys() == other.keys()
    return [name for name in one if (one[name].float() - other[name].float()).abs().max() > tolerance]


def message_of(work) -> str:
    """The name and text of the UserError that `work` raises."""
    from megatron_g2rl.errors import UserError

    try:
        work()
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
