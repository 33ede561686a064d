"""What ends a response: end-of-sequence tokens, the end of an assistant turn in the chat template, stop strings.

Both engines use the same endings. The token or stop string that ends a response is part of the response: it enters the
loss, so that the policy learns to produce it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_g2rl.config import Config
from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.data.templates import chat_text
from megatron_g2rl.records import Response, ResponseGroup
from megatron_g2rl.rollout.tokenizer import end_token_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK, END_THINK = "<think>", "</think>"
_ANSWER = "The answer is 42."
"""Content of the assistant turn whose end is read off the rendered chat template."""
TEMPLATE, STOP = "chat template", "rollout.stop"


@dataclass(frozen=True)
class Endings:
    """What ends the responses of a run."""

    token_ids: tuple[int, ...]
    """Tokens that end a response, ascending."""
    strings: tuple[str, ...] = ()
    """Stop strings."""
    described: str = ""
    """One line that lists all endings and the origin of each."""
    end_think_id: int | None = None
    """Token id of `</think>` if the tokenizer has one; decoded text may omit it."""

    def is_complete(self, prompt_text: str, response: Response) -> bool:
        """Whether the response ended by itself and closed the thinking block that the prompt or response opened."""
        if response.finish_reason == "length":
            return False
        opened = prompt_text.rstrip().endswith(THINK) or THINK in response.text
        return not opened or END_THINK in response.text or self.end_think_id in response.token_ids


def read_endings(config: Config, model_path: str, tokenizer: PreTrainedTokenizerBase) -> Endings:
    """Collect everything that ends a response under `config`, in training and in evaluation.

    Raises:
        RolloutError: there is no ending; every response would be truncated at `rollout.max_response_tokens`.
        DataError: the chat template fails.
    """
    data = [config.data] + ([config.evaluation.data(config.data)] if config.evaluation else [])
    tokens: dict[int, list[str]] = {}
    strings: dict[str, str] = {}
    for settings in data:
        token, text = turn_end(settings, tokenizer)
        if token is not None:
            tokens.setdefault(token, [TEMPLATE])
        elif text:
            strings[text] = TEMPLATE
    added = tokenizer.get_added_vocab()
    for text in config.rollout.stop:
        if text in added:
            tokens.setdefault(added[text], []).append(STOP)
        else:
            strings.setdefault(text, STOP)
    for token, origins in end_token_sources(model_path, tokenizer, required=not (tokens or strings)).items():
        tokens[token] = [*tokens.get(token, []), *origins]
    parts = [f"{_name(tokenizer, token)} ({token}: {', '.join(tokens[token])})" for token in sorted(tokens)]
    parts += [f"the text {text!r} ({origin})" for text, origin in strings.items()]
    return Endings(tuple(sorted(tokens)), tuple(strings), ", ".join(parts), added.get(END_THINK))


def turn_end(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, str]:
    """The token, or otherwise the text, that the chat template appends to an assistant turn.

    A model trained on the template ends its turns this way, even if the tokenizer's end-of-sequence token is another.

    Returns:
        The token id, or None and the text ("" when there is none, or `data.template` is `plain`).
    """
    if data.template == "plain" or not tokenizer.chat_template:
        return None, ""
    conversation = [{"role": "user", "content": "What is 6*7?"}, {"role": "assistant", "content": _ANSWER}]
    text = chat_text(conversation, data, tokenizer, generation_prompt=False)
    after = text.rpartition(_ANSWER)[2].strip() if _ANSWER in text else ""
    added = [token for token in tokenizer.get_added_vocab() if after.startswith(token)]
    if added:
        return tokenizer.get_added_vocab()[max(added, key=len)], ""
    return None, after


def count_as_complete(groups: Sequence[ResponseGroup], endings: Endings, incomplete: str) -> list[bool]:
    """Whether each response counts as complete, in group order; most reward functions see the others as empty.

    Args:
        groups: prompts and responses.
        endings: decides which responses are complete.
        incomplete: `rollout.incomplete_responses`; with `scored` all responses count as complete.
    """
    return [
        incomplete == "scored" or endings.is_complete(group.prompt.text, response)
        for group in groups
        for response in group.responses
    ]


def _name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    name = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    return name if name is not None else "unnamed token"
