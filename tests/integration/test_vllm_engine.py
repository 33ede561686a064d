"""The real vLLM (CPU build here): log-probs before and after weight updates, seeds, stops, settings and ranks.

vLLM replaces functions of torch process-wide, so it runs in forked children that return what they sampled;
the comparison with transformers is made here. A child serves a tied model, closes it, and serves an untied one.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import traceback
from collections import deque
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from random_models import assert_most_probable, largest_logprob_error, write_random_model
from transformers import AutoModelForCausalLM

from megatron_g2rl.records import Prompt, response_seed
from megatron_g2rl.rollout import vllm
from megatron_g2rl.rollout.distribute import DistributedRollout
from megatron_g2rl.rollout.engine import RolloutRequest, RolloutStopped, Sampling
from megatron_g2rl.rollout.vllm import VllmEngine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.same_for_both,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: docs/install.md"),
]

VOCABULARY = 512
END_IDS = tuple(range(12))
DRAWS = random.Random(0)
# vLLM's CPU cache has blocks of 128 tokens: the long prompts fill two and three of them, which prefix caching keeps
PROMPTS = [
    Prompt(place, "", tuple(DRAWS.choices(range(VOCABULARY), k=length)), "")
    for place, length in enumerate([5, 300, 9, 420])
]
# more prompt tokens than one pass reads (4096), and more responses than a cache of 1 MiB (8 blocks) holds
CROWD = [
    Prompt(place, "", tuple(DRAWS.choices(range(VOCABULARY), k=length)), "")
    for place, length in enumerate([420] * 11 + [9] * 4)
]
PARTS = [range(4), range(1, 3), range(1), range(2, 4)]
"""Indices of responses to each of `PROMPTS`."""
TOP = 30
"""Requested top-K tokens: more than vLLM allows by default (20)."""
STOP_STRINGS = ("7 w", "w33")
"""The first spans two tokens; the text of a token is `w` and its id."""
BOUND = 2e-3
"""Log-prob error in nats; 2e-5 is observed in float32, a stale cache or LM head causes 0.1 to 3."""


def sampling(temperature: float, **changes) -> Sampling:
    settings = dict(group_size=4, temperature=temperature, max_response_tokens=24, run_seed=5, step=0)
    return Sampling(**(settings | changes))


def make_model(folder, tied: bool) -> str:
    return write_random_model(folder, tie_word_embeddings=tied, eos_token_id=list(END_IDS))


def perturbed(folder: str, round_number: int) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(round_number)
    with torch.no_grad():
        for parameter in model.parameters() if round_number else ():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def start(folder: str, **changes) -> VllmEngine:
    settings = dict(
        dtype=torch.float32,
        tensor_parallel=1,
        max_model_tokens=512,
        kv_cache_mb=64,
        gpu_memory_fraction=0.5,
        enforce_eager=True,
        seed=0,
    )
    return VllmEngine(folder, **(settings | changes))


def refusal(folder: str, **changes) -> str:
    with pytest.raises(ValueError) as error:
        start(folder, **changes)
    return str(error.value)


def serve(folder: str) -> dict:
    """Everything that the tests compare, sampled by one engine."""
    found: dict = {}
    random_state, set_num_threads = torch.get_rng_state(), torch.set_num_threads
    engine = start(folder, top_logprobs=TOP)
    engine.load_weights(perturbed(folder, 0).named_parameters())
    found["initial 0.7"] = engine.generate(RolloutRequest(PROMPTS, sampling(0.7)))
    found["initial 1.0"] = engine.generate(RolloutRequest(PROMPTS, sampling(1.0)))
    found["reversed 1.0"] = engine.generate(RolloutRequest(PROMPTS[::-1], sampling(1.0)))[::-1]
    found["alone 1.0"] = [engine.generate(RolloutRequest([prompt], sampling(1.0)))[0] for prompt in PROMPTS]
    found["parts 1.0"] = engine.generate(RolloutRequest(PROMPTS, sampling(1.0), parts=PARTS))
    known = {PROMPTS[1].id: (None, found["parts 1.0"][1].responses[0], None, None)}
    found["known"] = []
    again = engine.generate(
        RolloutRequest(PROMPTS, sampling(1.0), parts=PARTS, finished=known, on_group=found["known"].append)
    )
    found["parts again"] = again
    found["most probable"] = engine.generate(RolloutRequest(PROMPTS, sampling(1.0, top_logprobs=TOP)))
    endings = engine._endings
    engine._endings = replace(endings, strings=STOP_STRINGS)
    found["stop strings"] = engine.generate(RolloutRequest(PROMPTS, sampling(1.0)))
    engine._endings = endings
    found["next step"] = engine.generate(RolloutRequest(PROMPTS, sampling(1.0, step=1)))
    found["roomy"] = engine.generate(RolloutRequest(CROWD, sampling(1.0, max_response_tokens=92)))
    found["stop"] = stop_and_resume(engine)
    found["in flight"] = draw_with_steps_in_flight(engine)
    found["state kept"] = torch.equal(torch.get_rng_state(), random_state) and torch.set_num_threads is set_num_threads
    for round_number in (1, 2):
        engine.sleep()
        engine.wake()
        engine.load_weights(perturbed(folder, round_number).named_parameters())
        found[f"update {round_number}"] = engine.generate(RolloutRequest(PROMPTS, sampling(0.7)))
    with pytest.raises(ValueError, match="data.max_prompt_tokens"):
        engine.generate(RolloutRequest([Prompt(0, "", (20,) * 500, "")], sampling(1.0)))
    with pytest.raises(ValueError, match="1 weights were not sent and are stale: model.norm.weight"):
        engine.load_weights(
            (name, tensor) for name, tensor in perturbed(folder, 1).named_parameters() if name != "model.norm.weight"
        )
    engine.close()
    found["process group left"] = dist.is_initialized()
    return found


def stop_and_resume(engine: VllmEngine) -> dict:
    """A call that is stopped after some groups, one that draws the others, an uninterrupted one, one that fails."""
    settings = sampling(1.0, max_response_tokens=92)
    kept: list = []
    with pytest.raises(RolloutStopped):
        engine.generate(RolloutRequest(CROWD, settings, on_group=kept.append, stop=lambda: len(kept) >= 4))
    left = engine._llm.llm_engine.get_num_unfinished_requests()
    undisturbed = engine.generate(RolloutRequest(CROWD, settings))
    finished = {group.prompt.id: group.responses for group in kept}
    drawn: list = []
    resumed = engine.generate(RolloutRequest(CROWD, settings, finished=finished, on_group=drawn.append))

    def full(_):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        engine.generate(RolloutRequest(CROWD, settings, on_group=full))
    left += engine._llm.llm_engine.get_num_unfinished_requests()
    again = engine.generate(RolloutRequest(CROWD, settings))
    return dict(kept=kept, left=left, undisturbed=undisturbed, resumed=resumed, drawn=drawn, again=again)


def draw_with_steps_in_flight(engine: VllmEngine) -> dict:
    """A complete and a stopped call while vLLM launches a step before it reads the last one's tokens, as on a GPU."""
    core, queue, lengths = engine._llm.llm_engine.engine_core.engine_core, deque(maxlen=2), []
    kept = core.batch_queue, core.batch_queue_size, core.step_fn
    core.batch_queue, core.batch_queue_size, core.step_fn = queue, 2, core.step_with_batch_queue
    groups = engine.generate(RolloutRequest(PROMPTS, sampling(1.0), stop=lambda: lengths.append(len(queue))))
    left = [len(queue)]
    with pytest.raises(RolloutStopped):
        engine.generate(RolloutRequest(PROMPTS, sampling(1.0), stop=lambda: len(queue) == 1))
    core.batch_queue, core.batch_queue_size, core.step_fn = kept
    return dict(groups=groups, longest=max(lengths), left=[*left, len(queue)])


