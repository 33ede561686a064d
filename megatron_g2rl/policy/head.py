"""The language-model head of both passes: log-probs, entropy and the feature Φ, without the logits of a whole batch.

`score_tokens` is the score pass (no gradients, Φ), `token_logprobs` the update pass (gradients). Both take hidden
states and this rank's rows of the output embedding, go over the response tokens in chunks, and share
`_VocabularyShard`, which turns one chunk of hidden states into the softmax quantities of the full vocabulary with two
collectives.

Φ (METHOD equations 5-8) needs sum_t a_t p_t per response. With e = exp(z - max) and Z its sum, that is the product of
the vector [a_t / Z_t] with e, which is already there for the log-probs: one more read of the chunk, no second product
with the vocabulary per token. What is left is one [responses, V] x [V, H] product for the whole call.

`policy.model.LanguageModelHead` calls these functions where the logits would be made.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

DEFAULT_CHUNK_TOKENS = 256
BLOCK_ROWS = 16_384
"""Vocabulary rows that are converted to float32 at a time."""


@dataclass(frozen=True)
class TokenScores:
    """Result of the score pass."""

    logprobs: Float[Tensor, "tokens"]
    """log p of the target (nats, float32); 0 where the token is not a response token."""
    entropy: Float[Tensor, "tokens"]
    """Entropy of the full-vocabulary distribution (nats, float32); 0 where the token is not a response token."""
    features: Float[Tensor, "responses hidden"] | None
    """Φ of each response (float32)."""


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
) -> TokenScores:
    """Log-prob and entropy of every response token and Φ of every response, in one sweep over the tokens.

    Φ_i = (c_i - P_i) W / A_i with c_i[v] = sum_t a_t 1{y_t = v}, P_i = sum_t a_t p_t, A_i = sum_t a_t (METHOD equations
    5-8). Logits are the model's own, in its dtype; everything made of them is accumulated in float32 (float64 for
    float64 input).

    Args:
        hidden: output of the final norm at the positions that predict `targets`.
        weight: this rank's rows of the output embedding.
        targets: global token ids; ignored where `response_index` is -1.
        response_index: which response a token belongs to, -1 for none. Tokens of one response may come in any order.
        num_responses: R.
        temperature: softmax temperature; the sampler's.
        token_weights: a_t; 1 when None.
        vocab_start: global id of this rank's first row.
        vocab_size: true vocabulary size; rows beyond it are padding and take no part. None: no padding.
        tp_group: ranks that hold the other rows of the vocabulary.
        reduce_group: ranks over which Φ is summed: tp_group and the ranks that hold other tokens of the same responses
            (context parallelism). None: tp_group.
        features: whether Φ is wanted.
        chunk_tokens: tokens whose logits exist at the same time.

    Returns:
        TokenScores; its features are the same on every rank of `reduce_group`. A response without tokens has Φ = 0.
    """
    accumulate = _accumulation_dtype(hidden)
    shard = _VocabularyShard(weight, temperature, vocab_start, vocab_size, tp_group)
    chosen = (response_index >= 0).nonzero().squeeze(1)
    logprobs = hidden.new_zeros(len(targets), dtype=accumulate)
    entropy = torch.zeros_like(logprobs)
    owner = response_index[chosen]
    weights = logprobs.new_ones(len(chosen)) if token_weights is None else token_weights[chosen].to(accumulate)
    # c - P: what the response's tokens pulled up minus what the model expected, per vocabulary row.
    balance = logprobs.new_zeros(num_responses if features else 0, weight.shape[0])
    runs = _runs(owner, chunk_tokens) if features else {}
    for part in _chunks(len(chosen), chunk_tokens):
        at = chosen[part]
        chunk = shard.softmax(hidden[at], targets[at])
        logprobs[at], entropy[at] = chunk.logprobs, chunk.entropy
        share = weights[part] / chunk.total
        for row, here in runs.get(part.start, ()):
            balance[row].addmv_(chunk.exp[here].t(), share[here], alpha=-1)
        del chunk  # or two chunks would exist while the next one is made
    if not features:
        return TokenScores(logprobs, entropy, None)
    local, inside = shard.local_ids(targets[chosen])
    balance.index_put_((owner, local), weights * inside, accumulate=True)
    return TokenScores(logprobs, entropy, _features(balance, owner, weights, weight, tp_group, reduce_group))


def _features(balance, owner, weights, weight, tp_group, reduce_group):
    """(c - P) W / A, summed over the ranks of `reduce_group` in one collective that carries A as a last column."""
    result = balance.new_zeros(balance.shape[0], weight.shape[1] + 1)
    result[:, :-1] = _times_rows(balance, weight)
    # Every tensor-parallel rank sees all tokens: only the first may count them.
    if _rank(tp_group) == 0:
        result[:, -1].index_add_(0, owner, weights)
    _all_reduce(result, reduce_group if reduce_group is not None else tp_group)
    total = result[:, -1:]
    return result[:, :-1] / torch.where(total > 0, total, torch.ones_like(total))


def token_logprobs(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab_local hidden"],
    targets: Int[Tensor, "tokens"],
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    with_entropy: bool = False,
    hidden_gradient: Literal["complete", "partial"] = "complete",
) -> Float[Tensor, "tokens"] | tuple[Float[Tensor, "tokens"], Float[Tensor, "tokens"]]:
    """Log-prob of every target, and on request the full-vocabulary entropy, with gradients to `hidden` and `weight`.

    Neither direction holds more than `chunk_tokens` rows of logits: backward computes them again. Both gradients are
    accumulated in float32 whatever the input dtype.

    Args:
        hidden: output of the final norm at the positions that predict `targets`; the same on all ranks of `tp_group`.
        weight: this rank's rows of the output embedding.
        targets: global token ids.
        temperature, vocab_start, vocab_size, tp_group, chunk_tokens: as in `score_tokens`.
        with_entropy: return entropy too.
        hidden_gradient: `complete`: the gradient of `hidden` is summed over `tp_group`; `partial`: it is this rank's
            part, for a caller whose own backward sums (sequence parallelism).

    Returns:
        log-probs (nats, float32), or (log-probs, entropy).
    """
    shard = _VocabularyShard(weight, temperature, vocab_start, vocab_size, tp_group)
    complete = hidden_gradient == "complete"
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, targets, shard, chunk_tokens, complete)
    return (logprobs, entropy) if with_entropy else logprobs


@dataclass
class _Softmax:
    """Softmax quantities of one chunk: exp [tokens, vocab_local] is this rank's part, the rest is global."""

    exp: Tensor
    total: Tensor
    logprobs: Tensor
    entropy: Tensor
    log_partition: Tensor


