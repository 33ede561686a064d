"""Reward functions in all forms that `reward.function` accepts (docs/rewards.md). From this folder, for example:

g2rl train CONFIG reward.function=own_rewards:brief
"""

from megatron_g2rl.rewards import verify_math


def brief(response: str, answer: str, tokens: list[int]) -> tuple[float, bool]:
    """Reward short correct responses more. Returning a pair keeps correctness separate from the reward."""
    correct = verify_math(response, answer) == 1.0
    return (1.0 - 0.5 * min(len(tokens) / 4000, 1.0) if correct else -1.0), correct


def overlong(tokens: list[int], finish_reason: str) -> float:
    """Penalize truncated and nearly truncated responses, which it sees in full; to be added with a weight."""
    if finish_reason == "length":
        return -1.0
    return -min(1.0, max(0.0, len(tokens) / 4000 - 1.0))


def by_level(completions: list[str], answers: list[str], level: list[int]) -> list[float]:
    """A batch of responses, and the data's column `level`, in TRL's signature."""
    verdicts = [verify_math(text, answer) == 1.0 for text, answer in zip(completions, answers, strict=True)]
    return [min(1.0, 0.2 * n) if correct else -1.0 for correct, n in zip(verdicts, level, strict=True)]


class Judge:
    """Constructed once per worker with `reward.arguments`; `close`, if defined, is called at the end."""

    def __init__(self, words: str = "therefore,hence") -> None:
        self.words = words.split(",")

    async def __call__(self, response: str, answer: str) -> float:
        """May be async, for example to call a server."""
        return 1.0 if any(word in response.lower() for word in self.words) else 0.0
