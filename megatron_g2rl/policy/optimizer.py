"""Megatron's data parallelism, distributed optimizer and schedule around the model chunks."""

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

from megatron_g2rl.config.tree import OptimizerConfig, PolicyConfig
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
    # Only the first chunk's buckets are worth overlapping: later chunks finish while it still computes.
    return [DistributedDataParallel(config, settings, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]


@dataclass(frozen=True)
class UpdateResult:
    """What one optimizer update did."""

    applied: bool
    """False: the loss or a gradient was not finite, and the weights are unchanged."""
    gradient_norm: float
    """Global gradient norm before clipping."""
    learning_rate: float
    """Learning rate it was (or would have been) applied with."""


class Optimizer:
    """Adam with its schedule over the chunks of a rank."""

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
        """Memory that was given back, and what was in it."""
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
            # What the configuration says counts, also after a resume.
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        config.finalize_model_grads_func = _finalize
        config.grad_scale_func = None
        if policy.overlap_communication:
            config.no_sync_func = [c.no_sync for c in chunks] if len(chunks) > 1 else chunks[0].no_sync

    @property
    def steps(self) -> int:
        """Updates that Adam has made: it corrects the bias of its moments by this number."""
        return self.schedule.num_steps

    def restore(self, steps: int, schedule: dict) -> None:
        """Take up the schedule's position and Adam's step count; every setting stays the configuration's.

        Args:
            steps: updates that Adam has made.
            schedule: its state.
        """
        for inner in megatron_compat.inner_optimizers(self.megatron):
            if isinstance(inner.optimizer, torch.optim.AdamW):
                for state in inner.optimizer.state.values():
                    state["step"].fill_(steps)
            else:
                for group in inner.optimizer.param_groups:
                    group["step"] = steps
        self.schedule.num_steps = 0  # it adds what it loads
        self.schedule.load_state_dict(self.schedule.state_dict() | {"num_steps": schedule["num_steps"]})

    def follow_weights(self) -> None:
        """Take the chunks' weights as the master weights; moments and schedule stay as they are."""
        self.megatron.reload_model_params()

    def rest(self) -> None:
        """Give memory back that would lie idle between updates: the gradients', and on request that of Adam's state.

        `zero_gradients` takes that of the gradients again, `wake` that of the state, bit for bit.
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
        """Bring Adam's state back to the device."""
        for storage, host in self._resting:
            storage.resize_(len(host))
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).copy_(host)
        self._resting.clear()

    def _state_storages(self) -> list[torch.UntypedStorage]:
        """Memory of moments and master weights, without that which the model computes with."""
        model = {p.untyped_storage().data_ptr() for chunk in self.chunks for p in chunk.parameters()}
        found = {}
        for inner in megatron_compat.inner_optimizers(self.megatron):
            for main, state in inner.optimizer.state.items():
                for tensor in (main, state["exp_avg"], state["exp_avg_sq"]):
                    storage = tensor.untyped_storage()
                    if storage.nbytes() and storage.data_ptr() not in model:
                        found[storage.data_ptr()] = storage
        return list(found.values())

    def _gradient_buffers(self) -> list[Tensor]:
        return [b.grad_data for chunk in self.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]

    def zero_gradients(self) -> None:
        """Forget the gradients of the last update; begins the next one."""
        self.wake()
        for buffer in self._gradient_buffers():
            if buffer.untyped_storage().nbytes() == 0:
                buffer.untyped_storage().resize_(buffer.nbytes)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    @torch.no_grad()
    def apply(self, loss: float) -> UpdateResult:
        """Clip and step, unless the loss or the gradient norm is not finite; every rank decides the same.

        Args:
            loss: the update's loss, the same on every rank.
        """
        rate = float(self.megatron.param_groups[0]["lr"])
        self.megatron.prepare_grads()
        norm = float(self.megatron.get_grad_norm())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return UpdateResult(False, norm, rate)
        self.megatron.step()
        self.schedule.step(increment=1)
        return UpdateResult(True, norm, rate)


def _finalize(model, num_tokens=None, **kwargs) -> None:
    """Megatron's gradient reductions without its division by tokens: our losses are normalised already."""
    finalize_model_grads(model, None, **kwargs)


def _create_state(inner: MegatronOptimizer) -> None:
    """Give Adam the state of its first step, so that it can be saved before one and be loaded into."""
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
