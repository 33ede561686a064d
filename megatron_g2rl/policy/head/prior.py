"""The head of the old-log-prob pass in one sweep, given the log-probs that the rollout engine has reported.

Φ needs softmax probabilities, whose partition sum is known only after the whole vocabulary. The rollout engine's
log-prob l_t of the target gives it in advance, up to the mismatch of engine and trainer (docs/method.md, section 7):

    prior_t = z_t[y_t] - l_t,    e_tv = exp(z_tv - prior_t),    s_t = sum_v e_tv,    Q_i = sum_{t in i} a_t e_t

s_t measures the error of the prior: log Z_t = prior_t + log s_t is exact, and so are log-probs and entropy. Q_i is
corrected for the tokens where s_t deviates from 1 by more than a tolerance; the others contribute at most
sum_t a_t |s_t - 1| to |Q_i - P_i|_1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rl.policy.head.products import Products
from megatron_g2rl.policy.head.softmax import RunningSoftmax, all_reduce, within
from megatron_g2rl.policy.head.sweep import sweep
from megatron_g2rl.policy.head.tiles import CPU_TILE, Tiles, consecutive_runs, runs_in_tiles, slices

if TYPE_CHECKING:
    from jaxtyping import Float, Int

DEFAULT_PRIOR_TOLERANCE = 1e-3
FAR_NATS = 30.0
"""A partition sum further than this from the prior is computed again with a running maximum: it may have overflowed."""
LARGEST_SUM = 8.0
"""A token with a larger partition sum leaves rounding errors in Q of its response, which is then computed again."""


@dataclass
class ExpectedCounts:
    """Accumulates -sum_t a_t p_t of each response in `balance`."""

    balance: Float[Tensor, "responses rows"]
    """c - P: weighted count of the response's tokens minus the count expected by the model, per vocabulary row."""
    owner: Int[Tensor, "tokens"]
    """Index of the response of each token."""
    weights: Float[Tensor, "tokens"]
    """a_t."""
    runs: Sequence[tuple[int, int]]
    """(response, number of tokens) of each run of consecutive tokens of one response."""
    measure: Callable[[], AbstractContextManager]
    """Measures the time that is spent on them."""


@dataclass(frozen=True)
class PriorScores:
    """Statistics of the tokens of one call."""

    logprobs: Float[Tensor, "tokens"]
    entropy: Float[Tensor, "tokens"]
    swept_again: int
    """Number of tokens whose exponentials were computed twice for the expected counts."""


def sweep_from_prior(
    products: Products,
    targets: Int[Tensor, "tokens"],
    prior_logprobs: Float[Tensor, "tokens"],
    tiles: Tiles,
    counts: ExpectedCounts | None,
    *,
    tolerance: float,
    vocab_start: int,
    group: dist.ProcessGroup | None,
) -> PriorScores:
    """Log-probs and entropy of `targets`, and the expected counts if requested; two collectives.

    Two more collectives follow if a prior is further than `FAR_NATS` from the truth on any token; all ranks of `group`
    see the same partition sums and agree on it.

    Args:
        products: hidden states and this rank's rows of the vocabulary, without padding.
        targets: global token ids.
        prior_logprobs: log-probs of `targets` according to the rollout engine; any numbers, also non-finite ones.
        tiles: sizes of the tiles.
        counts: where to add the expected counts; None: they are not needed.
        tolerance: largest deviation from 1 of a partition sum whose token is not swept again.
        vocab_start: global id of this rank's first row.
        group: ranks that hold the other rows of the vocabulary.
    """
    target_logits = _target_logits(products, targets, vocab_start)
    all_reduce(target_logits, group)
    prior = target_logits - prior_logprobs
    # Exponentials of an unusable prior are all 0, which is handled like any other prior that is far off.
    prior = torch.where(prior.isfinite(), prior, torch.finfo(prior.dtype).max / 4)
    sums = torch.zeros(2, len(targets), dtype=prior.dtype)
    _add_tiles(products, prior, tiles, sums, counts and counts.weights, counts)
    all_reduce(sums, group)
    total, moment = sums
    log_total = total.log()
    log_partition = prior + log_total
    logprobs = (target_logits - prior) - log_total
    entropy = log_total - moment / total
    far = (~(log_total.abs() <= FAR_NATS)).nonzero().squeeze(1)
    if len(far):
        state = RunningSoftmax(targets[far], prior.dtype)
        sweep(products.select(far), state, vocab_start, tiles)
        logprobs[far], entropy[far], log_partition[far] = state.finish(slice(None), group)
    swept_again = 0 if counts is None else _correct(products, log_partition, total, tiles, counts, tolerance)
    return PriorScores(logprobs, entropy, swept_again)


