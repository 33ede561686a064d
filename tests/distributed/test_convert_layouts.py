"""A converted folder gives the logits of transformers under every layout, and its checkpoints convert back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layout_cases import sequences
from safetensors.torch import load_file
from small_policy import make_policy, save_policy, train

LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, dict(tensor_parallel=2, sequence_parallel=True)),
    "pp2": (2, dict(pipeline_parallel=2)),
    "pp2_interleaved": (2, dict(pipeline_parallel=2, virtual_stages=2)),
    "ep2": (2, dict(expert_parallel=2)),
}
CASES = [
    (family, tied, layout)
    for family, tied in [("qwen3", True), ("qwen2", False), ("llama", False), ("llama", True), ("qwen3_moe", False)]
    for layout in LAYOUTS
    if layout != "ep2" or family == "qwen3_moe"
]


@pytest.fixture(scope="module")
def converted(model_folder, tmp_path_factory, ranks):
    """(family, tied) -> Megatron folder of the random model, created once."""
    made: dict[tuple[str, bool], str] = {}

    def get(family: str, tied: bool) -> str:
        if (family, tied) not in made:
            folder = str(tmp_path_factory.mktemp("converted") / "megatron")
            ranks(1, to_megatron, model_folder(family, tied), folder)
            made[family, tied] = folder
        return made[family, tied]

    return get


def to_megatron(rank: int, source: str, target: str):
    from megatron_g2rl.policy.hf.convert import hf_to_megatron

    hf_to_megatron(source, target)


def to_hf(rank: int, source: str, target: str):
    from megatron_g2rl.policy.hf.convert import megatron_to_hf

    megatron_to_hf(source, target)


def scores(rank: int, folder: str, layout: dict):
    policy = make_policy(folder, layout)
    return policy.score(sequences(policy.architecture.vocab_size), features=False)


def scores_and_logits(rank: int, folder: str, layout: dict):
    """The scores, and this rank's shard of the logits of each of its sequences: {source: [tokens, vocab_local]}."""
    from megatron_g2rl.policy.model import LanguageModelHead

    logits, score = {}, LanguageModelHead._score

    def spy(self, hidden, weight):
        batch = self.request.batch
        for row, source in enumerate(batch.sources):
            logits[source] = hidden[batch.row == row] @ weight.t()
        return score(self, hidden, weight)

    LanguageModelHead._score = spy  # only in this process, which ends with the test
    return scores(rank, folder, layout), logits


@pytest.mark.parametrize("family, tied, layout", CASES)
def test_a_converted_folder_gives_transformers_logits_under_every_layout(
    family, tied, layout, ranks, model_folder, converted
):
    from transformers import AutoModelForCausalLM

    world, settings = LAYOUTS[layout]
    answers = ranks(world, scores_and_logits, converted(family, tied), settings)
    found = answers[0][0]
    model = AutoModelForCausalLM.from_pretrained(model_folder(family, tied), dtype=torch.float32).eval()
    for i, s in enumerate(sequences(model.config.vocab_size)):
        with torch.no_grad():
            expected = model(torch.tensor([s.prompt + s.response])).logits[0, len(s.prompt) - 1 : -1]
        shards = [logits[i] for _, logits in answers if i in logits]
        # fp32, four layers, a different summation order.
        assert (torch.cat(shards, 1)[:, : model.config.vocab_size] - expected).abs().max() < 2e-5
        table = torch.log_softmax(expected, -1)
        chosen = table.gather(1, torch.tensor(s.response)[:, None])[:, 0]
        assert (found.logprobs[i] - chosen).abs().max() < 2e-5
        assert (found.entropy[i] + (table.exp() * table).sum(1)).abs().max() < 2e-5


def train_and_save(rank: int, folder: str, layout: dict, checkpoints: str, exported: str):
    policy = make_policy(folder, layout)
    train(policy, 1)
    save_policy(policy, Path(checkpoints), 1, {"step": 1}, keep=1)
    policy.save_hf(exported)


@pytest.mark.parametrize(
    "family, layout",
    [
        ("qwen3", dict(tensor_parallel=2, sequence_parallel=True)),
        ("llama", dict(pipeline_parallel=2)),
        ("qwen3_moe", dict(expert_parallel=2)),
        ("qwen2", dict(precision="bf16")),
    ],
    ids=["tp2", "pp2", "ep2", "dp2_bf16"],
)
def test_a_checkpoint_of_a_run_gives_the_same_tensors_as_its_export(family, layout, ranks, model_folder, tmp_path):
    steps, exported = tmp_path / "checkpoints", tmp_path / "exported"
    ranks(2, train_and_save, model_folder(family, False), layout, str(steps), str(exported))
    ranks(1, to_hf, str(next(steps.glob("step_*"))), str(tmp_path / "published"))
    before, after = load_file(exported / "model.safetensors"), load_file(tmp_path / "published" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    # A new run starts from its weights under another layout.
    again, original = (ranks(1, scores, str(f), {})[0] for f in (next(steps.glob("step_*")), tmp_path / "published"))
    assert all(torch.equal(a, b) for a, b in zip(again.logprobs, original.logprobs, strict=True))


def refuse(rank: int, folder: str):
    from megatron_g2rl.errors import UserError

    try:
        make_policy(folder, {})
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    "changes, named", [({"num_hidden_layers": 3}, "layers"), ({"tie_word_embeddings": True}, "output")]
)
def test_a_megatron_folder_of_another_model_is_refused(changes, named, ranks, converted, tmp_path):
    import json
    import shutil

    folder = tmp_path / "other"
    shutil.copytree(converted("llama", False), folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    assert "is corrupt: config.json" in ranks(1, refuse, str(folder))[0]
    from megatron_g2rl.policy.checkpoint import manifest

    manifest.write(folder)
    message = ranks(1, refuse, str(folder))[0]
    assert named in message and "the weights do not match" in message
