"""A Hugging Face folder gives the same logits in Megatron and in transformers, and is exported bit for bit."""

from __future__ import annotations

import pytest
import torch

from megatron_g2rl.config.sections.model import OptimizerConfig, PolicyConfig

MODELS = [("qwen3", True), ("qwen3", False), ("llama", True), ("llama", False), ("qwen2", False), ("qwen3_moe", False)]
LAYOUTS = {
    "one": (1, {}),
    "tp2_sp": (2, dict(tensor_parallel=2, sequence_parallel=True)),
    "pp2_interleaved": (2, dict(pipeline_parallel=2, virtual_stages=2)),
}


def make_policy(folder: str, layout: dict):
    from megatron_g2rl.policy import runtime
    from megatron_g2rl.policy.policy import Policy

    settings = PolicyConfig(**(dict(precision="fp32", device="cpu") | layout))
    return Policy(
        folder,
        settings,
        OptimizerConfig(),
        runtime.start(settings, seed=0),
        temperature=1.0,
        tokens_per_microbatch=64,
        total_updates=1,
    )


def logits_of_one_rank(rank: int, folder: str, lengths: list[int]):
    """Megatron's own logits, the head without a task, for packed sequences."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_g2rl.policy.model import unwrap

    policy = make_policy(folder, {})
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, policy.architecture.vocab_size, (sum(lengths),), generator=generator)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])
    model = unwrap(policy.chunks[0])
    with torch.no_grad():
        logits = model(tokens[None], positions[None], None, packed_seq_params=packed)[0]
    return tokens, logits[:, : policy.architecture.vocab_size]


def export(rank: int, folder: str, layout: dict, destination: str):
    policy = make_policy(folder, layout)
    policy.save_hf(destination)


@pytest.mark.parametrize("family, tied", MODELS)
def test_logits_of_packed_sequences_equal_transformers(family, tied, ranks, model_folder):
    from transformers import AutoModelForCausalLM

    folder, lengths = model_folder(family, tied), [17, 1, 30]
    tokens, logits = ranks(1, logits_of_one_rank, folder, lengths)[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.cat([model(t[None]).logits[0] for t in tokens.split(lengths)])
    # fp32, four layers, logits up to about 5: rounding from a different summation order stays below 1e-5.
    assert (logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family, tied", MODELS)
def test_export_returns_every_tensor_bit_for_bit_and_transformers_loads_it(
    family, tied, layout, ranks, model_folder, tmp_path
):
    from transformers import AutoModelForCausalLM

    world, settings = LAYOUTS[layout]
    folder = model_folder(family, tied)
    ranks(world, export, folder, settings, str(tmp_path / "out"))
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def broken_folder(rank: int, folder: str):
    from megatron_g2rl.policy.hf.weights import WeightsError

    try:
        make_policy(folder, {})
    except WeightsError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("defect", ["missing", "shape"])
def test_a_missing_or_misshaped_tensor_is_reported_by_name(defect, ranks, model_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder, name = tmp_path / "broken", "model.layers.2.mlp.up_proj.weight"
    shutil.copytree(model_folder("qwen3", False), folder)
    tensors = load_file(folder / "model.safetensors")
    changed = tensors.pop(name)
    if defect == "shape":
        tensors[name] = changed[:-2].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = ranks(1, broken_folder, str(folder))[0]
    assert name in message and "broken" in message


def scores_of_one_rank(rank: int, folder: str):
    from layout_cases import sequences

    policy = make_policy(folder, dict(head_memory_mb=1))
    batch = sequences(policy.architecture.vocab_size)
    return batch, policy.score(batch, features=True)


@pytest.mark.parametrize("family, tied", [("qwen3", True), ("llama", False)])
def test_log_probs_and_features_equal_those_of_transformers_and_autograd(family, tied, ranks, model_folder):
    from transformers import AutoModelForCausalLM

    folder = model_folder(family, tied)
    batch, scores = ranks(1, scores_of_one_rank, folder)[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for i, s in enumerate(batch):
        hidden = model.model(torch.tensor([s.prompt + s.response])).last_hidden_state[0, len(s.prompt) - 1 : -1]
        hidden = hidden.detach().requires_grad_()
        table = torch.log_softmax(model.lm_head(hidden), -1)
        logprobs = table.gather(1, torch.tensor(s.response)[:, None]).squeeze(1)
        (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
        # float32 against float64 over four layers.
        close = dict(rtol=1e-4, atol=1e-4, check_dtype=False)
        torch.testing.assert_close(scores.logprobs[i], logprobs.detach(), **close)
        torch.testing.assert_close(scores.entropy[i], -(table.exp() * table).sum(1).detach(), **close)
        torch.testing.assert_close(scores.features[i], gradient.mean(0), **close)
