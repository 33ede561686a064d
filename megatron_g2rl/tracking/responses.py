"""A few responses of a step, for reading: which ones, as rows of a file, and as text for TensorBoard."""

from __future__ import annotations

from typing import TypedDict

from megatron_g2rl.experience import Experience


class ResponseRow(TypedDict):
    """One line of responses.jsonl, the step aside."""

    prompt: str
    response: str
    answer: str
    """The reference answer."""
    reward: float
    """Base reward."""
    correct: bool
    score: float | None
    """Exploration score ν; None when it is not computed."""
    shaped: float
    finish_reason: str


def response_rows(experience: Experience) -> list[ResponseRow]:
    """Up to four responses of one group: of the correct and of the wrong ones the highest and the lowest ν.

    The group is the first that holds both kinds, else the first. Without scores ν is taken as equal everywhere.
    """
    e = experience
    correct = e.correct
    groups = [(e.group == i).nonzero().squeeze(1).tolist() for i in range(len(e.groups))]
    number = next((i for i, group in enumerate(groups) if len(correct[group].unique()) == 2), 0)
    chosen: list[int] = []
    for kind in (True, False):
        members = [i for i in groups[number] if bool(correct[i]) == kind]
        if e.scores is not None:
            members.sort(key=lambda i: float(e.scores[i]), reverse=True)
        chosen += members if len(members) < 2 else [members[0], members[-1]]
    prompt, responses = e.groups[number].prompt, e.responses
    return [
        ResponseRow(
            prompt=prompt.text,
            response=responses[i].text,
            answer=prompt.answer,
            reward=float(e.rewards[i]),
            correct=bool(e.correct[i]),
            score=None if e.scores is None else float(e.scores[i]),
            shaped=float(e.shaped[i]),
            finish_reason=responses[i].finish_reason,
        )
        for i in chosen
    ]


def responses_page(rows: list[ResponseRow]) -> str:
    """Markdown of the rows; texts are indented code, which nothing inside them can end or turn into markup."""
    parts = []
    for row in rows:
        score = "none" if row["score"] is None else f"{row['score']:.3f}"
        figures = f"reward {row['reward']:+.2f}, ν {score}, shaped {row['shaped']:+.3f}, {row['finish_reason']}"
        texts = (("prompt", row["prompt"]), ("response", row["response"]), ("answer", row["answer"]))
        parts += [f"### {figures}", *(f"**{name}**\n\n{_code(text)}" for name, text in texts)]
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
