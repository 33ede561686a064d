"""Rollouts: engines that generate responses with a copy of the policy's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from megatron_g2rl.config import Config
    from megatron_g2rl.rollout.endings import Endings
    from megatron_g2rl.rollout.engine import RolloutEngine


def make_engine(config: Config, model_path: str, device: torch.device, endings: Endings | None = None) -> RolloutEngine:
    """Start the engine that `rollout.engine` names; with several ranks, one engine that spans all of them.

    All ranks call this together, after torch.distributed is initialized. Engines are imported lazily: vLLM takes
    seconds to import and is optional.

    Args:
        config: the run's configuration.
        model_path: Hugging Face checkpoint (folder or hub name).
        device: device of this rank's policy.
        endings: what ends a response; None: read from the configuration and the checkpoint.

    Raises:
        ValueError: `rollout.tensor_parallel` does not fit the engine or the number of ranks.
        RolloutError: vLLM is requested but not installed, the engine refuses the model or the settings, or an engine of
            the user's own lacks a method.
    """
    import torch.distributed as dist

    from megatron_g2rl.config.world import undivided_ranks
    from megatron_g2rl.registry import ENGINES
    from megatron_g2rl.rollout.endings import read_endings
    from megatron_g2rl.rollout.engine import METHODS, RolloutError
    from megatron_g2rl.rollout.tokenizer import load_tokenizer

    rollout = config.rollout
    endings = endings or read_endings(config, model_path, load_tokenizer(model_path))
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if rollout.engine == "transformers" and rollout.tensor_parallel != 1:
        raise ValueError("rollout.tensor_parallel must be 1 with rollout.engine=transformers")
    if problem := undivided_ranks(rollout.tensor_parallel, world_size):
        raise ValueError(problem)
    engine: RolloutEngine = ENGINES.load(rollout.engine)(config, model_path, device, endings)
    if missing := [name for name in METHODS if not callable(getattr(engine, name, None))]:
        raise RolloutError(f"rollout.engine={rollout.engine} returned an engine without {', '.join(missing)}")
    if world_size == 1:
        return engine
    from megatron_g2rl.rollout.distribute import DistributedRollout

    dist.barrier()  # compile times differ between machines by more than the timeout of later collectives
    replica, rank_in_replica = divmod(dist.get_rank(), rollout.tensor_parallel)
    return DistributedRollout(engine, replica, world_size // rollout.tensor_parallel, leader=rank_in_replica == 0)
