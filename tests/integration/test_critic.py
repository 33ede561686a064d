"""PPO with a critic from the command line: without groups, on one rank and on two, killed and resumed."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from quickstart_model import quickstart_model
from safetensors.torch import load_file
from training_runs import attempt, read_metrics, read_status, start, train, without_times

from megatron_g2rl.tracking.table import unknown_names

# tests/distributed/test_critic.py runs with both versions of megatron-core.
pytestmark = [pytest.mark.slow, pytest.mark.same_for_both]

OPTIONS = [
    "algorithm.baseline=critic",
    "algorithm.critic_warmup_steps=1",
    "algorithm.critic_learning_rate=2e-3",
    "algorithm.gae_lambda=0.95",
    "exploration.method=none",
    "trainer.group_size=1",
    "trainer.prompts_per_step=16",
    "trainer.steps=5",
    "checkpoint.every_steps=1",
    "checkpoint.keep=5",
    "checkpoint.export_hf_every=1",
    "reward.function=odd_reward:odd",
    "algorithm.overlong_buffer_tokens=10",
    "algorithm.use_kl_in_reward=true",
    "algorithm.importance_level=sequence",
    "algorithm.rejection_bounds=[0.5, 2]",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return with_reward(tmp_path_factory.mktemp("critic"))


def with_reward(folder: Path) -> Path:
    """The folder, with a reward that an untrained model sometimes earns."""
    (folder / "odd_reward.py").write_text("def odd(text, answer):\n    return 1.0 if len(text) % 2 else -1.0\n")
    return folder


@pytest.fixture(scope="module")
def one_rank(folder, environment) -> list[dict]:
    return train(folder, "run", environment, *OPTIONS)


def test_a_critic_learns_before_and_with_the_policy(one_rank, folder):
    assert not unknown_names({name for line in one_rank for name in line} - {"step"})
    first, *others = one_rank
    assert first["update/count"] == 0 and all(line["update/count"] > 0 for line in others)
    assert first["critic/value_mean"] == 0 and abs(first["reward/kl_penalty"]) < 1e-6
    assert others[-1]["critic/value_mean"] < 0 and others[-1]["reward/kl_penalty"] != 0
    for line in one_rank:
        assert line["critic/skipped"] == 0 and line["critic/gradient_norm"] > 0 and line["critic/loss"] > 0
        assert -1 <= line["reward/overlong_penalty"] < 0 and line["mismatch/rejected_fraction"] == 0
        assert line["time/values_s"] > 0 and line["time/critic_update_s"] > 0
    # the critic learns the mean first: its values are closer to the returns than zeros
    last = others[-1]
    assert abs(last["critic/value_mean"] - last["critic/return_mean"]) < 0.9 * abs(last["critic/return_mean"])
    assert abs(first["critic/explained_variance"]) < 1e-6
    exports = [folder / "run" / "hf" / f"step_{step:08d}" for step in (1, 2)]
    initial, warm, changed = (load_file(path / "model.safetensors") for path in (quickstart_model(), *exports))
    assert all((warm[name] == initial[name]).all() for name in initial)
    assert any((changed[name] != initial[name]).any() for name in initial)


def test_a_killed_run_with_a_critic_resumes_to_the_same_numbers(one_rank, folder, tmp_path, environment):
    (process,) = start(with_reward(tmp_path), "run", environment, *OPTIONS)
    try:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and (read_status(tmp_path / "run").get("step") or 0) < 1:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    finally:
        process.kill()
    assert len(read_metrics(tmp_path / "run")) < 5
    assert without_times(train(tmp_path, "run", environment, *OPTIONS)) == without_times(one_rank)
    ends = [load_file(run / "run" / "model" / "model.safetensors") for run in (folder, tmp_path)]
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])


def test_two_ranks_train_a_critic_like_one(one_rank, tmp_path, environment):
    layout = ["policy.tensor_parallel=2", "policy.sequence_parallel=true", "trainer.steps=2"]
    found = train(with_reward(tmp_path), "run", environment, *OPTIONS, *layout, ranks=2)
    names = ["critic/loss", "critic/gradient_norm", "critic/explained_variance", "critic/return_mean"]
    for name in (*names, "reward/overlong_penalty", "policy/entropy"):
        # Step 0 has the same numbers in another summation order; afterwards rounding may change a sampled token.
        assert found[0][name] == pytest.approx(one_rank[0][name], rel=1e-3, abs=1e-6), name


def test_exploration_shapes_the_terminal_reward_of_groups(tmp_path, environment):
    options = ["algorithm.baseline=critic", "trainer.steps=2", "trainer.responses_per_update=16"]
    first, _ = train(tmp_path, "run", environment, *options)
    # one update per step, but its advantages need the values and Φ before
    assert first["time/old_logprobs_s"] > 0 and first["update/count"] == 1
    assert first["reward/shaped_mean"] != first["reward/mean"]
    assert first["critic/return_mean"] != pytest.approx(first["reward/mean"], abs=1e-6)


def test_a_critic_cannot_be_added_when_a_run_resumes(tmp_path, environment):
    train(tmp_path, "run", environment, "trainer.steps=1")
    options = ["algorithm.baseline=critic", "checkpoint.allow_changed=[algorithm.baseline]"]
    outcome = attempt(tmp_path, "run", environment, *options, "trainer.steps=2")
    assert outcome.code == 1 and "has no critic" in outcome.text and "Traceback" not in outcome.text
