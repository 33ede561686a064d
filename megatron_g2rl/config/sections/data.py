"""Prompt sources and rendering."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_g2rl.config.sections.base import AnswerPattern, Name, Positive, PositiveFloat, Section


class SourceConfig(Section):
    """One of several prompt sources; keys that it omits have their value from `data`."""

    source: Name
    """As `data.source`."""
    weight: PositiveFloat | None = None
    """Relative sampling frequency; set it for every source or for none."""
    subset: str | None = None
    split: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    answer_regex: AnswerPattern | None = None


class DataConfig(Section):
    """Prompt sources and rendering (docs/data.md)."""

    source: Name | None = None
    """A Hub name, a local file (.jsonl, .json, both also as .gz, .parquet, .arrow), a folder of such files, or
    `builtin:NAME` (a generated task). Required unless `sources` is set."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources instead of one: a list of mappings with `source`, optionally `weight` (relative sampling
    frequency), and `subset`, `split`, `prompt_column`, `answer_column`, `answer_regex` if they differ from `data`."""
    subset: str | None = None
    """Configuration name of a Hub dataset, or of a folder with the same layout."""
    split: str = "train"
    """Split of a Hub dataset or folder."""
    prompt_column: str = "problem"
    """Column with the problem: a string or a list of chat messages. Dots access nested columns."""
    answer_column: str = "answer"
    """Column with the reference answer: a string, a number or a list of them (`reward_model.ground_truth`)."""
    answer_regex: AnswerPattern | None = None
    """How to extract the reference from its column: `gsm8k` (after ####), `boxed` (the last box), `last_number`, or a
    regular expression whose last match counts (its first group, if it has one). null: the full text."""
    max_unverifiable: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Largest allowed fraction of references that no response can match, such as prose. 1: no limit."""
    template: Literal["chat", "plain"] = "chat"
    """`chat`: the tokenizer's chat template with the generation prompt; `plain`: `plain_template`."""
    plain_template: str = "{problem}\n"
    """Template of a plain prompt; `{problem}` and `{system}` are replaced."""
    system_prompt: str = "Please reason step by step, and put your final answer within \\boxed{}."
    """System message of a chat prompt that has none of its own, or `{system}` of a plain one. Empty: none."""
    chat_template_kwargs: dict[str, bool | int | float | str | None] = {}
    """Variables of the chat template, such as `{enable_thinking: false}`."""
    max_prompt_tokens: Positive = 1024
    """Longer prompts are treated as bad rows."""
    max_rows: Positive | None = None
    """Only the first rows of each source are read, for a trial on a large dataset; null: all. Evaluation sets are read
    completely."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Malformed rows: `error` stops and names the line; `skip` drops and counts them."""
    shuffle: bool = True
    """Shuffle the prompts in every epoch (from `run.seed`); false keeps the order of the file."""

    @property
    def label(self) -> str:
        """The source or sources, for messages."""
        return self.source if self.source is not None else ", ".join(part.source for part in self.sources)

    def each_source(self) -> tuple[DataConfig, ...]:
        """The configuration of each single source."""
        if not self.sources:
            return (self,)
        parts = [part.model_dump(exclude={"weight"}, exclude_none=True) for part in self.sources]
        return tuple(self.model_copy(update={"sources": (), "subset": None, **part}) for part in parts)
