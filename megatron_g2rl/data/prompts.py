"""Prompts: rows of one or several data sources, rendered with the model's template and encoded on access.

Every rank loads the same prompts, so there is no communication.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import datasets
import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from megatron_g2rl.config.inputs import BUILTIN
from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.config.sections.rewards import RewardConfig
from megatron_g2rl.data.columns import (
    answer_extractor,
    pack_columns,
    pack_messages,
    read_answer,
    read_messages,
    unpack_columns,
    unpack_messages,
)
from megatron_g2rl.data.errors import DataError
from megatron_g2rl.data.faults import RowReport
from megatron_g2rl.data.references import References, preset_hint, prose_fault, sample_places, verify_references
from megatron_g2rl.data.sources import Row, read_rows
from megatron_g2rl.data.store import ROWS_AT_ONCE, RowWriter
from megatron_g2rl.data.streams import PromptStream
from megatron_g2rl.data.templates import check_template, encode_texts, prompt_text
from megatron_g2rl.records import Prompt

__all__ = ["PromptDataset", "PromptStream", "load_prompts"]

logger = logging.getLogger(__name__)

BYTES_OF_MARKS = 16
"""Added to a prompt's bytes to get an upper bound of its tokens: a tokenizer may prepend a token or a space."""


class PromptDataset(Sequence[Prompt]):
    """The usable prompts of the sources, in order."""

    def __init__(
        self,
        rows: datasets.Dataset,
        files: Sequence[str],
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        report: RowReport,
    ) -> None:
        """Serve the rows of a table with `store.COLUMNS`, whose column `file` is an index into `files`."""
        self.rows, self.config, self.report = rows, config, report
        self.files, self.tokenizer = files, tokenizer
        self.column_names: frozenset[str] = frozenset()
        """Columns of the sources; set only if columns were requested."""
        self.has_columns = False
        """Whether some prompt has requested columns."""

    @property
    def parts(self) -> list[tuple[int, float]] | None:
        """Number of prompts and weight of each of `data.sources`; None with one source or without weights."""
        if not self.config.sources or self.config.sources[0].weight is None:
            return None
        counts = np.bincount(np.asarray(self.rows.with_format("arrow")["part"][:]), minlength=len(self.config.sources))
        for source, count in zip(self.config.sources, counts, strict=True):
            if not count:
                raise DataError(f"data.sources: {source.source} has a weight but no usable prompt: remove it")
        return [(int(n), source.weight) for n, source in zip(counts, self.config.sources, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Prompt:
        index = range(len(self))[index]
        return self._prompts(self.rows[index : index + 1])[0]

    def __iter__(self) -> Iterator[Prompt]:
        for batch in self.rows.iter(ROWS_AT_ONCE):
            yield from self._prompts(batch)

    def references(self, reward: RewardConfig) -> References:
        """Check on a sample whether the built-in reward function can verify the references."""
        sampled = sample_places(len(self))
        answers = self.rows.select(sampled)["answer"][:]
        report = verify_references(answers, lambda i: self.place(sampled[i]), self.report.prose, len(self), reward)
        return replace(report, hint=preset_hint([answer for answer in answers if prose_fault(answer)], self.config))

    def place(self, index: int) -> str:
        """Location of a prompt in its source (`file.jsonl:12`)."""
        row = self.rows[index]
        return f"{self.files[row['file']]}:{row['line']}"

    def _prompts(self, batch: dict[str, list]) -> list[Prompt]:
        messages = [unpack_messages(*one) for one in zip(batch["problem"], batch["several"], strict=True)]
        places = [f"{self.files[file]}:{line}" for file, line in zip(batch["file"], batch["line"], strict=True)]
        texts = [prompt_text(one, self.config, self.tokenizer) for one in messages]
        encoded = encode_texts(texts, self.config, self.tokenizer)
        for place, ids in zip(places, encoded, strict=True):
            if not 0 < len(ids) <= self.config.max_prompt_tokens:
                raise DataError(f"{place}: {_length_fault(len(ids), self.config)}")
        columns = map(unpack_columns, batch["columns"])
        rows = zip(batch["id"], texts, map(tuple, encoded), batch["answer"], places, columns, strict=True)
        return [Prompt(*row) for row in rows]


def load_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    columns: Collection[str] = (),
    rewrite: Callable[[Row], Row] | None = None,
) -> PromptDataset:
    """Read and validate all rows of the sources of `config`.

    A row is bad if it cannot be read, its problem or answer is missing or invalid, or it renders to more than
    `config.max_prompt_tokens` tokens. Rows whose size in bytes is within this limit are not encoded to check it.

    Args:
        config: the sources.
        tokenizer: the model's tokenizer.
        columns: further columns to keep in each prompt, if present (`ALL_COLUMNS`: all).
        rewrite: changes the problem and the answer of every readable row; a ValueError makes the row bad.

    Returns:
        The good rows; `Prompt.id` counts all rows of the sources, including bad ones.

    Raises:
        DataError: a source, split or column does not exist, the template does not work with this tokenizer, a row is
            bad and `config.on_bad_row` is `error`, or no row is left.
    """
    check_template(config, tokenizer)
    reader = _Reader(config, tokenizer, columns, rewrite)
    for part, source in enumerate(config.each_source()):
        reader.read(source, part)
    return reader.finish()


def check_embedding(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuse prompts with token ids outside the model's embedding.

    Args:
        prompts: all are encoded if the tokenizer has such tokens.
        tokenizer: the model's tokenizer.
        rows: rows of the embedding (`vocab_size`).

    Raises:
        DataError: names the first such prompt and token.
    """
    if max(tokenizer.get_vocab().values(), default=0) < rows:
        return
    for prompt in prompts:
        if (largest := max(prompt.token_ids)) >= rows:
            raise DataError(
                f"{prompt.source}: the prompt has the token {tokenizer.convert_ids_to_tokens(largest)!a} ({largest}), "
                f"but the model's embedding has {rows} rows (vocab_size in config.json): the tokenizer in model.path "
                "belongs to another model, or tokens were added to it but not to the model"
            )


class _Reader:
    """Reads rows into a table."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        columns: Collection[str],
        rewrite: Callable[[Row], Row] | None,
    ) -> None:
        self._config, self._tokenizer, self._rewrite = config, tokenizer, rewrite
        self._columns, self._column_names, self._has_columns = columns, set(), False
        self._writer, self._report, self._files = RowWriter(), RowReport(), {}
        self._hashes = array("Q")
        self._pending: list[tuple[Row, int, int, list[dict[str, str]], str]] = []
        """Rows (row, id, part, messages, answer) whose lengths are checked together."""
        shortest = prompt_text([{"role": "user", "content": "x"}], config, tokenizer)
        self._room = config.max_prompt_tokens - len(shortest.encode()) - BYTES_OF_MARKS
        """Problems of at most this many bytes are certainly within the token limit."""

    def read(self, source: DataConfig, part: int) -> None:
        """Read the rows of one source."""
        extract = answer_extractor(source)
        for row in islice(read_rows(source, self._columns, self._column_names), source.max_rows):
            index = self._report.total
            self._report.total += 1
            try:
                if row.fault:
                    raise ValueError(row.fault)
                row = self._rewrite(row) if self._rewrite else row
                messages = read_messages(row.problem, source.prompt_column, self._config.template)
                answer = read_answer(row.answer, source.answer_column, extract, source.answer_regex)
            except ValueError as error:
                self._report.bad.add(row.where, str(error))
                continue
            self._pending.append((row, index, part, messages, answer))
            if len(self._pending) == ROWS_AT_ONCE:
                self._take_pending()
        self._take_pending()

    def finish(self) -> PromptDataset:
        """Build the dataset of all good rows."""
        report, rows = self._report, self._writer.finish()
        report.distinct = len(np.unique(np.frombuffer(self._hashes, dtype=np.uint64)))
        report.check(self._config)
        generated = all(source.source.startswith(BUILTIN) for source in self._config.each_source())
        if report.distinct < len(rows) and not generated:
            logger.warning(
                "%d of %d problems of %s are duplicates: %d are distinct",
                *(len(rows) - report.distinct, len(rows), self._config.label, report.distinct),
            )
        dataset = PromptDataset(rows, list(self._files), self._config, self._tokenizer, report)
        if self._columns:
            dataset.column_names, dataset.has_columns = frozenset(self._column_names), self._has_columns
        return dataset

    def _take_pending(self) -> None:
        """Write the pending rows that are short enough."""
        unsure = [i for i, one in enumerate(self._pending) if not self._is_short(one[3])]
        texts = [prompt_text(self._pending[i][3], self._config, self._tokenizer) for i in unsure]
        encoded = encode_texts(texts, self._config, self._tokenizer) if texts else []
        lengths = dict(zip(unsure, map(len, encoded), strict=True))
        for i, (row, index, part, messages, answer) in enumerate(self._pending):
            length = lengths.get(i, 1)
            if not 0 < length <= self._config.max_prompt_tokens:
                self._report.bad.add(row.where, _length_fault(length, self._config))
                self._report.longest = max(self._report.longest, (length, row.where), key=lambda one: one[0])
                continue
            problem, several = pack_messages(messages)
            file = self._files.setdefault(row.file, len(self._files))
            columns = pack_columns(row.columns)
            self._has_columns |= bool(columns)
            self._writer.add(index, file, row.line, part, several, problem, answer, columns)
            self._hashes.append(xxhash.xxh3_64_intdigest(problem.encode()))
            if fault := prose_fault(answer):
                self._report.prose.add(row.where, f"{answer[:60]!a} {fault}")
        self._pending = []

    def _is_short(self, messages: list[dict[str, str]]) -> bool:
        """Whether a problem is certainly within the limit, as it has no more tokens than bytes."""
        return len(messages) == 1 and len(messages[0]["content"].encode()) <= self._room


def _length_fault(length: int, config: DataConfig) -> str:
    if not length:
        return "data.template renders it to no tokens"
    return f"{length} tokens, over data.max_prompt_tokens={config.max_prompt_tokens}"
