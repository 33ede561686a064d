"""When the rollout engine sleeps and wakes: recorded calls in place of vLLM, whose memory needs a GPU."""

from __future__ import annotations

import pytest
import torch

from megatron_g2rl.rollout.engine import RolloutRequest, Sampling
from megatron_g2rl.rollout.vllm import VllmEngine
from megatron_g2rl.rollout.vllm_compat import head_in_float32


class RecordedLLM:
    """The methods of vllm.LLM that the engine calls."""

    def __init__(self):
        self.calls = []

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        self.calls += [f"wake {tag}" for tag in tags]

    def collective_rpc(self, method, kwargs):
        self.calls.append(method)
        list(kwargs["weights_iterator"])

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")
        return True


@pytest.fixture
def engine():
    made = object.__new__(VllmEngine)
    made._llm, made._on_gpu, made._tied = RecordedLLM(), True, False
    made._loaded, made._asleep, made._expected = False, set(), frozenset({"a"})
    made._max_model_tokens = 8
    return made


def weights():
    return [("a", torch.zeros(1))]


def test_weights_are_restored_before_the_cache(engine):
    engine.load_weights(weights())
    engine._llm.calls.clear()
    engine.sleep()
    engine.sleep()
    engine.wake()
    engine.load_weights(weights())
    expected = ["sleep 2", "wake weights", "reload_weights", "wake kv_cache", "reset_prefix_cache"]
    assert engine._llm.calls == expected


def test_nothing_is_sampled_while_the_weights_are_offloaded(engine):
    sampling = Sampling(1, 1.0, 4, 0, 0)
    with pytest.raises(RuntimeError, match="call load_weights first"):
        engine.generate(RolloutRequest([], sampling))
    engine.load_weights(weights())
    engine.sleep()
    with pytest.raises(RuntimeError, match="after each sleep"):
        engine.generate(RolloutRequest([], sampling))


def test_a_sleeping_engine_is_woken_before_it_is_closed(engine, monkeypatch):
    from megatron_g2rl.rollout import vllm

    calls = engine._llm.calls
    monkeypatch.setattr(vllm, "shut_down", lambda llm: calls.append("shut down"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    engine._owns_process_group = False
    engine.sleep()
    engine.close()
    assert calls == ["sleep 2", "wake weights", "wake kv_cache", "shut down"]


def test_16_bit_models_get_a_float32_head():
    assert head_in_float32(torch.bfloat16) == {"hf_overrides": {"head_dtype": "float32"}}
    assert head_in_float32(torch.float32) == {}
