"""Number of layers of each pipeline stage. No torch."""

from __future__ import annotations

import itertools

from megatron_g2rl.config.sections.model import PolicyConfig

_MOST = 10_000
"""Largest number of chunks that a message proposes."""


def stage_layers(policy: PolicyConfig, layers: int) -> list[int]:
    """Layers of each model chunk in model order; `check_stages` must have returned None.

    Chunk i is on stage i modulo `pipeline_parallel`.

    Args:
        policy: parallel layout.
        layers: number of layers of the model.
    """
    chunks = policy.pipeline_parallel * policy.virtual_stages
    return parse(policy.pipeline_layout) if policy.pipeline_layout else [layers // chunks] * chunks


def check_stages(policy: PolicyConfig, layers: int) -> str | None:
    """The problem with the stages for a model with this many layers, and valid alternatives; None: no problem.

    Args:
        policy: parallel layout.
        layers: number of layers of the model.
    """
    chunks = policy.pipeline_parallel * policy.virtual_stages
    product = "policy.pipeline_parallel * virtual_stages"
    if chunks > min(layers, _MOST):
        return (
            f"{product} = {chunks} is more than {min(layers, _MOST)}, the maximum for a model of {layers} layers: "
            "lower one of the two"
        )
    if policy.pipeline_layout is None:
        if layers % chunks == 0:
            return None
        problem = f"the model's {layers} layers do not divide into {product} = {chunks} equal chunks"
    else:
        runs = _runs(policy.pipeline_layout)
        count, total = sum(times for _, times in runs), sum(number * times for number, times in runs)
        empty = any(number == 0 for number, _ in runs)
        if count == chunks and total == layers and not empty:
            return None
        problem = (
            f"policy.pipeline_layout={policy.pipeline_layout} has {count} chunks with {total} layers"
            f"{' and an empty chunk' * empty}; {product} = {chunks}, and the model has {layers} layers"
        )
    examples = " or ".join(dict.fromkeys(written(example) for example in _examples(layers, chunks)))
    equal = [str(n) for n in range(1, min(layers, _MOST) + 1) if layers % n == 0]
    return f"{problem}: set policy.pipeline_layout={examples}, or let {product} be one of {', '.join(equal)}"


def parse(layout: str) -> list[int]:
    """`12*7,10` as numbers."""
    return [number for number, times in _runs(layout) for _ in range(times)]


def _runs(layout: str) -> list[tuple[int, int]]:
    """(layers, times) of `12*7,10`."""
    parts = [part.partition("*") for part in layout.split(",")]
    return [(int(number), int(times or 1)) for number, _, times in parts]


def written(layers: list[int]) -> str:
    """Numbers of layers in the format of `pipeline_layout`."""
    runs = [(number, len(list(group))) for number, group in itertools.groupby(layers)]
    return ",".join(f"{number}*{times}" if times > 1 else str(number) for number, times in runs)


def _examples(layers: int, chunks: int) -> list[list[int]]:
    """Layouts: as even as possible, smaller chunks last; and with only the last chunk (with the LM head) smaller."""
    each, more = divmod(layers, chunks)
    examples = [[each + 1] * more + [each] * (chunks - more)]
    full = -(-layers // chunks)
    if chunks > 1 and layers - full * (chunks - 1) > 0:
        examples.append([full] * (chunks - 1) + [layers - full * (chunks - 1)])
    return examples
