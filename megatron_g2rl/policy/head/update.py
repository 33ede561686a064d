"""The head of the update pass: log-probs and entropy with gradients to the hidden states and the output embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rl.policy.head.products import Products
from megatron_g2rl.policy.head.softmax import RunningSoftmax, all_reduce, logits_gradient, within
from megatron_g2rl.policy.head.sweep import sweep, true_rows
from megatron_g2rl.policy.head.tiles import DEFAULT_CHUNK_TOKENS, slices, update_tiles
from megatron_g2rl.policy.head.update_features import UpdateFeatures

if TYPE_CHECKING:
    from jaxtyping import Float, Int


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
    main_grad: Float[Tensor, "vocab_local hidden"] | None = None,
    features: UpdateFeatures | None = None,
) -> Float[Tensor, "tokens"] | tuple[Float[Tensor, "tokens"], Float[Tensor, "tokens"]]:
    """Log-prob of every target, and optionally the full-vocabulary entropy, with gradients to `hidden` and `weight`.

    Neither direction holds more logits than three tables of `chunk_tokens` rows: backward recomputes the logits that
    forward could not keep. Both gradients are accumulated in float32 regardless of the input dtype. There are two
    collectives in forward and one in backward, independent of the number of tokens.

    Args:
        hidden: output of the final norm at the positions that predict `targets`; the same on all ranks of `tp_group`.
        weight: this rank's rows of the output embedding.
        targets: global token ids.
        temperature, vocab_start, vocab_size, tp_group: as in `score_tokens`.
        chunk_tokens: a third of the memory, in rows of logits.
        with_entropy: also return the entropy.
        hidden_gradient: `complete`: the gradient of `hidden` is summed over `tp_group`; `partial`: it is only this
            rank's part, for a caller that sums in its own backward (sequence parallelism).
        main_grad: Megatron's buffer for the gradient of `weight` (float32): backward adds to it and sets
            `grad_added_to_main_grad` on the weight, as Megatron's own linear layers do. None: the gradient is returned
            to autograd in the dtype of the weight.
        features: computes Φ of the targets' responses in the forward (`UpdateFeatures.phi`); log-probs, entropy and
            gradients are the same bits with and without it on a CPU. One collective more, and two with a prior.

    Returns:
        log-probs (nats, float32), or (log-probs, entropy).
    """
    valid = true_rows(weight, vocab_start, vocab_size)
    where = (temperature, vocab_start, valid, tp_group, chunk_tokens)
    complete = hidden_gradient == "complete"
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, targets, where, complete, main_grad, features)
    if features is not None:
        features.finish(targets, weight.detach(), valid, vocab_start, tp_group)
    return (logprobs, entropy) if with_entropy else logprobs


class _TokenLogprobs(torch.autograd.Function):
    """Tiled log-probs and entropy; backward computes the logits gradient of one tile at a time, in place."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, where, reduce_hidden, main_grad, features):
        temperature, vocab_start, valid, group, chunk_tokens = where
        products = Products(hidden, weight[:valid], temperature)
        ctx.tiles = update_tiles(len(targets), valid, chunk_tokens, hidden.device)
        state = RunningSoftmax(targets, products.dtype)
        if features is not None:
            features.begin(products, len(weight), targets, ctx.tiles, vocab_start, group)
        observe = None if features is None else features.observer
        ctx.kept = sweep(products, state, vocab_start, ctx.tiles, keep=any(ctx.needs_input_grad), observe=observe)
        logprobs, entropy, log_partition = state.finish(slice(None), group)
        if features is not None:
            features.correct(products, log_partition, ctx.kept)
        ctx.save_for_backward(hidden, weight, targets, entropy, log_partition)
        ctx.where, ctx.reduce_hidden, ctx.main_grad = where, reduce_hidden, main_grad
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, entropy, log_partition = ctx.saved_tensors
        temperature, vocab_start, valid, group, _ = ctx.where
        products = Products(hidden, weight[:valid], temperature)
        grad_logprobs = torch.zeros_like(entropy) if grad_logprobs is None else grad_logprobs
        # Losses without an entropy term still pass zeros; checking is free on a CPU but would synchronize a GPU.
        if grad_entropy is not None and not grad_entropy.is_cuda and not grad_entropy.any():
            grad_entropy = None
        grad_hidden = torch.zeros_like(hidden, dtype=products.dtype)
        grad_weight = torch.zeros_like(weight, dtype=products.dtype) if ctx.main_grad is None else ctx.main_grad
        tiles = ctx.tiles
        cpu = hidden.device.type == "cpu"
        scratch = hidden.new_empty(2, min(len(targets), tiles.rows) * tiles.columns if cpu else 0, dtype=products.dtype)
        for block in slices(valid, tiles.columns):
            rows = products.rows(block)
            for at in slices(len(targets), tiles.rows):
                shape = (at.stop - at.start, block.stop - block.start)
                work, exp = (part[: shape[0] * shape[1]].view(shape) if cpu else None for part in scratch)
                # Removed, because they are overwritten: a second backward must recompute them.
                z = ctx.kept.pop((at.start, block.start), None)
                z = products.logits(at, rows, work) if z is None else z
                local, inside = within(targets[at], vocab_start + block.start, shape[1])
                pull = None if grad_entropy is None else grad_entropy[at]
                numbers = (log_partition[at], entropy[at], grad_logprobs[at], pull, products.scale)
                gradient = logits_gradient(z, local, inside, *numbers, products.operand_dtype, exp)
                del z
                products.add_hidden_gradient(grad_hidden[at], gradient, rows)
                products.add_weight_gradient(grad_weight[block], gradient, at)
                del gradient
        products.finish_hidden_gradient(grad_hidden)
        if ctx.reduce_hidden:
            all_reduce(grad_hidden, group)
        weight_result = grad_weight.to(weight.dtype) if ctx.main_grad is None else _mark_added(weight)
        return grad_hidden.to(hidden.dtype), weight_result, None, None, None, None, None


def _mark_added(weight: Tensor) -> Tensor | None:
    """Mark the gradient as already added to `main_grad`, and return the placeholder gradient for autograd.

    The hook of Megatron's data parallelism needs a gradient that is not None to know that backward has run, and does
    not read it. A tied weight (`zero_out_wgrad`) gets a gradient from the input embedding, which the hook does add: a
    placeholder must not be part of that sum.
    """
    weight.grad_added_to_main_grad = True
    if getattr(weight, "zero_out_wgrad", False):
        return None
    return torch.empty_like(weight)
