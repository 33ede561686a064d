"""Optimizer state in a checkpoint: master weights and moments of every parameter, independent of the layout.

Megatron's distributed optimizer gives each data-parallel rank a range of the flattened parameters. Each rank stores the
complete rows of its range unchanged; a row that straddles ranks moves to the rank that holds most of it. Loading
reads only the rows of a rank's range. Nothing is gathered, and no padding of Megatron's buffers is involved.

A digest of each parameter's state is computed from the live optimizer at saving and again after loading. It is a sum
over elements, weighted by their positions in the stored tensor, so every layout computes the same value.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from megatron_g2rl.distributed.collectives import gather, gather_on_first_rank
from megatron_g2rl.policy import megatron_compat
from megatron_g2rl.policy.checkpoint.pieces import SHARDING, LocalBlock, Piece, local_blocks, sharded_entries
from megatron_g2rl.policy.checkpoint.shared_reading import SharedReading, data_parallel_group
from megatron_g2rl.policy.hf.megatron_folder import MegatronTensors
from megatron_g2rl.policy.model import unwrap
from megatron_g2rl.policy.optimizer import Optimizer

MASTER, FIRST, SECOND = STATES = ("param", "exp_avg", "exp_avg_sq")
"""States stored for each parameter, under Megatron's names: the float32 master weight and Adam's moments."""
MOMENTS = (FIRST, SECOND)
_OLD_MASTER = "fp32_param"
"""Name of the master weight in checkpoints of Megatron's unsharded optimizer."""
_MASK = (1 << 64) - 1


def state_prefix(state: str) -> str:
    """Prefix of the key of a stored optimizer tensor; the key of the weight follows."""
    return f"optimizer.state.{state}."


@dataclass(frozen=True)
class StateShard:
    """The part of a parameter's optimizer state that this rank updates, and the stored blocks that it belongs to."""

    name: str
    """Name of the parameter; the same on all ranks that hold a part of it."""
    blocks: tuple[LocalBlock, ...]
    """The complete local parameter as stored blocks."""
    start: int
    end: int
    """Range of the flattened local parameter that this rank updates."""
    tensors: dict[str, Tensor]
    """State -> float32 [end - start], views of the live optimizer."""
    inner: MegatronOptimizer
    """The chained Megatron optimizer that updates it."""

    def spans(self) -> Iterator[tuple[int, LocalBlock, int, int, int]]:
        """(block number, block, first and end element in the flattened block, offset of the first in `tensors`)."""
        begin = 0
        for number, block in enumerate(self.blocks):
            size = prod(block.piece.shape)
            low, high = max(self.start - begin, 0), min(self.end - begin, size)
            if low < high:
                yield number, block, low, high, begin + low - self.start
            begin += size

    @property
    def counted(self) -> bool:
        """Whether this rank's part counts in the digests: exactly one copy of every element does."""
        replica = self.blocks[0].replica
        return not any(replica[:-1] if megatron_compat.is_distributed(self.inner) else replica)


def state_shards(optimizer: Optimizer) -> list[StateShard]:
    """The parts of the optimizer state that this rank updates."""
    models = [unwrap(chunk) for chunk in optimizer.chunks]
    entries = {
        id(entry.data): entry
        for model in models
        for entry in sharded_entries(model.sharded_state_dict(metadata=SHARDING))
    }
    names = {
        parameter: f"{number}.{name}"
        for number, model in enumerate(models)
        for name, parameter in model.named_parameters()
    }
    shards = []
    for inner in megatron_compat.inner_optimizers(optimizer.megatron):
        for parameter, main, start, end in _mains(inner, names):
            moments = inner.optimizer.state[main]
            tensors = {MASTER: main.detach(), FIRST: moments[FIRST], SECOND: moments[SECOND]}
            tensors = {state: tensor.view(-1) for state, tensor in tensors.items()}
            blocks = tuple(local_blocks(entries[id(parameter)]))
            shards.append(StateShard(names[parameter], blocks, start, end, tensors, inner))
    return shards


def _sharing_group(inner) -> dist.ProcessGroup | None:
    return inner.data_parallel_group if megatron_compat.is_distributed(inner) else None


def _mains(inner, parameters: dict[nn.Parameter, str]) -> Iterator[tuple[nn.Parameter, Tensor, int, int]]:
    """(model parameter, this rank's part of its master weight, first element, end) of one optimizer."""
    if megatron_compat.is_distributed(inner):
        for parameter, (group, index) in inner.model_param_group_index_map.items():
            main = inner.optimizer.param_groups[group]["params"][index]
            yield parameter, main, *megatron_compat.span_in_parameter(inner, parameter)
        return
    mains = {id(main) for group in inner.optimizer.param_groups for main in group["params"]}
    for parameter in parameters:
        main = megatron_compat.master_weight(parameter)
        if id(main) in mains:
            yield parameter, main, 0, parameter.numel()


