"""Packs sequences into one row of tokens, shifted once, cut for context parallelism, aligned for sequence parallelism.

Position t of the packed row reads token t and predicts token t+1: the target of the last prompt token is the first
response token. This shift is made here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_g2rl.policy.specs import chunk_positions


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and one response to it, as token ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    def __post_init__(self):
        if not self.prompt:
            raise ValueError("a sequence needs a prompt token or more: the first response token is predicted from it")

    @property
    def length(self) -> int:
        """Tokens the model reads: all but the last one, which nothing is predicted from."""
        return len(self.prompt) + max(len(self.response), 1) - 1


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch on one rank. Under context parallelism it holds this rank's share of every sequence."""

    tokens: Int[Tensor, "tokens"]
    positions: Int[Tensor, "tokens"]
    targets: Int[Tensor, "tokens"]
    """The next token, global vocabulary id; 0 where nothing is predicted."""
    row: Int[Tensor, "tokens"]
    """Which response of this micro-batch the target belongs to; -1 for prompt and padding."""
    offset: Int[Tensor, "tokens"]
    """Position of the target inside its response; 0 where there is none."""
    cu_seqlens: Int[Tensor, "sequences+1"]
    """Bounds of the padded sequences before the context-parallel cut (int32); a last one may be padding only."""
    max_seqlen: int
    sources: tuple[int, ...]
    """Index of each response in the caller's list."""
    response_tokens: tuple[int, ...]
    """Full length of each response."""


def alignment(tensor_size: int, context_size: int, sequence_parallel: bool) -> tuple[int, int]:
    """(multiple of each sequence's length, multiple of the whole micro-batch's length) that a layout needs."""
    each = 2 * context_size if context_size > 1 else 1
    return each, each * (tensor_size if sequence_parallel else 1)


def pack(
    sequences: Sequence[TokenSequence],
    sources: Sequence[int],
    *,
    each: int = 1,
    whole: int = 1,
    total: int | None = None,
    context_rank: int = 0,
    context_size: int = 1,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Pack `sequences[i] for i in sources` into one micro-batch.

    Args:
        sequences: all sequences of the pass.
        sources: which of them go into this micro-batch; may be empty.
        each: every sequence is padded to a multiple of this.
        whole: the micro-batch is padded to a multiple of this.
        total: pad the micro-batch to this many tokens (a pipeline needs equal shapes); None: as short as possible.
        context_rank: this rank's place among those that share the sequences.
        context_size: number of those ranks.
        device: where the tensors go.

    Raises:
        ValueError: `total` is smaller than the packed sequences.
    """
    chosen = [sequences[i] for i in sources]
    padded = [_round_up(s.length, each) for s in chosen]
    used = sum(padded)
    length = max(_round_up(used, whole), whole, each) if total is None else total
    if length < used:
        raise ValueError(f"the micro-batch has {used} tokens and cannot be padded to {length}")
    bounds = [0]
    for n in padded + ([length - used] if length > used else []):
        bounds.append(bounds[-1] + n)
    columns = torch.zeros(5, length, dtype=torch.long)
    tokens, positions, targets, row, offset = columns
    row.fill_(-1)
    for r, (s, start) in enumerate(zip(chosen, bounds, strict=False)):
        n, first, count = s.length, start + len(s.prompt) - 1, len(s.response)
        tokens[start : start + n] = torch.tensor((s.prompt + s.response)[:n])
        positions[start : start + padded[r]] = torch.arange(padded[r])
        targets[first : first + count] = torch.tensor(s.response, dtype=torch.long)
        row[first : first + count] = r
        offset[first : first + count] = torch.arange(count)
    if context_size > 1:
        spans = zip(bounds, bounds[1:], strict=False)
        local = [a + chunk_positions(b - a, context_size, context_rank) for a, b in spans]
        columns = columns[:, torch.cat(local)]
    tokens, positions, targets, row, offset = columns.to(device)
    return PackedBatch(
        tokens=tokens,
        positions=positions,
        targets=targets,
        row=row,
        offset=offset,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device),
        max_seqlen=max(b - a for a, b in zip(bounds, bounds[1:], strict=False)),
        sources=tuple(sources),
        response_tokens=tuple(len(s.response) for s in chosen),
    )


def to_rows(values: Float[Tensor, "tokens"], batch: PackedBatch) -> Float[Tensor, "responses positions"]:
    """Lay the values of the response tokens out as one row a response; zero where this rank has no token.

    Differentiable with respect to `values`.
    """
    width = max(batch.response_tokens, default=0)
    table = values.new_zeros(len(batch.sources), width)
    here = batch.row >= 0
    return table.index_put((batch.row[here], batch.offset[here]), values[here])


def row_mask(batch: PackedBatch) -> Float[Tensor, "responses positions"]:
    """1 where this rank holds the response token, else 0 (float32)."""
    return to_rows((batch.row >= 0).float(), batch)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
