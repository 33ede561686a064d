"""The batch ledger agrees with the trainer's planning and with the head."""

from __future__ import annotations

import re

import pytest

from megatron_g2rl.config.ledger import batch_ledger, head_chunk_tokens
from megatron_g2rl.config.model_shape import ModelShape
from megatron_g2rl.config.tree import Config


def ledger(world_size: int, model: ModelShape | None = None, **sections) -> dict[str, str]:
    config = Config(model={"path": "org/model"}, data={"source": "org/data"}, **sections)
    return {row.name: row.value for row in batch_ledger(config, world_size, model)}


def test_the_papers_setting_has_sixteen_updates_of_sixteen_responses():
    rows = ledger(8, trainer={"steps": 100})
    assert rows["prompts per step"] == rows["responses per prompt"] == "16"
    assert rows["responses per step"] == "256"
    assert rows["updates per step"] == "16"
    assert rows["updates in the run"] == "1,600"
    assert rows["responses per rank and update"] == "2"
    assert rows["tokens per response, at most"] == "8,192"
    assert rows["tokens per step, at most"] == f"{256 * (1024 + 8192):,}"


def test_a_critic_is_updated_while_the_policy_is_not():
    algorithm = dict(baseline="critic", drop_uniform_groups=False, critic_warmup_steps=10)
    rows = ledger(1, algorithm=algorithm)
    assert (rows["updates of the critic in the run"], rows["updates in the run"]) == ("1,600", "1,440")
    assert "updates of the critic in the run" not in ledger(1)


def test_epochs_multiply_updates_but_not_responses():
    rows = ledger(1, trainer={"epochs_per_step": 3, "steps": 2})
    assert (rows["updates per step"], rows["responses per step"], rows["updates in the run"]) == ("48", "256", "96")


def test_model_parallel_ranks_form_one_data_parallel_rank():
    rows = ledger(16, policy={"tensor_parallel": 2, "pipeline_parallel": 2}, rollout={"tensor_parallel": 4})
    assert (rows["data-parallel ranks"], rows["rollout engines"]) == ("4", "4")
    assert rows["responses per rank and update"] == "4"


def test_memory_of_the_top_k_is_listed_only_when_it_is_used():
    name = "top-K of the rollout engine, at most"
    rows = ledger(8, exploration={"source": "sampler_topk", "top_k": 20})
    assert rows[name] == f"{256 * 8192 * 20 * (4 + 2) // 2**20} MiB"
    assert name not in ledger(8)


ONE_UPDATE = {"prompts_per_step": 16, "group_size": 4, "responses_per_update": 64, "tokens_per_microbatch": 40_000}


@pytest.mark.parametrize(
    ("trainer", "exploration", "value", "note"),
    [
        (
            {},
            {"mapping": "centered"},
            "the update",
            "no old-log-prob pass: every group (at most 36,864 tokens) fits into a micro-batch",
        ),
        (
            {},
            {},
            "the update, or an old-log-prob pass",
            "an old-log-prob pass in a step with more than a third of its responses in dropped groups without a "
            "correct response, the update in all others",
        ),
        (
            {"tokens_per_microbatch": 36_863},
            {"mapping": "centered"},
            "the update, or an old-log-prob pass",
            "an old-log-prob pass in a step with a group of more than trainer.tokens_per_microbatch=36,863 tokens "
            "(at most 36,864 are possible), the update in all others",
        ),
        (
            {},
            {"method": "none"},
            "the update, or an old-log-prob pass",
            "an old-log-prob pass in a step with more than a third of its responses in dropped groups, the update in "
            "all others",
        ),
        (
            {"responses_per_update": 16},
            {},
            "an old-log-prob pass",
            "not in the update: 4 updates per step: those after the first need old log-probs",
        ),
        ({}, {"source": "exact"}, "an old-log-prob pass", "not in the update: exploration.source=exact"),
        (
            {},
            {"source": "sampler_topk"},
            "the rollout engine's top-K",
            "exploration.source=sampler_topk: no pass over the responses before the update",
        ),
    ],
)
def test_the_pass_that_computes_features_is_named_with_the_reason(trainer, exploration, value, note):
    sections = dict(trainer=ONE_UPDATE | trainer, exploration=exploration)
    config = Config(model={"path": "org/model"}, data={"source": "org/data"}, **sections)
    (row,) = [row for row in batch_ledger(config, 8) if row.name == "Φ is computed in"]
    assert (row.value, row.note) == (value, note)


