"""Packs sequences into one row of tokens: shifted, split for context parallelism, padded for sequence parallelism.

Position t of the packed row reads token t and predicts token t+1: the target of the last prompt token is the first
response token. This module is the only one that applies this shift.

Everything that later code needs on the host (bounds, positions of response tokens) is computed here, before the tensors
are copied to the device: reading it back from a GPU would block the host in every micro-batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatron_g2rl.policy.specs import chunk_positions
from megatron_g2rl.records import ResponseGroup


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and one response to it, as token ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    def __post_init__(self):
        if not self.prompt:
            raise ValueError(
                "a sequence needs at least one prompt token: the first response token is predicted from it"
            )

    @property
    def length(self) -> int:
        """Number of tokens that the model reads: all but the last one, from which nothing is predicted."""
        return len(self.prompt) + max(len(self.response), 1) - 1


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch on one rank. Under context parallelism it contains this rank's part of every sequence."""

    tokens: Int[Tensor, "tokens"]
    positions: Int[Tensor, "tokens"]
    targets: Int[Tensor, "tokens"]
    """The next token, global vocabulary id; 0 where nothing is predicted."""
    row: Int[Tensor, "tokens"]
    """Index in this micro-batch of the response that the target belongs to; -1 for prompt and padding."""
    offset: Int[Tensor, "tokens"]
    """Position of the target inside its response; 0 where there is none."""
    chosen: Int[Tensor, "response_tokens"]
    """Positions at which a response token is predicted, in ascending order."""
    table_index: Int[Tensor, "response_tokens"]
    """Index of each of them in the flattened table [responses, positions] of `to_rows`."""
    runs: tuple[tuple[int, int], ...]
    """(response, number of tokens) of each run of consecutive `chosen` tokens of one response."""
    cu_seqlens: Int[Tensor, "bounds"]
    """`bounds` on the device (int32)."""
    bounds: tuple[int, ...]
    """Bounds of the padded sequences before the context-parallel split; the last ones may be padding only."""
    max_seqlen: int
    """An upper bound of their lengths."""
    sources: tuple[int, ...]
    """Index of each response in the caller's list."""
    response_tokens: tuple[int, ...]
    """Full length of each response, in tokens."""

    @property
    def width(self) -> int:
        """Length of the longest response, in tokens."""
        return max(self.response_tokens, default=0)


def sequences_of(groups: Sequence[ResponseGroup]) -> list[TokenSequence]:
    """Prompt and response tokens of every response, group after group."""
    return [TokenSequence(g.prompt.token_ids, r.token_ids) for g in groups for r in g.responses]


def alignment(tensor_size: int, context_size: int, sequence_parallel: bool) -> tuple[int, int]:
    """(multiple of each sequence's length, multiple of the micro-batch's total length) that a layout needs."""
    sequence_multiple = 2 * context_size if context_size > 1 else 1
    return sequence_multiple, sequence_multiple * (tensor_size if sequence_parallel else 1)


