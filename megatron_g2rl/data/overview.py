"""`g2rl data CONFIG`: shows the data of a run before it starts.

    g2rl data examples/smollm2_gsm8k/g2rl.yaml

Row and duplicate counts, rendered prompts, lengths relative to the limit, which references can be verified, and overlap
with the evaluation set. Nothing is trained and no weights are read; a Hub model must be in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from megatron_g2rl.config import Config
from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.data.prompts import PromptDataset, PromptStream, load_prompts
from megatron_g2rl.records import Prompt
from megatron_g2rl.rewards.verifier import MATH_REWARD
from megatron_g2rl.rollout.endings import read_endings
from megatron_g2rl.rollout.tokenizer import load_tokenizer

SHOWN_PROMPTS = 5
LENGTHS = 2_000
"""Maximum prompts encoded for the length distribution."""
LARGEST = 100
"""Number of prompts with the most bytes among which the longest is searched."""


def show_data(config: Config, console: Console) -> None:
    """Print the tables.

    Raises:
        UserError: the data cannot be used; the same error as in a run.
    """
    tokenizer = load_tokenizer(str(Path(config.model.path).expanduser()))
    training = _load(config.data, tokenizer, console, "Rows")
    stream = PromptStream(training, config.run.seed, config.data.shuffle, training.parts)
    _show_prompts(stream.next(min(SHOWN_PROMPTS, len(training))), tokenizer, console)
    _show_ends(config, tokenizer, console)
    _show_lengths(training, console, "prompt")
    if config.reward.uses(MATH_REWARD):
        _show_references(training, config, console)
    if config.evaluation is not None and config.evaluation.has_own_set:
        evaluation = _load(config.evaluation.data(config.data), tokenizer, console, "Rows of the evaluation set")
        _show_lengths(evaluation, console, "prompt of the evaluation set")
        if config.reward.uses(MATH_REWARD):
            _show_references(evaluation, config, console, " of the evaluation set")
        _show_overlap(training, evaluation, console)


def _load(data: DataConfig, tokenizer: PreTrainedTokenizerBase, console: Console, title: str) -> PromptDataset:
    """Load the prompts; bad rows are shown and skipped, as with `data.on_bad_row=skip`."""
    prompts = load_prompts(data.model_copy(update={"on_bad_row": "skip"}), tokenizer)
    report = prompts.report
    table = _table(title, "what", "number")
    for name, number in [
        ("rows", report.total),
        ("bad rows", report.bad.count),
        ("prompts", len(prompts)),
        ("distinct problems", report.distinct),
        ("copies of another problem", len(prompts) - report.distinct),
    ]:
        table.add_row(name, f"{number:,}")
    counts = np.bincount(np.asarray(prompts.rows.with_format("arrow")["part"][:]), minlength=len(data.each_source()))
    for source, count in zip(data.each_source(), counts if data.sources else (), strict=False):
        table.add_row(f"prompts of {source.source}", f"{count:,}")
    console.print(table)
    if report.bad.count:
        stops = " A run would fail on them (data.on_bad_row=error)." if data.on_bad_row == "error" else ""
        console.print(f"Bad rows:{stops}\n  {report.listing()}", markup=False, highlight=False)
    return prompts


def _show_prompts(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print the first prompts of the run, decoded from their tokens, including special tokens."""
    for prompt in prompts:
        text = escape(tokenizer.decode(prompt.token_ids, skip_special_tokens=False))
        for token in sorted(set(tokenizer.all_special_tokens), key=len, reverse=True):
            text = text.replace(escape(token), f"[reverse]{escape(token)}[/reverse]")
        console.rule(f"{escape(prompt.source)}, {len(prompt.token_ids)} tokens", align="left")
        console.print(text, highlight=False)
        console.print(f"[bold]reference:[/bold] {escape(prompt.answer)}", highlight=False)
    console.rule()


