"""The training loop: generate, score rewards, compute Φ, shape, update, and sync the new weights to the rollout engine.

    g2rl train CONFIG [key=value ...]

One step is one rollout batch and the updates made from it. Every rank runs this code; each call that makes up a step is
a collective and returns the same on every rank.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from pathlib import Path

from megatron_g2rl.config import Config
from megatron_g2rl.config.changes import fingerprint
from megatron_g2rl.config.loading import dump_config
from megatron_g2rl.config.run_files import STOPPED
from megatron_g2rl.config.world import world_size
from megatron_g2rl.distributed.collectives import on_first_rank
from megatron_g2rl.distributed.heartbeat import Heartbeat
from megatron_g2rl.errors import as_disk_error, as_lost_rank_error
from megatron_g2rl.evaluation.periodic import PeriodicEvaluation
from megatron_g2rl.policy import runtime as policy_runtime
from megatron_g2rl.policy.checkpoint import checkpoints
from megatron_g2rl.policy.models.flops import throughput
from megatron_g2rl.policy.policy import Policy
from megatron_g2rl.records import Experience, ResponseGroup, TokenStatistics
from megatron_g2rl.rewards.distribute import ScoredRewards
from megatron_g2rl.rewards.noise import flip_rewards
from megatron_g2rl.rollout import make_engine
from megatron_g2rl.rollout.endings import count_as_complete
from megatron_g2rl.rollout.engine import RolloutRequest, RolloutStopped, Sampling
from megatron_g2rl.rollout.journal import JournaledRollout
from megatron_g2rl.tracking.clock import Clock
from megatron_g2rl.tracking.health import RecentHealth
from megatron_g2rl.tracking.metrics import experience_metrics, prior_metrics
from megatron_g2rl.tracking.progress import TRAINING, Display, make_display
from megatron_g2rl.tracking.status import Status
from megatron_g2rl.tracking.tracker import Tracker
from megatron_g2rl.training.checkpoint_state import check_state
from megatron_g2rl.training.collection import cost_metrics, make_experience
from megatron_g2rl.training.critic_updates import CriticUpdates, make_critic
from megatron_g2rl.training.fused_update import FusedUpdate
from megatron_g2rl.training.providers import InputProviders
from megatron_g2rl.training.run_lock import check_folder
from megatron_g2rl.training.saving import RunSaver
from megatron_g2rl.training.setup import prepare
from megatron_g2rl.training.stopping import StopRequest, end_on_signals
from megatron_g2rl.training.updates import Updates

log = logging.getLogger(__name__)

TRAINER_PASSES = ("old_logprobs", "reference", "values", "critic_update", "update")
"""Phases of a step whose operations are counted."""


def train(config: Config) -> int:
    """Run the training of `config` on this rank; returns the exit code: 0 if finished, `STOPPED` if resumable."""
    folder = config.run.directory / config.run.name
    identity = f"{folder.absolute()}\n{dump_config(config)}"
    runtime = policy_runtime.start(config.policy, config.run.seed, identity)
    with make_display(config.run.name, runtime.rank) as display, Heartbeat() as heartbeat:
        try:
            trainer = Trainer(config, runtime, display)
            try:
                return trainer.run()
            finally:
                heartbeat.stop()
                trainer.close()
        except (OSError, checkpoints.CheckpointError) as error:
            check_folder(folder)  # a missing folder explains any missing file
            raise (as_disk_error(error, folder) if isinstance(error, OSError) else error) from error
        except RuntimeError as error:
            raise as_lost_rank_error(error) from error


class Trainer:
    """The training run on this rank."""

    def __init__(self, config: Config, runtime: policy_runtime.Runtime, display: Display):
        """Load everything that training needs; what was opened is closed again if that fails.

        Args:
            config: the run's configuration.
            runtime: this rank's position in the layout; `close` leaves its process groups.
            display: shows the phases.
        """
        self.config = config
        self.runtime = runtime
        self.display = display
        self.folder = config.run.directory / config.run.name
        self.status: Status | None = None
        """Writer of status.json on rank 0, once the run folder is locked."""
        self.recent_health = RecentHealth()
        self.clock = Clock(self.phase)
        self.step = 0
        end_on_signals()
        with ExitStack() as opened:
            self._load(opened)
            self._opened = opened.pop_all()
        self.stop = StopRequest(runtime.device, config.trainer.stop_after)

    def _load(self, opened: ExitStack) -> None:
        """Load the inputs, the policy and the rollout engine, and open the files of the run; a collective."""
        config, runtime = self.config, self.runtime
        prepared = prepare(config, runtime, self.folder, opened)
        self.lock = prepared.lock
        self.prompts = prepared.prompts
        self.rewards = prepared.rewards
        self.contents = prepared.contents
        self.endings = prepared.endings
        self.providers = InputProviders(config)
        opened.callback(self.providers.close)
        self.status = Status(self.folder) if runtime.rank == 0 else None
        self.display.begin("loading", 0, 0)
        self.phase("loading")
        self.policy = Policy(
            prepared.model_path,
            config.policy,
            config.optimizer,
            runtime,
            temperature=config.rollout.temperature,
            tokens_per_microbatch=config.trainer.tokens_per_microbatch,
            total_updates=config.policy_updates,
            family=config.model.family,
            keep_reference=config.algorithm.kl_coefficient > 0,
        )
        self.updates = Updates(config, self.policy)
        self.critic = make_critic(config, self.policy)
        self.critic_updates = None if self.critic is None else CriticUpdates(config, self.critic)
        self.fused_update = FusedUpdate(config, self.policy, self.updates, world_size(config))
        if prepared.checkpoint:
            self._resume(prepared.checkpoint)
        self.rest()
        engine = make_engine(config, str(prepared.model_path), runtime.device, self.endings)
        self.rollout = JournaledRollout(
            engine, self.folder / "rollouts", fingerprint(config), self.policy.architecture.vocab_size
        )
        opened.callback(self.rollout.close)
        self.rollout_is_current = False
        """Whether the rollout engine is awake and has the policy's current weights."""
        self.sync_weights()
        self.evaluation = None
        if prepared.evaluators:
            path = self.folder / "evaluation.jsonl"
            self.evaluation = PeriodicEvaluation(config, prepared.evaluators, path, self.step)
        self.saver = RunSaver(
            config,
            self.folder,
            self.policy,
            self.rollout,
            self.step if prepared.checkpoint else None,
            self.evaluation.best if self.evaluation else None,
            critic=self.critic,
        )
        opened.callback(self.saver.close)
        self.tracker: Tracker | None = None
        """Writer of the metrics, on rank 0."""
        on_first_rank(lambda: self._open_files(opened))

    def _open_files(self, opened: ExitStack) -> None:
        self.tracker = Tracker(self.folder, self.config, self.step)
        opened.callback(self.tracker.close)
        partial = self.folder / ".config.yaml"  # a full disk must not destroy the previous one
        partial.write_text(dump_config(self.config))
        partial.replace(self.folder / "config.yaml")

    def phase(self, name: str | None) -> None:
        """Report the current phase on the display and in status.json.

        Raises:
            RunFolderLost: the run folder is gone; nothing may be written.
        """
        self.display.phase(name)
        if self.status:
            self.lock.check()
            self.status.write(name, self.step)

    def run(self) -> int:
        """Run the remaining steps; returns the exit code."""
        steps, settings = self.config.trainer.steps, self.config.checkpoint
        self.display.begin(TRAINING, self.step, steps)
        if self.step >= steps:
            log.info("%d steps are done and trainer.steps=%d: raise trainer.steps to continue", self.step, steps)
        if not self.evaluate():
            return self.stopped()
        while self.step < steps:
            if self.stop.requested_anywhere() or not self.train_step():
                return self.stopped()
            if settings.export_hf_every and self.step % settings.export_hf_every == 0:
                self.phase("export")
                self.saver.export(self.folder / "hf" / f"step_{self.step:08d}")
            if self.step % settings.every_steps == 0 or self.step == steps:
                self.save()
            if not self.evaluate():
                return self.stopped()
        self.saver.finish(wait=True)
        self.phase("export")
        self.saver.export(self.folder / "model")
        self.rollout.forget_before(steps + 1)
        self.phase("finished")
        return 0

    def stopped(self) -> int:
        """Save a checkpoint after a stop request; returns the exit code `STOPPED`."""
        start, requested = time.time(), self.stop.requested_at
        self.save()
        self.saver.finish(wait=True)
        log.info(
            "stopped after step %d%s, %.1f s of it for saving; run the same command again to resume",
            self.step,
            f", {time.time() - requested:.1f} s after the request" if requested else "",
            time.time() - start,
        )
        self.phase("stopped")
        return STOPPED

    def evaluate(self) -> bool:
        """Run an evaluation if one is due; False if the run is to stop instead."""
        if self.evaluation and self.evaluation.due(self.step):
            if self.stop.requested_anywhere():
                return False
            self.phase("evaluation")
            try:
                self.sync_weights()
                metrics = self.evaluation.run(self.rollout, self.step, self.endings, self.stop.requested_here)
            except RolloutStopped:
                return False
            if self.tracker:
                self.tracker.write_evaluation(self.step, metrics)
            if (best := self.evaluation.best) and best.step == self.step > 0:
                self.save()
        return True

    def train_step(self) -> bool:
        """Run one step; False if the run is to stop: then nothing of the step is kept except the rollout journal."""
        cursor = self.prompts.state_dict()
        policy_runtime.reseed(self.config.run.seed, self.step)
        self.saver.finish()
        try:
            return self._train_step()
        except RolloutStopped:
            self.prompts.load_state_dict(cursor)
            return False

    def _train_step(self) -> bool:
        with self.clock.phase("step"):
            groups, outcome = self.sample(self.config.trainer.prompts_per_step)
            with self.clock.phase("old_logprobs"):
                fused = self.fused_update.applies(groups, outcome)
            if fused:
                experience, updates = self.fused_update.run(groups, outcome, self.clock, self.step)
                old = experience.old_statistics
            else:
                experience, old, updates = self.update_after_scoring(groups, outcome)
        self.report(experience, old, updates, has_prior=fused or self.policy.takes_prior)
        self.step += 1
        return True

    def update_after_scoring(
        self, groups: tuple[ResponseGroup, ...], outcome: ScoredRewards
    ) -> tuple[Experience, TokenStatistics, dict[str, float]]:
        """Complete the experience of a step, with more rounds of sampling if groups are dropped, and run its updates.

        Args:
            groups: responses of the first round.
            outcome: their rewards.

        Returns:
            The experience, the old policy's statistics of its responses, and metrics of the updates.
        """
        shared = (self.config, self.clock, self.providers, self.critic)
        experience = make_experience(self.policy, groups, outcome, *shared)
        for _ in range(self.config.algorithm.dynamic_sampling_rounds):
            missing = self.config.trainer.prompts_per_step - experience.groups_kept
            missing = min(missing, len(self.prompts.dataset) - len(experience.groups))
            if missing <= 0 or self.stop.requested_anywhere():
                break
            groups, outcome = self.sample(missing, experience.groups)
            experience = experience.joined(make_experience(self.policy, groups, outcome, *shared))
        if self.stop.requested_anywhere():
            raise RolloutStopped
        plan = self.updates.plan(experience, self.step)
        policy_plan = [] if self.step < self.config.algorithm.critic_warmup_steps else plan
        with self.clock.phase("old_logprobs"):
            known = self.updates.known_statistics(experience, policy_plan)
        critic_metrics = {}
        if self.critic_updates is not None:
            with self.clock.phase("critic_update"):
                critic_metrics = self.critic_updates.run(experience, plan, self.step)
        with self.clock.phase("update"):
            old, metrics = self.updates.run(experience, policy_plan, known, self.step)
        return experience, old, metrics | critic_metrics

    def rest(self) -> None:
        """Free memory that only updates need, of the policy and of its critic."""
        for model in filter(None, (self.policy, self.critic)):
            model.rest()

    def sync_weights(self) -> None:
        """Wake the rollout engine and load the policy's weights into it, unless it has them."""
        if not self.rollout_is_current:
            self.rest()
            self.rollout.wake()
            self.rollout.load_weights(self.policy.hf_weights())
            self.rollout_is_current = True

    def sleep_rollout(self) -> None:
        """Free the rollout engine's device memory; call `sync_weights` before it generates again."""
        self.rollout.sleep()
        self.rollout_is_current = False

    def sample(
        self, count: int, earlier: tuple[ResponseGroup, ...] = ()
    ) -> tuple[tuple[ResponseGroup, ...], ScoredRewards]:
        """Generate responses to the next `count` prompts and score their rewards.

        Args:
            count: number of prompts.
            earlier: groups already in this step; their prompts are skipped.
        """
        c = self.config
        prompts = self.prompts.next(count, without={g.prompt.id for g in earlier})
        with self.clock.phase("weight_sync"):
            self.sync_weights()
        with self.clock.phase("rollout"):
            request = RolloutRequest(prompts, self.sampling(), stop=self.stop.requested_here)
            groups = tuple(self.rollout.generate(request))
            self.sleep_rollout()
        with self.clock.phase("reward"):
            complete = count_as_complete(groups, self.endings, c.rollout.incomplete_responses)
            outcome = self.rewards.score(groups, complete)
            outcome = flip_rewards(outcome, groups, c.reward.flip_probability, c.run.seed)
        if self.stop.requested_anywhere():
            raise RolloutStopped
        return groups, outcome

    def sampling(self) -> Sampling:
        """Sampling settings of this step."""
        c, r = self.config, self.config.rollout
        top = c.exploration.top_logprobs
        return Sampling(c.trainer.group_size, r.temperature, r.max_response_tokens, c.run.seed, self.step, top)

    def report(
        self, experience: Experience, old: TokenStatistics, updates: dict[str, float], *, has_prior: bool
    ) -> None:
        """Write the step's metrics and responses to disk, and show the metrics.

        Args:
            experience: the responses of the step.
            old: their statistics under the old policy.
            updates: metrics of the updates.
            has_prior: whether Φ, if it is exact, is computed from the rollout engine's log-probs.
        """
        metrics = experience_metrics(experience, old, self.config.algorithm) | updates
        metrics |= self.rewards.read_metrics() | self.clock.read()
        tolerance = self.config.exploration.prior_tolerance_in(self.config.policy.precision)
        metrics |= prior_metrics(experience.responses, old.logprobs, tolerance if has_prior else 0.0)
        metrics |= cost_metrics(experience, metrics["time/step_s"])
        tokens = sum(len(r.token_ids) for r in experience.responses)
        metrics["throughput/response_tokens_per_s"] = tokens / metrics["time/step_s"]
        seconds = sum(metrics.get(f"time/{phase}_s", 0.0) for phase in TRAINER_PASSES)
        runtime, precision = self.policy.runtime, self.config.policy.precision
        metrics |= throughput(self.policy.take_flops(), seconds, runtime.world_size, runtime.device, precision)
        if self.tracker:
            self.tracker.write(self.step, metrics, experience)
        if self.status:
            self.status.health = self.recent_health.add(metrics)
        self.display.show(self.step + 1, metrics)

    def save(self) -> None:
        """Start saving a checkpoint; the rollout engine sleeps first, to free device memory for it."""
        self.phase("checkpoint")
        if self.saver.saved_step != self.step:
            self.sleep_rollout()
        state = {"step": self.step, "prompts": self.prompts.state_dict(), "bad_updates": self.updates.bad}
        if self.critic_updates is not None:
            state["critic_bad_updates"] = self.critic_updates.bad
        state |= {"config": self.config.model_dump(mode="json"), "contents": self.contents}
        self.saver.save(self.step, state, self.evaluation.best if self.evaluation else None)

    def _resume(self, checkpoint: Path) -> None:
        on_first_rank(
            lambda: check_state(checkpoint), f"{checkpoint} cannot be read", error=checkpoints.CheckpointError
        )
        load_optimizer = self.config.checkpoint.load_optimizer
        state = checkpoints.load(checkpoint, self.policy, critic=self.critic, load_optimizer=load_optimizer)
        self.step, self.updates.bad = state["step"], state["bad_updates"]
        if self.critic_updates is not None:
            self.critic_updates.bad = state["critic_bad_updates"]
        self.prompts.load_state_dict(state["prompts"])
        log.info("resumed from %s after %d steps", checkpoint, self.step)

    def close(self) -> None:
        """Close the files, the rollout engine and the reward workers, and leave the process groups."""
        with ExitStack() as closing:
            closing.callback(policy_runtime.stop)
            closing.callback(self._opened.close)
