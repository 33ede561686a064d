"""The Triton kernel of the sweep from a prior: product, exponential and sums of a tile of logits, in registers.

Only `triton_score` imports this module; triton comes with the CUDA builds of torch, and a CPU needs none.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sweep_tiles(
    hidden,  # [tokens, SIZE]
    weight,  # [rows, SIZE]: the vocabulary of this rank
    prior,  # [tokens] float32
    token_weights,  # [tokens] float32
    run,  # [tokens] int32: index of the token's run of consecutive tokens of one response, ascending
    run_row,  # [runs] int32: row of `counts` of each run
    order,  # [tokens] int32: which tokens to process; the first `count` of them
    count,  # [] int32, read on the device
    first_sum,  # sum exp(z - prior), or max z: [tokens], or [tiles of the vocabulary, tokens] if DETERMINISTIC
    second_sum,  # sum exp(z - prior) (z - prior), in the same shape
    counts,  # [responses, counts_stride] float32: sum over tokens of weight * exp(z - prior) is added
    tokens,
    rows,
    counts_stride,
    scale,  # logits are the product times `scale`
    SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ORDERED: tl.constexpr,  # False: all tokens in their order
    SUMS: tl.constexpr,  # 0: none; 1: the two sums; 2: the maximum instead
    COUNTS: tl.constexpr,
    DETERMINISTIC: tl.constexpr,  # no float atomics; the grid's second axis must be 1
    PRECISION: tl.constexpr,  # of products of float32 operands
    WIDEN: tl.constexpr,  # convert operands to float32: the interpreter has no products of bfloat16
):
    """One program: BLOCK_V rows of the vocabulary, all tokens of its part of the grid's second axis in order."""
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    limit = tl.load(count)
    part = tl.cdiv(tl.cdiv(limit, BLOCK_T), tl.num_programs(1)) * BLOCK_T
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, limit)
    h = tl.arange(0, BLOCK_H)
    # Rows and tokens beyond the end read others instead: the products need no mask, the sums leave them out.
    weight_rows = weight + tl.minimum(v, rows - 1).to(tl.int64)[None, :] * SIZE + h[:, None]
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside_t = t < end
        t = tl.minimum(t, end - 1)
        token = tl.load(order + t) if ORDERED else t
        hidden_rows = hidden + token.to(tl.int64)[:, None] * SIZE + h[None, :]
        z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for k in range(0, SIZE, BLOCK_H):
            if SIZE % BLOCK_H == 0:
                x = tl.load(hidden_rows + k)
                w = tl.load(weight_rows + k)
            else:
                x = tl.load(hidden_rows + k, mask=(h + k < SIZE)[None, :], other=0.0)
                w = tl.load(weight_rows + k, mask=(h + k < SIZE)[:, None], other=0.0)
            if WIDEN:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(x, w, z, input_precision=PRECISION)
        slot = (tl.program_id(0).to(tl.int64) * tokens if DETERMINISTIC else 0) + token
        # One quarter at a time: fewer registers for what is computed from the logits.
        quarters = _quarters(z * scale, BLOCK_T, BLOCK_V)
        if SUMS == 2:
            top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
            for q in tl.static_range(4):
                inside_v = tl.program_id(0) * BLOCK_V + q * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4) < rows
                top = tl.maximum(top, tl.max(tl.where(inside_v[None, :], quarters[q], float("-inf")), 1))
            if DETERMINISTIC:
                tl.store(first_sum + slot, top, mask=inside_t)
            else:
                tl.atomic_max(first_sum + slot, top, mask=inside_t, sem="relaxed")
        else:
            shift = tl.load(prior + token)
            total = tl.zeros((BLOCK_T,), tl.float32)
            moment = tl.zeros((BLOCK_T,), tl.float32)
            if COUNTS:
                a = tl.load(token_weights + token)
                runs = tl.load(run + token)
                first = tl.load(run + (tl.load(order + start) if ORDERED else start))
                last = tl.max(runs, 0)
            for q in tl.static_range(4):
                columns = tl.program_id(0) * BLOCK_V + q * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4)
                shifted = quarters[q] - shift[:, None]
                e = tl.where(inside_t[:, None] & (columns < rows)[None, :], tl.exp(shifted), 0.0)
                if SUMS == 1:
                    total += tl.sum(e, 1)
                    moment += tl.sum(tl.where(e > 0, e * shifted, 0.0), 1)
                if COUNTS:
                    e = e * a[:, None]
                    _add_columns(counts, e, runs, first, last, run_row, columns, rows, counts_stride, DETERMINISTIC)
            if SUMS == 1:
                if DETERMINISTIC:
                    tl.store(first_sum + slot, total, mask=inside_t)
                    tl.store(second_sum + slot, moment, mask=inside_t)
                else:
                    tl.atomic_add(first_sum + slot, total, mask=inside_t, sem="relaxed")
                    tl.atomic_add(second_sum + slot, moment, mask=inside_t, sem="relaxed")


@triton.jit
def _quarters(z, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """Four blocks of consecutive columns."""
    left, right = _halves(z, BLOCK_T, BLOCK_V)
    first, second = _halves(left, BLOCK_T, BLOCK_V // 2)
    third, fourth = _halves(right, BLOCK_T, BLOCK_V // 2)
    return first, second, third, fourth


@triton.jit
def _halves(z, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """Two blocks of consecutive columns."""
    return tl.split(tl.permute(tl.reshape(z, (BLOCK_T, 2, BLOCK_V // 2)), (0, 2, 1)))


@triton.jit
def _add_columns(counts, e, runs, first, last, run_row, v, rows, counts_stride, DETERMINISTIC: tl.constexpr):
    """counts[row of the run] += column sums of the tokens of each run from `first` to `last`."""
    for r in range(first, last + 1):
        sums = tl.sum(tl.where((runs == r)[:, None], e, 0.0), 0)
        row = counts + tl.load(run_row + r).to(tl.int64) * counts_stride + v
        if DETERMINISTIC:
            # No other program has these columns; the barrier orders it before the next addition to them.
            tl.store(row, tl.load(row, mask=v < rows, other=0.0) + sums, mask=v < rows)
            tl.debug_barrier()
        else:
            tl.atomic_add(row, sums, mask=v < rows, sem="relaxed")
