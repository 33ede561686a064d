"""A few responses of a step for inspection: selection, rows of responses.jsonl, and text for TensorBoard."""

from __future__ import annotations

from typing import TypedDict

from megatron_g2rl.records import Experience


class ResponseRow(TypedDict):
    """One line of responses.jsonl, without the step."""

    prompt: str
    response: str
    answer: str
    """The reference answer."""
    reward: float
    """Base reward."""
    correct: bool
    novelty: float | None
    """Novelty ν; None if it is not computed."""
    shaped: float
    """Shaped reward."""
    finish_reason: str


def response_rows(experience: Experience) -> list[ResponseRow]:
    """Up to four responses of one group: those with the highest and lowest ν among the correct and the incorrect ones.

    The group is the first with both correct and incorrect responses, else the first. If ν is not computed, the first
    and last responses are taken.
    """
    e = experience
    correct = e.correct
    ids = e.group_ids
    groups = [(ids == i).nonzero().squeeze(1).tolist() for i in range(len(e.groups))]
    number = next((i for i, group in enumerate(groups) if len(correct[group].unique()) == 2), 0)
    chosen: list[int] = []
    for kind in (True, False):
        members = [i for i in groups[number] if bool(correct[i]) == kind]
        if e.novelty is not None:
            members.sort(key=lambda i: float(e.novelty[i]), reverse=True)
        chosen += members if len(members) < 2 else [members[0], members[-1]]
    prompt, responses = e.groups[number].prompt, e.responses
    return [
        ResponseRow(
            prompt=prompt.text,
            response=responses[i].text,
            answer=prompt.answer,
            reward=float(e.rewards[i]),
            correct=bool(e.correct[i]),
            novelty=None if e.novelty is None else float(e.novelty[i]),
            shaped=float(e.shaped[i]),
            finish_reason=responses[i].finish_reason,
        )
        for i in chosen
    ]


def responses_page(rows: list[ResponseRow]) -> str:
    """The rows as Markdown; texts are indented code blocks, so that no content is interpreted as markup."""
    parts = []
    for row in rows:
        novelty = "none" if row["novelty"] is None else f"{row['novelty']:.3f}"
        figures = f"reward {row['reward']:+.2f}, ν {novelty}, shaped {row['shaped']:+.3f}, {row['finish_reason']}"
        texts = (("prompt", row["prompt"]), ("response", row["response"]), ("answer", row["answer"]))
        parts += [f"### {figures}", *(f"**{name}**\n\n{_code(text)}" for name, text in texts)]
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
