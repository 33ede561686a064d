"""The batch ledger: what one step and one update of a run consist of, computed before the run starts. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from megatron_g2rl.config.benchmark import read_benchmarks
from megatron_g2rl.config.feature_pass import (
    largest_possible_group,
    steps_with_a_pass,
    update_cannot_compute_features,
)
from megatron_g2rl.config.model_shape import ModelShape
from megatron_g2rl.config.stages import stage_layers, written
from megatron_g2rl.config.tree import Config
from megatron_g2rl.config.world import data_parallel_size, longest_sequence


@dataclass(frozen=True)
class LedgerRow:
    """One line of the ledger."""

    name: str
    """The counted quantity."""
    value: str
    """The count, or a range."""
    note: str = ""
    """How it is computed."""


def batch_ledger(config: Config, world_size: int, model: ModelShape | None = None) -> list[LedgerRow]:
    """Counts of prompts, responses, updates, micro-batches and tokens.

    Args:
        config: a configuration that `check_config` accepts for this world size.
        world_size: ranks of the run.
        model: shape of the model if it is known; the chunk size of the LM head depends on the vocabulary.
    """
    rows = [*_ranks(config, world_size), *_step(config), *_update(config, world_size), *_features(config, world_size)]
    rows += _tokens(config, world_size, model)
    return [*rows, *_evaluation(config)]


def ledger_table(rows: list[LedgerRow]) -> Table:
    """The ledger as a table for the terminal."""
    table = Table(title="Batch ledger", title_justify="left", box=None, pad_edge=False)
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_column("how", style="dim")
    for row in rows:
        table.add_row(row.name, row.value, row.note)
    return table


def _ranks(config: Config, world_size: int) -> list[LedgerRow]:
    policy = config.policy
    tensor, pipeline, context = policy.tensor_parallel, policy.pipeline_parallel, policy.context_parallel
    copies = data_parallel_size(config, world_size)
    engines = world_size // config.rollout.tensor_parallel
    prompts = -(-config.trainer.prompts_per_step // engines)
    return [
        LedgerRow("ranks", _count(world_size)),
        LedgerRow(
            "data-parallel ranks",
            _count(copies),
            f"ranks / ({tensor} tensor x {pipeline} pipeline x {context} context)",
        ),
        LedgerRow("rollout engines", _count(engines), f"at most {_count(prompts)} prompts each per step"),
    ]


def _step(config: Config) -> list[LedgerRow]:
    trainer = config.trainer
    responses = trainer.prompts_per_step * trainer.group_size
    updates = responses // trainer.responses_per_update * trainer.epochs_per_step
    fewer = "; fewer when uniform groups are dropped" if config.algorithm.drop_uniform_groups else ""
    return [
        LedgerRow("prompts per step", _count(trainer.prompts_per_step), "= groups per step"),
        LedgerRow("responses per prompt", _count(trainer.group_size), "group size"),
        LedgerRow("responses per step", _count(responses), "prompts x group size"),
        LedgerRow(
            "updates per step",
            _count(updates),
            f"{_count(responses)} / {trainer.responses_per_update} responses x {trainer.epochs_per_step} epochs{fewer}",
        ),
        LedgerRow("steps in the run", _count(trainer.steps)),
        LedgerRow("updates in the run", _count(config.policy_updates), "the length of the learning-rate schedule"),
        *_critic(config),
    ]


def _critic(config: Config) -> list[LedgerRow]:
    algorithm, trainer = config.algorithm, config.trainer
    if algorithm.baseline != "critic":
        return []
    warmup = algorithm.critic_warmup_steps
    alone = f"; only these in the first {_count(warmup)} steps" if warmup else ""
    note = f"of a second model with the policy's size and layout{alone}"
    return [LedgerRow("updates of the critic in the run", _count(trainer.steps * trainer.updates_per_step), note)]


def _update(config: Config, world_size: int) -> list[LedgerRow]:
    trainer, policy = config.trainer, config.policy
    copies = data_parallel_size(config, world_size)
    complete = _update_computes_features(config, world_size)
    # Updates are split by complete groups, by responses, or, depending on the step, by either.
    units = [(trainer.group_size, largest_possible_group(config))] if complete else []
    if not complete or steps_with_a_pass(config):
        units.append((1, longest_sequence(config)))
    fewest, most, full_length = trainer.responses_per_update, 0, 0
    for unit, longest in units:
        low, extra = divmod(trainer.responses_per_update // unit, copies)
        high = low + (extra > 0)
        fewest, most = min(fewest, low * unit), max(most, high * unit)
        full_length = max(full_length, -(-high // max(1, trainer.tokens_per_microbatch // longest)))
    groups = ("complete groups in some steps, " if len(units) > 1 else "complete groups, ") if complete else ""
    idle = "; some ranks have none and are idle" if fewest == 0 else ""
    # The interleaved pipeline schedule needs a multiple of `pipeline_parallel` micro-batches.
    rounds = policy.pipeline_parallel if policy.virtual_stages > 1 else 1
    return [
        LedgerRow(
            "responses per update",
            _count(trainer.responses_per_update),
            "all groups of the step" if complete else "drawn across groups",
        ),
        LedgerRow(
            "responses per rank and update",
            _range(fewest, most),
            f"on each data-parallel rank, {groups}balanced by length{idle}",
        ),
        LedgerRow(
            "micro-batches per update",
            _range(rounds, -(-full_length // rounds) * rounds),
            f"of {_count(trainer.tokens_per_microbatch)} tokens, on each data-parallel rank: short to long responses",
        ),
    ]


def _update_computes_features(config: Config, world_size: int) -> bool:
    return config.exploration.is_exact and update_cannot_compute_features(config, world_size) is None


def _features(config: Config, world_size: int) -> list[LedgerRow]:
    """The pass that computes Φ, and why."""
    name, settings = "Φ is computed in", config.exploration
    if not settings.wants_features:
        return []
    if not settings.is_exact:
        note = "exploration.source=sampler_topk: no pass over the responses before the update"
        return [LedgerRow(name, "the rollout engine's top-K", note)]
    if reason := update_cannot_compute_features(config, world_size):
        return [LedgerRow(name, "an old-log-prob pass", f"not in the update: {reason}")]
    if properties := steps_with_a_pass(config):
        note = f"an old-log-prob pass in a step with {' or '.join(properties)}, the update in all others"
        return [LedgerRow(name, "the update, or an old-log-prob pass", note)]
    largest = _count(largest_possible_group(config))
    note = f"no old-log-prob pass: every group (at most {largest} tokens) fits into a micro-batch"
    return [LedgerRow(name, "the update", note)]


def _tokens(config: Config, world_size: int, model: ModelShape | None) -> list[LedgerRow]:
    trainer = config.trainer
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    responses = trainer.prompts_per_step * trainer.group_size
    rows = [
        LedgerRow("tokens per response, at most", _count(response), f"after a prompt of at most {_count(prompt)}"),
        LedgerRow(
            "tokens per update, at most",
            _count(trainer.responses_per_update * (prompt + response)),
            "prompts included",
        ),
        LedgerRow("tokens per step, at most", _count(responses * (prompt + response)), "prompts included, one epoch"),
    ]
    tolerance = config.exploration.prior_tolerance_in(config.policy.precision)
    if tolerance:
        only_cpu = config.policy.head_kernel == "torch" and not _update_computes_features(config, world_size)
        where = "on a CPU: " if only_cpu else ""
        note = (
            f"{where}the sweep starts from the rollout engine's log-probs; tokens for which they are off by more are "
            "swept again"
        )
        rows.append(LedgerRow("relative tolerance of the sweep for Φ", f"{tolerance:g}", note))
    top = config.exploration.top_logprobs
    if top:
        size = 6 * top * responses * response / 2**20
        rows.append(
            LedgerRow(
                "top-K of the rollout engine, at most",
                f"{_count(round(size))} MiB",
                f"on each rank until Φ is computed: 6 bytes x {top} x response tokens of a step",
            )
        )
    if model is not None:
        policy = config.policy
        chunks = policy.pipeline_parallel * policy.virtual_stages
        if chunks > 1:
            layers = written(stage_layers(policy, model.layers))
            note = "in model order; the last one has the LM head"
            rows.append(
                LedgerRow("layers per stage" if policy.virtual_stages == 1 else "layers per chunk", layers, note)
            )
        vocabulary = -(-model.vocab_size // config.policy.tensor_parallel)
        rows.append(
            LedgerRow(
                "tokens per chunk of the LM head",
                _count(head_chunk_tokens(config.policy.head_memory_mb, vocabulary)),
                f"{config.policy.head_memory_mb} MiB: three float32 tables over {_count(vocabulary)} vocabulary rows",
            )
        )
    return rows


def _evaluation(config: Config) -> list[LedgerRow]:
    settings, steps = config.evaluation, config.trainer.steps
    if settings is None:
        return []
    each = settings.responses_per_prompt
    responses = f"{each} x all" if settings.prompts is None else _count(settings.prompts * each)
    prompts = "all" if settings.prompts is None else _count(settings.prompts)
    evaluations = 1 + -(-steps // settings.every_steps)
    rows = [
        LedgerRow(
            "evaluations in the run",
            _count(evaluations),
            f"before the first step, every {settings.every_steps} steps, after the last",
        )
    ]
    if settings.has_own_set:
        rows.append(LedgerRow("responses per evaluation", responses, f"{each} to each of {prompts} evaluation prompts"))
    for name, benchmark in read_benchmarks(settings.benchmarks).items():
        count = benchmark.problems
        total = f"{benchmark.samples} x all" if count is None else _count(count * benchmark.samples)
        note = f"{benchmark.samples} to each of {'all' if count is None else _count(count)} problems"
        rows.append(LedgerRow(f"responses of {name} per evaluation", total, note))
    return rows


def head_chunk_tokens(memory_mb: int, vocab_local: int) -> int:
    """Tokens whose logits and two derived tables (all float32) fit into `memory_mb` MiB; at least 16."""
    return max(16, memory_mb * 2**20 // (3 * 4 * vocab_local))


def _count(number: int) -> str:
    return f"{number:,}"


def _range(low: int, high: int) -> str:
    return _count(low) if low == high else f"{_count(low)} to {_count(high)}"
