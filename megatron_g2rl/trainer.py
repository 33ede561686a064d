"""The loop: sample, judge, score, shape, update, and give the sampler the new weights.

    g2rl train CONFIG [key=value ...]

One step is one rollout batch and the updates made from it. Every rank runs this code; each call that is named in the
picture of the design is a collective, and what it returns is the same on every rank.
"""

from __future__ import annotations

import errno
import logging
from contextlib import ExitStack
from pathlib import Path

from megatron_g2rl.algorithm import Totals, group_advantages, has_spread, training_loss, truncated_importance_weights
from megatron_g2rl.config import Config
from megatron_g2rl.config.loading import dump_config
from megatron_g2rl.data.batching import plan_updates
from megatron_g2rl.errors import UserError
from megatron_g2rl.experience import Experience, boolean_row_mask, group_ids, responses_of, rows_of, sequences_of
from megatron_g2rl.exploration import shape_groups
from megatron_g2rl.policy import runtime as policy_runtime
from megatron_g2rl.policy.policy import Policy
from megatron_g2rl.preparation import prepare
from megatron_g2rl.records import ResponseGroup
from megatron_g2rl.rollout import make_engine
from megatron_g2rl.rollout.engine import Sampling
from megatron_g2rl.stopping import STOPPED, StopRequest
from megatron_g2rl.tracking.clock import Clock
from megatron_g2rl.tracking.metrics import experience_metrics
from megatron_g2rl.tracking.progress import TRAINING, Display, make_display
from megatron_g2rl.tracking.tracker import Tracker

log = logging.getLogger(__name__)


class TooManyBadUpdates(UserError):
    """Updates in a row had a loss or gradient that was not finite."""


def train(config: Config) -> int:
    """Run the training of `config` on this rank; returns the exit code: 0 finished, `STOPPED` stopped and resumable."""
    runtime = policy_runtime.start(config.policy, config.run.seed)
    with make_display(config.run.name, runtime.rank) as display:
        try:
            trainer = Trainer(config, runtime, display)
            try:
                return trainer.run()
            finally:
                trainer.close()
        except OSError as error:
            raise _told_of_disk(error, config.run.directory / config.run.name) from error