def serve_both(folders: dict[bool, str]) -> dict:
    found = {tied: serve(folder) for tied, folder in folders.items()}
    engine = start(folders[True], kv_cache_mb=1)
    engine.load_weights(perturbed(folders[True], 0).named_parameters())
    found["crowded"] = engine.generate(RolloutRequest(CROWD, sampling(1.0, max_response_tokens=92)))
    engine.close()
    with pytest.MonkeyPatch.context() as patch:
        for head in ("float32", "bf16"):
            found[f"{head} head"] = serve_bf16(folders[False])
            patch.setattr(vllm, "head_in_float32", lambda dtype: {})
    found["small cache"] = refusal(folders[True], kv_cache_mb=1, max_model_tokens=1024)
    found["long model"] = refusal(folders[True], max_model_tokens=5000)
    return found


def only_a_head(folder: str) -> torch.nn.Module:
    """A bf16 model whose layers add nothing, with logits up to about 20, so that only the head rounds."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        model.lm_head.weight.mul_(6)
    return model


def serve_bf16(folder: str) -> list:
    engine = start(folder, dtype=torch.bfloat16)
    engine.load_weights(only_a_head(folder).named_parameters())
    groups = engine.generate(RolloutRequest(PROMPTS, sampling(1.0)))
    engine.close()
    return groups


def serve_tensor_parallel(folder: str, store: str, rank: int) -> list:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    engine = DistributedRollout(start(folder, tensor_parallel=2), replica=0, replicas=1, leader=rank == 0)
    engine.load_weights(perturbed(folder, 1).named_parameters())
    groups = engine.generate(RolloutRequest(PROMPTS, sampling(0.7)))
    # only the second rank is asked to stop; if it returned alone, the first would wait forever
    steps = iter(range(1000))
    with pytest.raises(RolloutStopped):
        engine.generate(RolloutRequest(PROMPTS, sampling(0.7), stop=lambda: rank == 1 and next(steps) >= 1))
    assert engine.generate(RolloutRequest(PROMPTS, sampling(0.7), stop=lambda: False)) == groups
    engine.close()
    dist.barrier()  # the process group belongs to the trainer and outlives the engine
    return groups


def in_children(*calls) -> list:
    """Results of calls `(function, arguments...)`, each in a separate forked process, concurrently."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def main(place: int) -> None:
        function, *arguments = calls[place]
        try:
            results.put((place, function(*arguments)))
        except BaseException:
            results.put((place, traceback.format_exc()))
        results.close()
        results.join_thread()
        os._exit(0)

    processes = [context.Process(target=main, args=(place,)) for place in range(len(calls))]
    for process in processes:
        process.start()
    gathered = dict(results.get(timeout=200) for _ in processes)
    for process in processes:
        process.join(timeout=20)
    for outcome in gathered.values():
        assert not isinstance(outcome, str), outcome
    return [gathered[place] for place in range(len(calls))]


