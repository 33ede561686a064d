"""Splits a step's responses into updates, over data-parallel ranks, and into micro-batches of a token budget.

Pure Python on lengths and indices: every rank computes the same plan without communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import accumulate, islice
from random import Random


def plan_updates(num_responses: int, responses_per_update: int, epochs: int, seed: int) -> list[list[int]]:
    """Split the responses of a step into optimizer updates, shuffled across groups again in each epoch.

    If the count does not divide evenly (groups were dropped), the last update of an epoch is smaller.

    Args:
        num_responses: number of usable responses; 0 gives no updates.
        responses_per_update: responses per update.
        epochs: passes over the responses.
        seed: derived from run seed and step.

    Returns:
        Response indices of each update; every index occurs exactly once per epoch.

    Raises:
        ValueError: a negative count, or an update or epoch count below 1.
    """
    if num_responses < 0 or responses_per_update < 1 or epochs < 1:
        raise ValueError(
            f"cannot split {num_responses} responses into updates of {responses_per_update}, {epochs} times: "
            "trainer.responses_per_update and trainer.epochs_per_step must be at least 1"
        )
    updates = []
    for epoch in range(epochs):
        order = list(range(num_responses))
        Random(f"updates/{seed}/{epoch}").shuffle(order)
        starts = range(0, num_responses, responses_per_update)
        updates += [order[start : start + responses_per_update] for start in starts]
    return updates


def plan_microbatches(
    lengths: Sequence[int],
    data_parallel: int,
    tokens_per_microbatch: int,
    alignment: int = 1,
    multiple_of: int = 1,
    work: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """Distribute sequences over data-parallel ranks and split each rank's into micro-batches, balanced by work.

    Greedy, most work first: to the least loaded rank, then to its least loaded micro-batch. All ranks get the
    same number of micro-batches, the smallest into which every rank's sequences fit; some may be empty.

    Args:
        lengths: tokens of each sequence, prompt included; they fill the budget.
        data_parallel: data-parallel ranks.
        tokens_per_microbatch: token budget of one micro-batch.
        alignment: sequence lengths are rounded up to a multiple of this.
        multiple_of: the number of micro-batches is a multiple of this (required by interleaved pipelines).
        work: time that each sequence takes, in any unit; None: its tokens. In long sequences attention takes most of
            the time, which the number of tokens then underestimates.

    Returns:
        `[rank][micro-batch][sequence indices]`, every index exactly once.

    Raises:
        ValueError: a single sequence exceeds the budget, or an argument is below 1.
    """
    for name, value in [("data_parallel", data_parallel), ("alignment", alignment), ("multiple_of", multiple_of)]:
        if value < 1:
            raise ValueError(f"{name} is {value}, it must be at least 1")
    costs = [-(-length // alignment) * alignment for length in lengths]
    _refuse_oversized(lengths, costs, tokens_per_microbatch)
    work = costs if work is None else work
    most_work_first = sorted(range(len(costs)), key=lambda index: (-work[index], index))
    ranks = _spread(most_work_first, work, data_parallel)

    count = max((-(-sum(costs[index] for index in rank) // tokens_per_microbatch) for rank in ranks), default=0)
    count = -(-max(count, 1 if costs else 0) // multiple_of) * multiple_of
    while True:
        plans = [_pack(rank, costs, work, count, tokens_per_microbatch) for rank in ranks]
        if all(plan is not None for plan in plans):
            return [plan for plan in plans if plan is not None]
        count += multiple_of


def plan_groups(
    lengths: Sequence[int],
    group_sizes: Sequence[int],
    data_parallel: int,
    tokens_per_microbatch: int,
    alignment: int = 1,
    multiple_of: int = 1,
    work: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """`plan_microbatches` with all responses of a group in the same micro-batch, group after group.

    Args:
        lengths: tokens of each sequence, group after group.
        group_sizes: sequences of each group.
        data_parallel, tokens_per_microbatch, alignment, multiple_of, work: as there.

    Raises:
        ValueError: a group exceeds the budget (`largest_group`), or an argument is below 1.
    """
    costs = _group_costs(lengths, group_sizes, alignment)
    if max(costs, default=0) > tokens_per_microbatch:
        raise ValueError(f"a group has {max(costs)} tokens, over the budget of {tokens_per_microbatch}")
    starts = [0, *accumulate(group_sizes)]
    work = None if work is None else _group_costs(work, group_sizes, 1)
    groups = plan_microbatches(costs, data_parallel, tokens_per_microbatch, multiple_of=multiple_of, work=work)
    return [
        [[index for g in sorted(micro) for index in range(starts[g], starts[g + 1])] for micro in rank]
        for rank in groups
    ]


def largest_group(lengths: Sequence[int], group_sizes: Sequence[int], alignment: int = 1) -> int:
    """Tokens of the largest group, padding included: the budget of a micro-batch that `plan_groups` needs."""
    return max(_group_costs(lengths, group_sizes, alignment), default=0)


def _group_costs(lengths: Sequence[int], group_sizes: Sequence[int], alignment: int) -> list[int]:
    remaining = iter(lengths)
    return [sum(-(-length // alignment) * alignment for length in islice(remaining, size)) for size in group_sizes]


def _refuse_oversized(lengths: Sequence[int], costs: Sequence[int], budget: int) -> None:
    index = max(range(len(costs)), key=costs.__getitem__, default=None)
    if index is not None and costs[index] > budget:
        over = sum(cost > budget for cost in costs)
        raise ValueError(
            f"sequence {index} has {lengths[index]} tokens ({costs[index]} with padding), over the budget of "
            f"trainer.tokens_per_microbatch={budget} ({over} of {len(costs)} sequences are): raise it to at least "
            f"{costs[index]}, or lower rollout.max_response_tokens or data.max_prompt_tokens"
        )


def _spread(most_work_first: Sequence[int], work: Sequence[int], parts: int) -> list[list[int]]:
    """Assign each sequence to the part with the least work (on ties, the fewest sequences)."""
    loads = [(0, 0, part) for part in range(parts)]
    members: list[list[int]] = [[] for _ in range(parts)]
    for index in most_work_first:
        load, held, part = heappop(loads)
        members[part].append(index)
        heappush(loads, (load + work[index], held + 1, part))
    return members


def _pack(
    most_work_first: Sequence[int], costs: Sequence[int], work: Sequence[int], count: int, budget: int
) -> list[list[int]] | None:
    """Pack a rank's sequences into `count` micro-batches: balanced if that fits, else longest first, else None."""
    even = _spread(most_work_first, work, count)
    if all(sum(costs[index] for index in members) <= budget for members in even):
        return even
    room = [budget] * count
    tight: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(most_work_first, key=lambda index: (-costs[index], index)):
        slot = next((slot for slot in range(count) if costs[index] <= room[slot]), None)
        if slot is None:
            return None
        room[slot] -= costs[index]
        tight[slot].append(index)
    return tight