def _told_of_disk(error: OSError, folder: Path) -> Exception:
    """What a full or read-only disk means for the run; any other error as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return error
    return UserError(
        f"the run cannot write to {error.filename or folder}: {error.strerror}. Free disk space there, and the same "
        "command goes on from the newest checkpoint"
    )


class Trainer:
    """A run on this rank."""

    def __init__(self, config: Config, runtime: policy_runtime.Runtime, display: Display):
        self.config, self.runtime, self.display, self.clock = config, runtime, display, Clock(display.phase)
        self.folder = config.run.directory / config.run.name
        prepared = prepare(config, runtime, self.folder, display)
        display.begin("loading", 0, 0)
        model_path, t = prepared.model_path, config.trainer
        self.prompts, self.evaluation, self.rewards = prepared.prompts, prepared.evaluation, prepared.rewards
        updates_per_step = t.prompts_per_step * t.group_size // t.responses_per_update * t.epochs_per_step
        self.policy = Policy(
            model_path,
            config.policy,
            config.optimizer,
            runtime,
            temperature=config.rollout.temperature,
            tokens_per_microbatch=t.tokens_per_microbatch,
            total_updates=t.steps * updates_per_step,
        )
        if config.algorithm.kl_coefficient:
            self.policy.keep_reference()
        self.step = self.bad_updates = 0
        self.saved_step: int | None = None
        if prepared.checkpoint:
            self._resume(prepared.checkpoint)
        self.rollout = make_engine(config, str(model_path), runtime.device)
        self.rollout.load_weights(self.policy.hf_weights())
        self.tracker = Tracker(self.folder, config, self.step) if runtime.rank == 0 else None
        if self.evaluation:
            self.evaluation.open(self.folder / "evaluation.jsonl", self.step)
        if runtime.rank == 0:
            (self.folder / "config.yaml").write_text(dump_config(config))
        self.stop = StopRequest(runtime.device)

    def run(self) -> int:
        """All steps that are left."""
        self.display.begin(TRAINING, self.step, self.config.trainer.steps)
        if not self.evaluate():
            return self.stopped()
        while self.step < self.config.trainer.steps:
            if self.stop.agreed() or not self.train_step():
                return self.stopped()
            if self.step % self.config.checkpoint.every_steps == 0 or self.step == self.config.trainer.steps:
                self.save()
            if not self.evaluate():
                return self.stopped()
        self.policy.save_hf(self.folder / "model")
        return 0

    def stopped(self) -> int:
        """Save what there is; the exit code that says so."""
        self.save()
        log.info("stopped after %d steps; the same command goes on from here", self.step)
        return STOPPED

    def evaluate(self) -> bool:
        """Ask the held-out problems when it is time; False when the run was asked to stop instead."""
        if self.evaluation and self.evaluation.due(self.step):
            if self.stop.agreed():
                return False
            self.display.phase("evaluation")
            metrics = self.evaluation.run(self.rollout, self.rewards, self.step)
            if self.tracker:
                self.tracker.write_evaluation(self.step, metrics)
        return True

    def train_step(self) -> bool:
        """One step; False when the run was asked to stop, and then the step has left no trace."""
        cursor = self.prompts.state_dict()
        with self.clock.phase("step"):
            experience = self.collect(self.config.trainer.prompts_per_step)
            for _ in range(self.config.algorithm.dynamic_sampling_rounds):
                missing = self.config.trainer.prompts_per_step - experience.groups_kept
                missing = min(missing, len(self.prompts.dataset) - len(experience.groups))
                if missing <= 0 or self.stop.agreed():
                    break
                self.give_weights()
                experience = experience.joined(self.collect(missing, experience.groups))
            if self.stop.agreed():
                self.prompts.load_state_dict(cursor)
                self.give_weights()
                return False
            with self.clock.phase("update"):
                updates = self.update(experience)
            self.give_weights()
        self.report(experience, updates)
        self.step += 1
        return True

    def give_weights(self) -> None:
        """Wake the sampler and give it the policy's weights."""
        with self.clock.phase("weights"):
            self.rollout.wake()
            self.rollout.load_weights(self.policy.hf_weights())

    def collect(self, count: int, earlier: tuple[ResponseGroup, ...] = ()) -> Experience:
        """Responses to the next `count` prompts, judged, scored, shaped and turned into advantages.

        Args:
            count: prompts to draw.
            earlier: groups that this step has already; their prompts are not drawn again.
        """
        c = self.config
        prompts = self.prompts.next(count, without={g.prompt.id for g in earlier})
        with self.clock.phase("rollout"):
            groups = tuple(self.rollout.generate(prompts, self.sampling()))
            self.rollout.sleep()
        with self.clock.phase("reward"):
            answers = [g.prompt.answer for g in groups for _ in g.responses]
            rewards = self.rewards.judge([r.text for r in responses_of(groups)], answers)
        sequences, group = sequences_of(groups), group_ids(groups)
        with self.clock.phase("score"):
            explore = c.exploration.method == "gradient"
            scored = self.policy.score(sequences, features=explore or c.exploration.measure_geometry)
        with self.clock.phase("reference"):
            reference = None
            if c.algorithm.kl_coefficient:
                with self.policy.reference_weights():
                    reference = self.policy.score(sequences, features=False).logprobs
        with self.clock.phase("exploration"):
            shaped, scores = rewards, None
            if scored.features is not None:
                e = c.exploration
                options = dict(root=e.root, mapping=e.mapping, strength=e.strength, clip=e.reward_clip)
                shaped, scores = shape_groups(scored.features, rewards, group, **options)
            shaped = shaped if explore else rewards
            advantages = group_advantages(
                shaped, group, normalize_std=c.algorithm.normalize_std, baseline=c.algorithm.baseline
            )
            kept = has_spread(shaped, group) | (not c.algorithm.drop_uniform_groups)
        return Experience(groups, rewards, scored, reference, scores, shaped, advantages, kept)

    def update(self, experience: Experience) -> dict[str, float]:
        """The optimizer updates of a step; metrics are means over those that were applied.

        Raises:
            TooManyBadUpdates: `trainer.max_nonfinite_updates` in a row were skipped.
        """
        t = self.config.trainer
        usable = experience.kept.nonzero().squeeze(1).tolist()
        seed = self.config.run.seed * 1_000_003 + self.step
        total: dict[str, float] = {}
        applied = 0
        plan = plan_updates(len(usable), t.responses_per_update, t.epochs_per_step, seed)
        for chosen in plan:
            result, metrics = self.update_once(experience, [usable[i] for i in chosen])
            self.bad_updates = 0 if result.applied else self.bad_updates + 1
            if result.applied:
                applied += 1
                metrics |= dict(gradient_norm=result.gradient_norm, learning_rate=result.learning_rate)
                for name, value in metrics.items():
                    total[name] = total.get(name, 0.0) + value
            if self.bad_updates >= t.max_nonfinite_updates:
                raise TooManyBadUpdates(
                    f"step {self.step + 1}: {self.bad_updates} updates in a row had a loss or gradient that is not "
                    f"finite (loss {metrics['loss']}, gradient norm {result.gradient_norm}); the newest checkpoint is "
                    "intact; lower optimizer.learning_rate or look at the responses of this step"
                )
        means = {f"update/{name}": value / applied for name, value in total.items()}
        return means | {"update/count": float(len(plan)), "update/skipped": float(len(plan) - applied)}

    def update_once(self, experience: Experience, members: list[int]):
        """One optimizer update on the responses `members` of the step."""
        a, e = self.config.algorithm, experience
        responses, sequences = e.responses, e.sequences
        old = [e.scored.logprobs[i] for i in members]
        sampler = [old[0].new_tensor(responses[i].logprobs) for i in members]
        reference = e.reference_logprobs and [e.reference_logprobs[i] for i in members]
        advantages = e.advantages[members]
        totals = Totals(tokens=sum(len(x) for x in old), responses=len(members))

        def loss(logprobs, entropy, batch):
            mask = boolean_row_mask(batch)
            old_rows, weights = rows_of(old, batch, mask), None
            if a.importance_cap is not None:
                weights = truncated_importance_weights(old_rows, rows_of(sampler, batch, mask), mask, a.importance_cap)
            return training_loss(
                logprobs,
                old_rows,
                advantages[list(batch.sources)].to(mask.device),
                mask,
                entropy=entropy,
                reference_logprobs=rows_of(reference, batch, mask) if reference else None,
                kl_coefficient=a.kl_coefficient,
                kl_estimator=a.kl_estimator,
                entropy_coefficient=a.entropy_coefficient,
                aggregation=a.aggregation,
                totals=totals,
                response_tokens=mask.new_tensor(batch.response_tokens, dtype=int),
                clip_low=a.clip_low,
                clip_high=a.clip_high,
                dual_clip=a.dual_clip,
                ratio=a.ratio,
                importance_weights=weights,
                group=self.policy.context_group,
            )

        return self.policy.update([sequences[i] for i in members], loss)

    def sampling(self) -> Sampling:
        """How the responses of this step are drawn."""
        c = self.config
        r = c.rollout
        return Sampling(c.trainer.group_size, r.temperature, r.max_response_tokens, c.run.seed, self.step)

    def report(self, experience: Experience, updates: dict[str, float]) -> None:
        """Write the step's metrics and responses, and show them."""
        metrics = experience_metrics(experience, self.config.algorithm.importance_cap) | updates
        metrics |= self.rewards.read_metrics() | self.clock.read()
        tokens = sum(len(r.token_ids) for r in experience.responses)
        metrics["throughput/response_tokens_per_s"] = tokens / metrics["time/step_s"]
        if self.tracker:
            self.tracker.write(self.step, metrics, experience)
        self.display.show(self.step + 1, metrics)

    def save(self) -> None:
        """Save a checkpoint that `train` resumes from."""
        state = {"step": self.step, "prompts": self.prompts.state_dict(), "bad_updates": self.bad_updates}
        if self.saved_step != self.step:
            self.display.phase("checkpoint")
            self.policy.save(self.folder / "checkpoints", self.step, state, self.config.checkpoint.keep)
            self.saved_step = self.step

    def _resume(self, checkpoint: Path) -> None:
        state = self.policy.load(checkpoint)
        self.step, self.bad_updates = state["step"], state["bad_updates"]
        self.prompts.load_state_dict(state["prompts"])
        self.saved_step = self.step
        log.info("resumed from %s after %d steps", checkpoint, self.step)

    def close(self) -> None:
        """Free the sampler and the reward workers, and leave the process groups."""
        with ExitStack() as closing:
            closing.callback(policy_runtime.stop)
            closing.callback(self.rewards.close)
            closing.callback(self.rollout.close)
            if self.tracker:
                closing.callback(self.tracker.close)
