"""Packs sequences into one row of tokens, shifted once, cut for context parallelism, aligned for sequence parallelism.

Position t of the packed row reads token t and predicts token t+1: the target of the last prompt token is the first
response token. This shift is made here and nowhere else.

Everything that later code must know on the host (bounds, where response tokens stand) is worked out here, before the
tensors go to the device: asking a GPU for it would stop the host in every micro-batch.
"""

from __future__ import annotations

import itertools
import math
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
    chosen: Int[Tensor, "response_tokens"]
    """Where the tokens of responses stand, in ascending order."""
    place: Int[Tensor, "response_tokens"]
    """Where each of them stands in the flattened table [responses, positions] of `to_rows`."""
    runs: tuple[tuple[int, int], ...]
    """(response, number of tokens) of the consecutive tokens of one response among the chosen ones."""
    cu_seqlens: Int[Tensor, "sequences+1"]
    """`bounds` on the device (int32)."""
    bounds: tuple[int, ...]
    """Bounds of the padded sequences before the context-parallel cut; the last ones may be padding only."""
    max_seqlen: int
    """An upper bound of their lengths."""
    sources: tuple[int, ...]
    """Index of each response in the caller's list."""
    response_tokens: tuple[int, ...]
    """Full length of each response."""

    @property
    def width(self) -> int:
        """Positions of the longest response."""
        return max(self.response_tokens, default=0)


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
    few_shapes: bool = False,
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
        few_shapes: round the numbers of tokens and sequences and `max_seqlen` up (`coarse`): kernels that are chosen
            or built for a shape are then built a few dozen times in a run, not in every micro-batch.
        context_rank: this rank's place among those that share the sequences.
        context_size: number of those ranks.
        device: where the tensors go.

    Raises:
        ValueError: `total` is smaller than the packed sequences.
    """
    chosen_sequences = [sequences[i] for i in sources]
    padded = [_round_up(s.length, each) for s in chosen_sequences]
    used = sum(padded)
    length = max(_round_up(used, whole), whole, each)
    if total is not None:
        length = total
    elif few_shapes:
        length = _round_up(coarse(length, TOKEN_STEPS), math.lcm(whole, each))
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
    place = row[chosen] * max(counts, default=0) + offset[chosen]
    runs = zip(*(x.tolist() for x in torch.unique_consecutive(row[chosen], return_counts=True)), strict=True)
    tokens, positions, targets, row, offset = to_device(columns, device)
    chosen, place = to_device(torch.stack([chosen, place]), device)
    return PackedBatch(
        tokens=tokens,
        positions=positions,
        targets=targets,
        row=row,
        offset=offset,
        chosen=chosen,
        place=place,
        runs=tuple(runs),
        cu_seqlens=to_device(torch.tensor(bounds, dtype=torch.int32), device),
        bounds=tuple(bounds),
        max_seqlen=longest,
        sources=tuple(sources),
        response_tokens=counts,
    )


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of host memory on `device`; the host does not wait for a GPU."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


TOKEN_STEPS, LENGTH_STEPS = 16, 2
"""Sizes in each doubling: tokens cost time, so at most a sixteenth is padding; a longest length costs next to none."""
SMALLEST_SHAPE = 128


def coarse(size: int, steps: int) -> int:
    """`size` rounded up to one of `steps` sizes in each doubling, at least `SMALLEST_SHAPE`."""
    if size <= SMALLEST_SHAPE:
        return SMALLEST_SHAPE
    return _round_up(size, _power_of_two(size) // (2 * steps))


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def to_rows(values: Float[Tensor, "tokens"], batch: PackedBatch) -> Float[Tensor, "responses positions"]:
    """Lay the values of the response tokens out as one row a response; zero where this rank has no token.

    Differentiable with respect to `values`.
    """
    table = values.new_zeros(len(batch.sources) * batch.width)
    rows = table.index_copy(0, batch.place, values.index_select(0, batch.chosen))
    return rows.view(len(batch.sources), batch.width)


def to_tokens(rows: Float[Tensor, "responses positions"], batch: PackedBatch) -> Float[Tensor, "tokens"]:
    """Values of rows, one a token of the micro-batch; zero where it is not a response token. Not differentiable."""
    tokens = rows.new_zeros(len(batch.tokens))
    return tokens.index_copy_(0, batch.chosen, rows.reshape(-1).index_select(0, batch.place))


def row_mask(batch: PackedBatch) -> Float[Tensor, "responses positions"]:
    """1 where this rank holds the response token, else 0 (float32)."""
    return to_rows(torch.ones(len(batch.tokens), device=batch.tokens.device), batch)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
