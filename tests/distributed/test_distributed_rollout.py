"""Rollouts split over ranks: same prompts, same responses, and no rank that waits for a failed one."""

from __future__ import annotations

import multiprocessing
import os
import random
import traceback

import pytest
import torch
import torch.distributed as dist
from random_models import write_random_model

from megatron_g2rl.config import Config
from megatron_g2rl.records import Prompt
from megatron_g2rl.rollout import make_engine
from megatron_g2rl.rollout.distribute import DistributedRollout
from megatron_g2rl.rollout.engine import Sampling

pytestmark = pytest.mark.distributed

DRAWS = random.Random(3)
PROMPTS = [Prompt(place, "", tuple(DRAWS.choices(range(128), k=DRAWS.randint(2, 30))), "") for place in range(5)]
SAMPLING = Sampling(group_size=3, temperature=1.0, max_response_tokens=12, run_seed=1, step=4)


def run_ranks(world_size: int, work, *arguments) -> list:
    """The results of `work(*arguments)` on forked ranks that talk over gloo."""
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


def generate(folder: str):
    config = Config.model_validate(
        {
            "model": {"path": folder},
            "data": {"source": "unused"},
            "rollout": {"engine": "transformers"},
            "policy": {"precision": "fp32"},
        }
    )
    return make_engine(config, folder, torch.device("cpu")).generate(PROMPTS, SAMPLING)


def test_any_number_of_ranks_gives_the_responses_of_one(folder):
    expected = generate(folder)
    assert [group.prompt for group in expected] == PROMPTS
    for world_size in (2, 3):
        for groups in run_ranks(world_size, generate, folder):
            assert [group.prompt for group in groups] == PROMPTS
            for group, reference in zip(groups, expected, strict=True):
                for response, other in zip(group.responses, reference.responses, strict=True):
                    assert response.token_ids == other.token_ids
                    assert response.seed == other.seed
                    # another batch, another order of float32 sums
                    assert response.logprobs == pytest.approx(other.logprobs, abs=1e-5)


class FailingEngine:
    def generate(self, prompts, sampling):
        if dist.get_rank() == 1:
            raise ValueError("out of luck")
        return []


def generate_with_a_failing_rank(folder: str) -> str:
    with pytest.raises(RuntimeError) as error:
        DistributedRollout(FailingEngine(), dist.get_rank(), 2, leader=False).generate(PROMPTS, SAMPLING)
    return str(error.value)


def test_a_failure_on_one_rank_is_raised_on_all(folder):
    messages = run_ranks(2, generate_with_a_failing_rank, folder)
    assert messages == ["sampling failed on rank 1: ValueError: out of luck"] * 2
