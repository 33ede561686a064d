"""The geometry of saved responses against plain numpy, and its pages."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch

from megatron_g2rl.commands.analyze import MOST
from megatron_g2rl.evaluation.geometry_study import BINS, KINDS, effective_ranks, pair_cosines, study
from megatron_g2rl.exploration import geometry
from megatron_g2rl.report import geometry as pages
from megatron_g2rl.report.plots import COLORS


def problems() -> tuple[list[torch.Tensor], list[list[bool]]]:
    draw = torch.Generator().manual_seed(4)
    features = [torch.randn(size, 6, generator=draw) for size in (4, 5, 3)]
    return features, [[True, True, False, False], [False] * 5, [True, False, True]]


def plain_cosines(features, correct, kind) -> list[float]:
    found = []
    for i, j in itertools.combinations(range(len(features)), 2):
        both = correct[i] + correct[j]
        if kind == "all" or both == {"both_correct": 2, "mixed": 1, "both_incorrect": 0}[kind]:
            one, other = features[i].double().numpy(), features[j].double().numpy()
            found.append(float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_each_kind_of_pairs_are_those_of_numpy(kind):
    features, correct = problems()
    parts = [plain_cosines(*each, kind) for each in zip(features, correct, strict=True)]
    values = np.array(sum(parts, []))
    found = study(features, correct)[kind]
    assert found["pairs"] == len(values) and found["problems"] == sum(map(bool, parts))
    assert found["mean"] == pytest.approx(values.mean(), abs=1e-7)
    assert found["negative_fraction"] == (values < 0).mean()
    assert found["orthogonal_fraction"] == (abs(values) < 0.1).mean()
    for percentile, value in found["percentiles"].items():
        assert value == pytest.approx(np.percentile(values, int(percentile)), abs=1e-6)
    assert sum(found["histogram"]) == pytest.approx(1) and len(found["histogram"]) == len(BINS) - 1
    assert pages.BINS == pytest.approx(BINS.tolist())
    low, high = found["intervals"]["mean"]
    assert low <= np.mean([np.mean(part) for part in parts if part]) <= high


def test_zero_features_and_missing_kinds_are_left_out():
    features = [torch.stack([torch.ones(3), torch.zeros(3), torch.ones(3)])]
    found = study(features, [[True, False, True]])
    assert found["all"]["pairs"] == found["both_correct"]["pairs"] == 1 and found["all"]["mean"] == pytest.approx(1)
    assert found["mixed"] == found["both_incorrect"] == {"pairs": 0}
    assert all(not len(part) for part in pair_cosines(torch.zeros(0, 3), torch.zeros(0).bool()).values())


def test_effective_ranks_are_means_over_problems_with_two_such_responses():
    features, correct = problems()
    found = effective_ranks(features, correct)
    assert found["all"] == pytest.approx(np.mean([geometry(each).effective_rank for each in features]))
    own = [geometry(features[0][:2]).effective_rank, geometry(features[2][[0, 2]]).effective_rank]
    assert found["correct"] == pytest.approx(np.mean(own))
    assert "correct" not in effective_ranks(features[1:2], correct[1:2])


def result(label: str, **changes) -> dict:
    features, correct = problems()
    found = dict(label=label, problems=3, responses=12, correct_fraction=0.4, logprob_difference=1e-6)
    found |= dict(gradient=study(features, correct), effective_rank=effective_ranks(features, correct))
    return found | dict(interval_method="bootstrap") | changes


def test_the_page_has_a_chart_for_each_kind_and_escapes_names():
    semantic = study(*problems())
    text = pages.page([result("one <b>"), result("two", semantic=semantic)])
    assert text.count("<svg viewBox") >= 8 and "one &lt;b&gt;" in text and "<b>" not in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_as_many_results_as_are_accepted_have_distinct_lines():
    page = pages.page([result(str(number)) for number in range(MOST)])
    table = page[: page.index("</table>")]
    swatches = re.findall(r'<svg class="swatch".*?</svg>', table)
    assert len(swatches) == len(set(swatches)) == MOST > len(COLORS)


def test_the_table_has_a_row_for_each_kind_and_a_dash_without_pairs():
    alone = study([torch.ones(2, 3)], [[True, True]])
    text = pages.markdown([result("mine", gradient=alone)])
    rows = [line for line in text.splitlines() if "update directions" in line]
    assert len(rows) == 4 and "| 0 | - |" in rows[2] and "1.000" in rows[0]
    assert all(line.count("|") == 10 for line in rows)
