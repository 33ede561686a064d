"""Number of ranks of a run: set by torchrun or Slurm, else by `trainer.ranks`. Does not import torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.tree import Config


def launched_world_size(environment: Mapping[str, str] | None = None) -> int | None:
    """Number of ranks set by the launcher of this process, or None without a launcher.

    torchrun sets RANK and WORLD_SIZE. srun sets SLURM_PROCID, SLURM_NTASKS and SLURM_STEP_ID; the shell of a batch
    job also has the first two, but it is a single process outside any job step.

    Args:
        environment: environment variables; by default those of this process.

    Raises:
        ConfigError: a variable is not a number of ranks.
    """
    environment = os.environ if environment is None else environment
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _ranks(environment["WORLD_SIZE"], "WORLD_SIZE")
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        tasks = _ranks(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")), "SLURM_NTASKS")
        return tasks if tasks > 1 else None
    return None


def launched_rank() -> str:
    """This process's rank as its launcher set it, before or after it has become a rank; `0` without a launcher."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))


def _ranks(text: str, variable: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"the environment variable {variable}={text!r} is not a number of ranks: unset or correct it")
    return int(text)


def world_size(config: Config) -> int:
    """Number of ranks of the run: set by the launcher, else `trainer.ranks`."""
    return launched_world_size() or config.trainer.ranks


def data_parallel_size(config: Config, ranks: int) -> int:
    """Data-parallel copies of the model on `ranks` ranks; 0 if they are too few for one."""
    policy = config.policy
    return ranks // (policy.tensor_parallel * policy.pipeline_parallel * policy.context_parallel)


def undivided_ranks(tensor_parallel: int, ranks: int) -> str | None:
    """The problem if `ranks` cannot be divided into rollout engines of `tensor_parallel` ranks; None: they can."""
    if ranks % tensor_parallel == 0:
        return None
    return f"rollout.tensor_parallel={tensor_parallel} does not divide the {ranks} ranks: choose a divisor"


def longest_sequence(config: Config) -> int:
    """Tokens of the longest sequence in training, including the padding that context parallelism requires."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    multiple = 2 * config.policy.context_parallel if config.policy.context_parallel > 1 else 1
    return -(-longest // multiple) * multiple


def longest_generation(config: Config) -> int:
    """Tokens of the longest prompt plus response in a rollout, evaluations included."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if config.evaluation is None:
        return longest
    from megatron_g2rl.config.benchmark import read_benchmarks

    for benchmark in read_benchmarks(config.evaluation.benchmarks).values():
        longest = max(longest, benchmark.data(config).max_prompt_tokens + benchmark.response_tokens(config))
    prompt = config.evaluation.data(config.data).max_prompt_tokens
    return max(longest, prompt + (config.evaluation.max_response_tokens or config.rollout.max_response_tokens))
