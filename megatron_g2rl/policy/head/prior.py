"""The head of the old-log-prob pass in one sweep, given the log-probs that the rollout engine has reported.

Φ needs softmax probabilities, whose partition sum is known only after the full vocabulary. The rollout engine's
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
    from jaxtyping import Bool, Float, Int

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
    swept_again: Int[Tensor, ""]
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
    own_logits = target_logits(products, targets, vocab_start)
    all_reduce(own_logits, group)
    prior = usable_prior(own_logits, prior_logprobs)
    sums = torch.zeros(2, len(targets), dtype=prior.dtype)
    _add_tiles(products, prior, tiles, sums, counts and counts.weights, counts)
    all_reduce(sums, group)
    total, moment = sums
    log_total = total.log()
    log_partition = prior + log_total
    logprobs = (own_logits - prior) - log_total
    entropy = log_total - moment / total
    far = is_far(log_total).nonzero().squeeze(1)
    if len(far):
        state = RunningSoftmax(targets[far], prior.dtype)
        # Its exponentials take as much memory as its logits.
        sweep(products.select(far), state, vocab_start, Tiles(max(1, tiles.rows // 2), tiles.columns))
        logprobs[far], entropy[far], log_partition[far] = state.finish(slice(None), group)
    swept_again = 0 if counts is None else _correct(products, log_partition, total, tiles, counts, tolerance)
    return PriorScores(logprobs, entropy, torch.tensor(swept_again))


def usable_prior(
    target_logits: Float[Tensor, "tokens"], prior_logprobs: Float[Tensor, "tokens"]
) -> Float[Tensor, "tokens"]:
    """prior_t of each token; huge if the log-prob is not finite: all exponentials are 0, and `is_far` detects it."""
    prior = target_logits - prior_logprobs
    return torch.where(prior.isfinite(), prior, torch.finfo(prior.dtype).max / 4)


def is_far(log_total: Float[Tensor, "tokens"]) -> Bool[Tensor, "tokens"]:
    """Tokens whose sums are not reliable; also those whose sums are NaN."""
    return ~(log_total.abs() <= FAR_NATS)


def correction(
    total: Float[Tensor, "tokens"], counts: ExpectedCounts, tolerance: float
) -> tuple[Bool[Tensor, "tokens"], Float[Tensor, "tokens"], Bool[Tensor, "responses"]]:
    """What the expected counts still need after the sweep: a_t s_t p_t of some tokens has to become a_t p_t.

    Returns:
        The tokens to sweep again, the weight of their softmax, and the responses whose counts must be set to zero
        first, because s_t has overflowed. Does not make the host wait for the device.
    """
    emptied = torch.zeros(len(counts.balance), device=total.device)
    overflowed = (~(total <= LARGEST_SUM)).to(emptied)
    emptied = emptied.index_add_(0, counts.owner, overflowed) > 0
    restarted = emptied.index_select(0, counts.owner)
    weights = torch.where(restarted, counts.weights, counts.weights * (1 - total))
    return restarted | ~((total - 1).abs() <= tolerance), weights, emptied


def target_logits(products: Products, targets: Tensor, vocab_start: int) -> Float[Tensor, "tokens"]:
    """Logits of the targets in this rank's part of the vocabulary, 0 for the others; a block of tokens at a time."""
    result = torch.zeros(len(targets), dtype=products.dtype, device=targets.device)
    if not len(products.weight):
        return result
    local, inside = within(targets, vocab_start, len(products.weight))
    for at in slices(len(targets), max(1, CPU_TILE // products.hidden.shape[1])):
        rows = products.weight.index_select(0, local[at]).to(products.dtype)
        result[at] = torch.linalg.vecdot(products.hidden[at].to(products.dtype), rows)
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

    A tile of logits and a strip of its exponentials exist at a time; the weight is read once per row of tiles.
    """
    tokens, runs = len(prior), {} if counts is None else runs_in_tiles(counts.runs, tiles.strip)
    logits, exponentials = (
        torch.empty(min(tokens, rows) * tiles.columns, dtype=products.dtype) for rows in (tiles.rows, tiles.strip)
    )
    for block in slices(len(products.weight), tiles.columns):
        rows = products.rows(block)
        for at in slices(tokens, tiles.rows):
            tile = products.logits(at, rows, _view(logits, at, block))
            for part in slices(len(tile), tiles.strip):
                strip = slice(at.start + part.start, at.start + part.stop)
                shifted = tile[part]
                shifted -= prior[strip, None]
                exp = torch.exp(shifted, out=_view(exponentials, part, block))
                if sums is not None:
                    sums[0, strip] += exp.sum(1)
                    sums[1, strip] += torch.linalg.vecdot(exp, shifted)
                if counts is not None:
                    with counts.measure():
                        factor = weights[strip]
                        for row, span in runs.get(strip.start, ()):
                            counts.balance[row, block].addmv_(exp[span].t(), factor[span], alpha=-1)


def _view(memory: Tensor, tokens: slice, block: slice) -> Tensor:
    """The first part of `memory` as a table [tokens, block]."""
    shape = (tokens.stop - tokens.start, block.stop - block.start)
    return memory[: shape[0] * shape[1]].view(shape)


def _correct(
    products: Products,
    log_partition: Float[Tensor, "tokens"],
    total: Float[Tensor, "tokens"],
    tiles: Tiles,
    counts: ExpectedCounts,
    tolerance: float,
) -> int:
    """Sweep the tokens again that miss by more than `tolerance`; returns their number."""
    with counts.measure():
        again, weights, emptied = correction(total, counts, tolerance)
        counts.balance[emptied] = 0
        indices = again.nonzero().squeeze(1)
    for part in indices.split(tiles.rows):
        owner = counts.owner[part]
        rest = ExpectedCounts(counts.balance, owner, weights[part], consecutive_runs(owner), counts.measure)
        _add_tiles(products.select(part), log_partition[part], tiles, None, rest.weights, rest)
    return len(indices)
