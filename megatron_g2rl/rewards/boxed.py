"""Extracts the final answer of a response: the content of the last \\boxed{...}."""

from __future__ import annotations

import re

# Tokens of the brace matching: an opening box, an escaped character (\{ is not an opening brace), a brace.
_TOKEN = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|[{}]", re.DOTALL)
_BOX_COMMAND = re.compile(r"\\boxed\s*(?=\{)")
_SPACE = re.compile(r"\s*")


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} of a response, or None if there is no final answer.

    Only the text after the last `</think>` counts; a response that opens `<think>` and never closes it has no answer.
    If the last box is never closed (a truncated response), there is no answer either: earlier boxes are not used
    instead. Nested boxes are unwrapped. Time is linear in the length of the text.
    """
    if "<think>" in text and "</think>" not in text:
        return None
    text = text.rpartition("</think>")[2]
    boxes = _closed_boxes(text)
    if boxes is None:
        return None
    # The outermost box around the last opened one; its inner boxes are part of the answer.
    last = max(boxes)
    begin, end = boxes[min(start for start, (_, end) in boxes.items() if start <= last < end)]
    while True:
        inner = _SPACE.match(text, begin).end()
        if inner not in boxes or text[boxes[inner][1] + 1 : end].strip():
            return _BOX_COMMAND.sub("", text[begin:end]).strip()
        begin, end = boxes[inner]


def _closed_boxes(text: str) -> dict[int, tuple[int, int]] | None:
    """Map the start of every closed box to (begin, end) of its content; None without a box or if the last is open."""
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
