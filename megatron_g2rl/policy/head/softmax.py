"""The elementwise part of the head: softmax quantities tile by tile, and the in-place gradient of the logits.

On a GPU each of the two is one compiled function over the tile; on a CPU each is a few passes over a tile that is still
in the cache, without temporaries.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class RunningSoftmax:
    """Maximum, partition sum, first moment and target logit of some tokens, accumulated tile by tile.

    With m the maximum so far, Z = sum exp(z - m) and S = sum exp(z - m) (z - m): a higher maximum m + d changes them to
    exp(-d) Z and exp(-d) (S - d Z).
    """

    def __init__(self, targets: Int[Tensor, "tokens"], dtype: torch.dtype):
        shape, device = len(targets), targets.device
        self.targets = targets
        # The lowest finite number, not -inf: a shard with only padding rows would compute inf - inf.
        self.top = torch.full((shape,), torch.finfo(dtype).min, dtype=dtype, device=device)
        self.total = torch.zeros(shape, dtype=dtype, device=device)
        self.moment, self.target = torch.zeros_like(self.total), torch.zeros_like(self.total)

    def add(
        self,
        at: slice,
        z: Tensor,
        first: int,
        scale: float,
        shifted: Tensor | None,
        exp: Tensor | None,
        *,
        sums_only: bool = False,
    ) -> Tensor | None:
        """Add the tile `z` of logits / `scale` of the tokens `at`, whose first column is vocabulary id `first`.

        Args:
            shifted, exp: output buffers for the scaled logits minus the maximum so far and for their exponentials;
                `shifted` may be `z`. Not used on a GPU.
            sums_only: the exponentials are not needed; on a GPU they are not written.

        Returns:
            exp(scaled z - maximum so far), or None.
        """
        local, inside = within(self.targets[at], first, z.shape[1])
        if z.is_cuda and sums_only:
            results = None, *_fused(_tile_sums)(z, self.top[at], local, scale)
        elif z.is_cuda:
            results = _fused(_tile_softmax)(z, self.top[at], local, scale)
        else:
            results = _tile_softmax_in_cache(z, self.top[at], local, scale, shifted, exp)
        exp, top, total, moment, target = results
        self.target[at] += target * inside
        self._rescale(at, top)
        self.total[at] += total
        self.moment[at] += moment
        return None if sums_only else exp

    def _rescale(self, at: slice, top: Tensor) -> None:
        change = self.top[at] - top
        factor = change.exp()
        self.moment[at] = factor * (self.moment[at] + change * self.total[at])
        self.total[at] *= factor
        self.top[at] = top

    def finish(self, at: slice, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probs, entropy, log partition sum) of the tokens `at` over all vocabulary shards; two collectives."""
        top = self.top[at].clone()
        all_reduce(top, group, dist.ReduceOp.MAX)
        self._rescale(at, top)
        sums = torch.stack([self.total[at], self.moment[at], self.target[at]])
        all_reduce(sums, group)
        total, moment, target = sums
        log_total = total.log()
        return (target - top) - log_total, log_total - moment / total, top + log_total


def _tile_softmax(z, top, local, scale):
    """exp(z - top), the new top, and a tile's sums, without side effects, as torch.compile needs it."""
    z = z * scale
    top = torch.maximum(top, z.amax(1))
    shifted = z - top[:, None]
    exp = shifted.exp()
    return exp, top, exp.sum(1), (exp * shifted).sum(1), z.gather(1, local[:, None]).squeeze(1)


def _tile_sums(z, top, local, scale):
    """`_tile_softmax` without the exponentials as an output; the compiler then keeps them in registers."""
    return _tile_softmax(z, top, local, scale)[1:]


def _tile_softmax_in_cache(z, top, local, scale, shifted, exp):
    """`_tile_softmax` for a CPU: five passes over the tile (maximum, subtraction, exponential, two sums)."""
    if scale != 1.0:
        z = z * scale
    top = torch.maximum(top, z.amax(1))
    target = z.gather(1, local[:, None]).squeeze(1)
    torch.sub(z, top[:, None], out=shifted)
    torch.exp(shifted, out=exp)
    return exp, top, exp.sum(1), torch.linalg.vecdot(exp, shifted), target


def logits_gradient(
    z: Float[Tensor, "tile columns"],
    local: Int[Tensor, "tile"],
    inside: Bool[Tensor, "tile"],
    log_partition: Float[Tensor, "tile"],
    entropy: Float[Tensor, "tile"],
    grad_logprobs: Float[Tensor, "tile"],
    grad_entropy: Float[Tensor, "tile"] | None,
    scale: float,
    dtype: torch.dtype,
    scratch: Tensor | None,
) -> Float[Tensor, "tile columns"]:
    """Gradient of a tile of logits: with p the softmax and H its entropy, d log p(y) / dz = 1{y} - p and
    dH / dz = -p (log p + H).

    Args:
        z: logits / `scale`; overwritten.
        local, inside: column of the target, and whether it is in the tile.
        dtype: dtype of the result.
        scratch: buffer of the size of `z`; not used on a GPU.
    """
    at_target = grad_logprobs * inside
    if z.is_cuda:
        pull = torch.zeros_like(grad_logprobs) if grad_entropy is None else grad_entropy
        return _fused(_tile_gradient)(z, local, at_target, log_partition, entropy, grad_logprobs, pull, scale, dtype)
    if scale != 1.0:
        z *= scale
    z -= log_partition[:, None]
    if grad_entropy is None:
        gradient = z.exp_().mul_(-grad_logprobs[:, None])
    else:
        gradient = torch.exp(z, out=scratch)
        # log p may be very negative, where p is 0, but never -inf: padding rows are not in the tile.
        constant = -(grad_entropy * entropy + grad_logprobs)
        gradient *= torch.addcmul(constant[:, None], z, grad_entropy[:, None], value=-1, out=z)
    gradient.scatter_add_(1, local[:, None], at_target[:, None])
    if scale != 1.0:
        gradient *= scale
    return gradient.to(dtype)


def _tile_gradient(z, local, at_target, log_partition, entropy, grad_logprobs, grad_entropy, scale, dtype):
    """`logits_gradient` without side effects, for torch.compile; one read and one write of the tile."""
    logp = z * scale - log_partition[:, None]
    pull = grad_entropy[:, None] * (logp + entropy[:, None]) + grad_logprobs[:, None]
    column = torch.arange(z.shape[1], device=z.device)
    hit = torch.where(column == local[:, None], at_target[:, None], 0.0)
    return ((hit - logp.exp() * pull) * scale).to(dtype)


def within(targets: Int[Tensor, "tokens"], first: int, columns: int) -> tuple[Tensor, Tensor]:
    """(column of each target in a tile whose first column is id `first`, whether it is in the tile)."""
    local = targets - first
    inside = (local >= 0) & (local < columns)
    return local.clamp(0, columns - 1), inside


@functools.cache
def _fused(function):
    return torch.compile(function, dynamic=True)


def all_reduce(x: Tensor, group: dist.ProcessGroup | None, op=dist.ReduceOp.SUM) -> None:
    """Reduce `x` in place over the ranks of `group`; a no-op without a group."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(x, op=op, group=group)
