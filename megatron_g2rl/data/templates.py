"""Renders the messages of a row to the text of a prompt, and encodes it to tokens.

Chat templates are programs that ship with a model: their first rendering is limited in time, memory and length.
"""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import re
import resource
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jinja2

from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Message = Mapping[str, str]

TEMPLATE_SECONDS = 5
"""Limit of the processor time of the first rendering of a chat template: other programs do not count."""
WAIT_SECONDS = 120.0
"""Time limit of the first rendering on a busy machine."""
TEMPLATE_BYTES = 2**30
"""Memory limit of the first rendering."""
TEMPLATE_CHARACTERS = 2**20
"""Maximum length of the text that a chat template renders from two short messages."""


def check_template(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse an invalid template, and a chat template that fails or exceeds its time, memory or length limit.

    The first rendering runs in a separate process, which can be killed.

    Raises:
        DataError: the message gives the reason.
    """
    if data.template == "plain":
        if "{problem}" not in data.plain_template:
            raise DataError(f"data.plain_template={data.plain_template!r} does not contain {{problem}}")
        return
    reserved = sorted(data.chat_template_kwargs and data.chat_template_kwargs.keys() & _reserved_names(tokenizer))
    if reserved:
        raise DataError(f"data.chat_template_kwargs: {', '.join(reserved)} is reserved and cannot be set: remove it")
    if not tokenizer.chat_template:
        raise DataError(
            f"data.template is chat, but the tokenizer of {_name(tokenizer)} has no chat template (base models "
            "often have none): set data.template=plain"
        )

    def render_twice() -> str:
        prompt = chat_text(with_system([{"role": "user", "content": "1+1"}], data), data, tokenizer)
        answered = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
        return prompt + "\0" + chat_text(answered, data, tokenizer, generation_prompt=False)

    text = _in_bounds(render_twice, f"the chat template of {_name(tokenizer)}")
    if len(text) > TEMPLATE_CHARACTERS:
        raise DataError(
            f"the chat template of {_name(tokenizer)} renders a short conversation to {len(text)} characters: fix "
            "it, or set data.template=plain"
        )
    prompt = text.partition("\0")[0]
    if "1+1" not in prompt:
        raise DataError(
            f"the chat template of {_name(tokenizer)} omits the problem (it may expect message content as a list of "
            "parts): fix it, or set data.template=plain"
        )
    if data.system_prompt.strip() not in prompt:
        log.warning("the chat template of %s omits data.system_prompt", _name(tokenizer))


def _reserved_names(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Names that transformers uses as rendering options or sets itself."""
    options = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"kwargs"}
    return options | {"messages", "bos_token", "eos_token", "pad_token", "unk_token"}


def with_system(messages: Sequence[Message], data: DataConfig) -> list[Message]:
    """Prepend the system message of `data`, if it is set and the messages do not start with one."""
    if not data.system_prompt or messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": data.system_prompt}, *messages]


def chat_text(
    messages: Sequence[Message], data: DataConfig, tokenizer: PreTrainedTokenizerBase, generation_prompt: bool = True
) -> str:
    """Render a conversation with the tokenizer's chat template, by default with a generation prompt.

    Raises:
        DataError: the template fails, or needs other variables or roles.
    """
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt, **data.chat_template_kwargs
        )
    except MemoryError:
        raise
    except Exception as error:  # a template is code: it can raise anything
        reason = f"{error}" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        raise DataError(
            f"the chat template of {_name(tokenizer)} failed: {reason:.500}. If it has no "
            "system role, set data.system_prompt to an empty text; data.template=plain does not use the template"
        ) from error


def prompt_text(messages: Sequence[Message], data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Render the text of a prompt with the configured template, including the generation prompt."""
    if data.template == "chat":
        return chat_text(with_system(messages, data), data, tokenizer)
    system = messages[0]["content"] if messages[0]["role"] == "system" else data.system_prompt
    values = {"{problem}": messages[-1]["content"], "{system}": system}
    # in one pass, so that braces inside a value are not substituted
    return re.sub(r"\{problem\}|\{system\}", lambda match: values[match[0]], data.plain_template)


def encode_texts(texts: list[str], data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of prompt texts.

    A chat template writes its own special tokens; plain text gets those that the tokenizer adds to every text. A text
    that already begins with the beginning-of-sequence token does not get a second one.
    """
    encoded = tokenizer(texts, add_special_tokens=data.template == "plain")["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is None:
        return encoded
    return [ids[1:] if ids[:2] == [bos, bos] else ids for ids in encoded]


def _in_bounds(render: Callable[[], str], what: str) -> str:
    """Call `render` in a forked process with time and memory limits, and return its result.

    Raises:
        DataError: it exceeds the limits, or `render` raised.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(render, writing)
    os.close(writing)
    deadline, parts = time.monotonic() + WAIT_SECONDS, []
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while time.monotonic() < deadline:
            if select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                part = pipe.read(2**16)
                if not part:
                    break
                parts.append(part)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    remedy = "fix it in the tokenizer's files, or set data.template=plain"
    if not parts:
        raise DataError(f"{what} did not end within {TEMPLATE_SECONDS} s for one short conversation: {remedy}")
    kind, text = pickle.loads(b"".join(parts))
    if kind == "error":
        raise DataError(text)
    if kind == "memory":
        raise DataError(f"{what} takes more than {TEMPLATE_BYTES >> 30} GiB for one short conversation: {remedy}")
    return text


def _answer(render: Callable[[], str], writing: int) -> None:
    """Call `render` in the forked process, send the outcome, and exit."""
    try:
        with open("/proc/self/statm") as pages:
            size = int(pages.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + TEMPLATE_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (TEMPLATE_SECONDS, TEMPLATE_SECONDS + 1))
        try:
            outcome = ("text", render()[: TEMPLATE_CHARACTERS + 1])
        except MemoryError:
            outcome = ("memory", "")
        except DataError as error:
            outcome = ("error", str(error))
        except Exception as error:  # the parent raises it as DataError
            outcome = ("error", f"the chat template raised {type(error).__name__}: {error}"[:500])
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(outcome, pipe)
    finally:
        os._exit(0)


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or "this model"