class _VocabularyShard:
    """This rank's rows of the output embedding, and how to reach the others."""

    def __init__(self, weight, temperature, vocab_start, vocab_size, group):
        self.weight, self.temperature, self.group = weight, temperature, group
        self.start, self.rows = vocab_start, weight.shape[0]
        self.valid = self.rows if vocab_size is None else min(max(vocab_size - vocab_start, 0), self.rows)

    def logits(self, hidden):
        """[tokens, rows] in the accumulation dtype, divided by the temperature; padding rows are -inf."""
        logits = (hidden @ self.weight.t()).to(_accumulation_dtype(hidden))
        if self.temperature != 1.0:
            logits /= self.temperature
        logits[:, self.valid :] = -torch.inf
        return logits

    def local_ids(self, targets):
        """(row of the target on this rank, whether it is on this rank)."""
        local = targets - self.start
        inside = (local >= 0) & (local < self.valid)
        return local.clamp(0, self.rows - 1), inside

    def softmax(self, hidden, targets) -> _Softmax:
        """Two collectives: the maximum, and one packed sum."""
        logits = self.logits(hidden)
        top = logits.amax(1)
        _all_reduce(top, self.group, dist.ReduceOp.MAX)
        logits -= top[:, None]
        local, inside = self.local_ids(targets)
        target = logits.gather(1, local[:, None]).squeeze(1).masked_fill(~inside, 0.0)
        # Padding is -inf: the products below need 0 there, and exp(-inf) is 0.
        shifted = logits[:, : self.valid]
        exp = logits.exp()
        first_moment = torch.einsum("tv,tv->t", exp[:, : self.valid], shifted)
        sums = torch.stack([exp.sum(1), first_moment, target])
        _all_reduce(sums, self.group)
        total, first_moment, target = sums
        log_total = total.log()
        return _Softmax(exp, total, target - log_total, log_total - first_moment / total, top + log_total)


