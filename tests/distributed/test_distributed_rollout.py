"""Rollouts split over ranks: same prompts, same responses, and no rank waits for a failed one."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from random_models import write_random_model

from megatron_g2rl.config import Config
from megatron_g2rl.records import Prompt, Response, ResponseGroup
from megatron_g2rl.rollout import make_engine
from megatron_g2rl.rollout import transformers as transformers_engine
from megatron_g2rl.rollout.distribute import DistributedRollout, deal
from megatron_g2rl.rollout.engine import RolloutRequest, RolloutStopped, Sampling, WrappedEngine
from megatron_g2rl.rollout.journal import JournaledRollout
from megatron_g2rl.rollout.watch import Watch

pytestmark = [pytest.mark.distributed, pytest.mark.same_for_both]

DRAWS = random.Random(3)
PROMPTS = [Prompt(place, "", tuple(DRAWS.choices(range(128), k=DRAWS.randint(2, 30))), "") for place in range(5)]
SAMPLING = Sampling(group_size=3, temperature=1.0, max_response_tokens=12, run_seed=1, step=4)


def run_ranks(world_size: int, work, *arguments) -> list:
    """The results of `work(*arguments)` on forked ranks that communicate over gloo."""
    context = multiprocessing.get_context("fork")
    results, store = context.Queue(), f"{arguments[0]}/store-{world_size}-{work.__name__}"

    def rank_main(rank: int) -> None:
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
            results.put((rank, work(*arguments)))
        except BaseException:
            results.put((rank, traceback.format_exc()))
        finally:
            results.close()
            results.join_thread()
            os._exit(0)

    processes = [context.Process(target=rank_main, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    gathered = dict(results.get(timeout=100) for _ in processes)
    for process in processes:
        process.join(timeout=10)
    return [gathered[rank] for rank in range(world_size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_attention_heads=2, initializer_range=0.2)
    return write_random_model(tmp_path_factory.mktemp("model"), "llama", eos_token_id=[1, 2, 3, 4], **sizes)


def make(folder: str):
    config = Config.model_validate(
        {
            "model": {"path": folder},
            "data": {"source": "unused"},
            "rollout": {"engine": "transformers"},
            "policy": {"precision": "fp32"},
        }
    )
    return make_engine(config, folder, torch.device("cpu"))


def generate(folder: str):
    return make(folder).generate(RolloutRequest(PROMPTS, SAMPLING))


def generate_with_top(folder: str):
    return make(folder).generate(RolloutRequest(PROMPTS, replace(SAMPLING, top_logprobs=4)))


def test_any_number_of_ranks_gives_the_responses_of_one_rank(folder):
    expected = generate(folder)
    assert [group.prompt for group in expected] == PROMPTS
    for world_size in (2, 3):
        for groups in run_ranks(world_size, generate, folder):
            assert [group.prompt for group in groups] == PROMPTS
            for group, reference in zip(groups, expected, strict=True):
                for response, other in zip(group.responses, reference.responses, strict=True):
                    assert response.token_ids == other.token_ids
                    assert response.seed == other.seed
                    # different batches, a different order of float32 sums
                    assert response.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("group_size", [1, 3, 8])
@pytest.mark.parametrize("replicas", [1, 2, 3, 7, 64])
def test_every_response_is_assigned_once_and_replica_loads_differ_by_at_most_one(replicas, group_size):
    for prompts in range(0, 40):
        dealt = deal(prompts, group_size, replicas)
        members = [[(p, i) for p, part in own.items() for i in part] for own in dealt]
        everything = [(p, i) for p in range(prompts) for i in range(group_size)]
        assert [member for own in members for member in own] == everything  # once each, and consecutive
        loads = [len(own) for own in members]
        assert len(loads) == replicas and max(loads) - min(loads) <= 1
        split = [p for p in range(prompts) if sum(p in own for own in dealt) > 1]
        assert all(len(part) for own in dealt for part in own.values())
        assert not split if prompts % replicas == 0 else len(split) < replicas


class CountingEngine:
    """Counts the responses that a real engine draws on this rank."""

    def __init__(self, engine):
        self.engine, self.drawn = engine, []

    def generate(self, request):
        def count(group):
            indices = range(group.first, group.first + len(group.responses))
            self.drawn += [(group.prompt.id, index) for index in indices]

        return self.engine.generate(replace(request, on_group=count))


def count_what_is_drawn(folder: str, model: str, prompts: int) -> tuple:
    rollout = make(model)
    rollout._engine = engine = CountingEngine(rollout._engine)
    return rollout.generate(RolloutRequest(PROMPTS[:prompts], SAMPLING, on_group=lambda group: None)), engine.drawn


@pytest.mark.parametrize(("world_size", "prompts"), [(2, 5), (4, 1), (4, 2)])
def test_fewer_prompts_than_replicas_keep_every_replica_busy(folder, tmp_path, world_size, prompts):
    expected = make(folder).generate(RolloutRequest(PROMPTS[:prompts], SAMPLING))
    outcomes = run_ranks(world_size, count_what_is_drawn, tmp_path, folder, prompts)
    loads = [len(drawn) for _, drawn in outcomes]
    assert max(loads) - min(loads) <= 1
    drawn = [member for _, part in outcomes for member in part]
    assert sorted(drawn) == [(p, i) for p in range(prompts) for i in range(SAMPLING.group_size)]
    for groups, _ in outcomes:
        assert tokens_of(groups) == tokens_of(expected)
        assert [r.seed for g in groups for r in g.responses] == [r.seed for g in expected for r in g.responses]
        assert [group.first for group in groups] == [0] * prompts


def test_every_rank_gets_the_top_k_tokens_of_the_other_ranks(folder):
    expected = generate_with_top(folder)
    for groups in run_ranks(3, generate_with_top, folder):
        assert tokens_of(groups) == tokens_of(expected)
        for group, reference in zip(groups, expected, strict=True):
            for response, other in zip(group.responses, reference.responses, strict=True):
                assert response.top_ids.shape == (len(response.token_ids), 4)
                # half precision of numbers up to 8; different batches, a different order of float32 sums
                np.testing.assert_allclose(response.top_logprobs, other.top_logprobs, atol=2e-2)
                assert (response.top_ids == other.top_ids).mean() > 0.9


def tokens_of(groups) -> list:
    return [response.token_ids for group in groups for response in group.responses]


class FailingEngine:
    def generate(self, request):
        if dist.get_rank() == 1:
            raise ValueError("out of luck")
        return []


def generate_with_a_failing_rank(folder: str) -> str:
    with pytest.raises(RuntimeError) as error:
        rollout = DistributedRollout(FailingEngine(), dist.get_rank(), 2, leader=False)
        rollout.generate(RolloutRequest(PROMPTS, SAMPLING))
    return str(error.value)


def test_a_failure_on_one_rank_is_raised_on_all(folder):
    messages = run_ranks(2, generate_with_a_failing_rank, folder)
    assert messages == ["generation failed on rank 1: ValueError: out of luck"] * 2


class SteppingEngine:
    """Draws a group in `steps` engine steps; partners step together, as in a shared engine."""

    def __init__(self, steps: int, partners: dist.ProcessGroup | None = None):
        self.steps, self.partners, self.made = steps, partners, 0

    def generate(self, request):
        finished = request.finished
        groups = []
        for prompt, part in zip(request.prompts, request.parts, strict=True):
            if prompt.id in finished:
                groups.append(ResponseGroup(prompt, finished[prompt.id][part.start : part.stop], part.start))
                continue
            for _ in range(self.steps):
                if request.stop():
                    raise RolloutStopped
                time.sleep(1e-3)
                self.made += 1
                if self.partners:
                    dist.all_reduce(torch.zeros(1), group=self.partners)
            drawn = tuple(Response((1,), (0.0,), "", "stop", prompt.id) for _ in part)
            groups.append(ResponseGroup(prompt, drawn, part.start))
            if request.on_group:
                request.on_group(groups[-1])
        return groups


def stop_on_one_rank(folder: str, sharing: int) -> tuple:
    """Only rank 3 is asked to stop while the others have work for 50 s; then all draw once more."""
    rank, replicas = dist.get_rank(), 4 // sharing
    engine = SteppingEngine(50_000)
    rollout = DistributedRollout(engine, rank // sharing, replicas, leader=rank % sharing == 0)
    engine.partners = rollout._partners
    start = time.monotonic()
    with pytest.raises(RolloutStopped):
        rollout.generate(RolloutRequest(PROMPTS, SAMPLING, stop=lambda: rank == 3 and engine.made > 20))
    seconds, made, engine.steps = time.monotonic() - start, engine.made, 1
    handed_on = []
    finished = {PROMPTS[0].id: tuple(Response((2,), (0.0,), "", "stop", index) for index in range(3))}
    groups = rollout.generate(
        RolloutRequest(PROMPTS, SAMPLING, finished=finished, on_group=handed_on.append, stop=lambda: False)
    )
    assert [group.prompt for group in groups] == PROMPTS
    assert [r.token_ids for r in groups[0].responses] == [(2,)] * 3 and groups[0].responses == finished[PROMPTS[0].id]
    assert [[r.token_ids for r in group.responses] for group in groups[1:]] == [[(1,)] * 3] * 4
    return seconds, made, [(group.prompt.id, group.first, len(group.responses)) for group in handed_on]


@pytest.mark.parametrize("sharing", [1, 2])
def test_a_stop_on_one_rank_stops_all_ranks_and_partners_at_the_same_step(folder, tmp_path, sharing):
    outcomes = run_ranks(4, stop_on_one_rank, tmp_path, sharing)
    assert not [outcome for outcome in outcomes if isinstance(outcome, str)], outcomes
    seconds, made, handed_on = zip(*outcomes, strict=True)
    assert max(seconds) < 45  # one poll a second, on a busy machine
    if sharing == 2:
        assert made[0] == made[1] and made[2] == made[3]
        assert handed_on == ([(1, 0, 3), (2, 0, 1)], [], [(2, 1, 2), (3, 0, 3), (4, 0, 3)], [])
    else:
        assert handed_on == ([], [(1, 0, 3), (2, 0, 1)], [(2, 1, 2), (3, 0, 2)], [(3, 2, 1), (4, 0, 3)])


def fill_the_disk_of_rank_2(folder: str) -> tuple:
    rank = dist.get_rank()
    engine = SteppingEngine(3)
    rollout = DistributedRollout(engine, rank // 2, 2, leader=rank % 2 == 0)
    engine.partners = rollout._partners

    def on_group(group):
        if rank == 2:
            raise OSError(errno.ENOSPC, "No space left on device", "journal")

    with pytest.raises(OSError) as error:
        rollout.generate(RolloutRequest(PROMPTS, SAMPLING, on_group=on_group))
    return error.value.errno, str(error.value)


def test_a_full_disk_on_one_rank_is_reported_on_all_and_no_rank_hangs(folder, tmp_path):
    expected = (errno.ENOSPC, f"[Errno {errno.ENOSPC}] No space left on device (rank 2): 'journal'")
    assert run_ranks(4, fill_the_disk_of_rank_2, tmp_path) == [expected] * 4


class KeepsRequest(WrappedEngine):
    """Keeps the request for a look at what it has from the journal."""

    def generate(self, request):
        self.request = request
        return self._engine.generate(request)


def journal(folder: str, model: str) -> tuple:
    """The groups of a step on a real model, and how many of them were not drawn again."""
    engine = KeepsRequest(make(model))
    groups = JournaledRollout(engine, Path(folder, "rollouts"), "a").generate(RolloutRequest(PROMPTS, SAMPLING))
    return groups, sum(None not in responses for responses in engine.request.finished.values())


def test_a_killed_step_resumes_from_the_journals_of_all_ranks(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_engine, "ROWS_PER_PASS", 3)  # one group in a pass: 12 tokens at most
    undisturbed = run_ranks(2, journal, tmp_path, folder)[0][0]
    for file in sorted(Path(tmp_path, "rollouts").iterdir()):
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:-1]) + lines[-1][:-9])  # the last group of each rank was not recorded
    for path in tmp_path.glob("store*"):
        path.unlink()
    outcomes = run_ranks(2, journal, tmp_path, folder)
    assert outcomes == [(undisturbed, 3)] * 2  # of 5; bitwise equal with the same number of ranks
    assert run_ranks(3, journal, tmp_path, folder) == [(undisturbed, 5)] * 3


def test_a_partial_group_in_a_journal_is_not_drawn_again(folder, tmp_path):
    undisturbed = run_ranks(2, journal, tmp_path, folder)[0][0]
    lines = {file: file.read_bytes().splitlines(keepends=True) for file in Path(tmp_path, "rollouts").iterdir()}
    parts = [(file, line) for file, own in lines.items() for line in own if b'"first"' in line]
    assert len(parts) == 2 and parts[0][0] != parts[1][0]  # 15 responses on 2 ranks: the third group is split
    for file, line in parts:
        file.write_bytes(line)  # nothing else was recorded
    for path in tmp_path.glob("store*"):
        path.unlink()
    assert run_ranks(2, journal, tmp_path, folder) == [(undisturbed, 1)] * 2
    parts[0][0].write_bytes(parts[0][1])
    parts[1][0].unlink()
    # one part of the group is recorded: the other is drawn, now on one rank, and the group is assembled
    (groups, replayed) = journal(str(tmp_path), folder)
    assert replayed == 0 and tokens_of(groups) == tokens_of(undisturbed)
    kept = json.loads(parts[0][1])
    same = [r.logprobs for r in groups[2].responses][kept["first"] :][: len(kept["responses"])]
    assert same == [tuple(r["logprobs"]) for r in kept["responses"]]


class SlowOnRank1:
    """An engine whose replica on rank 1 takes longer than the timeout of collectives."""

    def generate(self, request):
        time.sleep(8.0 * dist.get_rank())
        answer = Response((1,), (-1.0,), "", "stop", 0)
        return [
            ResponseGroup(prompt, (answer,) * len(part))
            for prompt, part in zip(request.prompts, request.parts, strict=True)
        ]


def draw_with_a_short_collective_timeout(folder) -> int:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=5), dist.group.WORLD)
    engine = DistributedRollout(SlowOnRank1(), dist.get_rank(), 2, True)
    return len(engine.generate(RolloutRequest(PROMPTS, SAMPLING)))


def test_a_replica_may_take_longer_than_the_collective_timeout(tmp_path):
    assert run_ranks(2, draw_with_a_short_collective_timeout, tmp_path) == [len(PROMPTS)] * 2


def wait_for_an_absent_rank(folder) -> str:
    if dist.get_rank() == 0:
        asked_at = time.monotonic() + 2
        Watch(lambda: time.monotonic() > asked_at, None).wait_for_others()
    return "left"


def test_a_rank_that_is_asked_to_stop_does_not_wait_for_others(tmp_path):
    assert run_ranks(2, wait_for_an_absent_rank, tmp_path) == ["left"] * 2
