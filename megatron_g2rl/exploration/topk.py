"""Φ from the rollout engine's top-K log-probs: no forward pass of the training model, no logits, no hidden states.

φ_t = W^T (e(y_t) - p_t) needs all of p_t, but the rollout engine returns only its K largest entries and that of the
sampled token. The missing mass, r_t = 1 - Σ p_k, has to be distributed over the other rows of W. It follows the sampled
tokens: whenever y_t is outside the top K, it is a draw from exactly the missing distribution, so the counts of such
tokens over all responses of the call are an unbiased estimate of the pooled tail Σ_t r_t tail_t. The missing mass of a
token is distributed in proportion to that pool, over the rows whose probability is not known. The coefficients of a
token still add up to zero, like those of φ_t: adding one vector to all rows of W changes nothing, which is not true
when the missing mass is dropped.

The error of Φ is at most (mean r_t) times the largest distance between two rows of W, and zero if K = V. If the pool
contains no rows beyond those known for a token, the token's missing mass is dropped.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_ROWS = 16_384
"""Rows of the output embedding that are converted to float32 at a time."""
CHUNK_ENTRIES = 1 << 22
"""Top-K entries that are sorted at a time."""
KNOWN = 1 - 1e-6
"""If the known rows of a token cover this fraction of the pool, nothing is left to distribute its missing mass over."""
MASS_TOLERANCE = 1e-2
"""The probabilities of a token may exceed a sum of 1 by this: rollout engines round log-probs to half precision."""


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
        top_ids: global ids of the K most probable tokens, in any order; -1 marks an absent entry, and a repeated id
            counts once. Do not include a sampled token that is not among the K (vLLM lists it first): pass
            `target_logprobs`.
        top_logprobs: their log-probs (nats) under the full softmax at the sampling temperature, not renormalized.
        targets: the sampled tokens, global ids.
        weight: this rank's rows of the output embedding.
        response_index: index of the response that a token belongs to; -1: not a response token.
        num_responses: R.
        target_logprobs: log-probs of `targets`, used where they are not in the top K. None: their mass there counts as
            missing.
        token_weights: a_t; 1 when None.
        vocab_start: global id of this rank's first row.
        vocab_size: true vocabulary size; rows beyond it are padding. None: no padding.
        tp_group: ranks that hold the other rows; all of them must pass the same tokens.
        reduce_group: ranks over which tokens are summed: tp_group and the ranks that hold other tokens of the same
            call. None: tp_group.

    Returns:
        Φ [R, H], float32 (float64 for a float64 weight), the same on every rank of `reduce_group`. A response without
        tokens has Φ = 0.

    Raises:
        ValueError: shapes disagree, or the probabilities of a token sum to more than 1 (as log-probs of another
            temperature, or renormalized ones, do).

    Source: docs/method.md, section 1; how the missing mass is distributed is derived in docs/internals/topk.md.
    """
    _check(top_ids, top_logprobs, targets, response_index)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    vocabulary = vocab_size if vocab_size is not None else weight.shape[0] * _size(tp_group)
    reduce_group = reduce_group if reduce_group is not None else tp_group
    chosen = (response_index >= 0).nonzero().squeeze(1)
    owner, sampled = response_index[chosen], targets[chosen].long()
    weights = torch.ones_like(owner, dtype=dtype) if token_weights is None else token_weights[chosen].to(dtype)

    outside = ~(top_ids[chosen] == sampled[:, None]).any(1)
    pool = torch.zeros(vocabulary, dtype=dtype, device=weight.device)
    pool.index_add_(0, sampled, weights * outside)
    _all_reduce(pool, reduce_group)
    pool /= pool.sum().clamp(min=torch.finfo(dtype).tiny)

    # c - P over this rank's rows; the last column collects the entries of other ranks' rows.
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
        scale = weights[part] * torch.where(left > 1 - KNOWN, missing / left, 0)
        add(owner[part, None], ids, scale[:, None] * known - weights[part, None] * mass)
        spread.index_add_(0, owner[part], scale)
    add(owner, sampled, weights)
    balance = balance[:, :rows].addr_(spread, pool[vocab_start : vocab_start + rows], alpha=-1)

    # One collective: the total weight A is the last column. All ranks of tp_group see all tokens, so one adds it.
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
    """Known (ids, probabilities) at each position: the sampled token included, probability 0 for repeated ids."""
    ids, mass = top_ids.long(), top_logprobs.to(dtype).exp()
    if target_logprobs is not None:
        ids = torch.cat([ids, targets[:, None].long()], 1)
        mass = torch.cat([mass, target_logprobs[:, None].to(dtype).exp()], 1)
    # Stable: of a repeated id the first entry counts, which is the rollout engine's own.
    ids, order = ids.sort(dim=1, stable=True)
    mass = mass.gather(1, order).masked_fill(ids < 0, 0)
    mass[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1], 0)
    total = mass.sum(1)
    # Not `(total > ...).any()`: NaN has to fail too.
    if not (total <= 1 + MASS_TOLERANCE).all():
        raise ValueError(
            f"the probabilities of a token's top {top_ids.shape[1]} sum to {total.nan_to_num(torch.inf).max():.3f}: "
            "pass natural-log probabilities of the full softmax at the sampling temperature"
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
