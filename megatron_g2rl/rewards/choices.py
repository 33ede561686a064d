"""Multiple choice: the letter that a response chooses, and the reward for the correct one."""

from __future__ import annotations

import re

from megatron_g2rl.rewards.boxed import last_boxed

# "A" and "I" are also words: "the answer is A good one" chooses nothing.
_LETTER = r"(?:[B-HJ-Z](?![A-Za-z])|[AI](?![A-Za-z])(?!\s+[a-z]))"
_BOXED = re.compile(r"(?:\\(?:text|mathrm|textbf|mathbf)\s*\{\s*)?\(?\s*([A-Za-z])(?![A-Za-z])")
_STATED = re.compile(
    r"(?i:\b(?:answer|choice|option))\b[^A-Za-z\n]{0,20}(?:(?i:is|would be|must be)\b[^A-Za-z\n]{0,20})?"
    r"(?:(?i:option|choice)\s+)?[^A-Za-z\n]{0,6}(" + _LETTER + ")"
)


def last_letter(text: str) -> str | None:
    """The option that a response chooses, as a capital letter; None if it chooses none.

    The last box counts, if there is one ("\\boxed{B}", "\\boxed{(B) 12 m}"), else the last statement such as "the
    answer is (B)" or "Answer: B". Only the text after the last `</think>` counts, and an open `<think>` has no answer.
    """
    if "<think>" in text and "</think>" not in text:
        return None
    text = text.rpartition("</think>")[2]
    boxed = last_boxed(text)
    if boxed is not None:
        chosen = _BOXED.match(boxed.strip())
        return chosen[1].upper() if chosen else None
    stated = [match[1] for match in _STATED.finditer(text)]
    return stated[-1] if stated else None


def choice_reward(response_text: str, answer: str) -> float:
    """+1.0 if the response chooses the option with the letter `answer`, -1.0 otherwise."""
    return 1.0 if last_letter(response_text) == answer.strip().upper() else -1.0
