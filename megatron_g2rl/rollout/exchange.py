"""Responses as plain bytes, for handing the groups of a step from rank to rank.

As pickled objects every rank would receive each number as an object of some 30 bytes, hold pickles of all of them
beside the objects, and pad its own part to the largest. As arrays a token is 8 bytes on the wire.
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
"""Responses to a prompt, all or consecutive ones, by its position among the prompts of the step."""


def pack(drawn: Drawn) -> np.ndarray:
    """The responses as one array of uint8; `unpack` reads it.

    Raises:
        ValueError: a response has another `finish_reason`, or not one log-prob for each token.
    """
    responses = [r for group in drawn.values() for r in group]
    for r in responses:
        if len(r.token_ids) != len(r.logprobs):
            raise ValueError(f"a response has {len(r.token_ids)} tokens and {len(r.logprobs)} log-probs")
    texts = [r.text.encode("utf-8", "surrogatepass") for r in responses]
    logprobs = np.array([x for r in responses for x in r.logprobs], np.float64)
    # What samplers compute in float32 stays what it is in float32.
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
    """What `pack` packed; tables of most probable tokens are views of `data`."""
    place = 0

    def take(count: int, dtype: type) -> np.ndarray:
        nonlocal place
        begin, place = place, place + count * np.dtype(dtype).itemsize
        return data[begin:place].view(dtype)

    groups, responses, width, top = take(4, np.int64).tolist()
    positions, sizes = take(2 * groups, np.int64).reshape(2, -1).tolist()
    tokens, texts, seeds, reasons = take(4 * responses, np.int64).reshape(4, -1).tolist()
    total = sum(tokens)
    ids, logprobs = take(total, np.int32), take(total, np.float32 if width == 4 else np.float64)
    tables = [take(total * top, dtype).reshape(-1, top) for _, dtype in _TOPS] if top else None
    text = data[place:].tobytes()
    found: list[Response] = []
    token = character = 0
    for length, size, seed, reason in zip(tokens, texts, seeds, reasons, strict=True):
        here = slice(token, token + length)
        found.append(
            Response(
                tuple(ids[here].tolist()),
                tuple(logprobs[here].tolist()),
                text[character : character + size].decode("utf-8", "surrogatepass"),
                REASONS[reason],
                seed,
                *(table[here] for table in tables or ()),
            )
        )
        token, character = token + length, character + size
    members = iter(found)
    return {p: tuple(next(members) for _ in range(size)) for p, size in zip(positions, sizes, strict=True)}


def share(own: np.ndarray, sizes: Sequence[int]) -> Iterator[tuple[int, dict[int, tuple[Response, ...]]]]:
    """Ranks and their responses; a collective, in which every rank that has some sends them to all in its turn.

    Args:
        own: this rank's, packed.
        sizes: bytes of every rank's; 0: it has none.
    """
    for rank, size in enumerate(sizes):
        if not size:
            continue
        data = own if rank == dist.get_rank() else np.empty(size, np.uint8)
        dist.broadcast(torch.from_numpy(data), src=rank)
        yield rank, unpack(data)