# ---------------------------------------------------------------------- saving
@dataclass(frozen=True)
class Fragment:
    """Position of a part of a row that straddles ranks."""

    row: tuple[str, int, int]
    """Parameter name, block number, row in the block."""
    start: int
    end: int
    """Range of columns."""


@dataclass(frozen=True)
class _Part:
    """A fragment with its values [states, columns of the fragment]."""

    fragment: Fragment
    block: LocalBlock
    values: Tensor


def blocks_to_save(optimizer: Optimizer, shards: Sequence[StateShard]) -> list[LocalBlock]:
    """Complete rows of master weights and moments, each row on one rank of its group; a collective."""
    saved: list[LocalBlock] = []
    for inner in megatron_compat.inner_optimizers(optimizer.megatron):
        rows, fragments = rows_of([shard for shard in shards if shard.inner is inner])
        saved += rows
        if (group := _sharing_group(inner)) is not None:
            saved += _exchange(fragments, group)
    return saved


def rows_of(shards: Sequence[StateShard]) -> tuple[list[LocalBlock], list[_Part]]:
    """The complete rows of some shards, and the parts of rows that straddle ranks."""
    rows: list[LocalBlock] = []
    parts: list[_Part] = []
    for shard in shards:
        for number, block, low, high, offset in shard.spans():
            columns = block.piece.columns
            first, last = -(-low // columns), high // columns
            if first < last:
                begin = offset + first * columns - low
                end = begin + (last - first) * columns
                rows += _stored(block, first, last, {s: tensor[begin:end] for s, tensor in shard.tensors.items()})
            for row, start, end in _partial_rows(low, high, columns):
                begin = offset + row * columns + start - low
                values = torch.stack([shard.tensors[state][begin : begin + end - start] for state in STATES])
                parts.append(_Part(Fragment((shard.name, number, row), start, end), block, values))
    return rows, parts


def row_owners(fragments: Sequence[Sequence[Fragment]]) -> dict[tuple[str, int, int], int]:
    """The rank that stores each straddling row: the rank that holds most of it.

    Args:
        fragments: one list per rank.
    """
    best: dict[tuple[str, int, int], tuple[int, int]] = {}
    for rank, held in enumerate(fragments):
        for fragment in held:
            best[fragment.row] = max(best.get(fragment.row, (0, 0)), (fragment.end - fragment.start, -rank))
    return {row: -rank for row, (_, rank) in best.items()}


def _partial_rows(low: int, high: int, columns: int) -> list[tuple[int, int, int]]:
    """(row, first column, end) of the rows that the elements `low` to `high` cover only in part."""
    rows = []
    if low % columns:
        rows.append((low // columns, low % columns, min(high - low // columns * columns, columns)))
    if high % columns and (high // columns != low // columns or low % columns == 0):
        rows.append((high // columns, 0, high % columns))
    return rows


def _stored(block: LocalBlock, first: int, last: int, tensors: dict[str, Tensor]) -> list[LocalBlock]:
    piece = block.piece.narrow(first, last)
    shape = piece.shape[piece.leading :]
    return [
        replace(block, piece=piece.named(state_prefix(state)), tensor=tensor.view(shape))
        for state, tensor in tensors.items()
    ]


def _exchange(parts: Sequence[_Part], group: dist.ProcessGroup) -> list[LocalBlock]:
    """Bring the parts of each row to the rank that stores it; a collective over `group`."""
    gathered = gather([part.fragment for part in parts], group)
    owner, this_rank, ranks = row_owners(gathered), dist.get_rank(group), dist.get_process_group_ranks(group)
    others = {}
    for rank, held in enumerate(gathered):
        for fragment in held:
            if rank != this_rank:
                others.setdefault(fragment.row, []).append((rank, fragment))
    transfers, rows, received = [], [], []
    # The same order on both sides of every transfer.
    for part in sorted(parts, key=lambda part: part.fragment.row):
        row, values = part.fragment.row, part.values
        if owner[row] != this_rank:
            transfers.append(dist.P2POp(dist.isend, values, ranks[owner[row]], group))
            continue
        complete = values.new_empty(len(STATES), part.block.piece.columns)
        complete[:, part.fragment.start : part.fragment.end] = values
        for rank, other in others[row]:
            buffer = values.new_empty(len(STATES), other.end - other.start)
            transfers.append(dist.P2POp(dist.irecv, buffer, ranks[rank], group))
            received.append((complete[:, other.start : other.end], buffer))
        rows.append((part.block, row[2], complete))
    for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
        transfer.wait()
    for target, buffer in received:
        target.copy_(buffer)
    return [
        stored
        for block, number, complete in rows
        for stored in _stored(block, number, number + 1, dict(zip(STATES, complete, strict=True)))
    ]


# ---------------------------------------------------------------------- loading
def read_shards(shards: Sequence[StateShard], reader: MegatronTensors) -> None:
    """Fill master weights and moments from a checkpoint of any layout; a collective.

    Raises:
        WeightsError: part of a tensor is not stored, or cannot be read; on every rank.
    """
    reading = SharedReading()
    for shard in shards:
        sharded = megatron_compat.is_distributed(shard.inner)
        for state, target in shard.tensors.items():
            for _, block, low, high, offset in shard.spans():
                group = None if sharded else data_parallel_group(block.piece.key)
                read = functools.partial(_read, reader, state, block, low, high)
                reading.fill(target[offset : offset + high - low], read, group)
    reading.finish()


def mismatched_masters(shards: Sequence[StateShard], reader: MegatronTensors) -> list[str]:
    """Keys of parameters whose stored master weights do not round to the weights, which must be loaded already.

    Raises:
        WeightsError: as `read_shards`.
    """
    mismatched = set()
    for shard in shards:
        for _, block, low, high, _ in shard.spans():
            weights = block.tensor.reshape(-1)[low:high].cpu()
            if not torch.equal(_read(reader, MASTER, block, low, high).to(weights.dtype), weights):
                mismatched.add(block.piece.key)
    return sorted(mismatched)


def _read(reader: MegatronTensors, state: str, block: LocalBlock, low: int, high: int) -> Tensor:
    """The elements `low` to `high` of a flattened block of optimizer state; only their rows are read."""
    piece = block.piece.named(stored_prefix(state, block.piece.key, reader))
    first, last = low // piece.columns, -(-high // piece.columns)
    begin = first * piece.columns
    return reader.read_rows(piece, first, last).reshape(-1)[low - begin : high - begin]


def stored_prefix(state: str, key: str, reader: MegatronTensors) -> str:
    """Prefix of the key under which a checkpoint stores a state of the parameter `key`.

    Without sharding, Megatron stores no separate master weight for float32 weights, and otherwise calls it
    `fp32_param`.
    """
    if state != MASTER or state_prefix(MASTER) + key in reader.metadata.state_dict_metadata:
        return state_prefix(state)
    old = state_prefix(_OLD_MASTER)
    return old if old + key in reader.metadata.state_dict_metadata else ""


# ---------------------------------------------------------------------- digests
def digests(shards: Sequence[StateShard]) -> dict[str, int]:
    """Digest of each stored tensor of the optimizer, per layer, on rank 0; the same under every layout.

    Bit patterns are weighted by 2 * position + 1 and summed modulo 2**64: a shift, a swap or a flipped bit changes
    the sum. A collective; other ranks get an empty dictionary.
    """
    names, sums = [], []
    for shard in shards:
        if not shard.counted:
            continue
        for _, block, low, high, offset in shard.spans():
            for state, tensor in shard.tensors.items():
                names.append(_digest_name(block.piece.named(state_prefix(state))))
                sums.append(_weighted_bits(tensor[offset : offset + high - low], block.piece, low))
    local: dict[str, int] = {}
    for name, value in zip(names, torch.stack(sums).tolist() if sums else [], strict=True):
        local[name] = (local.get(name, 0) + value) & _MASK
    total: dict[str, int] = {}
    for part in gather_on_first_rank(local) or ():
        for name, value in part.items():
            total[name] = (total.get(name, 0) + value) & _MASK
    return total


def _digest_name(piece: Piece) -> str:
    return piece.key + "".join(f"[{index}]" for index in piece.offset[: piece.leading])


def _weighted_bits(values: Tensor, piece: Piece, low: int) -> Tensor:
    """Sum of bits * (2 * position + 1) over float32 `values`, which start at element `low` of the flattened block."""
    bits, columns = values.view(torch.int32), piece.columns
    strides = [prod(piece.stored[axis + 1 :]) for axis in range(len(piece.stored))]
    base = sum(offset * stride for offset, stride in zip(piece.offset, strides, strict=True))
    step = strides[piece.leading]
    first, last = -(-low // columns), (low + len(bits)) // columns
    if columns == 1 or first > last:  # a vector, or a part of one row
        row, column = divmod(low, columns)
        start = base + row * step + column
        return _run(bits, start, step if columns == 1 else 1)
    head, body = first * columns - low, (last - first) * columns
    total = _run(bits[:head], base + (first - 1) * step + low % columns, 1)
    total = total + _run(bits[head + body :], base + last * step, 1)
    rows = bits[head : head + body].view(-1, columns)
    by_row, by_column = rows.sum(1, dtype=torch.int64), rows.sum(0, dtype=torch.int64)
    return total + _run(by_row, base + first * step, step) + _run(by_column, 0, 1) - by_column.sum()


def _run(bits: Tensor, start: int, step: int) -> Tensor:
    """Sum of bits * (2 * (start + i * step) + 1), modulo 2**64."""
    positions = torch.arange(len(bits), device=bits.device).mul_(step).add_(start)
    return (bits * (2 * positions + 1)).sum()
