"""Prompts: rows of a data source, rendered with the model's template, tokenized once, drawn in a reproducible order.

Every rank loads the same prompts and walks the same order, so nothing is communicated.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from random import Random
from typing import Any

import datasets
import jinja2
from transformers import PreTrainedTokenizerBase

from megatron_g2rl.config.tree import DataConfig
from megatron_g2rl.data.bounded import bounded
from megatron_g2rl.data.sources import DataError, Row, read_rows
from megatron_g2rl.records import Prompt

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 1000
"""Rows rendered and tokenized together."""
TEMPLATE_S, TEMPLATE_BYTES = 30.0, 2 << 30
"""Seconds and memory for the chat template on a batch of problems, which takes milliseconds and little."""
SHOWN_BAD_ROWS = 5
"""Bad rows that a message lists; the rest is counted."""

_COLUMNS = datasets.Features(
    {
        "id": datasets.Value("int64"),
        "text": datasets.Value("string"),
        "token_ids": datasets.List(datasets.Value("int32")),
        "answer": datasets.Value("string"),
        "source": datasets.Value("string"),
    }
)


class PromptDataset(Sequence[Prompt]):
    """The usable prompts of a data source, in the source's order."""

    def __init__(self, rows: datasets.Dataset, skipped: int = 0) -> None:
        """Wrap a table with the columns of `Prompt`; `skipped` bad rows were left out of it."""
        self.rows = rows
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Prompt:
        row = self.rows[index]
        return Prompt(row["id"], row["text"], tuple(row["token_ids"]), row["answer"], row["source"])