def test_a_run_without_features_names_no_pass_for_them():
    assert "Φ is computed in" not in ledger(8, exploration={"method": "none", "measure_geometry": False})


def test_complete_groups_are_counted_where_the_update_computes_features():
    rows = ledger(8, trainer=ONE_UPDATE)
    assert rows["responses per rank and update"] == "8" and rows["micro-batches per update"] == "1 to 2"
    rows = ledger(8, trainer=ONE_UPDATE | {"tokens_per_microbatch": 80_000})
    assert rows["micro-batches per update"] == "1"
    rows = ledger(12, trainer=ONE_UPDATE | {"prompts_per_step": 18, "responses_per_update": 72})
    assert rows["responses per rank and update"] == "4 to 8", "steps in which groups are dropped: 6"


@pytest.mark.parametrize(
    ("mapping", "what"), [("centered", "complete groups, "), ("correct_only", "complete groups in some steps, ")]
)
def test_steps_that_may_have_another_pass_are_counted_as_well(mapping, what):
    # 18 groups of 4 on 12 ranks: 1 or 2 groups, or 6 responses, of which 40 fill a micro-batch and 44 do not
    trainer = ONE_UPDATE | {"prompts_per_step": 18, "responses_per_update": 72}
    sections = dict(trainer=trainer, exploration={"mapping": mapping})
    config = Config(model={"path": "org/model"}, data={"source": "org/data"}, **sections)
    (row,) = [row for row in batch_ledger(config, 12) if row.name == "responses per rank and update"]
    assert (row.value, row.note) == ("4 to 8", f"on each data-parallel rank, {what}balanced by length")


def test_ranks_without_work_are_shown():
    rows = ledger(32)
    assert rows["responses per rank and update"] == "0 to 1"


def test_the_layers_of_the_stages_are_shown():
    model = ModelShape(layers=94, heads=64, key_value_groups=4, experts=128, max_positions=32768, vocab_size=151936)
    rows = ledger(8, model, policy={"pipeline_parallel": 8, "pipeline_layout": "12*7,10"})
    assert rows["layers per stage"] == "12*7,10"
    rows = ledger(2, model, policy={"pipeline_parallel": 2})
    assert rows["layers per stage"] == "47*2"
    assert "layers per stage" not in ledger(1, model)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("policy", "shards"),
    [({}, 1), ({"context_parallel": 2}, 2), ({"pipeline_parallel": 2, "virtual_stages": 2}, 2)],
)
def test_the_maximum_of_micro_batches_is_the_planners_for_full_length_responses(ranks, policy, shards):
    planner = pytest.importorskip("megatron_g2rl.data.batching")
    rows = ledger(ranks * shards, policy=policy, trainer={"responses_per_update": 64, "tokens_per_microbatch": 20000})
    counts = []
    for tokens in (2, 1024 + 8192):
        plan = planner.plan_microbatches(
            [tokens] * 64,
            data_parallel=ranks,
            tokens_per_microbatch=20000,
            alignment=2 * policy["context_parallel"] if "context_parallel" in policy else 1,
            multiple_of=policy.get("pipeline_parallel", 1),
        )
        counts.append(len(plan[0]))
    assert [int(n) for n in re.findall(r"\d+", rows["micro-batches per update"])] == sorted(set(counts))


@pytest.mark.parametrize("rows", [1_000, 18_992, 151_936])
def test_the_heads_chunk_fills_its_memory_and_no_more(rows):
    three_tables = 3 * rows * 4
    chunk = head_chunk_tokens(256, rows)
    assert chunk * three_tables <= 256 * 2**20 < (chunk + 1) * three_tables
    assert head_chunk_tokens(1, 10**6) == 16, "a tiny budget must not make the head crawl"


def test_the_heads_chunk_is_listed_when_the_vocabulary_is_known():
    model = ModelShape(layers=28, heads=16, key_value_groups=8, experts=0, max_positions=32768, vocab_size=151936)
    rows = ledger(2, model, policy={"tensor_parallel": 2})
    assert rows["tokens per chunk of the LM head"] == f"{256 * 2**20 // (12 * 75968):,}"
    assert "tokens per chunk of the LM head" not in ledger(1)
