"""Cross-field checks of the method: groups, critic, options of reward and loss, exploration, learning rate."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_g2rl.config.tree import Config

MISSING_ENCODER = (
    "needs exploration.encoder, the folder or Hub name of a sentence-transformers model, such as "
    "sentence-transformers/all-MiniLM-L6-v2"
)
"""What a method that compares embeddings lacks without it, after the name of the key."""


def method_problems(config: Config) -> Iterator[str]:
    """Why exploration, algorithm and optimizer of a configuration cannot be used together; each with the remedy."""
    yield from _groups(config)
    yield from _critic(config)
    yield from _options(config)
    yield from _exploration(config)
    yield from _schedule(config)


def _groups(config: Config) -> Iterator[str]:
    alone, method = config.trainer.group_size < 2, config.exploration.method
    if alone and config.algorithm.baseline != "critic":
        yield (
            "trainer.group_size=1: advantages and novelty compare the responses of a group and are zero for a single "
            "response, so nothing would be learned; set trainer.group_size to 2 or more, or algorithm.baseline to "
            "critic, with exploration.method=none"
        )
    elif alone and method != "none":
        yield (
            f"trainer.group_size=1: exploration.method={method} compares the responses of a group; set "
            "trainer.group_size to 2 or more, or exploration.method to none"
        )
    if config.algorithm.dynamic_sampling_rounds and not config.algorithm.drop_uniform_groups:
        yield (
            f"algorithm.dynamic_sampling_rounds={config.algorithm.dynamic_sampling_rounds} replaces dropped groups, "
            "but algorithm.drop_uniform_groups=false drops none: set it to true, or the rounds to 0"
        )


def _exploration(config: Config) -> Iterator[str]:
    if config.exploration.method == "semantic" and config.exploration.encoder is None:
        yield f"exploration.method=semantic {MISSING_ENCODER}"
    if config.exploration.source == "sampler_topk" and not config.exploration.wants_features:
        yield (
            "exploration.source=sampler_topk has no effect with exploration.method=none and "
            "exploration.measure_geometry=false, since Φ is not used; set it to auto, or change one of the other two"
        )


def _critic(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    if algorithm.baseline != "critic":
        if algorithm.critic_warmup_steps:
            yield (
                f"algorithm.critic_warmup_steps={algorithm.critic_warmup_steps}, but algorithm.baseline="
                f"{algorithm.baseline} has no critic: set it to 0, or algorithm.baseline to critic"
            )
        return
    if algorithm.drop_uniform_groups:
        yield (
            "algorithm.drop_uniform_groups=true drops groups with equal rewards, but they contribute "
            "to the updates with algorithm.baseline=critic: set it to false"
        )


def _options(config: Config) -> Iterator[str]:
    algorithm, longest = config.algorithm, config.rollout.max_response_tokens
    if algorithm.use_kl_in_reward and not algorithm.kl_coefficient:
        yield (
            "algorithm.use_kl_in_reward=true has no effect with algorithm.kl_coefficient=0: set the coefficient, or "
            "use_kl_in_reward to false"
        )
    if algorithm.importance_level == "sequence" and algorithm.importance_cap is None:
        yield (
            "algorithm.importance_level=sequence has no effect with algorithm.importance_cap=null: set a cap, or the "
            "level to token"
        )
    if algorithm.overlong_buffer_tokens is not None and algorithm.overlong_buffer_tokens > longest:
        yield (
            f"algorithm.overlong_buffer_tokens={algorithm.overlong_buffer_tokens} is more than "
            f"rollout.max_response_tokens={longest}, before which the penalty grows: lower it"
        )


def _schedule(config: Config) -> Iterator[str]:
    if config.optimizer.min_learning_rate > config.optimizer.learning_rate:
        yield (
            f"optimizer.min_learning_rate={config.optimizer.min_learning_rate:g} is above "
            f"optimizer.learning_rate={config.optimizer.learning_rate:g}, the peak of the schedule: lower it"
        )
    optimizer = config.optimizer
    if optimizer.min_learning_rate and optimizer.schedule == "constant":
        yield (
            f"optimizer.min_learning_rate={optimizer.min_learning_rate:g} has no effect with "
            "optimizer.schedule=constant: set the schedule to cosine or linear, or the minimum to 0"
        )
