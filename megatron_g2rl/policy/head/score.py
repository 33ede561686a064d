"""The head of the old-log-prob pass: log-probs, entropy and the feature Φ of every response in one sweep, no gradients.

Φ (docs/method.md, section 1) needs sum_t a_t p_t per response. With e = exp(z - max) and Z its sum, that is the product
of the vector [a_t / Z_t] with e, which is already computed for the log-probs: one more read of the tiles, no second
product with the vocabulary per token. In addition, the call needs one [responses, V] x [V, H] product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rl.policy.head.device_timer import DeviceTimer
from megatron_g2rl.policy.head.features import features_from_counts, timed
from megatron_g2rl.policy.head.prior import DEFAULT_PRIOR_TOLERANCE, ExpectedCounts, sweep_from_prior
from megatron_g2rl.policy.head.products import Products, accumulation_dtype
from megatron_g2rl.policy.head.softmax import RunningSoftmax
from megatron_g2rl.policy.head.sweep import sweep, true_rows
from megatron_g2rl.policy.head.tiles import (
    DEFAULT_CHUNK_TOKENS,
    Tiles,
    consecutive_runs,
    prior_tiles,
    runs_in_tiles,
    score_tiles,
    slices,
    update_tiles,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int


Kernel = Literal["torch", "triton", "triton_deterministic"]


@dataclass(frozen=True)
class TokenScores:
    """Result of the old-log-prob pass."""

    logprobs: Float[Tensor, "tokens"]
    """Log-prob of the target (nats, float32); 0 where the token is not a response token."""
    entropy: Float[Tensor, "tokens"]
    """Entropy of the full-vocabulary distribution (nats, float32); 0 where the token is not a response token."""
    features: Float[Tensor, "responses hidden"] | None
    """Φ of each response (float32)."""
    swept_again: Int[Tensor, ""] | None = None
    """Number of tokens whose prior deviated by more than the tolerance; None if no prior was used."""
    hidden_sums: Float[Tensor, "responses hidden"] | None = None
    """Sums of the hidden states of each response over this rank's tokens (float32); only from a model's head."""


@torch.no_grad()
def score_tokens(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab_local hidden"],
    targets: Int[Tensor, "tokens"],
    response_index: Int[Tensor, "tokens"],
    num_responses: int,
    *,
    temperature: float = 1.0,
    token_weights: Float[Tensor, "tokens"] | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    reduce_group: dist.ProcessGroup | None = None,
    features: bool = True,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    timer: DeviceTimer | None = None,
    runs: Sequence[tuple[int, int]] | None = None,
    prior_logprobs: Float[Tensor, "tokens"] | None = None,
    prior_tolerance: float = DEFAULT_PRIOR_TOLERANCE,
    kernel: Kernel = "torch",
) -> TokenScores:
    """Log-prob and entropy of every response token and Φ of every response, in one sweep over the tokens.

    Φ_i = (c_i - P_i) W / A_i with c_i[v] = sum_t a_t 1{y_t = v}, P_i = sum_t a_t p_t, A_i = sum_t a_t
    (docs/method.md, section 1). Logits and all values derived from them are float32 regardless of the dtype of the
    weights (float64 for float64).

    Args:
        hidden: output of the final norm at the positions that predict `targets`.
        weight: this rank's rows of the output embedding.
        targets: global token ids; ignored where `response_index` is -1.
        response_index: index of the response of each token, -1 for none. Tokens of a response may be in any order.
        num_responses: R.
        temperature: softmax temperature; the sampling temperature of the rollout engine.
        token_weights: a_t; None: 1.
        vocab_start: global id of this rank's first row.
        vocab_size: true vocabulary size; rows beyond it are padding and are ignored. None: no padding.
        tp_group: ranks that hold the other rows of the vocabulary.
        reduce_group: ranks over which Φ is summed: tp_group and the ranks that hold other tokens of the same responses
            (context parallelism). None: tp_group.
        features: whether to compute Φ.
        chunk_tokens: a third of the memory, in rows of logits: at most three float32 tables of that many rows exist.
        timer: measures the extra time of Φ as `features`, and of its sum over ranks as `reduce_head`.
        runs: (response, number of tokens) for each run of consecutive tokens of one response, if every token belongs to
            a response and the caller knows the runs on the host. None: computed on the device, which the host waits
            for.
        prior_logprobs: log-probs of the targets from elsewhere, such as the rollout engine: `prior` then needs neither
            a maximum nor the exponentials of complete rows. They affect speed and, within the tolerance, Φ; wrong or
            non-finite ones are recognized. None: the exact sweep.
        prior_tolerance: largest relative error of the softmax of a token in Φ that is left uncorrected. 0: the exact
            sweep.
        kernel: `triton`: on a GPU, the sweep from a prior is one Triton kernel; `triton_deterministic`: the same
            without float atomics; `torch`: on a GPU every sweep is exact.

    Returns:
        TokenScores; its features are the same on every rank of `reduce_group`. A response without tokens has Φ = 0.
    """
    dtype = accumulation_dtype(hidden)
    chosen = slice(None) if runs is not None else (response_index >= 0).nonzero().squeeze(1)
    valid = true_rows(weight, vocab_start, vocab_size)
    products = Products(hidden[chosen], weight[:valid], temperature)
    own_targets = targets[chosen]
    count = len(own_targets)
    logprobs = hidden.new_zeros(len(targets), dtype=dtype)
    entropy = torch.zeros_like(logprobs)
    counts = None
    if features:
        with timed(timer, "features"):
            owner = response_index[chosen]
            weights = logprobs.new_ones(count) if token_weights is None else token_weights[chosen].to(dtype)
            runs = consecutive_runs(owner) if runs is None else runs
            balance = logprobs.new_zeros(num_responses, weight.shape[0])
            counts = ExpectedCounts(balance, owner, weights, runs, lambda: timed(timer, "features"))
    swept_again = None
    if prior_logprobs is not None and prior_tolerance > 0 and not (hidden.is_cuda and kernel == "torch"):
        prior = prior_logprobs[chosen].to(dtype)
        where = dict(tolerance=prior_tolerance, vocab_start=vocab_start, group=tp_group)
        if kernel == "torch":
            tiles = prior_tiles(count, valid, chunk_tokens)
            result = sweep_from_prior(products, own_targets, prior, tiles, counts, **where)
        else:
            from megatron_g2rl.policy.head import triton_score

            where |= dict(temperature=temperature, deterministic=kernel == "triton_deterministic")
            operands = hidden[chosen], weight[:valid]
            result = triton_score.sweep_from_prior(*operands, own_targets, prior, counts, **where)
        logprobs[chosen], entropy[chosen], swept_again = result.logprobs, result.entropy, result.swept_again
    elif counts is None:
        state = RunningSoftmax(own_targets, dtype)
        sweep(products, state, vocab_start, update_tiles(count, valid, chunk_tokens, hidden.device))
        logprobs[chosen], entropy[chosen], _ = state.finish(slice(None), tp_group)
    else:
        tiles = score_tiles(count, valid, chunk_tokens, hidden.device)
        values = _sweep_exactly(products, own_targets, tiles, counts, vocab_start, tp_group)
        logprobs[chosen], entropy[chosen] = values
    if counts is None:
        return TokenScores(logprobs, entropy, None, swept_again)
    shard = dict(valid=valid, vocab_start=vocab_start, tp_group=tp_group, reduce_group=reduce_group, timer=timer)
    return TokenScores(logprobs, entropy, features_from_counts(counts, own_targets, weight, **shard), swept_again)


def _sweep_exactly(products, targets, tiles, counts, vocab_start, group) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy) of `targets`, and the expected counts: keeps the exponentials of a row of tiles."""
    state = RunningSoftmax(targets, products.dtype)
    logprobs = torch.empty_like(state.total)
    entropy = torch.empty_like(state.total)
    with counts.measure():
        in_tiles = runs_in_tiles(counts.runs, tiles.rows)
    scratch = _Scratch(tiles, len(products.weight), logprobs.device, products.dtype)
    for at in slices(len(targets), tiles.rows):
        exps = _row_of_tiles(products, state, at, vocab_start, tiles, scratch)
        logprobs[at], entropy[at], log_partition = state.finish(at, group)
        with counts.measure():
            for block, top, exp in exps:
                factor = counts.weights[at] * (top - log_partition).exp()
                for row, span in in_tiles.get(at.start, ()):
                    counts.balance[row, block].addmv_(exp[span].t(), factor[span], alpha=-1)
        del exps  # otherwise two rows of tiles would exist while the next one is computed
    return logprobs, entropy


