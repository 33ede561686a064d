"""`g2rl evaluate` and `g2rl analyze` in forked processes, and a benchmark for them."""

from __future__ import annotations

from failing_runs import Place

from tools.fuzz.forking import Outcome, preload, run_forked

SUMS = """
source: sums.jsonl
metrics: [pass@1, pass@8, maj@8, mean@8]
samples: 40
max_response_tokens: 24
"""


def g2rl(place: Place, *arguments: str) -> Outcome:
    preload()
    output = place.folder.parent / f"{place.folder.name}.out"
    outcome = run_forked(arguments, place.folder, output, limit_s=240, environment=place.environment)
    assert not outcome.stopped, outcome.text[-3000:]
    return outcome
