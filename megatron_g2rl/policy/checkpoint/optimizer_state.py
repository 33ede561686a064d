"""What a checkpoint holds of the optimizer: master weights and moments of every parameter, under any layout.

Megatron's distributed optimizer gives each data-parallel rank a range of the flattened parameters. Each rank stores the
complete rows of its range as they are; rows that straddle two ranks move to the one that holds more of them. Loading
reads the rows of a rank's range and no others. Nothing is gathered, and no padding of Megatron's buffers is involved.

A digest of each parameter's state is computed from the live optimizer when it is saved and again after it was loaded.
It is a sum over elements that depends on their positions in the stored tensor, so every layout computes the same.
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

from megatron_g2rl.policy import megatron_compat
from megatron_g2rl.policy.checkpoint.pieces import SHARDING, LocalBlock, Piece, local_blocks, sharded_entries
from megatron_g2rl.policy.checkpoint.shared_reading import SharedReading, data_parallel_group
from megatron_g2rl.policy.hf.megatron_folder import MegatronTensors
from megatron_g2rl.policy.model import unwrap
from megatron_g2rl.policy.optimizer import Optimizer

MASTER, FIRST, SECOND = STATES = ("param", "exp_avg", "exp_avg_sq")
"""What is stored of a parameter, under Megatron's names: the float32 master weight and the moments of Adam."""
MOMENTS = (FIRST, SECOND)
_OLD_MASTER = "fp32_param"
"""What the master weight was called in checkpoints of Megatron's optimizer without sharding."""
_MASK = (1 << 64) - 1


def state_prefix(state: str) -> str:
    """What the key of a stored optimizer tensor begins with; the key of the weight follows."""
    return f"optimizer.state.{state}."


@dataclass(frozen=True)
class StateShard:
    """The part of a parameter's optimizer state that this rank updates, and the stored blocks that it belongs to."""

    name: str
    """Of the parameter, the same on all ranks that share it."""
    blocks: tuple[LocalBlock, ...]
    """The whole local parameter as stored blocks."""
    start: int
    end: int
    """The elements of the flattened local parameter that are here."""
    tensors: dict[str, Tensor]
    """State -> float32 [end - start], views of the live optimizer."""
    inner: MegatronOptimizer
    """The one of Megatron's chained optimizers that updates it."""

    def spans(self) -> Iterator[tuple[int, LocalBlock, int, int, int]]:
        """(number of the block, block, first element, end, both of the flattened block, its place in `tensors`)."""
        begin = 0
        for number, block in enumerate(self.blocks):
            size = prod(block.piece.shape)
            low, high = max(self.start - begin, 0), min(self.end - begin, size)
            if low < high:
                yield number, block, low, high, begin + low - self.start
            begin += size

    @property
    def counted(self) -> bool:
        """Whether this rank's part counts in the sums of the digests: one copy of every element does."""
        replica = self.blocks[0].replica
        return not any(replica[:-1] if megatron_compat.is_distributed(self.inner) else replica)


def state_shards(optimizer: Optimizer) -> list[StateShard]:
    """What this rank holds of the optimizer's state."""
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
    """(model parameter, its master weight or the part of it that is here, first element, end) of one optimizer."""
    if megatron_compat.is_distributed(inner):
        for parameter, (group, place) in inner.model_param_group_index_map.items():
            main = inner.optimizer.param_groups[group]["params"][place]
            yield parameter, main, *megatron_compat.span_in_parameter(inner, parameter)
        return
    own = {id(main) for group in inner.optimizer.param_groups for main in group["params"]}
    for parameter in parameters:
        main = megatron_compat.master_weight(parameter)
        if id(main) in own:
            yield parameter, main, 0, parameter.numel()


# ---------------------------------------------------------------------- saving
@dataclass(frozen=True)
class Fragment:
    """Where a part of a row belongs whose other parts are on other ranks."""

    row: tuple[str, int, int]
    """Name of the parameter, number of the block, row of the block."""
    start: int
    end: int
    """Columns."""


@dataclass(frozen=True)
class _Part:
    """A fragment with its values [states, columns of the fragment]."""

    fragment: Fragment
    block: LocalBlock
    values: Tensor


def blocks_to_save(optimizer: Optimizer, shards: Sequence[StateShard]) -> list[LocalBlock]:
    """Complete rows of master weights and moments, every row on one rank of each group; a collective."""
    saved: list[LocalBlock] = []
    for inner in megatron_compat.inner_optimizers(optimizer.megatron):
        rows, fragments = rows_of([shard for shard in shards if shard.inner is inner])
        saved += rows
        if (group := _sharing_group(inner)) is not None:
            saved += _exchange(fragments, group)
    return saved


