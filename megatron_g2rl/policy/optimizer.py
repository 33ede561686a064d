"""Megatron's data parallelism, distributed optimizer and learning-rate schedule for the model chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_g2rl.config.sections.model import OptimizerConfig, PolicyConfig
from megatron_g2rl.policy import megatron_compat


def wrap_data_parallel(
    chunks: Sequence[nn.Module], config: TransformerConfig, policy: PolicyConfig
) -> list[DistributedDataParallel]:
    """Wrap the chunks in Megatron's DistributedDataParallel: fp32 gradients, summed (never averaged) over ranks."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=policy.overlap_communication,
        overlap_param_gather=policy.overlap_communication and policy.distributed_optimizer,
        use_distributed_optimizer=policy.distributed_optimizer,
    )
    # Overlap pays off only for the buckets of the first chunk: later chunks finish while it still computes.
    return [DistributedDataParallel(config, settings, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]


def gather_parameters(chunks: Sequence[DistributedDataParallel], policy: PolicyConfig) -> None:
    """Complete the parameter gathering that overlap_communication defers to the next forward; a collective."""
    if policy.overlap_communication and policy.distributed_optimizer:
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)


@dataclass(frozen=True)
class UpdateResult:
    """Result of one optimizer update."""

    applied: bool
    """False: the loss or a gradient was not finite, and the weights are unchanged."""
    gradient_norm: float
    """Global gradient norm before clipping."""
    learning_rate: float
    """Learning rate of the update, whether or not it was applied."""


class Optimizer:
    """Adam with its schedule, for the model chunks of a rank."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        config: TransformerConfig,
        policy: PolicyConfig,
        settings: OptimizerConfig,
        total_updates: int,
    ):
        self.chunks, self.offload = chunks, policy.offload_optimizer
        self._resting: list[tuple[torch.UntypedStorage, Tensor]] = []
        """Freed device memory, and host copies of its contents."""
        self.megatron: MegatronOptimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=settings.learning_rate,
                min_lr=settings.min_learning_rate,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                adam_eps=settings.epsilon,
                clip_grad=settings.gradient_clip,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=policy.distributed_optimizer,
                overlap_param_gather=policy.overlap_communication and policy.distributed_optimizer,
            ),
            list(chunks),
            use_gloo_process_groups=False,
        )
        for inner in megatron_compat.inner_optimizers(self.megatron):
            _create_state(inner)
        # Decay starts after the warm-up and must not be empty.
        decay = max(total_updates, settings.warmup_updates + 1)
        self.schedule = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=settings.learning_rate,
            min_lr=settings.min_learning_rate,
            lr_warmup_steps=settings.warmup_updates,
            lr_decay_steps=decay,
            lr_decay_style=settings.schedule,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=decay,
            wd_incr_style="constant",
            # The settings of the configuration apply, also after a resume.
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        config.finalize_model_grads_func = _finalize
        config.grad_scale_func = None
        if policy.overlap_communication:
            config.no_sync_func = [c.no_sync for c in chunks] if len(chunks) > 1 else chunks[0].no_sync

    @property
    def steps(self) -> int:
        """Number of applied updates, which Adam uses for bias correction."""
        return self.schedule.num_steps

    def restore(self, steps: int, schedule: dict) -> None:
        """Restore the schedule's position and Adam's step count; all settings remain those of the configuration.

        Args:
            steps: number of updates that Adam has applied.
            schedule: state of the schedule.
        """
        for inner in megatron_compat.inner_optimizers(self.megatron):
            if isinstance(inner.optimizer, torch.optim.AdamW):
                for state in inner.optimizer.state.values():
                    state["step"].fill_(steps)
            else:
                for group in inner.optimizer.param_groups:
                    group["step"] = steps
        self.schedule.num_steps = 0  # load_state_dict adds the loaded value
        self.schedule.load_state_dict(self.schedule.state_dict() | {"num_steps": schedule["num_steps"]})

    def follow_weights(self) -> None:
        """Set the master weights from the chunks' weights; moments and schedule are unchanged."""
        self.megatron.reload_model_params()

    def rest(self) -> None:
        """Free memory that is unused between updates: that of the gradients and, with `offload`, of Adam's state.

        `zero_gradients` allocates the gradients again; `wake` restores the state, bit by bit.
        """
        self.megatron.zero_grad()
        for buffer in self._gradient_buffers():
            buffer.untyped_storage().resize_(0)
        if not self.offload:
            return
        for storage in self._state_storages():
            if storage.nbytes():
                device_bytes = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                self._resting.append((storage, host.copy_(device_bytes)))
                storage.resize_(0)

    def wake(self) -> None:
        """Restore Adam's state on the device."""
        for storage, host in self._resting:
            storage.resize_(len(host))
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).copy_(host)
        self._resting.clear()

    def _state_storages(self) -> list[torch.UntypedStorage]:
        """Storages of moments and master weights, except those that are also the model's parameters."""
        model = {p.untyped_storage().data_ptr() for chunk in self.chunks for p in chunk.parameters()}
        storages = {}
        for inner in megatron_compat.inner_optimizers(self.megatron):
            for main, state in inner.optimizer.state.items():
                for tensor in (main, state["exp_avg"], state["exp_avg_sq"]):
                    storage = tensor.untyped_storage()
                    if storage.nbytes() and storage.data_ptr() not in model:
                        storages[storage.data_ptr()] = storage
        return list(storages.values())

    def _gradient_buffers(self) -> list[Tensor]:
        return [b.grad_data for chunk in self.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]

    def zero_gradients(self) -> None:
        """Zero the gradients; called at the start of an update."""
        self.wake()
        for buffer in self._gradient_buffers():
            if buffer.untyped_storage().nbytes() == 0:
                buffer.untyped_storage().resize_(buffer.nbytes)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    @torch.no_grad()
    def apply(self, loss: float, gradient_scale: float = 1.0) -> UpdateResult:
        """Clip and step, unless the loss or the gradient norm is not finite; the decision is the same on every rank.

        Args:
            loss: the update's loss, the same on every rank.
            gradient_scale: factor still to be applied to the gradients, the same on every rank.
        """
        if gradient_scale != 1.0:
            for chunk in self.chunks:
                chunk.scale_gradients(gradient_scale)
        rate = float(self.megatron.param_groups[0]["lr"])
        self.megatron.prepare_grads()
        norm = float(self.megatron.get_grad_norm())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return UpdateResult(False, norm, rate)
        self.megatron.step()
        self.schedule.step(increment=1)
        return UpdateResult(True, norm, rate)


def _finalize(model, num_tokens=None, **kwargs) -> None:
    """Megatron's gradient reductions without its division by tokens: the losses are already normalized."""
    finalize_model_grads(model, None, **kwargs)


def _create_state(inner: MegatronOptimizer) -> None:
    """Create Adam's state before the first step, so that it can be saved and loaded."""
    if not isinstance(inner.optimizer, torch.optim.AdamW):
        inner.init_state_fn(inner.optimizer, inner.config)
        return
    for group in inner.optimizer.param_groups:
        for parameter in group["params"]:
            inner.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter.data),
                "exp_avg_sq": torch.zeros_like(parameter.data),
            }
