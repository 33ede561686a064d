"""Checks the state of the training loop in a checkpoint before a run resumes from it."""

from __future__ import annotations

from pathlib import Path

from megatron_g2rl.policy.checkpoint import checkpoints


def check_state(checkpoint: Path) -> None:
    """Refuse a checkpoint whose state is inconsistent with its step.

    Raises:
        CheckpointError: names the inconsistent entry.
    """
    remedy = "it was edited or is corrupt; remove it to resume from the previous one"
    state, step = checkpoints.read_state(checkpoint).get("trainer"), checkpoints.step_of(checkpoint)
    try:
        trainer, rounds = state["config"]["trainer"], state["config"]["algorithm"]["dynamic_sampling_rounds"]
        # Each round skips the prompts already in the step. Factor 100: the batch size may have changed since then.
        drawn = 100 * step * trainer["prompts_per_step"] * (1 + rounds) * (2 + rounds)
        expected = [
            ("step", state["step"], step, step),
            ("prompts.position", state["prompts"]["position"], step, drawn),
            ("bad_updates", state["bad_updates"], 0, trainer["max_nonfinite_updates"]),
        ]
        if state["config"]["algorithm"].get("baseline") == "critic":
            bad = state["critic_bad_updates"]
            expected.append(("critic_bad_updates", bad, 0, trainer["max_nonfinite_updates"]))
    except (KeyError, TypeError) as error:
        raise checkpoints.CheckpointError(f"{checkpoint}: its state is incomplete ({error!r}): {remedy}") from None
    for name, value, low, high in expected:
        if type(value) is not int or not low <= value <= high:
            bounds = f"{low} to {high}" if low < high else str(low)
            raise checkpoints.CheckpointError(f"{checkpoint}: {name} is {value!r:.40}, not {bounds}: {remedy}")
