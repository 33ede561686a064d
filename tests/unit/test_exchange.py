"""Responses exchanged between ranks: lossless, and a few bytes per token."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest

from megatron_g2rl.records import Response, response_seed
from megatron_g2rl.rollout import exchange

TEXTS = ("", "plain", "∑ x² 🙂", "broken \udcff", "nul \0 and\nlines")


def responses(count: int, tokens: int, top: int = 0, wide: bool = False) -> tuple[Response, ...]:
    draw = random.Random(count)
    made = []
    for index in range(count):
        n = draw.randint(0, tokens)
        values = [-draw.random() * 10 for _ in range(n)]
        made.append(
            Response(
                tuple(draw.randrange(2**31) for _ in range(n)),
                tuple(values if wide else np.array(values, np.float32).tolist()),
                TEXTS[index % len(TEXTS)],
                draw.choice(exchange.REASONS),
                response_seed(1, "train", 2, 3, index),
                np.array([draw.randrange(9) for _ in range(n * top)], np.int32).reshape(n, top) if top else None,
                np.array([draw.random() for _ in range(n * top)], np.float16).reshape(n, top) if top else None,
            )
        )
    return tuple(made)


@pytest.mark.parametrize("top", [0, 5])
@pytest.mark.parametrize("wide", [False, True])
def test_responses_are_unchanged_by_a_round_trip(top, wide):
    drawn = {7: responses(6, 40, top, wide), 0: responses(1, 0, top), 3: (), 12: responses(4, 9, top)}
    found = exchange.unpack(exchange.pack(drawn))
    assert found == drawn and list(found) == list(drawn)
    for position, group in drawn.items():
        for a, b in zip(group, found[position], strict=True):
            assert top == 0 or np.array_equal(a.top_ids, b.top_ids) and np.array_equal(a.top_logprobs, b.top_logprobs)
            assert all(type(x) is float for x in b.logprobs) and all(type(x) is int for x in b.token_ids)


def test_nan_and_infinity_survive_a_round_trip():
    odd = (float("nan"), float("-inf"), 0.0)
    found = exchange.unpack(exchange.pack({0: (Response((1, 2, 3), odd, "", "stop", 1),)}))
    assert np.array_equal(found[0][0].logprobs, odd, equal_nan=True)


def test_a_token_needs_eight_bytes_and_a_response_forty_plus_its_text():
    drawn = {0: responses(64, 2_000)}
    tokens = sum(len(r.token_ids) for r in drawn[0])
    text = sum(len(r.text.encode("utf-8", "surrogatepass")) for r in drawn[0])
    assert len(exchange.pack(drawn)) <= 8 * tokens + 40 * 64 + text + 64
    assert len(pickle.dumps(drawn)) > 1.5 * len(exchange.pack(drawn))


def test_a_response_with_too_few_logprobs_is_refused():
    with pytest.raises(ValueError, match="2 tokens and 1 log-probs"):
        exchange.pack({0: (Response((1, 2), (0.0,), "", "stop", 1),)})
