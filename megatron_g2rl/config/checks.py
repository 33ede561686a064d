"""Cross-field checks: whatever would otherwise fail after the job has queued, or silently have no effect.

Allowed, so not checked: `exploration.mapping=literal` with a strength at which a novel incorrect response and an
ordinary correct one come close (docs/method.md, section 3 says what `literal` means); `clip_high` below `clip_low`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from megatron_g2rl.config import install_hints, vllm_version
from megatron_g2rl.config.benchmark import own_evaluation, read_benchmarks, unmeasurable
from megatron_g2rl.config.code_files import named_code
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.inputs import file_problems, source_problems
from megatron_g2rl.config.keys import config_keys
from megatron_g2rl.config.method_checks import method_problems
from megatron_g2rl.config.model_shape import ModelShape
from megatron_g2rl.config.sections.model import PolicyConfig
from megatron_g2rl.config.stages import check_stages
from megatron_g2rl.config.tree import Config
from megatron_g2rl.config.world import longest_generation, longest_sequence, undivided_ranks, world_size

_WORD = re.compile(r"[a-z_]+\.[a-z_]+")


def module_problems(key: str, module: str) -> Iterator[str]:
    """Why a module named by a key cannot be imported here; nothing if it can."""
    try:
        exists = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        exists = False
    except Exception as error:  # find_spec("a.b") imports a
        yield f"{key}: the package of {module} raises {type(error).__name__} when it is imported: {error}"
        return
    if not exists:
        yield f"{key}: there is no module {module} to import from (the search includes {Path.cwd()})"


def check_config(
    config: Config,
    model: ModelShape | None = None,
    ranks: int | None = None,
    files: bool = True,
    module_problems: Callable[[str, str], Iterable[str]] = module_problems,
) -> None:
    """Refuse a configuration that cannot run on any machine.

    Args:
        config: the complete configuration.
        model: shape of the model, or None if it is not known yet, which skips its checks.
        ranks: world size; by default that of the launcher, else `trainer.ranks`.
        files: whether the files and folders named in the configuration are on this machine.
        module_problems: why a module named by a key cannot be imported where the run will import it.

    Raises:
        ConfigError: every violation, each with its keys and the remedy.
    """
    ranks = ranks or world_size(config)
    problems = [*layout_problems(config.policy, ranks), *_batch(config), *_lengths(config, model)]
    problems += [*method_problems(config), *_rollout(config, ranks), *source_problems(config), *_evaluation(config)]
    for key, path in named_code(config):
        problems += module_problems(f"{key}={path}", path.partition(":")[0])
    problems += _reward(config)
    problems += file_problems(config) if files else []
    if model is not None:
        problems += _model(config, model)
    if problems:
        located = [_with_origin(config, problem) for problem in problems]
        raise ConfigError.listing("the configuration cannot run", located)


def cautions(config: Config) -> list[str]:
    """Warnings about settings that are valid but probably unintended; each with its keys and the fix."""
    updates, warmup = config.policy_updates, config.optimizer.warmup_updates
    if updates == 0:
        return [
            f"algorithm.critic_warmup_steps={config.algorithm.critic_warmup_steps} is not below "
            f"trainer.steps={config.trainer.steps}: the policy is never updated; lower the warm-up"
        ]
    if warmup >= updates:
        return [
            f"optimizer.warmup_updates={warmup}, but the run has {updates} updates: the learning rate never reaches "
            f"optimizer.learning_rate={config.optimizer.learning_rate:g}; lower the warm-up"
        ]
    return []


def check_machine(config: Config) -> None:
    """Refuse a configuration that this machine cannot run: a missing package, an unsupported vLLM, no CUDA.

    Imports torch only to check for CUDA.

    Raises:
        ConfigError: every violation, each with its keys and the remedy.
    """
    problems = list(_machine(config, _find_spec))
    if problems:
        located = [_with_origin(config, problem) for problem in problems]
        raise ConfigError.listing("this machine cannot run the configuration", located)


def _with_origin(config: Config, problem: str) -> str:
    """`problem` prefixed with the file and line of the first key that it names."""
    named = next((word for word in _WORD.findall(problem) if word in config_keys()), "")
    origin = config.origin_of(named)
    return f"{origin}: {problem}" if origin else problem


def layout_problems(policy: PolicyConfig, ranks: int, key: str = "trainer.ranks") -> Iterator[str]:
    """Why `ranks` ranks, set by the configuration key `key`, cannot have the layout of `policy`."""
    model_ranks = policy.tensor_parallel * policy.pipeline_parallel * policy.context_parallel
    if ranks % model_ranks:
        yield (
            f"policy.tensor_parallel * pipeline_parallel * context_parallel = {policy.tensor_parallel} * "
            f"{policy.pipeline_parallel} * {policy.context_parallel} = {model_ranks} does not divide the {ranks} "
            f"ranks: change them, or start a multiple of {model_ranks} ranks ({key}, torchrun or Slurm)"
        )
    if policy.expert_parallel > 1 and ranks % (policy.expert_parallel * policy.pipeline_parallel):
        yield (
            f"policy.expert_parallel * pipeline_parallel = {policy.expert_parallel} * {policy.pipeline_parallel} does "
            f"not divide the {ranks} ranks: change policy.expert_parallel or {key}"
        )
    if policy.sequence_parallel and policy.tensor_parallel == 1:
        yield (
            "policy.sequence_parallel=true needs policy.tensor_parallel > 1, because it splits sequences over the "
            "tensor-parallel ranks; set it to false"
        )
    if policy.virtual_stages > 1 and policy.pipeline_parallel == 1:
        yield f"policy.virtual_stages={policy.virtual_stages} needs policy.pipeline_parallel > 1; set it to 1"
    if policy.layer_spec == "te" and policy.device == "cpu":
        yield "policy.layer_spec=te needs a GPU, but policy.device=cpu; set policy.layer_spec=torch or auto"


def _model(config: Config, model: ModelShape) -> Iterator[str]:
    yield from model_layout_problems(config.policy, model)
    if problem := _undivided_heads("rollout.tensor_parallel", config.rollout.tensor_parallel, model):
        yield problem
    top = config.exploration.top_logprobs
    if top > model.vocab_size:
        yield (
            f"exploration.top_k={top} is more than the model's vocabulary of {model.vocab_size} tokens: lower it "
            f"({model.vocab_size} gives the exact Φ)"
        )


def _undivided_heads(key: str, size: int, model: ModelShape) -> str | None:
    if model.heads % size == 0:
        return None
    return f"{key}={size} does not divide the model's {model.heads} attention heads: choose a divisor"


def model_layout_problems(policy: PolicyConfig, model: ModelShape) -> Iterator[str]:
    """Why `model` cannot be split as `policy` says."""
    if problem := check_stages(policy, model.layers):
        yield problem
    if problem := _undivided_heads("policy.tensor_parallel", policy.tensor_parallel, model):
        yield problem
    if model.key_value_groups % policy.tensor_parallel:
        yield (
            f"policy.tensor_parallel={policy.tensor_parallel} does not divide the model's {model.key_value_groups} "
            "key-value heads: choose a divisor, and use policy.pipeline_parallel for the rest"
        )
    if policy.expert_parallel > 1 and model.experts == 0:
        yield f"policy.expert_parallel={policy.expert_parallel}, but the model has no experts: set it to 1"
    elif model.experts and policy.tensor_parallel > 1 and not policy.sequence_parallel:
        yield (
            f"policy.tensor_parallel={policy.tensor_parallel} with a mixture-of-experts model needs "
            "policy.sequence_parallel=true: Megatron requires it"
        )
    elif model.experts % policy.expert_parallel:
        yield f"policy.expert_parallel={policy.expert_parallel} does not divide the model's {model.experts} experts"


def _batch(config: Config) -> Iterator[str]:
    trainer = config.trainer
    responses = trainer.prompts_per_step * trainer.group_size
    if responses % trainer.responses_per_update:
        divisors = _divisors(trainer.prompts_per_step, trainer.group_size)
        below = max(n for n in divisors if n < trainer.responses_per_update)
        above = min((n for n in divisors if n > trainer.responses_per_update), default=below)
        nearest = " or ".join(map(str, sorted({below, above})))
        yield (
            f"trainer.prompts_per_step * group_size = {trainer.prompts_per_step} * {trainer.group_size} = {responses} "
            f"responses cannot be split into updates of trainer.responses_per_update={trainer.responses_per_update}: "
            f"set trainer.responses_per_update to {nearest}, or change the other two"
        )


def _divisors(*factors: int) -> list[int]:
    """All divisors of a product, from the prime factors of its factors."""
    divisors = {1}
    for factor in factors:
        prime = 2
        while factor > 1:
            if prime * prime > factor:
                prime = factor
            if factor % prime:
                prime += 1
                continue
            factor //= prime
            divisors |= {n * prime for n in divisors}
    return sorted(divisors)


def _lengths(config: Config, model: ModelShape | None) -> Iterator[str]:
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    longest, padded = prompt + response, longest_sequence(config)
    total = f"data.max_prompt_tokens + rollout.max_response_tokens = {prompt} + {response} = {longest}"
    if padded > config.trainer.tokens_per_microbatch:
        padding = f" ({padded} with padding for context parallelism)" if padded > longest else ""
        yield (
            f"{total}{padding} does not fit into trainer.tokens_per_microbatch={config.trainer.tokens_per_microbatch}: "
            f"raise it to {padded} or more, or lower the lengths"
        )
    if model is not None and longest > model.max_positions:
        yield f"{total} is more than the model's max_position_embeddings={model.max_positions}: lower the lengths"
    elif model is not None and longest_generation(config) > model.max_positions:
        yield (
            f"evaluation.max_prompt_tokens + evaluation.max_response_tokens = {longest_generation(config)} is more "
            f"than the model's max_position_embeddings={model.max_positions}: lower them"
        )


def _rollout(config: Config, ranks: int) -> Iterator[str]:
    rollout = config.rollout
    if rollout.engine == "transformers" and rollout.tensor_parallel > 1:
        yield (
            f"rollout.tensor_parallel={rollout.tensor_parallel}, but rollout.engine=transformers runs a complete "
            "model on each rank: set it to 1, or set rollout.engine=vllm"
        )
    elif problem := undivided_ranks(rollout.tensor_parallel, ranks):
        yield problem


def _evaluation(config: Config) -> Iterator[str]:
    if config.evaluation is None:
        return
    try:
        read_benchmarks(config.evaluation.benchmarks)
    except ConfigError as error:
        yield from (f"evaluation.benchmarks: {problem}" for problem in error.problems)
    settings = own_evaluation(config.evaluation)
    if not config.evaluation.has_own_set or (config.data.sources and config.evaluation.source is None):
        return
    if settings.temperature == 0 and settings.samples > 1:
        yield (
            f"evaluation.temperature=0 gives the same response evaluation.responses_per_prompt={settings.samples} "
            "times: set it to 1, or a higher temperature"
        )
    if large := unmeasurable(settings):
        yield (
            f"evaluation.metrics: {large} of more responses than evaluation.responses_per_prompt={settings.samples}: "
            "raise evaluation.responses_per_prompt or remove them"
        )
    data, evaluation = config.data, config.evaluation.data(config.data)
    wanted = (evaluation.source, evaluation.subset)
    same = next((part for part in data.each_source() if (part.source, part.subset) == wanted), None)
    if same and (evaluation.split == same.split or Path(same.source).expanduser().is_file()):
        yield (
            f"evaluation would use the training problems (data.source={same.source}, split {same.split!r}): set "
            "evaluation.source to other problems, or evaluation.split to another split if the source has several"
        )


def _reward(config: Config) -> Iterator[str]:
    reward, labels = config.reward, [part.label for part in config.reward.each_function()]
    default = type(reward).model_fields["function"].default
    if reward.functions and reward.function != default:
        yield (
            "reward.function and reward.functions are both set: remove one of them, or set reward.function to its "
            f"default, {default}"
        )
    if reward.functions and reward.arguments:
        yield "reward.arguments applies to reward.function: move the arguments to the entries of reward.functions"
    if repeated := {label for label in labels if labels.count(label) > 1}:
        yield f"reward.functions: {', '.join(sorted(repeated))} is used more than once: give each function its own name"
    if len(reward.functions) > 1 and reward.correct_by is None:
        yield (
            "reward.correct_by is not set, so it is undefined which of reward.functions decides whether a response is "
            f"correct: set it to {' or '.join(labels)}"
        )
    if reward.correct_by is not None and reward.correct_by not in labels:
        yield f"reward.correct_by={reward.correct_by} is not one of reward.functions: {', '.join(labels)}"
    if reward.functions and all(part.weight == 0 for part in reward.functions):
        yield "reward.functions: every weight is 0, so all rewards are equal: set at least one other weight"


def check_rollout_machine(config: Config) -> list[str]:
    """Why this machine cannot run the rollout engine of `config`, without a policy; empty if it can."""
    problems = list(_engine(config, _find_spec))
    if config.policy.device == "cuda" and not _has_cuda():
        problems.append("policy.device=cuda: this machine has no CUDA device; set auto, or use a machine with a GPU")
    return problems


def _engine(config: Config, find_spec: Callable[[str], object | None]) -> Iterator[str]:
    if config.rollout.engine == "vllm" and find_spec("vllm") is None:
        yield vllm_version.unusable()
    elif config.rollout.engine == "vllm" and (problem := vllm_version.unsupported()):
        yield f"rollout.engine=vllm, but {problem}"


def _machine(config: Config, find_spec: Callable[[str], object | None]) -> Iterator[str]:
    policy = config.policy
    yield from _engine(config, find_spec)
    if config.logging.wandb_project is not None and find_spec("wandb") is None:
        yield install_hints.missing_wandb(config.logging.wandb_project)
    if policy.layer_spec == "te" and find_spec("transformer_engine") is None:
        yield (
            f"policy.layer_spec=te, but Transformer Engine is not installed ({install_hints.TRANSFORMER_ENGINE}): "
            "install it, or set policy.layer_spec=torch or auto"
        )
    if policy.layer_spec == "te" and policy.precision == "fp32":
        yield "policy.layer_spec=te supports policy.precision=bf16 only: set that, or policy.layer_spec=torch"
    needs_cuda = {"policy.device=cuda": policy.device == "cuda", "policy.layer_spec=te": policy.layer_spec == "te"}
    if any(needs_cuda.values()) and not _has_cuda():
        keys = " and ".join(key for key, needed in needs_cuda.items() if needed)
        yield f"{keys}: this machine has no CUDA device; set auto, or use a machine with a GPU"


def _find_spec(name: str) -> object | None:
    # None in sys.modules: the package is installed but hidden from Megatron because it is unusable here.
    hidden = name in sys.modules and sys.modules[name] is None
    return PathFinder.find_spec(name) if hidden else importlib.util.find_spec(name)


def _has_cuda() -> bool:
    import torch  # takes seconds, so only where needed

    return torch.cuda.is_available()
