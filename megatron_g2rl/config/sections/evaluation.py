"""Evaluation during training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_g2rl.config.sections.base import (
    AnswerPattern,
    Fraction,
    Metric,
    Name,
    NonNegative,
    NonNegativeFloat,
    Positive,
    Section,
    comma_separated,
)
from megatron_g2rl.config.sections.data import DataConfig


class EvaluationConfig(Section):
    """Evaluation before the first step, every few steps and after the last. Keys set to null are taken from `data`."""

    source: Name | None = None
    """Source of the problems, as `data.source`; null: `data.source` itself."""
    subset: str | None = None
    """Configuration name of a Hub dataset; null: that of `data` for the same source, none for a different one."""
    split: str = "test"
    """Split of a Hub dataset, folder or built-in task."""
    prompt_column: str | None = None
    """Column with the problem; null: as in `data`."""
    answer_column: str | None = None
    """Column with the reference answer; null: as in `data`."""
    answer_regex: AnswerPattern | None = None
    """How to extract the reference from its column; null: as in `data` for the same source, the full text for a
    different one."""
    template: Literal["chat", "plain"] | None = None
    """As `data.template`; null: the same."""
    plain_template: str | None = None
    """As `data.plain_template`; null: the same."""
    system_prompt: str | None = None
    """As `data.system_prompt`; null: the same."""
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None
    """As `data.chat_template_kwargs`; null: the same."""
    max_prompt_tokens: Positive | None = None
    """As `data.max_prompt_tokens`; null: the same."""
    max_response_tokens: Positive | None = None
    """As `rollout.max_response_tokens`; null: the same."""
    prompts: Positive | None = None
    """Number of problems per evaluation, the same selection in all runs; null: all problems of the source."""
    responses_per_prompt: Positive = 16
    """Responses per problem: n of pass@n and maj@n; pass@1 is the mean over them."""
    metrics: Annotated[tuple[Metric, ...], BeforeValidator(comma_separated)] = ()
    """Metrics in addition to pass@1, pass@n and maj@n: `pass@K`, `maj@K` and `mean@K` for K up to n."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature in evaluations; 0: greedy decoding, with one response per problem."""
    top_p: Fraction = 1.0
    """Nucleus sampling in evaluations: total probability of the tokens that can be sampled; 1: all."""
    top_k: NonNegative = 0
    """Number of most probable tokens that can be sampled in evaluations; 0: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Smallest probability of a token that can be sampled in evaluations, relative to the most probable; 0: none."""
    benchmarks: Annotated[tuple[str, ...], BeforeValidator(comma_separated)] = ()
    """Evaluation sets declared in files: names such as `aime24`, paths of your own files, or `builtin:NAME`
    (docs/evaluation.md). The set that the keys above describe is then evaluated only if `source` is set."""
    every_steps: Positive = 20
    """Steps between evaluations."""

    @property
    def has_own_set(self) -> bool:
        """Whether the set that the keys of this section describe is evaluated."""
        return self.source is not None or not self.benchmarks

    def data(self, training: DataConfig) -> DataConfig:
        """The data settings of the evaluation set: its own, and those of training where omitted."""
        names = ("prompt_column", "answer_column", "answer_regex", "template", "plain_template", "system_prompt")
        names += ("chat_template_kwargs", "max_prompt_tokens", "subset")
        updates = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.source is not None:
            updates = {"source": self.source, "sources": (), "subset": None, "answer_regex": None, **updates}
        return training.model_copy(update={"split": self.split, "max_rows": None, **updates})
