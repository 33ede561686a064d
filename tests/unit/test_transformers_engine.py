"""The transformers engine: exact log-probs, and responses that depend only on their seed."""

from __future__ import annotations

import random
from dataclasses import replace
from operator import attrgetter

import pytest
import torch
from random_models import assert_most_probable, largest_logprob_error, write_random_model
from transformers import AutoModelForCausalLM

from megatron_g2rl.records import Prompt
from megatron_g2rl.rollout import transformers as transformers_engine
from megatron_g2rl.rollout.engine import RolloutRequest, RolloutStopped, Sampling
from megatron_g2rl.rollout.sampling import draw, uniform
from megatron_g2rl.rollout.transformers import TransformersEngine

VOCABULARY = 512
END_IDS = tuple(range(40))  # about one in twelve tokens of a random model ends its response


def make_model(folder, tied: bool) -> str:
    return write_random_model(folder, head_dim=16, tie_word_embeddings=tied, eos_token_id=list(END_IDS))


def make_prompts(lengths) -> list[Prompt]:
    draws = random.Random(0)
    return [
        Prompt(10 + place, "", tuple(draws.choices(range(VOCABULARY), k=length)), "")
        for place, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def engine(model_path) -> TransformersEngine:
    return TransformersEngine(model_path, dtype=torch.float32, device=torch.device("cpu"))


PROMPTS = make_prompts([3, 17, 3, 60, 8])
SAMPLING = Sampling(group_size=4, temperature=0.7, max_response_tokens=24, run_seed=5, step=2)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_logprobs_are_those_of_the_sampling_distribution(engine, model_path, temperature):
    groups = engine.generate(RolloutRequest(PROMPTS, Sampling(4, temperature, 24, 5, 2)))
    # 4e-6 is observed; float32 sums in a different order
    assert largest_logprob_error(AutoModelForCausalLM.from_pretrained(model_path), groups, temperature) < 1e-4


def test_top_k_tokens_are_returned_and_change_no_response(engine, model_path):
    groups = engine.generate(RolloutRequest(PROMPTS, replace(SAMPLING, top_logprobs=7)))
    assert groups == engine.generate(RolloutRequest(PROMPTS, SAMPLING))
    assert_most_probable(AutoModelForCausalLM.from_pretrained(model_path), groups, SAMPLING.temperature, 7, 1e-4)
    assert engine.generate(RolloutRequest(PROMPTS[:1], SAMPLING))[0].responses[0].top_ids is None


def test_responses_do_not_depend_on_how_prompts_are_batched(engine, model_path):
    together = engine.generate(RolloutRequest(PROMPTS, SAMPLING))
    assert [group.prompt for group in together] == PROMPTS
    reversed_order = engine.generate(RolloutRequest(PROMPTS[::-1], SAMPLING))[::-1]
    alone = [engine.generate(RolloutRequest([prompt], SAMPLING))[0] for prompt in PROMPTS]
    # less than one response fits: one row at a time, groups are split
    narrow_engine = TransformersEngine(model_path, dtype=torch.float32, device=torch.device("cpu"), memory_mb=0)
    narrow = narrow_engine.generate(RolloutRequest(PROMPTS, SAMPLING))
    expected = [[response.token_ids for response in group.responses] for group in together]
    for other in (reversed_order, alone, narrow):
        assert [[response.token_ids for response in group.responses] for group in other] == expected


def test_the_rest_of_a_call_is_drawn_bitwise_equal(engine, monkeypatch):
    monkeypatch.setattr(
        transformers_engine, "ROWS_PER_PASS", 8
    )  # two groups per pass; float sums differ between passes
    handed_on = []
    whole = engine.generate(RolloutRequest(PROMPTS, SAMPLING, on_group=handed_on.append))
    assert sorted(handed_on, key=attrgetter("prompt.id")) == whole
    for missing in ([0], [1, 3], [4], []):
        finished = {g.prompt.id: g.responses for place, g in enumerate(whole) if place not in missing}
        handed_on.clear()
        assert engine.generate(RolloutRequest(PROMPTS, SAMPLING, finished=finished, on_group=handed_on.append)) == whole
        assert sorted(handed_on, key=attrgetter("prompt.id")) == [whole[place] for place in missing]


def test_parts_of_groups_and_their_rests_are_drawn_bitwise_equal(engine, monkeypatch):
    complete = engine.generate(RolloutRequest(PROMPTS, SAMPLING))
    monkeypatch.setattr(transformers_engine, "ROWS_PER_PASS", 4)
    parts = [range(2, 4), range(4), range(1), range(1, 3), range(3, 4)]
    handed_on = []
    groups = engine.generate(RolloutRequest(PROMPTS, SAMPLING, parts=parts, on_group=handed_on.append))
    assert sorted(handed_on, key=attrgetter("prompt.id")) == groups
    assert [group.first for group in groups] == [part.start for part in parts]
    for group, part, other in zip(groups, parts, complete, strict=True):
        expected = [other.responses[index] for index in part]
        assert [(r.token_ids, r.seed) for r in group.responses] == [(r.token_ids, r.seed) for r in expected]
    known = {  # two complete parts, and one of two responses of another
        PROMPTS[0].id: (None, None, *groups[0].responses),
        PROMPTS[2].id: (groups[2].responses[0], None, None, None),
        PROMPTS[3].id: (None, None, groups[3].responses[1], None),
    }
    handed_on.clear()
    assert (
        engine.generate(RolloutRequest(PROMPTS, SAMPLING, parts=parts, finished=known, on_group=handed_on.append))
        == groups
    )
    assert sorted(handed_on, key=attrgetter("prompt.id")) == [groups[1], groups[3], groups[4]]


def test_a_stop_takes_effect_at_every_token_and_later_draws_are_unchanged(engine):
    whole = engine.generate(RolloutRequest(PROMPTS, SAMPLING))
    for count in (0, 1, 7):
        asked = iter(range(100))
        with pytest.raises(RolloutStopped):
            engine.generate(
                RolloutRequest(PROMPTS, SAMPLING, stop=lambda asked=asked, count=count: next(asked) >= count)
            )
        assert next(asked) == count + 1  # not once more than needed
    assert engine.generate(RolloutRequest(PROMPTS, SAMPLING, stop=lambda: False)) == whole


def test_responses_repeat_with_their_seeds_and_differ_inside_a_group_and_between_steps(engine):
    groups = engine.generate(RolloutRequest(PROMPTS, SAMPLING))
    assert engine.generate(RolloutRequest(PROMPTS, SAMPLING)) == groups
    for group in groups:
        assert len({response.seed for response in group.responses}) == SAMPLING.group_size
    drawn = {response.token_ids for group in groups for response in group.responses}
    assert len(drawn) > 15  # of 20; one-token responses may repeat
    later = engine.generate(RolloutRequest(PROMPTS, Sampling(4, 0.7, 24, 5, 3)))
    assert all(a.responses != b.responses for a, b in zip(groups, later, strict=True))


def test_the_end_token_is_kept_and_nothing_follows_it(engine):
    responses = [
        response for group in engine.generate(RolloutRequest(PROMPTS, SAMPLING)) for response in group.responses
    ]
    assert {response.finish_reason for response in responses} == {"stop", "length"}
    for response in responses:
        assert len(response.logprobs) == len(response.token_ids)
        assert not set(response.token_ids[:-1]) & set(END_IDS)
        assert (response.token_ids[-1] in END_IDS) == (response.finish_reason == "stop")
        if response.finish_reason == "length":
            assert len(response.token_ids) == SAMPLING.max_response_tokens
        assert response.text.split() == [
            f"w{token}" for token in response.token_ids if token != 1
        ]  # w1 is a special token


def test_the_global_random_state_is_unchanged(engine):
    before = torch.get_rng_state()
    engine.generate(RolloutRequest(PROMPTS, SAMPLING))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("tied", [True, False])
def test_new_weights_are_used(tmp_path, tied):
    folder = make_model(tmp_path, tied)
    engine = TransformersEngine(folder, dtype=torch.float32, device=torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    engine.sleep()
    engine.wake()
    engine.load_weights(model.named_parameters())
    assert largest_logprob_error(model, engine.generate(RolloutRequest(PROMPTS, SAMPLING)), SAMPLING.temperature) < 1e-4


def test_an_incomplete_or_unknown_weight_stream_is_refused(model_path):
    engine = TransformersEngine(model_path, dtype=torch.float32, device=torch.device("cpu"))
    weights = dict(AutoModelForCausalLM.from_pretrained(model_path).named_parameters())
    with pytest.raises(ValueError, match="not in Qwen3ForCausalLM"):
        engine.load_weights([("model.layers.9.weight", torch.zeros(1))])
    with pytest.raises(ValueError, match="shape"):
        engine.load_weights([("model.norm.weight", torch.zeros(1))])
    del weights["model.norm.weight"]
    with pytest.raises(ValueError, match="stale: model.norm.weight"):
        engine.load_weights(weights.items())


def test_uniform_numbers_are_splitmix64():
    # published test vector of SplitMix64, seed 1234567
    vector = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    for position, word in enumerate(vector):
        assert uniform(torch.tensor([1234567]), position).item() == (word >> 12) / 2**52


def test_tokens_are_drawn_with_their_probabilities_and_never_at_probability_zero():
    logits = torch.tensor([1.0, -torch.inf, 0.0, 2.0, -1.0, -torch.inf])
    count = 100_000
    numbers = torch.cat([uniform(torch.arange(count) * 7919 + 13, position) for position in range(2)])
    tokens, logprobs = draw(logits.expand(2 * count, -1), 0.8, numbers)
    expected = torch.softmax(logits.double() / 0.8, -1)
    seen = torch.bincount(tokens, minlength=6).double() / (2 * count)
    # five standard deviations of a fraction of 200 000 draws
    assert ((seen - expected).abs() <= 5 * (expected * (1 - expected) / (2 * count)).sqrt()).all()
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], atol=1e-6, rtol=0)
    edge, _ = draw(logits.expand(2, -1), 0.8, torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64))
    assert edge.tolist() == [0, 4]
