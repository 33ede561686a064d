"""Property: an answer that equals the reference by construction is correct, one changed in one place is incorrect.

The pairs come from tools/bench/verifier_pairs.py, rationals of up to 120 digits among them. CI draws a few hundred with
a fixed seed; the slow test draws 10,000.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from megatron_g2rl.rewards import verify_math
from tools.bench.verifier_pairs import Pair, pairs

QUIET = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


def check(pair: Pair) -> None:
    verdict = verify_math(f"So the answer is \\boxed{{{pair.found}}}.", pair.gold) == 1.0
    assert verdict is pair.equal, f"{pair.kind}: {pair.found!r} for {pair.gold!r} was scored {verdict}"


@settings(max_examples=400, **QUIET)
@given(pairs())
def test_equal_pairs_are_correct_and_changed_pairs_are_incorrect(pair):
    check(pair)


@pytest.mark.slow
@settings(max_examples=10_000, **QUIET)
@given(pairs())
def test_ten_thousand_pairs_have_no_verification_error(pair):
    check(pair)
