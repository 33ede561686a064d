"""Geometry of saved responses: how the update directions, and texts, of responses to one problem relate.

The study of §3.5 of the paper (docs/method.md, section 5), by the correctness of the two responses of a pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_g2rl.evaluation.summary import CONFIDENCE, RESAMPLES, intervals
from megatron_g2rl.exploration.geometry import ORTHOGONAL_BELOW, geometry
from megatron_g2rl.exploration.score import unit_features

KINDS = ("all", "both_correct", "mixed", "both_incorrect")
"""Pairs of responses to one problem, by their correctness."""
PERCENTILES = (5, 25, 50, 75, 95)
BINS = np.linspace(-1, 1, 41)
"""Bounds of the histograms of cosines."""


def pair_cosines(
    features: Float[Tensor, "responses hidden"], correct: Bool[Tensor, "responses"]
) -> dict[str, Float[Tensor, "_pairs"]]:
    """Cosines of all pairs of nonzero features of ONE problem, by kind (`KINDS`); float64."""
    units, nonzero = unit_features(features)
    units, correct = units[nonzero], correct[nonzero]
    cosines = (units @ units.T).clamp(-1, 1)
    first, second = torch.triu_indices(len(units), len(units), offset=1)
    pairs, both = cosines[first, second], correct[first].long() + correct[second].long()
    return {
        "all": pairs,
        "both_correct": pairs[both == 2],
        "mixed": pairs[both == 1],
        "both_incorrect": pairs[both == 0],
    }


def study(
    features: Sequence[Float[Tensor, "_responses hidden"]], correct: Sequence[Sequence[bool]]
) -> dict[str, dict[str, Any]]:
    """Statistics of the cosines of the pairs of each kind.

    Args:
        features: Φ or embeddings of the responses to each problem.
        correct: whether each of them is correct.

    Returns:
        Kind -> `pairs` (number), `problems` (with such a pair), `mean`, `negative_fraction`, `orthogonal_fraction`,
        `percentiles`, `histogram` (fractions of the pairs in each of the `BINS`) and `intervals` of the three numbers,
        by bootstrap over problems. Numbers are means over all pairs; the intervals are of means over problems. A kind
        without pairs has only `pairs` = 0.
    """
    by_problem = [
        pair_cosines(each, torch.tensor(flags, dtype=torch.bool)) for each, flags in zip(features, correct, strict=True)
    ]
    found = {}
    for kind in KINDS:
        parts = [cosines[kind].numpy() for cosines in by_problem if len(cosines[kind])]
        if not parts:
            found[kind] = {"pairs": 0}
            continue
        values = np.concatenate(parts)
        per_problem = {name: [float(of(part)) for part in parts] for name, of in _NUMBERS.items()}
        found[kind] = {
            "pairs": len(values),
            "problems": len(parts),
            **{name: float(of(values)) for name, of in _NUMBERS.items()},
            "percentiles": {str(p): float(np.percentile(values, p)) for p in PERCENTILES},
            "histogram": (np.histogram(values, BINS)[0] / len(values)).tolist(),
            "intervals": {name: list(bounds) for name, bounds in intervals(per_problem).items()},
        }
    return found


def effective_ranks(
    features: Sequence[Float[Tensor, "_responses hidden"]], correct: Sequence[Sequence[bool]]
) -> dict[str, float]:
    """Mean effective rank of the features of a problem: of all responses, and of the correct and incorrect ones.

    Problems with fewer than two such responses do not count; a kind without problems is absent.
    """
    found: dict[str, list[float]] = {"all": [], "correct": [], "incorrect": []}
    for each, flags in zip(features, correct, strict=True):
        mask = torch.tensor(flags, dtype=torch.bool)
        for kind, members in (("all", each), ("correct", each[mask]), ("incorrect", each[~mask])):
            if len(members) > 1:
                found[kind].append(geometry(members).effective_rank)
    return {kind: float(np.mean(ranks)) for kind, ranks in found.items() if ranks}


INTERVAL_METHOD = (
    f"bootstrap over problems of the mean over problems, {RESAMPLES} samples, {CONFIDENCE:.0%} percentile interval"
)
_NUMBERS: Mapping[str, Any] = {
    "mean": np.mean,
    "negative_fraction": lambda values: np.mean(values < 0),
    "orthogonal_fraction": lambda values: np.mean(np.abs(values) < ORTHOGONAL_BELOW),
}