def _show_ends(config: Config, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    described = read_endings(config, str(Path(config.model.path).expanduser()), tokenizer).described
    console.print(f"A response ends at {described}", markup=False, highlight=False)


def _show_lengths(prompts: PromptDataset, console: Console, what: str) -> None:
    """Print quantiles of prompt lengths (of a sample) and the longest prompt."""
    step = max(1, len(prompts) // LENGTHS)
    sample = prompts.rows if step == 1 else prompts.rows.select(range(0, len(prompts), step))
    lengths = np.array([len(prompt.token_ids) for prompt in islice(_part(prompts, sample), LENGTHS)])
    sampled = "all prompts" if step == 1 else f"{len(lengths):,} prompts"
    limit = prompts.config.max_prompt_tokens
    table = _table(f"Tokens of a {what} ({sampled}, limit {limit})", "quantile", "tokens", "of the limit")
    for name, fraction in [("least", 0), ("10%", 0.1), ("median", 0.5), ("90%", 0.9), ("99%", 0.99), ("most", 1)]:
        value = int(np.quantile(lengths, fraction, method="higher"))
        table.add_row(name, f"{value:,}", f"{value / limit:.0%}")
    console.print(table)
    longest = max(_part(prompts, prompts.rows.select(_largest(prompts))), key=lambda prompt: len(prompt.token_ids))
    console.print(f"Longest: {longest.source} with {len(longest.token_ids):,} tokens", markup=False, highlight=False)


def _part(prompts: PromptDataset, rows: datasets.Dataset) -> PromptDataset:
    return PromptDataset(rows, prompts.files, prompts.config, prompts.tokenizer, prompts.report)


def _largest(prompts: PromptDataset) -> np.ndarray:
    """Indices of the problems with the most bytes; one of them has the most tokens, or nearly so."""
    column = prompts.rows.with_format("arrow")["problem"][:]
    sizes = np.asarray(pyarrow.compute.binary_length(column))
    return np.argsort(-sizes, kind="stable")[:LARGEST]


def _show_references(prompts: PromptDataset, config: Config, console: Console, of: str = "") -> None:
    report = prompts.references(config.reward)
    table = _table(f"References{of} ({report.sampled:,} of {report.total:,} examined)", "what", "number")
    names = {
        "plain": "plain numbers, fractions, letters",
        "value": "parse to a value that is accepted",
        "verbatim": "accepted only as identical text",
        "unverifiable": "rejected by the verifier against themselves",
    }
    for name, count in report.counts.items():
        table.add_row(names[name], f"{count:,}")
    table.add_row("no final answer, of all", f"{report.prose.count:,}")
    table.add_row(
        f"no response can match{of and ','}{of} (limit data.max_unverifiable)", f"{report.unverifiable_fraction:.2%}"
    )
    console.print(table)
    if report.unverifiable_fraction:
        stops = " A run would fail on them." if report.unverifiable_fraction > config.data.max_unverifiable else ""
        console.print(f"{report.hint}{report.describe()}{stops}", markup=False, highlight=False)


def _show_overlap(training: PromptDataset, evaluation: PromptDataset, console: Console) -> None:
    """Print how many evaluation problems are also in the training data, ignoring white space and case."""
    trained = {_key(problem) for problem in _problems(training.rows)}
    shared = [index for index, problem in enumerate(_problems(evaluation.rows)) if _key(problem) in trained]
    table = _table("Evaluation set", "what", "number")
    table.add_row("prompts", f"{len(evaluation):,}")
    table.add_row("distinct problems", f"{evaluation.report.distinct:,}")
    table.add_row("also in the training data", f"{len(shared):,}")
    console.print(table)
    if shared:
        listed = ", ".join(evaluation.place(index) for index in shared[:SHOWN_PROMPTS])
        console.print(f"Trained on and evaluated: {listed}", markup=False, highlight=False)


def _problems(rows: datasets.Dataset):
    for batch in rows.select_columns(["problem"]).iter(1000):
        yield from batch["problem"]


def _key(problem: str) -> int:
    return hash(" ".join(problem.lower().split()))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, min_width=len(title))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table
