"""How many layers each pipeline stage gets. No torch."""

from __future__ import annotations

import itertools

from megatron_g2rl.config.tree import PolicyConfig


def stage_layers(policy: PolicyConfig, layers: int) -> list[int]:
    """Layers of each model chunk in the order of the model; `check_stages` must be content.

    Chunk i is on stage i modulo `pipeline_parallel`.

    Args:
        policy: layout.
        layers: of the model.
    """
    chunks = policy.pipeline_parallel * policy.virtual_stages
    return parse(policy.pipeline_layout) if policy.pipeline_layout else [layers // chunks] * chunks


def check_stages(policy: PolicyConfig, layers: int) -> str | None:
    """What is wrong with the stages for a model of so many layers, and which are possible; None: nothing.

    Args:
        policy: layout.
        layers: of the model.
    """
    chunks = policy.pipeline_parallel * policy.virtual_stages
    product = "policy.pipeline_parallel * virtual_stages"
    if chunks > layers:
        return f"the model's {layers} layers are fewer than {product} = {chunks}: every chunk needs one; lower them"
    if policy.pipeline_layout is None:
        if layers % chunks == 0:
            return None
        wrong = f"the model's {layers} layers do not divide into {product} = {chunks} equal chunks"
    else:
        found = parse(policy.pipeline_layout)
        if len(found) == chunks and sum(found) == layers and min(found) > 0:
            return None
        wrong = (
            f"policy.pipeline_layout={policy.pipeline_layout} has {len(found)} chunks with {sum(found)} layers"
            f"{' and an empty chunk' * (min(found) == 0)}; {product} = {chunks}, and the model has {layers} layers"
        )
    examples = " or ".join(dict.fromkeys(written(example) for example in _examples(layers, chunks)))
    equal = [str(n) for n in range(1, layers + 1) if layers % n == 0]
    return f"{wrong}: set policy.pipeline_layout={examples}, or let {product} be one of {', '.join(equal)}"


def parse(layout: str) -> list[int]:
    """`12*7,10` as numbers."""
    parts = [part.partition("*") for part in layout.split(",")]
    return [int(number) for number, _, times in parts for _ in range(int(times or 1))]


def written(layers: list[int]) -> str:
    """Numbers as a `pipeline_layout`."""
    runs = [(number, len(list(group))) for number, group in itertools.groupby(layers)]
    return ",".join(f"{number}*{times}" if times > 1 else str(number) for number, times in runs)


def _examples(layers: int, chunks: int) -> list[list[int]]:
    """As even as possible with the lighter chunks last, and with only the last chunk, which has the head, lighter."""
    each, more = divmod(layers, chunks)
    found = [[each + 1] * more + [each] * (chunks - more)]
    full = -(-layers // chunks)
    if chunks > 1 and layers - full * (chunks - 1) > 0:
        found.append([full] * (chunks - 1) + [layers - full * (chunks - 1)])
    return found
