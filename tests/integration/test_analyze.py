"""`g2rl analyze` on real evaluations: Φ as in training, several models on one page, clear errors."""

from __future__ import annotations

import json

import pytest
import torch
from evaluation_runs import SUMS, g2rl
from failing_runs import Place, assert_one_message

from megatron_g2rl.evaluation.results import read_responses
from tools.fuzz.forking import fork_ranks, wait_for_all

pytestmark = [pytest.mark.slow, pytest.mark.same_for_both]


@pytest.fixture
def evaluated(place) -> Place:
    """A folder with the results of a model on six problems."""
    place.write("sums.yaml", SUMS)
    rows = [{"problem": f"{a}+{b}=?", "answer": str(a + b)} for a in range(3) for b in range(2)]
    place.write("sums.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    outcome = g2rl(place, "evaluate", "config.yaml", "--benchmark", "sums.yaml", "--samples", "8")
    assert outcome.code == 0, outcome.text[-3000:]
    return place


def test_the_analysis_has_the_features_of_the_policy_and_the_log_probs_of_the_engine(evaluated):
    outcome = g2rl(evaluated, "analyze", "config.yaml", "evaluations")
    assert outcome.code == 0, outcome.text[-3000:]
    (found,) = json.loads((evaluated.folder / "geometry/geometry.json").read_text())
    assert (found["problems"], found["responses"]) == (6, 48)
    # float32 in two implementations
    assert found["logprob_difference"] < 1e-5
    assert found["gradient"]["all"]["pairs"] <= 6 * 8 * 7 // 2
    assert 1 < found["effective_rank"]["all"] <= 8
    assert (evaluated.folder / "geometry/geometry.html").stat().st_size > 10_000
    assert "update directions" in (evaluated.folder / "geometry/geometry.md").read_text()
    check_cosines(evaluated, found)


def check_cosines(place: Place, found: dict) -> None:
    """Φ of two responses from transformers, by autograd: the gradient of the mean log-prob at the last hidden state."""
    import transformers

    (folder,) = (path.parent for path in (place.folder / "evaluations").rglob("summary.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(place.folder / found["model"], dtype=torch.float32)
    temperature, cosines = found["temperature"], []
    for problem in read_responses(folder):
        features = []
        for tokens in problem.responses:
            ids = torch.tensor([problem.prompt + tokens])
            first = len(problem.prompt) - 1
            states = model.model(ids).last_hidden_state[0, first : first + len(tokens)].detach().requires_grad_()
            logprobs = (model.lm_head(states) / temperature).log_softmax(-1)
            logprobs.gather(1, torch.tensor(tokens)[:, None]).mean().backward()
            features.append(states.grad.sum(0))
        units = torch.nn.functional.normalize(torch.stack(features).double(), dim=1)
        products = units @ units.T
        cosines.append(products[tuple(torch.triu_indices(len(units), len(units), 1))])
    expected = torch.cat(cosines)
    assert found["gradient"]["all"]["pairs"] == len(expected)
    assert found["gradient"]["all"]["mean"] == pytest.approx(float(expected.mean()), abs=1e-4)


def test_two_ranks_give_the_numbers_of_one(evaluated):
    assert g2rl(evaluated, "analyze", "config.yaml", "evaluations").code == 0
    options = ["analyze", "config.yaml", "evaluations", "--output", "two", "policy.tensor_parallel=2"]
    started = fork_ranks(2, options, evaluated.folder, evaluated.folder / "rank", evaluated.environment)
    assert wait_for_all(started, 240) == [0, 0], started[0].read()[-3000:]
    one, two = (json.loads((evaluated.folder / name / "geometry.json").read_text())[0] for name in ("geometry", "two"))
    for kind, part in one["gradient"].items():
        assert two["gradient"][kind]["pairs"] == part["pairs"]
        if part["pairs"]:
            assert two["gradient"][kind]["mean"] == pytest.approx(part["mean"], abs=1e-4)


def test_what_cannot_be_analyzed_is_refused_in_one_message(evaluated):
    place = evaluated
    assert_one_message(g2rl(place, "analyze", "config.yaml", "nowhere"), 2, ("nowhere", "g2rl evaluate"))
    (summary,) = (place.folder / "evaluations").rglob("summary.json")
    content = json.loads(summary.read_text())
    summary.write_text(json.dumps(content | dict(path="./gone/model")))
    assert_one_message(g2rl(place, "analyze", "config.yaml", "evaluations"), 2, ("gone", "no such folder"))
    summary.write_text("{}")
    assert_one_message(g2rl(place, "analyze", "config.yaml", "evaluations"), 2, ("not the summary",))
    summary.write_text(json.dumps(content))
    (summary.parent / "responses.parquet").write_bytes(b"PAR1")
    assert_one_message(g2rl(place, "analyze", "config.yaml", "evaluations"), 1, ("responses.parquet",))
