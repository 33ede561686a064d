"""Where the final answer stands in a response: the content of the last \\boxed{...}."""

from __future__ import annotations

import re

# What decides each step of the brace matching: an opening box, an escaped character (\{ opens nothing), a brace.
_TOKEN = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|[{}]", re.DOTALL)
_BOX_COMMAND = re.compile(r"\\boxed\s*(?=\{)")
_SPACE = re.compile(r"\s*")


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} of a response, or None when it holds no final answer.

    Only what follows the last `</think>` counts; a response that opens `<think>` and never closes it has no answer. A
    last box whose brace is never closed (a response cut short) is no answer either: earlier boxes do not stand in for
    it. Boxes inside boxes are unwrapped. Time is linear in the length of the text.
    """
    if "<think>" in text and "</think>" not in text:
        return None
    text = text.rpartition("</think>")[2]
    boxes = _closed_boxes(text)
    if boxes is None:
        return None
    # The outermost box around the last one that was opened: its inner boxes are part of the answer.
    last = max(boxes)
    begin, end = boxes[min(start for start, (_, end) in boxes.items() if start <= last < end)]
    while True:
        inner = _SPACE.match(text, begin).end()
        if inner not in boxes or text[boxes[inner][1] + 1 : end].strip():
            return _BOX_COMMAND.sub("", text[begin:end]).strip()
        begin, end = boxes[inner]


def _closed_boxes(text: str) -> dict[int, tuple[int, int]] | None:
    """Start of every closed box -> (begin, end) of its content; None when there is no box or the last is not closed."""
    boxes: dict[int, tuple[int, int]] = {}
    open_braces: list[tuple[int, int] | None] = []
    last_start = -1
    for token in _TOKEN.finditer(text):
        if token["box"]:
            last_start = token.start()
            open_braces.append(token.span())
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces:
            box = open_braces.pop()
            if box is not None:
                boxes[box[0]] = (box[1], token.start())
    return boxes if last_start in boxes else None
