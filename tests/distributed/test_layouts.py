"""Every parallel layout computes the same numbers as one rank, and as transformers."""

from __future__ import annotations

import functools

import pytest
import torch
from layout_cases import TEMPERATURE, sequences, weighted_loss

from megatron_g2rl.config.sections.model import OptimizerConfig, PolicyConfig

# A different order of fp32 sums: a few units in the last place of numbers of order 1 to 10, over four layers.
TOLERANCE = 2e-5

LAYOUTS = {
    "tp2": (2, dict(tensor_parallel=2)),
    "tp2_sp": (2, dict(tensor_parallel=2, sequence_parallel=True)),
    "pp2": (2, dict(pipeline_parallel=2)),
    "pp2_interleaved": (2, dict(pipeline_parallel=2, virtual_stages=2)),
    "pp2_uneven": (2, dict(pipeline_parallel=2, pipeline_layout="3,1")),
    "pp3_uneven": (3, dict(pipeline_parallel=3, pipeline_layout="1,2,1")),
    "dp2": (2, dict()),
    "cp2": (2, dict(context_parallel=2)),
    "tp2_pp2_sp": (4, dict(tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True)),
    "tp2_cp2_sp": (4, dict(tensor_parallel=2, context_parallel=2, sequence_parallel=True)),
}


def run_policy(rank: int, folder: str, layout: dict, tokens_per_microbatch: int = 40, updates: int = 0):
    """Scores, gradients (under Hugging Face names) and, with `updates`, the weights afterwards, of one layout."""
    from megatron_g2rl.policy import runtime
    from megatron_g2rl.policy.policy import Policy

    defaults = dict(precision="fp32", device="cpu", distributed_optimizer=updates > 0, head_memory_mb=1)
    settings = PolicyConfig(**(defaults | layout))
    policy = Policy(
        folder,
        settings,
        OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_updates=1),
        runtime.start(settings, seed=1),
        temperature=TEMPERATURE,
        tokens_per_microbatch=tokens_per_microbatch,
        total_updates=10,
    )
    batch = sequences(policy.architecture.vocab_size)
    scores = policy.score(batch, features=True)
    result = {"logprobs": torch.cat(scores.logprobs), "entropy": torch.cat(scores.entropy), "features": scores.features}
    # Some tokens are within the tolerance, some are swept again, one makes its complete response be swept again.
    reported = [(x + torch.arange(len(x)) % 3 * 5e-6).tolist() for x in scores.logprobs]
    reported[1][0] += 50.0
    prior = policy.score(batch, features=True, prior_logprobs=reported, prior_tolerance=6e-6)
    result |= {"from a prior: logprobs": torch.cat(prior.logprobs), "from a prior: entropy": torch.cat(prior.entropy)}
    result["from a prior: features"] = prior.features
    if not updates:
        result["logits"] = logits(policy, batch)
    for _ in range(updates):
        outcome, result["metrics"], _ = policy.update(batch, weighted_loss)
        assert outcome.applied
    if updates:
        result["weights"] = {k: v.clone() for k, v in policy.hf_weights()}
    else:
        result["metrics"] = policy.accumulate_gradients(batch, weighted_loss)
        result["gradients"] = gradients(policy)
    runtime.stop()
    return result if rank in (0,) else None