def tokens(groups) -> list:
    return [[response.token_ids for response in group.responses] for group in groups]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[bool, str]:
    return {tied: make_model(tmp_path_factory.mktemp(f"tied-{tied}"), tied) for tied in (True, False)}


@pytest.fixture(scope="module")
def served(folders) -> dict:
    return in_children((serve_both, folders))[0]


both = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@both
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_the_sampling_distribution(served, folders, tied, temperature):
    error = largest_logprob_error(perturbed(folders[tied], 0), served[tied][f"initial {temperature}"], temperature)
    assert error < BOUND


@both
def test_top_k_tokens_are_returned_and_change_no_response(served, folders, tied):
    groups = served[tied]["most probable"]
    assert tokens(groups) == tokens(served[tied]["initial 1.0"])
    model = perturbed(folders[tied], 0)
    assert largest_logprob_error(model, groups, 1.0) < BOUND
    assert_most_probable(model, groups, 1.0, TOP, BOUND)


@both
def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(served, tied):
    ended = 0
    for group, full in zip(served[tied]["stop strings"], served[tied]["initial 1.0"], strict=True):
        for response, longer in zip(group.responses, full.responses, strict=True):
            texts = [" ".join(f"w{t}" for t in longer.token_ids[: n + 1]) for n in range(len(longer.token_ids))]
            length = next((n for n, text in enumerate(texts, 1) if any(s in text for s in STOP_STRINGS)), len(texts))
            assert response.token_ids == longer.token_ids[:length]
            assert response.logprobs == longer.logprobs[:length]
            if length < len(texts):
                ended += 1
                assert response.finish_reason == "stop"
    assert ended > 4


@both
@pytest.mark.parametrize("update", [1, 2])
def test_updated_weights_are_used_for_short_and_for_cached_long_prompts(served, folders, tied, update):
    error = largest_logprob_error(perturbed(folders[tied], update), served[tied][f"update {update}"], 0.7)
    assert error < BOUND


@both
def test_responses_depend_on_their_seeds_and_not_on_the_batch(served, tied):
    found = served[tied]
    groups = found["initial 1.0"]
    assert [group.prompt for group in groups] == PROMPTS
    assert tokens(found["reversed 1.0"]) == tokens(groups)
    assert tokens(found["alone 1.0"]) == tokens(groups)
    assert all(a != b for a, b in zip(tokens(found["next step"]), tokens(groups), strict=True))
    expected = [[group.responses[index].token_ids for index in part] for group, part in zip(groups, PARTS, strict=True)]
    for parts in (found["parts 1.0"], found["parts again"]):
        assert [[response.token_ids for response in group.responses] for group in parts] == expected
        assert [group.first for group in parts] == [part.start for part in PARTS]
    assert found["parts again"][1].responses[0] == found["parts 1.0"][1].responses[0]  # not drawn again: bitwise equal
    assert sorted(group.prompt.id for group in found["known"]) == [prompt.id for prompt in PROMPTS]
    for group in groups:
        assert len({response.token_ids for response in group.responses}) == 4
        seeds = [response.seed for response in group.responses]
        assert seeds == [response_seed(5, "train", 0, group.prompt.id, index) for index in range(4)]