class PromptStream:
    """Walks a dataset for ever; the prompt at each position depends on the seed and the position only.

    In each epoch every prompt comes once, in an order of its own.
    """

    def __init__(self, dataset: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        """Start at the first prompt; with `shuffle`, each epoch has an order of its own, made from `seed`."""
        self.dataset = dataset
        self.seed = seed
        self.shuffle = shuffle
        self.position = 0
        self._order: tuple[int, Sequence[int]] = (-1, ())

    def next(self, count: int, without: Collection[int] = ()) -> list[Prompt]:
        """Return the next `count` prompts, no two the same, and move on.

        A draw that crosses the end of an epoch passes over prompts that it holds already: responses are seeded by their
        prompt, and the group of a prompt drawn twice would be a copy.

        Args:
            count: prompts to draw.
            without: ids (`Prompt.id`) to pass over.

        Raises:
            ValueError: there are not so many prompts.
        """
        if count + len(without) > len(self.dataset):
            raise ValueError(f"cannot draw {count} other prompts than {len(without)} of {len(self.dataset)}")
        drawn: dict[int, Prompt] = {}
        while len(drawn) < count:
            epoch, offset = divmod(self.position, len(self.dataset))
            prompt = self.dataset[self._order_of(epoch)[offset]]
            if prompt.id not in without:
                drawn.setdefault(prompt.id, prompt)
            self.position += 1
        return list(drawn.values())

    def state_dict(self) -> dict[str, int]:
        """Return the position: prompts drawn so far, over all epochs."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position."""
        self.position = state["position"]

    def _order_of(self, epoch: int) -> Sequence[int]:
        if self._order[0] != epoch:
            order = list(range(len(self.dataset)))
            if self.shuffle:
                Random(f"prompts/{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]


def load_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptDataset:
    """Load, check, render and tokenize all prompts of `config.source`.

    A row is bad when it cannot be read, lacks its problem or answer, holds something else than text there (numbers are
    taken as answers), or renders to more than `config.max_prompt_tokens` tokens.

    Returns:
        The good rows; `Prompt.id` counts all rows of the source, bad ones too.

    Raises:
        DataError: the source, split or a column does not exist, the template does not work with this tokenizer, a row
            is bad and `config.on_bad_row` is `error`, or no row is left.
    """
    _check_template(config, tokenizer)
    bad: list[str] = []
    good: dict[str, list[Any]] = {column: [] for column in _COLUMNS}
    total = 0
    batch: list[tuple[int, str, str, str]] = []
    for total, row in enumerate(read_rows(config), start=1):
        fault, problem, answer = _check_row(row, config)
        if fault:
            bad.append(f"{row.where}: {fault}")
            continue
        batch.append((total - 1, row.where, problem, answer))
        if len(batch) == ROWS_AT_ONCE:
            _tokenize(batch, config, tokenizer, good, bad)
            batch = []
    _tokenize(batch, config, tokenizer, good, bad)
    _report(bad, total, config)
    return PromptDataset(datasets.Dataset.from_dict(good, features=_COLUMNS), skipped=len(bad))


def _check_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    if config.template == "chat" and not tokenizer.chat_template:
        raise DataError(
            f"data.template is chat, but the tokenizer of {_name(tokenizer)} has no chat template (base models "
            "often have none): set data.template=plain"
        )
    if config.template == "plain" and "{problem}" not in config.plain_template:
        raise DataError(f"data.plain_template={config.plain_template!r} does not contain {{problem}}")


def _check_row(row: Row, config: DataConfig) -> tuple[str, str, str]:
    """Return what is wrong with a row ("" when nothing is), its problem and its answer."""
    if row.fault:
        return row.fault, "", ""
    texts = []
    for column, numbers_allowed in [(config.prompt_column, False), (config.answer_column, True)]:
        value = row.values.get(column)
        if numbers_allowed and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if value is None:
            return f"column {column!r} is missing", "", ""
        if not isinstance(value, str):
            return f"column {column!r} holds {type(value).__name__}, not text", "", ""
        if not value.strip():
            return f"column {column!r} is empty", "", ""
        texts.append(value)
    return "", texts[0], texts[1]


def _tokenize(
    batch: list[tuple[int, str, str, str]],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    good: dict[str, list[Any]],
    bad: list[str],
) -> None:
    """Render and tokenize (id, where, problem, answer) rows and append each to `good` or `bad`."""
    if not batch:
        return
    texts = render([problem for _, _, problem, _ in batch], config, tokenizer)
    # a chat template writes its own special tokens; a plain text gets those the tokenizer puts before every text
    encoded = tokenizer(texts, add_special_tokens=config.template == "plain")["input_ids"]
    for (index, where, _, answer), text, token_ids in zip(batch, texts, encoded, strict=True):
        if len(token_ids) > config.max_prompt_tokens:
            bad.append(f"{where}: {len(token_ids)} tokens, over data.max_prompt_tokens={config.max_prompt_tokens}")
            continue
        if not token_ids:
            bad.append(f"{where}: rendered by data.template it has no tokens")
            continue
        for column, value in zip(_COLUMNS, (index, text, token_ids, answer, where), strict=True):
            good[column].append(value)


def render(problems: Sequence[str], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Put each problem into the configured template, ready for the model to answer."""
    if config.template == "plain":
        return [_fill(config.plain_template, problem, config.system_prompt) for problem in problems]
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    chats = [[*system, {"role": "user", "content": problem}] for problem in problems]
    try:
        with bounded(TEMPLATE_S, TEMPLATE_BYTES):
            return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template computes: with the wrong types it can raise anything
        reason = f"{error}" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        raise DataError(
            f"the chat template of {_name(tokenizer)} failed: {reason:.300}. If it has no system role, "
            "set data.system_prompt to an empty text; data.template=plain does without the template"
        ) from error


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or "this model"


def _fill(template: str, problem: str, system: str) -> str:
    values = {"{problem}": problem, "{system}": system}
    return re.sub(r"\{problem\}|\{system\}", lambda match: values[match[0]], template)  # one pass: no braces of a value


def _report(bad: list[str], total: int, config: DataConfig) -> None:
    """Stop when rows are bad and must not be, or when none is left; else log what was left out."""
    if total == 0:
        raise DataError(f"data.source: {config.source} has no rows")
    if not bad:
        return
    listed = "\n  ".join(bad[:SHOWN_BAD_ROWS])
    more = f"\n  and {len(bad) - SHOWN_BAD_ROWS} more" if len(bad) > SHOWN_BAD_ROWS else ""
    found = f"{len(bad)} of {total} rows of {config.source} are bad"
    if config.on_bad_row == "error":
        raise DataError(f"{found}; mend them, or set data.on_bad_row=skip to leave them out:\n  {listed}{more}")
    if len(bad) == total:
        raise DataError(f"{found}: no prompt is left:\n  {listed}{more}")
    logger.warning("%s and left out:\n  %s%s", found, listed, more)
