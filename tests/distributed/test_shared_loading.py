"""Data-parallel ranks read a Hugging Face folder once together, and raise the error of any of them together."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from small_policy import export, make_policy, message_of

EXPERTS = ".mlp.experts."
TP2, PP2, CP2, EP2 = (
    {f"{kind}_parallel": 2} for kind in ("tensor", "pipeline", "context", "expert")
)  # of 2 ranks; the others are data-parallel


def load_and_count(rank: int, folder: str, layout: dict):
    """(name and bytes of each tensor that this rank reads, bits of the model as its replica exports them)."""
    from megatron_g2rl.policy.hf.tensor_folder import TensorFolder

    reads, read = [], TensorFolder.read

    def counted(self, name):
        tensor = read(self, name)
        reads.append((name, tensor.nbytes))
        return tensor

    TensorFolder.read = counted
    policy = make_policy(folder, layout)
    TensorFolder.read = read
    stored = load_file(f"{folder}/model.safetensors")
    exported = export(policy)
    dtype = torch.bfloat16 if layout.get("precision") == "bf16" else torch.float32
    changed = [name for name, tensor in exported.items() if not torch.equal(tensor, stored[name].to(dtype))]
    return reads, changed, list(exported)


CASES = {
    # family, tied, ranks, layout, times that a tensor is read, and an expert's
    "dp2": ("qwen3", False, 2, {}, 1, None),
    "dp3 bf16": ("qwen3", True, 3, dict(precision="bf16"), 1, None),
    "tp2 dp2": ("qwen3", False, 4, TP2, 2, None),
    "pp2 dp2": ("llama", False, 4, PP2, 1, None),
    "cp2 dp2": ("qwen3", False, 4, CP2, 1, None),
    "ep2": ("qwen3_moe", False, 2, EP2, 1, 1),
    "ep2 dp2": ("qwen3_moe", False, 4, EP2, 1, 1),
    "tp2 ep2": ("qwen3_moe", False, 4, TP2 | EP2 | dict(sequence_parallel=True), 2, 1),
    "tp2 dp2 experts": ("qwen3_moe", False, 4, TP2 | dict(sequence_parallel=True), 2, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_data_parallel_ranks_together_read_every_tensor_once(case, ranks, model_folder):
    """Each tensor-parallel rank reads its own part; nothing else is read by two ranks."""
    family, tied, world, layout, times, expert_times = CASES[case]
    folder = model_folder(family, tied)
    outcomes = ranks(world, load_and_count, folder, layout)
    counts = Counter(name for reads, _, _ in outcomes for name, _ in reads)
    for _, changed, names in outcomes:
        assert not changed
        assert sorted(names) == sorted(counts)
        # The largest tensors, which a rollout engine buffers to the end, are sent last.
        vocabulary = {"model.embed_tokens.weight"} if tied else {"model.embed_tokens.weight", "lm_head.weight"}
        assert set(names[-len(vocabulary) :]) == vocabulary
    assert counts == {name: expert_times if EXPERTS in name else times for name in counts}
    sizes = [sum(size for _, size in reads) for reads, _, _ in outcomes]
    # The largest tensors of this model, the embeddings, are a tenth of it.
    assert max(sizes) < 1.35 * sum(sizes) / world


def load_and_fail(rank: int, folder: str, layout: dict, failing: int | None, when: str) -> str:
    """The error of this rank; rank `failing` cannot read its file when it checks the headers, or later."""
    from megatron_g2rl.policy.hf.tensor_folder import TensorFolder

    def fail(*_):
        raise OSError("Stale file handle")

    if rank == failing:
        setattr(TensorFolder, when, fail)
    return message_of(lambda: make_policy(folder, layout))


@pytest.mark.parametrize("when", ["headers", "read"])
@pytest.mark.parametrize("layout", [{}, TP2], ids=["dp4", "tp2 dp2"])
def test_what_one_rank_cannot_read_is_the_same_error_on_all(layout, when, ranks, model_folder):
    messages = ranks(4, load_and_fail, model_folder("qwen3", False), layout, 3, when)
    assert messages == ["WeightsError: Stale file handle (rank 3)"] * 4


@pytest.mark.parametrize("layout", [{}, EP2], ids=["dp2", "ep2"])
def test_a_truncated_file_is_the_same_error_on_all_ranks(layout, ranks, model_folder, tmp_path):
    folder = tmp_path / "truncated"
    shutil.copytree(model_folder("qwen3_moe", False), folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    first, second = ranks(2, load_and_fail, str(folder), layout, None, "")
    assert first == second and f"{file}: it is incomplete or corrupt" in first