def _target_logits(products: Products, targets: Tensor, vocab_start: int) -> Float[Tensor, "tokens"]:
    """Logits of the targets in this rank's part of the vocabulary, 0 for the others; a block of tokens at a time."""
    result = torch.zeros(len(targets), dtype=products.dtype)
    if not len(products.weight):
        return result
    local, inside = within(targets, vocab_start, len(products.weight))
    for at in slices(len(targets), max(1, CPU_TILE // products.hidden.shape[1])):
        rows = products.weight.index_select(0, local[at]).to(products.operand_dtype)
        result[at] = torch.linalg.vecdot(products.hidden[at], rows)
    return result * products.scale * inside


def _add_tiles(
    products: Products,
    prior: Float[Tensor, "tokens"],
    tiles: Tiles,
    sums: Float[Tensor, "2 tokens"] | None,
    weights: Float[Tensor, "tokens"] | None,
    counts: ExpectedCounts | None,
) -> None:
    """Add exp(z - prior) and its product with z - prior to `sums`, and minus its weighted column sums to `counts`.

    Nothing larger than two tiles exists at a time, and each row of the weight is read once per row of tiles.
    """
    tokens, runs = len(prior), {} if counts is None else runs_in_tiles(counts.runs, tiles.rows)
    scratch = torch.empty(2, min(tokens, tiles.rows) * tiles.columns, dtype=products.dtype)
    for block in slices(len(products.weight), tiles.columns):
        rows = products.rows(block)
        for at in slices(tokens, tiles.rows):
            shape = (at.stop - at.start, block.stop - block.start)
            work, exp = (part[: shape[0] * shape[1]].view(shape) for part in scratch)
            shifted = products.logits(at, rows, work)
            shifted -= prior[at, None]
            torch.exp(shifted, out=exp)
            if sums is not None:
                sums[0, at] += exp.sum(1)
                sums[1, at] += torch.linalg.vecdot(exp, shifted)
            if counts is not None:
                with counts.measure():
                    factor = weights[at]
                    for row, span in runs.get(at.start, ()):
                        counts.balance[row, block].addmv_(exp[span].t(), factor[span], alpha=-1)


def _correct(
    products: Products,
    log_partition: Float[Tensor, "tokens"],
    total: Float[Tensor, "tokens"],
    tiles: Tiles,
    counts: ExpectedCounts,
    tolerance: float,
) -> int:
    """Replace a_t s_t p_t by a_t p_t where |s_t - 1| is above `tolerance`; returns the number of these tokens."""
    with counts.measure():
        weights = counts.weights * (1 - total)
        again = ~((total - 1).abs() <= tolerance)
        overflowed = ~(total <= LARGEST_SUM)
        if overflowed.any():
            rows = counts.owner[overflowed].unique()
            counts.balance[rows] = 0
            emptied = torch.isin(counts.owner, rows)
            weights = torch.where(emptied, counts.weights, weights)
            again |= emptied
        indices = again.nonzero().squeeze(1)
    for part in indices.split(tiles.rows):
        owner = counts.owner[part]
        rest = ExpectedCounts(counts.balance, owner, weights[part], consecutive_runs(owner), counts.measure)
        _add_tiles(products.select(part), log_partition[part], tiles, None, rest.weights, rest)
    return len(indices)
