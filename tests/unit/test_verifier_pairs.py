"""Property: an answer that equals the reference by construction is correct, one changed in one place is incorrect.

The pairs come from tools/bench/verifier_pairs.py, rationals of up to 120 digits among them. CI draws a few hundred with
a fixed seed; the slow test draws 10,000.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_g2rl.rewards import verify_math
from tools.bench.verifier_pairs import Pair, draw_pair

QUIET = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


def check(pair: Pair) -> None:
    verdict = verify_math(f"So the answer is \\boxed{{{pair.found}}}.", pair.gold) == 1.0
    assert verdict is pair.equal, f"{pair.kind}: {pair.found!r} for {pair.gold!r} was scored {verdict}"


@settings(max_examples=400, **QUIET)
@given(st.builds(draw_pair, st.randoms(use_true_random=False)))
def test_equal_pairs_are_right_and_changed_pairs_are_wrong(pair):
    check(pair)


@pytest.mark.slow
@settings(max_examples=500, **QUIET)
@given(st.integers(0, 2**64 - 1))
def test_ten_thousand_pairs_have_no_wrong_verdict(seed):
    """hypothesis draws one seed for 20 pairs: drawing every choice costs several times as much as the verdict."""
    random = Random(seed)
    for _ in range(20):
        check(draw_pair(random))
