"""How many ranks a run has: what torchrun or Slurm started, or what `trainer.ranks` asks for. Knows no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.tree import Config


def launched_world_size(environment: Mapping[str, str] | None = None) -> int | None:
    """Ranks of the launcher this process was started by, or None when no launcher started it.

    torchrun sets RANK and WORLD_SIZE. srun sets SLURM_PROCID, SLURM_NTASKS and SLURM_STEP_ID; the shell of a batch
    job has the first two as well, but it is one process and no step.

    Args:
        environment: environment variables; this process's own by default.

    Raises:
        ConfigError: a variable holds no number of ranks.
    """
    environment = os.environ if environment is None else environment
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _ranks(environment["WORLD_SIZE"], "WORLD_SIZE")
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        tasks = _ranks(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")), "SLURM_NTASKS")
        return tasks if tasks > 1 else None
    return None


def _ranks(text: str, variable: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"the environment variable {variable}={text!r} is no number of ranks: unset it, or set one")
    return int(text)


def world_size(config: Config) -> int:
    """Ranks of the run: the launcher's, else `trainer.ranks`."""
    return launched_world_size() or config.trainer.ranks


def data_parallel_size(config: Config, ranks: int) -> int:
    """Copies of the model in `ranks` ranks; 0 when they do not even make one."""
    policy = config.policy
    return ranks // (policy.tensor_parallel * policy.pipeline_parallel * policy.context_parallel)


def longest_sequence(config: Config) -> int:
    """Tokens of the longest sequence the model may read, with the padding that context parallelism asks for."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    multiple = 2 * config.policy.context_parallel if config.policy.context_parallel > 1 else 1
    return -(-longest // multiple) * multiple


def longest_generation(config: Config) -> int:
    """Tokens of the longest prompt with its response that the sampler draws, evaluations included."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if config.evaluation is None:
        return longest
    prompt = config.evaluation.data(config.data).max_prompt_tokens
    return max(longest, prompt + (config.evaluation.max_response_tokens or config.rollout.max_response_tokens))