def rows_of(shards: Sequence[StateShard]) -> tuple[list[LocalBlock], list[_Part]]:
    """The complete rows of some shards, and the parts of rows that straddle two ranks."""
    rows: list[LocalBlock] = []
    parts: list[_Part] = []
    for shard in shards:
        for number, block, low, high, place in shard.spans():
            columns = block.piece.columns
            first, last = -(-low // columns), high // columns
            if first < last:
                begin = place + first * columns - low
                end = begin + (last - first) * columns
                rows += _stored(block, first, last, {s: tensor[begin:end] for s, tensor in shard.tensors.items()})
            for row, start, end in _partial_rows(low, high, columns):
                begin = place + row * columns + start - low
                values = torch.stack([shard.tensors[state][begin : begin + end - start] for state in STATES])
                parts.append(_Part(Fragment((shard.name, number, row), start, end), block, values))
    return rows, parts


def row_owners(fragments: Sequence[Sequence[Fragment]]) -> dict[tuple[str, int, int], int]:
    """The rank that stores each straddling row: the one that holds most of it.

    Args:
        fragments: of each rank.
    """
    best: dict[tuple[str, int, int], tuple[int, int]] = {}
    for rank, held in enumerate(fragments):
        for fragment in held:
            best[fragment.row] = max(best.get(fragment.row, (0, 0)), (fragment.end - fragment.start, -rank))
    return {row: -rank for row, (_, rank) in best.items()}


def _partial_rows(low: int, high: int, columns: int) -> list[tuple[int, int, int]]:
    """(row, first column, end) of the rows of which the elements `low` to `high` are a part only."""
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
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, [part.fragment for part in parts], group=group)
    owner, here, ranks = row_owners(everyone), dist.get_rank(group), dist.get_process_group_ranks(group)
    others = {}
    for rank, held in enumerate(everyone):
        for fragment in held:
            if rank != here:
                others.setdefault(fragment.row, []).append((rank, fragment))
    transfers, rows, received = [], [], []
    # The same order on both sides of every transfer.
    for part in sorted(parts, key=lambda part: part.fragment.row):
        row, values = part.fragment.row, part.values
        if owner[row] != here:
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
            for _, block, low, high, place in shard.spans():
                group = None if sharded else data_parallel_group(block.piece.key)
                read = functools.partial(_read, reader, state, block, low, high)
                reading.fill(target[place : place + high - low], read, group)
    reading.finish()


def mismatched_masters(shards: Sequence[StateShard], reader: MegatronTensors) -> list[str]:
    """Keys of parameters whose stored master weights do not round to the weights, which are loaded already.

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
    """The elements `low` to `high` of a flattened block of optimizer state; no more than their rows are read."""
    piece = block.piece.named(stored_prefix(state, block.piece.key, reader))
    first, last = low // piece.columns, -(-high // piece.columns)
    begin = first * piece.columns
    return reader.read_rows(piece, first, last).reshape(-1)[low - begin : high - begin]


def stored_prefix(state: str, key: str, reader: MegatronTensors) -> str:
    """Where a checkpoint has a state of the parameter `key`.

    Without sharding, Megatron stores no master weight that equals the weight (float32), or calls it `fp32_param`.
    """
    if state != MASTER or state_prefix(MASTER) + key in reader.metadata.state_dict_metadata:
        return state_prefix(state)
    old = state_prefix(_OLD_MASTER)
    return old if old + key in reader.metadata.state_dict_metadata else ""


# ---------------------------------------------------------------------- digests
def digests(shards: Sequence[StateShard]) -> dict[str, int]:
    """Digest of each stored tensor of the optimizer, by layer, on rank 0; the same under every layout.

    Bit patterns are weighted with 2 * position + 1 and summed modulo 2**64: a shift, a swap or a flipped bit changes
    the sum. A collective; other ranks get an empty dictionary.
    """
    names, sums = [], []
    for shard in shards:
        if not shard.counted:
            continue
        for _, block, low, high, place in shard.spans():
            for state, tensor in shard.tensors.items():
                names.append(_digest_name(block.piece.named(state_prefix(state))))
                sums.append(_weighted_bits(tensor[place : place + high - low], block.piece, low))
    own: dict[str, int] = {}
    for name, value in zip(names, torch.stack(sums).tolist() if sums else [], strict=True):
        own[name] = (own.get(name, 0) + value) & _MASK
    everyone: list = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, everyone, dst=0)
    total: dict[str, int] = {}
    for part in everyone or ():
        for name, value in part.items():
            total[name] = (total.get(name, 0) + value) & _MASK
    return total


def _digest_name(piece: Piece) -> str:
    return piece.key + "".join(f"[{index}]" for index in piece.offset[: piece.leading])


def _weighted_bits(values: Tensor, piece: Piece, low: int) -> Tensor:
    """Sum of bits * (2 * position + 1) over float32 `values`, which begin at element `low` of the flattened block."""
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
