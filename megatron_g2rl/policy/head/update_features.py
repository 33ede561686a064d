"""Φ in the forward of the update pass, from the exponentials that it computes for the log-probs anyway.

The expected counts of Φ need p_t = exp(z - m) exp(m - log Z_t), where m is the running maximum when a tile is computed.
log Z_t is known only after the complete vocabulary, but its prior is known before (`prior`): the tile's exponentials
are summed with the factor a_t exp(m - prior_t), and tokens whose prior was wrong are swept again with the exact
log Z_t. Without a prior, all tokens are swept a second time, from the logits that the forward keeps for its backward
where it has kept them. The running softmax itself is that of a forward without Φ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rl.policy.head.device_timer import DeviceTimer
from megatron_g2rl.policy.head.features import features_from_counts, timed
from megatron_g2rl.policy.head.prior import ExpectedCounts, correction, target_logits, usable_prior
from megatron_g2rl.policy.head.products import Products
from megatron_g2rl.policy.head.softmax import all_reduce
from megatron_g2rl.policy.head.tiles import Tiles, consecutive_runs, runs_in_tiles, slices

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class UpdateFeatures:
    """Computes Φ of the responses of one call of `token_logprobs`; not differentiable."""

    phi: Float[Tensor, "responses hidden"] | None
    """Φ of each response after the call (float32; float64 for float64 inputs), the same on every rank of the
    `reduce_group`."""

    def __init__(
        self,
        owner: Int[Tensor, "tokens"],
        num_responses: int,
        *,
        runs: Sequence[tuple[int, int]] | None = None,
        prior_logprobs: Float[Tensor, "tokens"] | None = None,
        prior_tolerance: float = 0.0,
        reduce_group: dist.ProcessGroup | None = None,
        timer: DeviceTimer | None = None,
    ):
        """Prepare for one call.

        Args:
            owner: index of the response of each target; all targets belong to one.
            num_responses: R.
            runs, prior_logprobs, prior_tolerance, reduce_group, timer: as in `score_tokens`. A prior is used on every
                device; the host waits for a GPU once, to learn which tokens it has missed.
        """
        self.phi = None
        self._owner, self._size, self._runs = owner, num_responses, runs
        self._logprobs = prior_logprobs if prior_tolerance > 0 else None
        self._tolerance, self._reduce_group, self._timer = prior_tolerance, reduce_group, timer
        self._counts: ExpectedCounts | None = None
        self._prior: Tensor | None = None

    @torch.no_grad()
    def begin(
        self,
        products: Products,
        rows: int,
        targets: Int[Tensor, "tokens"],
        tiles: Tiles,
        vocab_start: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Allocate the counts and compute the prior, before the sweep; one collective if there is a prior.

        Args:
            products, targets, tiles, vocab_start, group: those of the sweep.
            rows: this rank's rows of the output embedding, padding included.
        """
        with timed(self._timer, "features"):
            self._tiles = tiles
            runs = consecutive_runs(self._owner) if self._runs is None else self._runs
            balance = torch.zeros(self._size, rows, dtype=products.dtype, device=targets.device)
            weights = torch.ones_like(targets, dtype=products.dtype)
            self._counts = ExpectedCounts(balance, self._owner, weights, runs, lambda: timed(self._timer, "features"))
            if self._logprobs is None:
                return
            self._runs_in_tiles = runs_in_tiles(runs, tiles.rows)
            own_logits = target_logits(products, targets, vocab_start)
            all_reduce(own_logits, group)
            self._prior = usable_prior(own_logits, self._logprobs.to(products.dtype))

    @property
    def observer(self):
        """What the sweep calls for each tile; None if the counts do not need its exponentials."""
        return None if self._prior is None else self._add

    def _add(self, at: slice, block: slice, exp: Tensor, top: Tensor) -> None:
        counts = self._counts
        with counts.measure():
            factor = counts.weights[at] * (top - self._prior[at]).exp()
            for row, span in self._runs_in_tiles.get(at.start, ()):
                counts.balance[row, block].addmv_(exp[span].t(), factor[span], alpha=-1)

    @torch.no_grad()
    def correct(
        self,
        products: Products,
        log_partition: Float[Tensor, "tokens"],
        kept: dict[tuple[int, int], Tensor],
    ) -> None:
        """After the sweep: add what the counts still miss.

        Args:
            products: those of the sweep.
            log_partition: log Z_t of each token.
            kept: tiles of logits / scale by first token and column; not changed.
        """
        counts = self._counts
        with counts.measure():
            if self._prior is None:
                self._add_softmax(products, log_partition, counts.weights, counts.runs, kept)
                return
            again, weights, emptied = correction((log_partition - self._prior).exp(), counts, self._tolerance)
            counts.balance.masked_fill_(emptied[:, None], 0)
            indices = again.nonzero().squeeze(1)
            if len(indices):
                runs = consecutive_runs(counts.owner[indices])
                self._add_softmax(products.select(indices), log_partition[indices], weights[indices], runs, {})

    def _add_softmax(self, products, log_partition, weights, runs, kept) -> None:
        """Subtract the weighted softmax of the tokens of `products` from the counts of their responses."""
        in_tiles = runs_in_tiles(runs, self._tiles.rows)
        for block in slices(len(products.weight), self._tiles.columns):
            rows = products.rows(block)
            for at in slices(len(log_partition), self._tiles.rows):
                z = kept.get((at.start, block.start))
                z = products.logits(at, rows) if z is None else z.clone()
                exp = z.mul_(products.scale).sub_(log_partition[at, None]).exp_()
                factor = weights[at]
                for row, span in in_tiles.get(at.start, ()):
                    self._counts.balance[row, block].addmv_(exp[span].t(), factor[span], alpha=-1)
                del z, exp

    @torch.no_grad()
    def finish(
        self,
        targets: Int[Tensor, "tokens"],
        weight: Float[Tensor, "vocab_local hidden"],
        valid: int,
        vocab_start: int,
        tp_group: dist.ProcessGroup | None,
    ) -> None:
        """Compute Φ from the counts; one collective. Arguments as in `features_from_counts`."""
        counts, self._counts = self._counts, None
        shard = dict(valid=valid, vocab_start=vocab_start, tp_group=tp_group, reduce_group=self._reduce_group)
        self.phi = features_from_counts(counts, targets, weight, timer=self._timer, **shard)
