"""The sweep from a prior (`prior`) on a GPU, as one Triton kernel: logits and exponentials never reach memory.

It computes what `prior.sweep_from_prior` computes, without making the host wait: tokens that need another sweep are
selected on the device, and a sweep over none of them ends immediately. Float32 operands are multiplied as float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from megatron_g2rl.policy.head.prior import ExpectedCounts, PriorScores, correction, is_far, usable_prior
from megatron_g2rl.policy.head.softmax import all_reduce, within
from megatron_g2rl.policy.head.tiles import slices
from megatron_g2rl.policy.head.triton_kernel import sweep_tiles

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

SUMS, MAXIMUM = 1, 2
TARGET_TOKENS = 4096
"""Tokens whose rows of the weight are gathered together for the logits of the targets."""
PROGRAMS = 512
"""Programs that keep any GPU busy; small vocabularies split the tokens over several programs."""


@dataclass(frozen=True)
class KernelTiles:
    """Sizes of a tile and its resources."""

    tokens: int
    columns: int
    depth: int
    """Elements of the hidden size that are multiplied at a time."""
    warps: int
    stages: int


WIDE = KernelTiles(128, 256, 64, 8, 3)
"""16-bit operands on sm_90, where all tokens are swept."""
SQUARE = KernelTiles(128, 128, 64, 8, 3)
"""16-bit operands otherwise."""
NARROW = {8: KernelTiles(64, 64, 32, 8, 3), 9: KernelTiles(64, 64, 32, 4, 3), 10: KernelTiles(64, 64, 16, 4, 3)}
"""Float32 operands, by the major compute capability; later devices have those of the last."""


def kernel_tiles(dtype: torch.dtype, capability: tuple[int, int], *, deterministic: bool, ordered: bool) -> KernelTiles:
    """Tiles that compile without spilled registers, except 8 bytes of stack with float32 operands on sm_80.

    They were chosen by compiling them with triton 3.7.1, not by timing.

    Args:
        dtype: of the operands.
        capability: compute capability of the device.
        deterministic: no float atomics.
        ordered: some tokens are swept, not all.
    """
    if dtype == torch.float32:
        return NARROW.get(capability[0], NARROW[max(NARROW)])
    return WIDE if capability[0] == 9 and not (deterministic or ordered) else SQUARE


class FusedSweep:
    """Launches the kernel over the hidden states of one call."""

    def __init__(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        weight: Float[Tensor, "rows hidden"],
        scale: float,
        *,
        deterministic: bool,
        tiles: KernelTiles | None = None,
    ):
        """Hidden states and rows of one dtype (float32 or 16 bits); logits are their product times `scale`."""
        if hidden.dtype != weight.dtype:
            raise ValueError(f"hidden states are {hidden.dtype}, the output embedding is {weight.dtype}")
        self.hidden, self.weight = hidden.contiguous(), weight.contiguous()
        self.scale, self.deterministic = scale, deterministic
        self.tiles = tiles

    def run(
        self,
        prior: Float[Tensor, "tokens"],
        selected: Bool[Tensor, "tokens"] | None = None,
        *,
        sums: int = 0,
        counts: ExpectedCounts | None = None,
        weights: Float[Tensor, "tokens"] | None = None,
    ) -> list[Float[Tensor, "tokens"]]:
        """Sweep all tokens, or the selected ones; subtract weighted column sums of exp(z - prior) from `counts`.

        Args:
            prior: subtracted from the logits.
            selected: None: all tokens.
            sums: SUMS: return [sum of exp(z - prior), its first moment]; MAXIMUM: return [max z]; 0: return nothing.
            counts: None: no column sums.
            weights: weight of each token in `counts`.
        """
        tokens, device = len(self.hidden), self.hidden.device
        if selected is None:
            order, count = prior, torch.full((), tokens, dtype=torch.int32, device=device)
        else:
            order = torch.argsort((~selected).to(torch.int8), stable=True).to(torch.int32)
            count = selected.sum(dtype=torch.int32)
        t = self.tiles or self._tiles_of_device(ordered=selected is not None)
        blocks = triton.cdiv(len(self.weight), t.columns)
        results = self._results(sums, blocks)
        if tokens and len(self.weight):
            unused = prior
            rows_of_tiles = triton.cdiv(tokens, t.tokens)
            splits = 1 if self.deterministic else min(rows_of_tiles, triton.cdiv(PROGRAMS, blocks))
            sweep_tiles[(blocks, splits)](
                self.hidden,
                self.weight,
                prior,
                unused if counts is None else -weights,
                unused if counts is None else run_of_token(counts.runs, device),
                unused if counts is None else row_of_run(counts.runs, device),
                order,
                count,
                results[0] if results else unused,
                results[1] if len(results) > 1 else unused,
                unused if counts is None else counts.balance,
                tokens,
                len(self.weight),
                0 if counts is None else counts.balance.stride(0),
                self.scale,
                SIZE=self.hidden.shape[1],
                BLOCK_T=t.tokens,
                BLOCK_V=t.columns,
                BLOCK_H=t.depth,
                ORDERED=selected is not None,
                SUMS=sums,
                COUNTS=counts is not None,
                DETERMINISTIC=self.deterministic,
                PRECISION="ieee",
                WIDEN=triton.knobs.runtime.interpret,
                num_warps=t.warps,
                num_stages=t.stages,
            )
        if not self.deterministic:
            return results
        return [x.amax(0) if sums == MAXIMUM else x.sum(0) for x in results]

    def _tiles_of_device(self, *, ordered: bool) -> KernelTiles:
        capability = torch.cuda.get_device_capability(self.hidden.device)
        return kernel_tiles(self.hidden.dtype, capability, deterministic=self.deterministic, ordered=ordered)

    def _results(self, sums: int, blocks: int) -> list[Tensor]:
        """Where the kernel adds its sums; in the deterministic mode, one row for each tile of the vocabulary."""
        tokens, device = len(self.hidden), self.hidden.device
        shape = (max(1, blocks), tokens) if self.deterministic else (tokens,)
        if sums == MAXIMUM:
            return [torch.full(shape, torch.finfo(torch.float32).min, device=device)]
        return [torch.zeros(shape, device=device) for _ in range(2 if sums else 0)]


def run_of_token(runs: Sequence[tuple[int, int]], device: torch.device) -> Int[Tensor, "tokens"]:
    """Index of the run of each token, int32."""
    lengths = torch.tensor([length for _, length in runs], dtype=torch.long)
    return _to(torch.repeat_interleave(torch.arange(len(runs), dtype=torch.int32), lengths), device)


def row_of_run(runs: Sequence[tuple[int, int]], device: torch.device) -> Int[Tensor, "runs"]:
    """Response of each run, int32."""
    return _to(torch.tensor([row for row, _ in runs], dtype=torch.int32), device)


def _to(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def sweep_from_prior(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "rows hidden"],
    targets: Int[Tensor, "tokens"],
    prior_logprobs: Float[Tensor, "tokens"],
    counts: ExpectedCounts | None,
    *,
    temperature: float,
    tolerance: float,
    vocab_start: int,
    group: dist.ProcessGroup | None,
    deterministic: bool = False,
    tiles: KernelTiles | None = None,
) -> PriorScores:
    """As `prior.sweep_from_prior`; always four collectives, as the host does not know whether a prior is far off.

    Args:
        hidden, weight: operands of one dtype; `weight` without padding rows.
        targets, prior_logprobs, counts, tolerance, vocab_start, group: as there.
        temperature: softmax temperature.
        deterministic: no float atomics: bit-identical repetitions, for [tiles of the vocabulary, tokens] numbers of
            memory.
        tiles: None: those for the device.
    """
    sweep = FusedSweep(hidden, weight, 1 / temperature, deterministic=deterministic, tiles=tiles)
    target_logits = _target_logits(sweep, targets, vocab_start)
    all_reduce(target_logits, group)
    prior = usable_prior(target_logits, prior_logprobs)
    sums = torch.stack(sweep.run(prior, sums=SUMS, counts=counts, weights=counts and counts.weights))
    all_reduce(sums, group)
    total, moment = sums
    # Tokens whose prior is useless get their maximum as a new one. The host does not know that usually there are none.
    far = is_far(total.log())
    (top,) = sweep.run(prior, far, sums=MAXIMUM)
    all_reduce(top, group, dist.ReduceOp.MAX)
    center = torch.where(far, top, prior)
    sums = torch.stack(sweep.run(center, far, sums=SUMS))
    all_reduce(sums, group)
    own_total, own_moment = torch.where(far, sums[0], total), torch.where(far, sums[1], moment)
    log_total = own_total.log()
    logprobs, entropy = (target_logits - center) - log_total, log_total - own_moment / own_total
    if counts is None:
        return PriorScores(logprobs, entropy, torch.zeros((), dtype=torch.long, device=hidden.device))
    with counts.measure():
        again, weights, emptied = correction(total, counts, tolerance)
        counts.balance.masked_fill_(emptied[:, None], 0)
        sweep.run(center + log_total, again, counts=counts, weights=weights)
    return PriorScores(logprobs, entropy, again.sum())


def _target_logits(sweep: FusedSweep, targets: Tensor, vocab_start: int) -> Float[Tensor, "tokens"]:
    """Logits of the targets in this rank's part of the vocabulary, 0 for the others; float32."""
    result = torch.zeros(len(targets), device=sweep.hidden.device)
    if not len(sweep.weight):
        return result
    local, inside = within(targets, vocab_start, len(sweep.weight))
    for at in slices(len(targets), TARGET_TOKENS):
        rows = sweep.weight.index_select(0, local[at])
        result[at] = (sweep.hidden[at].float() * rows.float()).sum(1)
    return result * sweep.scale * inside
