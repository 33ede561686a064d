"""Order of operations in the loop: checkpoints while the rollout engine sleeps, and no response from old weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_g2rl.evaluation.periodic import Best
from megatron_g2rl.training.trainer import Trainer


class FakeEngine:
    """A fake rollout engine that tracks what it holds in memory."""

    def __init__(self, policy, events):
        self.policy, self.events, self.awake, self.weights = policy, events, True, None

    def sleep(self):
        self.awake, self.weights = False, None

    def wake(self):
        self.awake = True

    def load_weights(self, weights):
        assert self.awake
        self.weights = weights
        self.events.append("weights")

    def sample(self, what):
        assert self.awake and self.weights == self.policy.updates, f"{what} with the weights of another step"
        self.events.append(what)

    def forget_before(self, step):
        pass


def make_trainer(steps: int, every: int, best_at: int | None = None) -> tuple[Trainer, list[str]]:
    events: list[str] = []
    policy = SimpleNamespace(updates=0)
    policy.hf_weights, policy.rest = lambda: policy.updates, lambda: None
    trainer = object.__new__(Trainer)
    engine = FakeEngine(policy, events)

    def save(step, state, best):
        if trainer.saver.saved_step != step:
            assert not engine.awake, "a checkpoint while the rollout engine holds its memory"
            events.append(f"save {step}")
            trainer.saver.saved_step = step

    def evaluate(rollout, step, endings, stop):
        engine.sample("evaluation")
        trainer.evaluation.best = Best(best_at, 1.0) if step == best_at else trainer.evaluation.best
        return {}

    def step():
        trainer.sync_weights()
        engine.sample("rollout")
        trainer.sleep_rollout()
        policy.updates += 1
        trainer.step += 1
        return True

    trainer.config = SimpleNamespace(
        trainer=SimpleNamespace(steps=steps),
        checkpoint=SimpleNamespace(every_steps=every, export_hf_every=None),
        model_dump=lambda mode: {},
    )
    trainer.policy, trainer.rollout, trainer.step, trainer.rollout_is_current = policy, engine, 0, False
    trainer.critic = trainer.critic_updates = None
    trainer.display = SimpleNamespace(begin=lambda *a: None, phase=lambda name: None)
    trainer.status = trainer.tracker = trainer.rewards = None
    trainer.contents = {}
    trainer.folder = SimpleNamespace(__truediv__=None)
    trainer.endings = None
    trainer.stop = SimpleNamespace(requested_anywhere=lambda: False, requested_here=None, requested_at=None)
    trainer.prompts, trainer.updates = SimpleNamespace(state_dict=dict), SimpleNamespace(bad=0)
    trainer.saver = SimpleNamespace(saved_step=None, save=save, finish=lambda wait=False: None, export=lambda f: None)
    trainer.evaluation = SimpleNamespace(best=None, due=lambda s: best_at is not None, run=evaluate)
    trainer.train_step = step
    return trainer, events


@pytest.mark.parametrize(("every", "best_at"), [(1, None), (2, None), (2, 1), (2, 2), (1, 3)])
def test_every_checkpoint_is_saved_while_the_rollout_engine_sleeps(every, best_at, tmp_path):
    trainer, events = make_trainer(4, every, best_at)
    trainer.folder = tmp_path
    assert trainer.run() == 0
    saved = [int(event.split()[1]) for event in events if event.startswith("save")]
    assert saved == sorted({*range(every, 5, every), 4} | ({best_at} if best_at else set()))
    assert events.count("rollout") == 4


def test_weights_are_sent_once_per_step(tmp_path):
    trainer, events = make_trainer(3, 1)
    trainer.folder = tmp_path
    trainer.run()
    assert events == ["weights", "rollout", "save 1", "weights", "rollout", "save 2", "weights", "rollout", "save 3"]
