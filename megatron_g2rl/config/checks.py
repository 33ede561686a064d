"""Checks that need several values at once: everything that would otherwise fail after a queue, or silently do nothing.

Not checked, because it is allowed: `exploration.mapping=literal` with a strength at which a novel wrong answer and a
plain correct one come close (docs/method.md, section 3 says what `literal` means); `clip_high` below `clip_low`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from megatron_g2rl.config import install_hints, vllm_version
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.inputs import BUILTIN, BUILTIN_MODEL, file_problems, source_problems
from megatron_g2rl.config.keys import config_keys
from megatron_g2rl.config.model_shape import ModelShape
from megatron_g2rl.config.stages import check_stages
from megatron_g2rl.config.tree import Config
from megatron_g2rl.config.world import longest_generation, longest_sequence, world_size

_WORD = re.compile(r"[a-z_]+\.[a-z_]+")


def module_problems(key: str, module: str) -> Iterator[str]:
    """Why a module that a key names cannot be imported here, if it cannot."""
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    except Exception as error:  # looking for a.b runs the code of a
        yield f"{key}: the package of {module} raises {type(error).__name__} when it is imported: {error}"
        return
    if not found:
        yield f"{key}: there is no module {module} to import from (it is looked for in {Path.cwd()} too)"


def check_config(
    config: Config,
    model: ModelShape | None = None,
    ranks: int | None = None,
    files: bool = True,
    module_problems: Callable[[str, str], Iterable[str]] = module_problems,
) -> None:
    """Refuse what cannot run, whatever the machine.

    Args:
        config: the whole configuration.
        model: shape of the model, or None when it is not known yet; its checks are then left out.
        ranks: world size; by default the launcher's, else `trainer.ranks`.
        files: whether the files and folders that it names are on this machine.
        module_problems: why a module that a key names cannot be imported where the run will import it.

    Raises:
        ConfigError: every violation, each with its keys and the remedy.
    """
    ranks = ranks or world_size(config)
    problems = [*_layout(config, ranks), *_batch(config), *_lengths(config, model), *_algorithm(config)]
    problems += [*_schedule(config), *_rollout(config, ranks), *source_problems(config), *_evaluation(config)]
    problems += _reward(config, module_problems)
    problems += file_problems(config) if files else []
    if model is not None:
        problems += _model(config, model)
    if problems:
        raise ConfigError.listing("the configuration cannot run", [_placed(config, problem) for problem in problems])


def cautions(config: Config) -> list[str]:
    """What runs, but is hardly meant; each with its keys and the remedy."""
    trainer, warmup = config.trainer, config.optimizer.warmup_updates
    updates = trainer.steps * (trainer.prompts_per_step * trainer.group_size // trainer.responses_per_update)
    updates *= trainer.epochs_per_step
    if warmup >= updates:
        return [
            f"optimizer.warmup_updates={warmup}, but the run has {updates} updates: the learning rate never reaches "
            f"optimizer.learning_rate={config.optimizer.learning_rate:g}; lower the warm-up"
        ]
    return []


def check_machine(config: Config) -> None:
    """Refuse what this machine cannot run: a missing package, an unsupported vLLM, no CUDA.

    Imports torch only to ask about CUDA.

    Raises:
        ConfigError: every violation, each with its keys and the remedy.
    """
    problems = list(_machine(config, _find_spec))
    if problems:
        told = [_placed(config, problem) for problem in problems]
        raise ConfigError.listing("this machine cannot run the configuration", told)


def _placed(config: Config, problem: str) -> str:
    """`problem` after the file and line of the first key that it names, as for a value of a wrong type."""
    named = next((word for word in _WORD.findall(problem) if word in config_keys()), "")
    place = config.place_of(named)
    return f"{place}: {problem}" if place else problem


def _layout(config: Config, ranks: int) -> Iterator[str]:
    policy = config.policy
    model_ranks = policy.tensor_parallel * policy.pipeline_parallel * policy.context_parallel
    if ranks % model_ranks:
        yield (
            f"policy.tensor_parallel * pipeline_parallel * context_parallel = {policy.tensor_parallel} * "
            f"{policy.pipeline_parallel} * {policy.context_parallel} = {model_ranks} does not divide the {ranks} "
            f"ranks: change them, or start a multiple of {model_ranks} ranks (trainer.ranks, or torchrun and Slurm)"
        )
    if policy.expert_parallel > 1 and ranks % (policy.expert_parallel * policy.pipeline_parallel):
        yield (
            f"policy.expert_parallel * pipeline_parallel = {policy.expert_parallel} * {policy.pipeline_parallel} does "
            f"not divide the {ranks} ranks: change policy.expert_parallel or trainer.ranks"
        )
    if policy.sequence_parallel and policy.tensor_parallel == 1:
        yield "policy.sequence_parallel=true needs policy.tensor_parallel > 1: it splits over those; set it to false"
    if policy.virtual_stages > 1 and policy.pipeline_parallel == 1:
        yield f"policy.virtual_stages={policy.virtual_stages} needs policy.pipeline_parallel > 1; set it to 1"
    if policy.layer_spec == "te" and policy.device == "cpu":
        yield "policy.layer_spec=te needs a GPU, but policy.device=cpu; set policy.layer_spec=torch or auto"


def _model(config: Config, model: ModelShape) -> Iterator[str]:
    policy = config.policy
    if problem := check_stages(policy, model.layers):
        yield problem
    for key, ways in (
        ("policy.tensor_parallel", policy.tensor_parallel),
        ("rollout.tensor_parallel", config.rollout.tensor_parallel),
    ):
        if model.heads % ways:
            yield f"{key}={ways} does not divide the model's {model.heads} attention heads: take a divisor"
    if model.key_value_groups % policy.tensor_parallel:
        yield (
            f"policy.tensor_parallel={policy.tensor_parallel} does not divide the model's {model.key_value_groups} "
            "key-value heads: take a divisor, and policy.pipeline_parallel for the rest"
        )
    top = config.exploration.top_logprobs
    if top > model.vocab_size:
        yield (
            f"exploration.top_k={top} is more than the model's vocabulary of {model.vocab_size} tokens: lower it "
            f"({model.vocab_size} gives the exact Φ)"
        )
    if policy.expert_parallel > 1 and model.experts == 0:
        yield f"policy.expert_parallel={policy.expert_parallel}, but the model has no experts: set it to 1"
    elif model.experts and policy.tensor_parallel > 1 and not policy.sequence_parallel:
        yield (
            f"policy.tensor_parallel={policy.tensor_parallel} of a mixture-of-experts model needs "
            "policy.sequence_parallel=true: megatron refuses to train it otherwise"
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
            f"responses cannot be cut into updates of trainer.responses_per_update={trainer.responses_per_update}: "
            f"set trainer.responses_per_update to {nearest}, or change the other two"
        )


def _divisors(*factors: int) -> list[int]:
    """All divisors of a product, from the primes of its factors."""
    found = {1}
    for factor in factors:
        prime = 2
        while factor > 1:
            if prime * prime > factor:
                prime = factor
            if factor % prime:
                prime += 1
                continue
            factor //= prime
            found |= {n * prime for n in found}
    return sorted(found)


def _lengths(config: Config, model: ModelShape | None) -> Iterator[str]:
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    longest, padded = prompt + response, longest_sequence(config)
    what = f"data.max_prompt_tokens + rollout.max_response_tokens = {prompt} + {response} = {longest}"
    if padded > config.trainer.tokens_per_microbatch:
        padding = f" ({padded} with the padding of context parallelism)" if padded > longest else ""
        yield (
            f"{what}{padding} does not fit into trainer.tokens_per_microbatch={config.trainer.tokens_per_microbatch}: "
            f"raise that to {padded} or more, or lower the lengths"
        )
    if model is not None and longest > model.max_positions:
        yield f"{what} is more than the model's max_position_embeddings={model.max_positions}: lower the lengths"
    elif model is not None and longest_generation(config) > model.max_positions:
        yield (
            f"evaluation.max_prompt_tokens + evaluation.max_response_tokens = {longest_generation(config)} is more "
            f"than the model's max_position_embeddings={model.max_positions}: lower them"
        )


def _algorithm(config: Config) -> Iterator[str]:
    if config.trainer.group_size < 2:
        yield (
            "trainer.group_size=1: advantages and exploration scores compare the responses of a group, and of one "
            "response alone they are zero, so nothing would be learned; set trainer.group_size to 2 or more"
        )
    if config.algorithm.dynamic_sampling_rounds and not config.algorithm.drop_uniform_groups:
        yield (
            f"algorithm.dynamic_sampling_rounds={config.algorithm.dynamic_sampling_rounds} replaces dropped groups, "
            "but algorithm.drop_uniform_groups=false drops none: set that to true, or the rounds to 0"
        )
    if config.exploration.source == "sampler_topk" and not config.exploration.wants_features:
        yield (
            "exploration.source=sampler_topk does nothing with exploration.method=none and "
            "exploration.measure_geometry=false: nothing would use Φ; set it to exact, or one of the two others"
        )
    if config.optimizer.min_learning_rate > config.optimizer.learning_rate:
        yield (
            f"optimizer.min_learning_rate={config.optimizer.min_learning_rate:g} is above "
            f"optimizer.learning_rate={config.optimizer.learning_rate:g}, where the schedule starts: lower it"
        )


def _schedule(config: Config) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.min_learning_rate and optimizer.schedule == "constant":
        yield (
            f"optimizer.min_learning_rate={optimizer.min_learning_rate:g} does nothing with "
            "optimizer.schedule=constant: set that to cosine or linear, or the minimum to 0"
        )


def _rollout(config: Config, ranks: int) -> Iterator[str]:
    rollout = config.rollout
    if rollout.engine == "transformers" and rollout.tensor_parallel > 1:
        yield (
            f"rollout.tensor_parallel={rollout.tensor_parallel}, but rollout.engine=transformers runs one whole model "
            "on each rank: set it to 1, or rollout.engine=vllm"
        )
    elif ranks % rollout.tensor_parallel:
        yield f"rollout.tensor_parallel={rollout.tensor_parallel} does not divide the {ranks} ranks: take a divisor"


def _evaluation(config: Config) -> Iterator[str]:
    if config.evaluation is None or (config.data.sources and config.evaluation.source is None):
        return
    data, held_out = config.data, config.evaluation.data(config.data)
    asked = (held_out.source, held_out.subset)
    same = next((part for part in data.each_source() if (part.source, part.subset) == asked), None)
    if same and (held_out.split == same.split or Path(same.source).expanduser().is_file()):
        yield (
            f"evaluation would ask the problems that are trained on (data.source={same.source}, split {same.split!r}): "
            "name other ones in evaluation.source, or another evaluation.split of a source that has splits"
        )
    if config.model.path == BUILTIN_MODEL and not held_out.source.startswith(BUILTIN):
        yield (
            f"model.path={BUILTIN_MODEL} is made for a built-in task, but evaluation.source={held_out.source}: "
            "set it to null"
        )


def _reward(config: Config, module_problems: Callable[[str, str], Iterable[str]]) -> Iterator[str]:
    reward, labels = config.reward, [part.label for part in config.reward.each_function()]
    for part in reward.each_function():
        yield from module_problems(f"{reward.key}={part.function}", part.function.partition(":")[0])
    if reward.functions and reward.function != type(reward).model_fields["function"].default:
        yield "reward.function and reward.functions are both set: remove one of them"
    if reward.functions and reward.arguments:
        yield "reward.arguments is for reward.function: put arguments into the entries of reward.functions"
    if repeated := {label for label in labels if labels.count(label) > 1}:
        yield f"reward.functions: {', '.join(sorted(repeated))} is the name of several: give each a name of its own"
    if len(reward.functions) > 1 and reward.correct_by is None:
        yield (
            "reward.correct_by is not set, so that nothing says which of reward.functions decides whether a response "
            f"is correct: set it to {' or '.join(labels)}"
        )
    if reward.correct_by is not None and reward.correct_by not in labels:
        yield f"reward.correct_by={reward.correct_by} is none of reward.functions: {', '.join(labels)}"
    if reward.functions and all(part.weight == 0 for part in reward.functions):
        yield "reward.functions: every weight is 0, so that all rewards are equal: give one of them another weight"


def _machine(config: Config, find_spec: Callable[[str], object | None]) -> Iterator[str]:
    policy = config.policy
    if config.rollout.engine == "vllm" and find_spec("vllm") is None:
        yield (
            f"rollout.engine=vllm, but vLLM is not installed. Install it ({install_hints.VLLM}), or set "
            "rollout.engine=transformers"
        )
    elif config.rollout.engine == "vllm" and (problem := vllm_version.unsupported()):
        yield f"rollout.engine=vllm, but {problem}"
    if config.logging.wandb_project is not None and find_spec("wandb") is None:
        yield (
            f"logging.wandb_project={config.logging.wandb_project}, but wandb is not installed: "
            f"{install_hints.WANDB}, or set logging.wandb_project to null"
        )
    if policy.layer_spec == "te" and find_spec("transformer_engine") is None:
        yield (
            f"policy.layer_spec=te, but Transformer Engine is not installed ({install_hints.TRANSFORMER_ENGINE}): "
            "install it, or set policy.layer_spec=torch or auto"
        )
    if policy.layer_spec == "te" and policy.precision == "fp32":
        yield "policy.layer_spec=te takes policy.precision=bf16 only: set that, or policy.layer_spec=torch"
    asks_for_cuda = {"policy.device=cuda": policy.device == "cuda", "policy.layer_spec=te": policy.layer_spec == "te"}
    if any(asks_for_cuda.values()) and not _has_cuda():
        asking = " and ".join(key for key, asks in asks_for_cuda.items() if asks)
        yield f"{asking}: this machine has no CUDA device; set them to auto, or use a machine with a GPU"


def _find_spec(name: str) -> object | None:
    # None in sys.modules: the package is installed, but hidden from Megatron because it cannot be used here.
    hidden = name in sys.modules and sys.modules[name] is None
    return PathFinder.find_spec(name) if hidden else importlib.util.find_spec(name)


def _has_cuda() -> bool:
    import torch  # seconds: only where the answer matters

    return torch.cuda.is_available()
