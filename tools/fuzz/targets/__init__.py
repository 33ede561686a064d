"""What is fuzzed: each target creates valid files, changes them and sets the command that reads them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tools.fuzz.case import Work
from tools.fuzz.targets import (
    checkpoints,
    clusters,
    configurations,
    datasets,
    journals,
    models,
    overrides,
    runs,
    sweeps,
)

TARGETS: dict[str, tuple[Callable[[Work], None], float]] = {
    "configurations": (configurations.make, 18),
    "overrides": (overrides.make, 15),
    "datasets": (datasets.make, 12),
    "models": (models.make, 15),
    "checkpoints": (checkpoints.make, 13),
    "journals": (journals.make, 4),
    "runs": (runs.make, 12),
    "clusters": (clusters.make, 7),
    "sweeps": (sweeps.make, 4),
}
"""Function that creates a case, and relative frequency of the target."""


def target_of(seed: int, number: int) -> str:
    """The target of a case; independent of the fuzzer's other arguments."""
    weights = [weight for _, weight in TARGETS.values()]
    return Random(f"{seed}/{number}").choices(list(TARGETS), weights)[0]
