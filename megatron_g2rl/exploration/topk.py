"""Φ from the sampler's own top-K log-probs: no forward pass of the training model, no logits, no hidden states.

φ_t = W^T (e(y_t) - p_t) needs all of p_t, and the sampler tells its K largest entries and that of the drawn token. What
they miss, r_t = 1 - Σ p_k, has to be spread over the other rows of W. It is spread as the drawn tokens are: wherever
y_t lies outside the top K it is a draw from the very distribution that is missing, so the counts of such tokens, over
all responses of the call, are an unbiased picture of the pooled tail Σ_t r_t tail_t. Each token takes its share of that
pool without the rows it knows already. The coefficients of a token still add up to zero, as those of φ_t do: adding one
vector to all rows of W changes nothing, which is not true when the missing mass is dropped.

The error of Φ is at most (mean r_t) times the largest distance between two rows of W, and zero where K = V. Where the
pool holds nothing that a token does not know already, its missing mass is dropped.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_ROWS = 16_384
"""Rows of the output embedding that are converted to float32 at a time."""
CHUNK_ENTRIES = 1 << 22
"""Entries of the top-K that are sorted at a time."""
KNOWN = 1 - 1e-6
"""A token that knows this share of the pool has nothing left of it to spread its missing mass over."""
MASS_TOLERANCE = 1e-2
"""Probabilities of a token may add up to this much more than 1: samplers round log-probs to half precision."""


@torch.no_grad()
def features_from_topk(
    top_ids: Int[Tensor, "tokens top"],
    top_logprobs: Float[Tensor, "tokens top"],
    targets: Int[Tensor, "tokens"],
    weight: Float[Tensor, "vocab_local hidden"],
    response_index: Int[Tensor, "tokens"],
    num_responses: int,
    *,
    target_logprobs: Float[Tensor, "tokens"] | None = None,
    token_weights: Float[Tensor, "tokens"] | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    reduce_group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "responses hidden"]:
    """Φ of every response, estimated from the K most probable tokens at each of its positions.

    Args:
        top_ids: global ids of the K most probable tokens, in any order; an entry of -1 is absent, a repeated one counts
            once. A drawn token that is not one of the K does not belong here (vLLM lists it first): see
            `target_logprobs`.
        top_logprobs: their log-probs (nats) under the full softmax at the sampling temperature, not renormalised.
        targets: the drawn tokens, global ids.
        weight: this rank's rows of the output embedding.
        response_index: which response a token belongs to, -1 for none.
        num_responses: R.
        target_logprobs: log-probs of `targets`, for where they are not in the top K. None: they have no mass of their
            own there, and it counts as missing.
        token_weights: a_t; 1 when None.
        vocab_start: global id of this rank's first row.
        vocab_size: true vocabulary size; rows beyond it are padding. None: no padding.
        tp_group: ranks that hold the other rows; all of them are given the same tokens.
        reduce_group: ranks over which tokens are summed: tp_group and the ranks that hold other tokens of the same
            call. None: tp_group.

    Returns:
        Φ [R, H], float32 (float64 for a float64 weight), the same on every rank of `reduce_group`. A response without
        tokens has Φ = 0.

    Raises:
        ValueError: shapes disagree, or the probabilities of a token add up to more
            than 1 (log-probs of another temperature, or renormalised ones, are no log-probs of the sampler).

    Source: docs/method.md, section 1; the spread of the missing mass is derived in docs/internals/topk.md.
    """
    _check(top_ids, top_logprobs, targets, response_index)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    vocabulary = vocab_size if vocab_size is not None else weight.shape[0] * _size(tp_group)
    reduce_group = reduce_group if reduce_group is not None else tp_group
    chosen = (response_index >= 0).nonzero().squeeze(1)
    owner, drawn = response_index[chosen], targets[chosen].long()
    weights = torch.ones_like(owner, dtype=dtype) if token_weights is None else token_weights[chosen].to(dtype)

    outside = ~(top_ids[chosen] == drawn[:, None]).any(1)
    pool = torch.zeros(vocabulary, dtype=dtype, device=weight.device)
    pool.index_add_(0, drawn, weights * outside)
    _all_reduce(pool, reduce_group)
    pool /= pool.sum().clamp(min=torch.finfo(dtype).tiny)

    # c - P over this rank's rows; a last column takes what belongs to the rows of other ranks.
    rows = min(max(vocabulary - vocab_start, 0), weight.shape[0])
    balance = torch.zeros(num_responses, rows + 1, dtype=dtype, device=weight.device)
    spread = torch.zeros(num_responses, dtype=dtype, device=weight.device)

    def add(responses, ids, values):
        local = ids - vocab_start
        local = torch.where((local >= 0) & (local < rows), local, rows)
        balance.view(-1).index_add_(0, (responses * (rows + 1) + local).flatten(), values.flatten())

    for part in torch.arange(len(chosen), device=chosen.device).split(max(1, CHUNK_ENTRIES // (top_ids.shape[1] + 1))):
        at = chosen[part]
        ids, mass = _known(top_ids[at], top_logprobs[at], targets[at], _rows(target_logprobs, at), dtype)
        known = pool[ids] * (mass > 0)
        left, missing = 1 - known.sum(1), (1 - mass.sum(1)).clamp(min=0)
        share = weights[part] * torch.where(left > 1 - KNOWN, missing / left, 0)
        add(owner[part, None], ids, share[:, None] * known - weights[part, None] * mass)
        spread.index_add_(0, owner[part], share)
    add(owner, drawn, weights)
    balance = balance[:, :rows].addr_(spread, pool[vocab_start : vocab_start + rows], alpha=-1)

    # One collective; A travels as a last column, and only one rank of tp_group, which all see all tokens, counts it.
    result = torch.zeros(num_responses, weight.shape[1] + 1, dtype=dtype, device=weight.device)
    for start in range(0, rows, BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, rows)
        result[:, :-1].addmm_(balance[:, start:end], weight[start:end].to(dtype))
    if tp_group is None or dist.get_rank(tp_group) == 0:
        result[:, -1].index_add_(0, owner, weights)
    _all_reduce(result, reduce_group)
    total = result[:, -1:]
    return result[:, :-1] / torch.where(total > 0, total, 1)


def _known(top_ids, top_logprobs, targets, target_logprobs, dtype):
    """(ids, probabilities) that are known of each token: the drawn one added where it is not there, repeated ones 0."""
    ids, mass = top_ids.long(), top_logprobs.to(dtype).exp()
    if target_logprobs is not None:
        ids = torch.cat([ids, targets[:, None].long()], 1)
        mass = torch.cat([mass, target_logprobs[:, None].to(dtype).exp()], 1)
    # Stable: of a repeated id the first one counts, which is the sampler's own entry.
    ids, order = ids.sort(dim=1, stable=True)
    mass = mass.gather(1, order).masked_fill(ids < 0, 0)
    mass[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1], 0)
    total = mass.sum(1)
    # Written so that NaN fails too.
    if not (total <= 1 + MASS_TOLERANCE).all():
        raise ValueError(
            f"the probabilities of a token's top {top_ids.shape[1]} add up to {total.nan_to_num(torch.inf).max():.3f}: "
            "they must be natural-log probabilities of the full softmax at the sampling temperature"
        )
    return ids.clamp(min=0), mass


def _check(top_ids, top_logprobs, targets, response_index):
    tokens = len(targets)
    if top_ids.ndim != 2 or top_ids.shape != top_logprobs.shape or len(top_ids) != tokens:
        raise ValueError(
            f"top_ids and top_logprobs must be [{tokens}, K], got {list(top_ids.shape)} and {list(top_logprobs.shape)}"
        )
    if response_index.shape != targets.shape:
        raise ValueError(f"response_index must be [{tokens}], got {list(response_index.shape)}")


def _rows(values, at):
    return None if values is None else values[at]


def _size(group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _all_reduce(x: Tensor, group) -> None:
    if _size(group) > 1:
        dist.all_reduce(x, group=group)
