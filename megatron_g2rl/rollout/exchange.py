"""Serializes responses to plain bytes, to exchange the groups of a step between ranks.

With pickled objects, every rank would receive each number as an object of about 30 bytes, hold the pickles of all ranks
in addition to the objects, and pad its own part to the largest. With arrays, a token takes 8 bytes on the wire.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_g2rl.records import Response

REASONS = ("stop", "length")
"""Values of `Response.finish_reason`, by their code on the wire."""
Drawn = Mapping[int, tuple[Response, ...]]
"""Responses to each prompt (all of them, or a consecutive range) by prompt position in the step."""


def pack(drawn: Drawn) -> np.ndarray:
    """Serialize responses to one uint8 array for `unpack`.

    Raises:
        ValueError: a response has an unknown `finish_reason`, or not exactly one log-prob per token.
    """
    responses = [r for group in drawn.values() for r in group]
    for r in responses:
        if len(r.token_ids) != len(r.logprobs):
            raise ValueError(f"a response has {len(r.token_ids)} tokens and {len(r.logprobs)} log-probs")
    texts = [r.text.encode("utf-8", "surrogatepass") for r in responses]
    logprobs = np.array([x for r in responses for x in r.logprobs], np.float64)
    # Log-probs that the engine computed in float32 are sent as float32 without loss.
    narrow = logprobs.astype(np.float32)
    exact = np.array_equal(narrow.astype(np.float64), logprobs, equal_nan=True)
    tops = [r for r in responses if r.top_ids is not None]
    top = tops[0].top_ids.shape[1] if tops else 0
    columns = [
        [len(r.token_ids) for r in responses],
        [len(text) for text in texts],
        [r.seed for r in responses],
        [REASONS.index(r.finish_reason) for r in responses],
    ]
    parts = [
        np.array([len(drawn), len(responses), 4 if exact else 8, top], np.int64),
        np.array([list(drawn), [len(group) for group in drawn.values()]], np.int64),
        np.array(columns, np.int64),
        np.array([t for r in responses for t in r.token_ids], np.int32),
        narrow if exact else logprobs,
        *(np.concatenate([getattr(r, name) for r in tops]).astype(dtype, copy=False) for name, dtype in _TOPS if top),
        np.frombuffer(b"".join(texts), np.uint8),
    ]
    return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])


_TOPS = (("top_ids", np.int32), ("top_logprobs", np.float16))


def unpack(data: np.ndarray) -> dict[int, tuple[Response, ...]]:
    """Inverse of `pack`; the top-K tables are views of `data`."""
    offset = 0

    def take(count: int, dtype: type) -> np.ndarray:
        nonlocal offset
        begin, offset = offset, offset + count * np.dtype(dtype).itemsize
        return data[begin:offset].view(dtype)

    groups, responses, width, top = take(4, np.int64).tolist()
    positions, sizes = take(2 * groups, np.int64).reshape(2, -1).tolist()
    tokens, texts, seeds, reasons = take(4 * responses, np.int64).reshape(4, -1).tolist()
    total = sum(tokens)
    ids, logprobs = take(total, np.int32), take(total, np.float32 if width == 4 else np.float64)
    tables = [take(total * top, dtype).reshape(-1, top) for _, dtype in _TOPS] if top else None
    text = data[offset:].tobytes()
    unpacked: list[Response] = []
    token = character = 0
    for length, size, seed, reason in zip(tokens, texts, seeds, reasons, strict=True):
        span = slice(token, token + length)
        unpacked.append(
            Response(
                tuple(ids[span].tolist()),
                tuple(logprobs[span].tolist()),
                text[character : character + size].decode("utf-8", "surrogatepass"),
                REASONS[reason],
                seed,
                *(table[span] for table in tables or ()),
            )
        )
        token, character = token + length, character + size
    members = iter(unpacked)
    return {p: tuple(next(members) for _ in range(size)) for p, size in zip(positions, sizes, strict=True)}


def broadcast_all(packed: np.ndarray, sizes: Sequence[int]) -> Iterator[tuple[int, dict[int, tuple[Response, ...]]]]:
    """Yield (rank, its responses); a collective in which each rank with responses broadcasts them in turn.

    Args:
        packed: this rank's responses from `pack`.
        sizes: packed size of every rank in bytes; 0: no responses.
    """
    for rank, size in enumerate(sizes):
        if not size:
            continue
        data = packed if rank == dist.get_rank() else np.empty(size, np.uint8)
        dist.broadcast(torch.from_numpy(data), src=rank)
        yield rank, unpack(data)