class _Scratch:
    """Memory for one row of tiles on a CPU, reused for each row of tiles."""

    def __init__(self, tiles: Tiles, vocabulary: int, device: torch.device, dtype: torch.dtype):
        cpu = device.type == "cpu"
        self.logits = torch.empty(tiles.rows * tiles.columns if cpu else 0, dtype=dtype, device=device)
        self.exps = torch.empty(tiles.rows * vocabulary if cpu else 0, dtype=dtype, device=device)

    def take(self, memory: Tensor, start: int, shape: tuple[int, int]) -> Tensor | None:
        return memory[start : start + shape[0] * shape[1]].view(shape) if len(memory) else None


def _row_of_tiles(products, state, at, vocab_start, tiles, scratch) -> list[tuple[slice, Tensor, Tensor]]:
    """[(vocabulary block, maximum that was subtracted before the exponential, exponentials)] of the tokens `at`."""
    exps, tokens = [], at.stop - at.start
    for block in slices(len(products.weight), tiles.columns):
        shape = (tokens, block.stop - block.start)
        work, exp = scratch.take(scratch.logits, 0, shape), scratch.take(scratch.exps, block.start * tokens, shape)
        z = products.logits(at, products.rows(block), work)
        exp = state.add(at, z, vocab_start + block.start, products.scale, work, exp)
        exps.append((block, state.top[at].clone(), exp))
        del z
    return exps