class _TokenLogprobs(torch.autograd.Function):
    """Chunked log-probs and entropy; backward recomputes each chunk's logits.

    With p the softmax and H its entropy: d logp(y) / d z = 1{y} - p and dH / d z = -p (log p + H).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, shard, chunk_tokens, reduce_hidden):
        dtype = _accumulation_dtype(hidden)
        logprobs = hidden.new_empty(len(targets), dtype=dtype)
        entropy, log_partition = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for at in _chunks(len(targets), chunk_tokens):
            chunk = shard.softmax(hidden[at], targets[at])
            logprobs[at], entropy[at], log_partition[at] = chunk.logprobs, chunk.entropy, chunk.log_partition
            del chunk
        ctx.save_for_backward(hidden, weight, targets, entropy, log_partition)
        ctx.shard, ctx.chunk_tokens, ctx.reduce_hidden = shard, chunk_tokens, reduce_hidden
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, entropy, log_partition = ctx.saved_tensors
        shard, dtype = ctx.shard, entropy.dtype
        grad_hidden = torch.zeros_like(hidden, dtype=dtype)
        grad_weight = torch.zeros_like(weight, dtype=dtype)
        for at in _chunks(len(targets), ctx.chunk_tokens):
            logp = shard.logits(hidden[at]).sub_(log_partition[at, None])
            grad_logits = logp.exp()
            # logp is -inf on padding rows, where p is 0: the entropy term must not become 0 * inf.
            pull = logp[:, : shard.valid].add_(entropy[at, None]).mul_(grad_entropy[at, None])
            grad_logits[:, : shard.valid] *= pull.add_(grad_logprobs[at, None]).neg_()
            del logp, pull
            local, inside = shard.local_ids(targets[at])
            grad_logits.scatter_add_(1, local[:, None], (grad_logprobs[at] * inside)[:, None])
            if shard.temperature != 1.0:
                grad_logits /= shard.temperature
            grad_hidden[at] = _times_rows(grad_logits, weight)
            grad_weight.addmm_(grad_logits.t(), hidden[at].to(dtype))
            del grad_logits
        if ctx.reduce_hidden:
            _all_reduce(grad_hidden, shard.group)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None, None, None, None


def _runs(owner: Int[Tensor, "tokens"], chunk_tokens: int) -> dict[int, list[tuple[int, slice]]]:
    """First token of a chunk -> (response, place in the chunk) of each run of tokens of one response; one sync."""
    rows, lengths = torch.unique_consecutive(owner, return_counts=True)
    runs, start = defaultdict(list), 0
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        end = start + length
        while start < end:
            chunk = start // chunk_tokens * chunk_tokens
            stop = min(end, chunk + chunk_tokens)
            runs[chunk].append((row, slice(start - chunk, stop - chunk)))
            start = stop
    return runs


def _chunks(count: int, size: int):
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def _times_rows(left: Tensor, weight: Tensor) -> Tensor:
    """left [n, V] @ weight [V, H] in left's dtype; a weight of lower precision is converted a block at a time."""
    if left.dtype == weight.dtype:
        return left @ weight
    result = left.new_zeros(left.shape[0], weight.shape[1])
    for part in _chunks(weight.shape[0], BLOCK_ROWS):
        result.addmm_(left[:, part], weight[part].to(left.dtype))
    return result


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rank(group) -> int:
    return 0 if group is None else dist.get_rank(group)


def _all_reduce(x: Tensor, group, op=dist.ReduceOp.SUM) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(x, op=op, group=group)
