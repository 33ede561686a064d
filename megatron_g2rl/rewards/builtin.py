"""Rewards of the built-in tasks, and a constant reward for training without supervision."""

from __future__ import annotations

from typing import Any

from megatron_g2rl.registry import TASK_RULES
from megatron_g2rl.rewards.verifier import math_reward


def task_reward(
    response_text: str, answer: str, problem: str = "", builtin_task: str = "", *, graded: bool = False
) -> float | dict[str, Any]:
    """Reward of a response to a built-in task, in mixtures too: each problem is scored by the rules of its own task.

    Args:
        response_text: the response.
        answer: the reference answer.
        problem: the text of the problem.
        builtin_task: column that rows of built-in tasks have. Without rules of its own (arithmetic, other sources),
            answers are compared by the verifier of mathematical answers.
        graded: partial credit for incorrect responses: -1 to 1 instead of -1 or 1; never for compared answers.

    Returns:
        Reward, correctness and canonical form (docs/rewards.md); only the reward for compared answers.

    Raises:
        ValueError: `problem` is not one of the task.
    """
    if builtin_task not in TASK_RULES:
        return math_reward(response_text, answer)
    verdict = TASK_RULES[builtin_task](response_text, answer, problem)
    credit = verdict.credit if graded else float(verdict.is_correct)
    result: dict[str, Any] = {"reward": 2 * credit - 1, "correct": verdict.is_correct}
    return result | ({"form": verdict.form} if verdict.has_forms else {})


def constant_reward(response_text: str) -> float:
    """1.0 for every response: with exploration, novelty alone decides (docs/rewards.md)."""
    return 1.0