@both
def test_a_stopped_call_can_be_resumed_and_leaves_no_requests(served, tied):
    found = served[tied]["stop"]
    assert 4 <= len(found["kept"]) < len(CROWD) and found["left"] == 0
    assert found["again"] == found["undisturbed"]  # after a failure, bitwise equal
    by_id = {group.prompt.id: group for group in found["kept"]}
    assert [by_id.get(group.prompt.id, group) for group in found["resumed"]] == found["resumed"]
    assert {group.prompt.id for group in found["drawn"]} == {p.id for p in CROWD} - by_id.keys()
    assert tokens(found["resumed"]) == tokens(found["undisturbed"])
    for group, other in zip(found["resumed"], found["undisturbed"], strict=True):
        for response, reference in zip(group.responses, other.responses, strict=True):
            # bitwise equal with one thread on the machines tested; with two, batches change the summation order: 6e-6
            assert response.logprobs == pytest.approx(reference.logprobs, abs=1e-4)


@both
def test_no_step_is_in_flight_after_a_call(served, tied):
    found = served[tied]["in flight"]
    assert found["longest"] > 0 and found["left"] == [0, 0]
    assert tokens(found["groups"]) == tokens(served[tied]["initial 1.0"])


def test_a_cache_too_small_for_all_responses_together_changes_no_response(served):
    assert tokens(served["crowded"]) == tokens(served[True]["roomy"])


def test_a_bf16_model_has_the_logits_of_a_float32_head(served, folders):
    """Compared with transformers' bf16 hidden states and float32 logits, as the policy computes them."""
    model = only_a_head(folders[False])
    errors = {head: head_error(model, served[f"{head} head"]) for head in ("float32", "bf16")}
    assert errors["float32"] < 1e-4 and errors["bf16"] > 5e-3, errors


@torch.no_grad()
def head_error(model: torch.nn.Module, groups: list) -> float:
    """Mean absolute difference of log-probs."""
    differences = []
    for group in groups:
        start = len(group.prompt.token_ids)
        for response in group.responses:
            hidden = model.model(torch.tensor([group.prompt.token_ids + response.token_ids])).last_hidden_state[0]
            table = torch.log_softmax(hidden.float() @ model.lm_head.weight.float().T, -1)[start - 1 : -1]
            picked = table.gather(1, torch.tensor(response.token_ids)[:, None]).squeeze(1)
            differences.append((picked - torch.tensor(response.logprobs)).abs())
    return float(torch.cat(differences).mean())


@both
def test_the_end_token_is_kept_and_a_truncated_response_is_marked(served, tied):
    names = ("initial 0.7", "initial 1.0", "next step", "update 1")
    responses = [response for name in names for group in served[tied][name] for response in group.responses]
    assert {response.finish_reason for response in responses} == {"stop", "length"}
    for response in responses:
        assert len(response.logprobs) == len(response.token_ids)
        assert not set(response.token_ids[:-1]) & set(END_IDS)
        assert (response.token_ids[-1] in END_IDS) == (response.finish_reason == "stop")
        assert response.finish_reason == "stop" or len(response.token_ids) == 24
        assert response.text.split() == [f"w{t}" for t in response.token_ids if t != 1]  # w1 is a special token


@both
def test_the_process_state_is_restored(served, tied):
    assert served[tied]["state kept"]
    assert not served[tied]["process group left"]


def test_settings_that_vllm_refuses_are_reported_with_our_keys(served):
    assert "raise rollout.kv_cache_mb=1" in served["small cache"]
    assert "data.max_prompt_tokens + rollout.max_response_tokens" in served["long model"]


@pytest.mark.distributed
def test_two_tensor_parallel_ranks_sample_from_the_updated_weights(folders, tmp_path, shared_memory_alone):
    calls = [(serve_tensor_parallel, folders[True], str(tmp_path / "store"), rank) for rank in range(2)]
    first, second = in_children(*calls)
    assert first == second
    assert [group.prompt for group in first] == PROMPTS
    assert largest_logprob_error(perturbed(folders[True], 1), first, 0.7) < BOUND