@torch.no_grad()
def logits(policy, batch) -> torch.Tensor:
    """Logits at every response token [tokens, vocabulary]: the head without a task, through megatron's own schedule."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_g2rl.policy.schedule import run_schedule

    starts = torch.tensor([0, *(len(s.response) for s in batch)]).cumsum(0)
    table = torch.zeros(int(starts[-1]), policy.architecture.vocab_size)
    packed = policy.microbatches(batch)
    read = lambda task: lambda output, non_loss_data=True: output[0]  # noqa: E731
    outputs = run_schedule(policy.chunks, packed, lambda b: None, read, forward_only=True)
    for b, output in zip(packed, outputs, strict=policy.runtime.last_stage):
        whole = gather_from_tensor_model_parallel_region(output)[:, : policy.architecture.vocab_size]
        if policy.runtime.reports:
            here = b.row >= 0
            table[starts[torch.tensor(b.sources, dtype=torch.long)[b.row[here]]] + b.offset[here]] = whole[here].float()
    dist.all_reduce(table)
    return table


@torch.no_grad()
def gradients(policy) -> dict[str, torch.Tensor]:
    """Gradients under Hugging Face names, gathered by the code that gathers weights (which has its own tests)."""
    for entry in policy.hf.local:
        entry.parameter.copy_(entry.parameter.main_grad)
    return {name: tensor.clone() for name, tensor in policy.hf_weights()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def compare(found: dict, expected: dict) -> None:
    for name in ("logits", "logprobs", "entropy", "features"):
        assert relative(found[name], expected[name]) < TOLERANCE, name
        if name != "logits":
            assert relative(found[f"from a prior: {name}"], expected[name]) < TOLERANCE, f"{name} from a prior"
    assert found["metrics"].keys() == expected["metrics"].keys()
    for name, value in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=TOLERANCE), name
    for kind in ("gradients", "weights"):
        assert found.get(kind, {}).keys() == expected.get(kind, {}).keys()
        for name, tensor in expected.get(kind, {}).items():
            assert relative(found[kind][name], tensor) < TOLERANCE, f"{kind} of {name}"


@pytest.fixture(scope="module")
def one_rank(ranks, model_folder):
    return functools.cache(lambda *key: ranks(1, run_policy, model_folder(*key), {})[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_log_probs_features_and_gradients_of_one_rank(layout, ranks, model_folder, one_rank):
    world, settings = LAYOUTS[layout]
    found = ranks(world, run_policy, model_folder("qwen3", False), settings)[0]
    compare(found, one_rank("qwen3", False))


@pytest.mark.parametrize("layout", ["tp2_sp", "pp2", "pp2_interleaved", "pp2_uneven", "cp2"])
def test_tied_embeddings_sum_the_gradients_of_both_uses_in_every_layout(layout, ranks, model_folder, one_rank):
    world, settings = LAYOUTS[layout]
    found = ranks(world, run_policy, model_folder("qwen3", True), settings)[0]
    compare(found, one_rank("qwen3", True))


@pytest.mark.parametrize(
    "layout",
    [
        dict(expert_parallel=2),
        dict(expert_parallel=2, tensor_parallel=2, sequence_parallel=True),
        dict(tensor_parallel=2, sequence_parallel=True),
        dict(pipeline_parallel=2),
    ],
    ids=["ep2", "tp2_ep2", "tp2", "pp2"],
)
def test_expert_parallel_ranks_compute_the_same_as_one_rank(layout, ranks, model_folder, one_rank):
    found = ranks(2, run_policy, model_folder("qwen3_moe", False), layout)[0]
    compare(found, one_rank("qwen3_moe", False))


def run_with_gpu_branches(rank: int, folder: str, layout: dict):
    """With the fused activation and the padded shapes that a GPU run uses."""
    from megatron_g2rl.policy import model, packing

    plain, pack = model.transformer_config, packing.pack

    def fused(*arguments):
        config = plain(*arguments)
        config.bias_activation_fusion = True
        return config

    model.transformer_config = fused
    packing.pack = functools.partial(_pack_few_shapes, pack)
    return run_policy(rank, folder, layout)


def _pack_few_shapes(pack, *arguments, **options):
    batch = pack(*arguments, **(options | dict(few_shapes=True)))
    assert len(batch.tokens) >= 128 // options["context_size"]
    return batch


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", dict()),
        ("qwen3", dict(tensor_parallel=2, sequence_parallel=True)),
        ("qwen3", dict(context_parallel=2)),
        ("qwen3", dict(pipeline_parallel=2)),
        ("qwen3_moe", dict(expert_parallel=2)),
    ],
    ids=["dp2", "tp2_sp", "cp2", "pp2", "ep2"],
)
def test_gpu_specific_branches_change_no_result(family, layout, ranks, model_folder, one_rank):
    found = ranks(2, run_with_gpu_branches, model_folder(family, False), layout)[0]
    compare(found, one_rank(family, False))


@pytest.mark.parametrize("tokens", [14, 25, 1000])
def test_gradients_do_not_depend_on_the_split_into_microbatches(tokens, ranks, model_folder, one_rank):
    found = ranks(1, run_policy, model_folder("qwen3", False), {}, tokens)[0]
    compare(found, one_rank("qwen3", False))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_activation_recomputation_changes_nothing(recompute, ranks, model_folder, one_rank):
    found = ranks(1, run_policy, model_folder("qwen3", False), dict(recompute=recompute))[0]
    compare(found, one_rank("qwen3", False))


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(overlap_communication=True),
        dict(distributed_optimizer=False),
        dict(distributed_optimizer=False, overlap_communication=True),
        dict(pipeline_parallel=2),
        dict(tensor_parallel=2, sequence_parallel=True),
    ],
    ids=["dp2", "dp2_overlap", "dp2_replicated", "dp2_replicated_overlap", "pp2", "tp2_sp"],
)
def test_updated_weights_do_not_depend_on_layout_or_optimizer_sharding(settings, ranks, model_folder):
    folder = model_folder("qwen3", True)
    expected = ranks(1, run_policy, folder, dict(distributed_optimizer=False), 40, 3)[0]
    found = ranks(2, run_policy, folder, settings, 40, 3)[0]
    # Adam divides by the root of tiny second moments, which enlarges rounding in rarely used rows: compare weights to
    # 1% of the change by three updates of 1e-3.
    for name, tensor in expected["weights"].items():
        assert (found["weights"][name] - tensor).abs().max() < 3e-5, name


def test_bf16_training_is_close_to_fp32(ranks, model_folder, one_rank):
    found = ranks(2, run_policy, model_folder("qwen3", False), dict(precision="bf16", tensor_parallel=2))[0]
    expected = one_rank("qwen3", False)
    # bf16 has 8 bits: 2**-8 relative for each of about twenty roundings.
    assert (found["logprobs"] - expected["logprobs"]).abs().max() < 0.1
    assert relative(found["features"], expected["features"]) < 0.05
    for name, tensor in expected["gradients"].items():
        assert torch.cosine_similarity(found["gradients"][name].flatten().float(), tensor.flatten(), dim=0) > 0.99, name