def pack(
    sequences: Sequence[TokenSequence],
    sources: Sequence[int],
    *,
    sequence_multiple: int = 1,
    batch_multiple: int = 1,
    total: int | None = None,
    few_shapes: bool = False,
    context_rank: int = 0,
    context_size: int = 1,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Pack `sequences[i] for i in sources` into one micro-batch.

    Args:
        sequences: all sequences of the pass.
        sources: indices of those in this micro-batch; may be empty.
        sequence_multiple: every sequence is padded to a multiple of this.
        batch_multiple: the micro-batch is padded to a multiple of this.
        total: pad the micro-batch to this many tokens (a pipeline needs equal shapes); None: as short as possible.
        few_shapes: round the numbers of tokens and sequences and `max_seqlen` up (`coarse`): kernels that are selected
            or compiled per shape are then compiled a few dozen times in a run, not in every micro-batch.
        context_rank: this rank's context-parallel rank.
        context_size: context-parallel size.
        device: device of the resulting tensors.

    Raises:
        ValueError: `total` is smaller than the packed sequences.
    """
    chosen_sequences = [sequences[i] for i in sources]
    padded = [_round_up(s.length, sequence_multiple) for s in chosen_sequences]
    used = sum(padded)
    length = max(_round_up(used, batch_multiple), batch_multiple, sequence_multiple)
    if total is not None:
        length = total
    elif few_shapes:
        length = _round_up(coarse(length, TOKEN_STEPS), math.lcm(batch_multiple, sequence_multiple))
    if length < used:
        raise ValueError(f"the micro-batch has {used} tokens and cannot be padded to {length}")
    bounds = [0]
    for n in padded + ([length - used] if length > used else []):
        bounds.append(bounds[-1] + n)
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    if few_shapes:
        longest = coarse(longest, LENGTH_STEPS)
        bounds += [length] * (_power_of_two(len(bounds) - 1) + 1 - len(bounds))
    columns = torch.zeros(5, length, dtype=torch.long)
    tokens, positions, targets, row, offset = columns
    row.fill_(-1)
    for r, (s, start) in enumerate(zip(chosen_sequences, bounds, strict=False)):
        n, first, count = s.length, start + len(s.prompt) - 1, len(s.response)
        tokens[start : start + n] = torch.tensor((s.prompt + s.response)[:n])
        positions[start : start + padded[r]] = torch.arange(padded[r])
        targets[first : first + count] = torch.tensor(s.response, dtype=torch.long)
        row[first : first + count] = r
        offset[first : first + count] = torch.arange(count)
    if context_size > 1:
        spans = [(a, b) for a, b in itertools.pairwise(bounds) if b > a]
        local = [a + chunk_positions(b - a, context_size, context_rank) for a, b in spans]
        columns = columns[:, torch.cat(local)]
    _, _, _, row, offset = columns
    chosen = (row >= 0).nonzero().squeeze(1)
    counts = tuple(len(s.response) for s in chosen_sequences)
    table_index = row[chosen] * max(counts, default=0) + offset[chosen]
    runs = zip(*(x.tolist() for x in torch.unique_consecutive(row[chosen], return_counts=True)), strict=True)
    tokens, positions, targets, row, offset = to_device(columns, device)
    chosen, table_index = to_device(torch.stack([chosen, table_index]), device)
    return PackedBatch(
        tokens=tokens,
        positions=positions,
        targets=targets,
        row=row,
        offset=offset,
        chosen=chosen,
        table_index=table_index,
        runs=tuple(runs),
        cu_seqlens=to_device(torch.tensor(bounds, dtype=torch.int32), device),
        bounds=tuple(bounds),
        max_seqlen=longest,
        sources=tuple(sources),
        response_tokens=counts,
    )


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor from host memory to `device`; the host does not wait for a GPU."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


TOKEN_STEPS, LENGTH_STEPS = 16, 2
"""Steps per doubling of the size: fine for tokens, which cost time (at most 1/16 is padding), coarse for lengths."""
SMALLEST_SHAPE = 128


def coarse(size: int, steps: int) -> int:
    """`size` rounded up to one of `steps` sizes per doubling, and to at least `SMALLEST_SHAPE`."""
    if size <= SMALLEST_SHAPE:
        return SMALLEST_SHAPE
    return _round_up(size, _power_of_two(size) // (2 * steps))


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def to_rows(values: Float[Tensor, "tokens"], batch: PackedBatch) -> Float[Tensor, "responses positions"]:
    """Arrange the values of the response tokens as one row per response; zero where this rank has no token.

    Differentiable with respect to `values`.
    """
    table = values.new_zeros(len(batch.sources) * batch.width)
    rows = table.index_copy(0, batch.table_index, values.index_select(0, batch.chosen))
    return rows.view(len(batch.sources), batch.width)


def row_mask(batch: PackedBatch) -> Bool[Tensor, "responses positions"]:
    """True at response tokens that this rank holds."""
    return to_rows(torch.ones(len(batch.tokens), device=batch.tokens.device), batch).bool()


def rows_of(
    values: Sequence[Float[Tensor, "_tokens"]], batch: PackedBatch, mask: Bool[Tensor, "responses positions"]
) -> Float[Tensor, "responses positions"]:
    """Per-response values of a pass, arranged as the rows of one micro-batch (float32); zero where the mask is False.

    Args:
        values: one tensor on the host per response of the pass; `batch.sources` selects those of the micro-batch.
        batch: the micro-batch.
        mask: `row_mask` of the micro-batch; under context parallelism it covers this rank's tokens only.
    """
    table = torch.zeros(mask.shape)
    for row, source in enumerate(batch.sources):
        table[row, : len(values[source])] = values[source]
    return table.to(mask.device) * mask


def chosen_values(values: Sequence[Sequence[float]], batch: PackedBatch) -> Float[Tensor, "response_tokens"]:
    """One number for each of the batch's `chosen` tokens, in their order.

    Args:
        values: one list per response of the pass, as long as the response; `batch.sources` selects from it.
        batch: the micro-batch.
    """
    table = torch.zeros(len(batch.sources), batch.width)
    for row, source in enumerate(batch.sources):
        table[row, : len(values[source])] = torch.tensor(values[source], dtype=table.dtype)
    return to_device(table.flatten(), batch.table_index.device).index_select(0, batch.table_index)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
