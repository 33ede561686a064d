"""Master weights and moments are bitwise equal after a save and a load under every layout.

The oracle is Megatron's own bookkeeping: which elements of a parameter a rank updates, assembled over the ranks by
the test and exported under Hugging Face names like weights, so that layouts can be compared.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from random_models import write_random_model
from small_policy import differing, export, load_policy, make_policy, save_policy, train

STATES = ("param", "exp_avg", "exp_avg_sq")


def split_into_buckets(elements: int | None) -> None:
    """Give Megatron's buffers buckets of about `elements`; None: Megatron's choice."""
    if elements is None:
        return
    from megatron_g2rl.policy import optimizer

    original = optimizer.DistributedDataParallelConfig
    optimizer.DistributedDataParallelConfig = lambda **options: original(**options, bucket_size=elements)


def complete_states(policy) -> dict[str, dict[str, torch.Tensor]]:
    """State -> Hugging Face name -> the complete tensor, by Megatron's ranges; overwrites the weights."""
    import torch.distributed as dist

    chained = getattr(policy.optimizer.megatron, "chained_optimizers", [policy.optimizer.megatron])
    parameters = {id(getattr(p, "main_param", p)): p for chunk in policy.chunks for p in chunk.parameters()}
    found: dict[str, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {state: [] for state in STATES}
    for inner in chained:
        if hasattr(inner, "model_param_group_index_map"):
            everything = {p: None for buffer in inner.buffers for p in buffer.param_index_map}
            for parameter in everything:
                complete = {state: torch.zeros(parameter.numel()) for state in STATES}
                if parameter in inner.model_param_group_index_map:
                    span = inner._get_model_param_range_map(parameter)["param"]
                    for state, tensor in inner._get_main_param_and_optimizer_states(parameter).items():
                        if state in STATES:
                            complete[state][span.start : span.end] = tensor.detach().view(-1)
                for state in STATES:
                    dist.all_reduce(complete[state], group=inner.data_parallel_group)
                    found[state].append((parameter, complete[state]))
        else:
            for main, state in inner.optimizer.state.items():
                tensors = {"param": main.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
                for name, tensor in tensors.items():
                    found[name].append((parameters[id(main)], tensor.clone()))
    exported = {}
    for state, tensors in found.items():
        for parameter, tensor in tensors:
            # The master weights of a float32 model are its weights: keep what has not been exported yet.
            parameter.data = tensor.view(parameter.shape)
        exported[state] = export(policy)
    return exported


def save(rank: int, folder: str, layout: dict, checkpoints: str, bucket: int | None):
    split_into_buckets(bucket)
    policy = make_policy(folder, layout)
    train(policy, 2)
    save_policy(policy, Path(checkpoints), 2, {"step": 2}, keep=1)
    return complete_states(policy)


def load(rank: int, folder: str, layout: dict, checkpoints: str, bucket: int | None):
    from megatron_g2rl.policy.checkpoint.checkpoints import latest

    split_into_buckets(bucket)
    policy = make_policy(folder, layout)
    load_policy(policy, latest(Path(checkpoints)))
    return complete_states(policy)


def assert_same(saved: dict, loaded: dict) -> None:
    for state in STATES:
        assert not differing(loaded[state], saved[state]), state
    moments = torch.cat([tensor.flatten() for tensor in saved["exp_avg"].values()])
    assert moments.count_nonzero() > len(moments) // 2


PP2, VPP2 = dict(pipeline_parallel=2), dict(pipeline_parallel=2, virtual_stages=2)
TP2, CP2, EP2 = dict(tensor_parallel=2, sequence_parallel=True), dict(context_parallel=2), dict(expert_parallel=2)
OVERLAP, REPLICATED = dict(overlap_communication=True), dict(distributed_optimizer=False)
ODD = dict(intermediate_size=101, num_hidden_layers=4)
EVEN = dict(intermediate_size=102, num_hidden_layers=4)
MOE = dict(family="qwen3_moe", num_hidden_layers=2, moe_intermediate_size=23)
TIED = dict(tie_word_embeddings=True)
SMALL = 9_001
"""Elements in a bucket: a model has several."""

CASES = {
    "tied_pp2_odd": (2, PP2, ODD | TIED, None),
    "untied_pp2_odd": (2, PP2, ODD, None),
    "interleaved_odd": (2, VPP2, ODD | TIED, None),
    "dp3": (3, {}, ODD, None),
    "dp5": (5, {}, ODD | TIED, None),
    "pp2_dp3": (6, PP2, ODD | TIED, None),
    "overlap_buckets": (1, OVERLAP, ODD | TIED, SMALL),
    "overlap_buckets_dp3": (3, OVERLAP, ODD | TIED, SMALL),
    "overlap_buckets_pp2_dp2": (4, PP2 | OVERLAP, ODD | TIED, SMALL),
    "tp2_dp2": (4, TP2, EVEN | TIED, None),
    "tp2_pp2_overlap": (4, TP2 | PP2 | OVERLAP, EVEN | TIED, SMALL),
    "cp2_dp2": (4, CP2, ODD, None),
    "ep2_dp2": (4, EP2, MOE, None),
    "ep2_overlap": (2, EP2 | OVERLAP, MOE, SMALL),
    "replicated_pp2": (2, PP2 | REPLICATED, ODD | TIED, None),
}


@pytest.fixture(scope="module")
def saved_case(ranks, tmp_path_factory):
    """name in `CASES` -> (model folder, checkpoint folder, complete states); each is saved once."""
    found: dict[str, tuple[str, str, dict]] = {}

    def get(case: str) -> tuple[str, str, dict]:
        if case not in found:
            world, layout, size, bucket = CASES[case]
            place = tmp_path_factory.mktemp(case)
            folder = write_random_model(place / "model", **({"family": "qwen3"} | size))
            states = ranks(world, save, folder, layout, str(place / "saved"), bucket)[0]
            found[case] = folder, str(place / "saved"), states
        return found[case]

    return get


@pytest.mark.parametrize("case", CASES)
def test_the_same_layout_restores_every_bit_of_the_optimizer(case, saved_case, ranks):
    world, layout, _, bucket = CASES[case]
    folder, checkpoints, saved = saved_case(case)
    assert_same(saved, ranks(world, load, folder, layout, checkpoints, bucket)[0])


@pytest.mark.parametrize(
    "case, world, layout, bucket",
    [
        ("tied_pp2_odd", 1, {}, None),
        ("pp2_dp3", 2, OVERLAP, SMALL),
        ("overlap_buckets_dp3", 2, PP2, None),
        ("tp2_dp2", 5, {}, None),
        ("tp2_pp2_overlap", 3, REPLICATED, None),
        ("interleaved_odd", 4, PP2 | OVERLAP, SMALL),
        ("ep2_dp2", 1, {}, None),
        ("replicated_pp2", 3, {}, None),
    ],
)
def test_another_layout_restores_every_bit_of_the_optimizer(case, world, layout, bucket, saved_case, ranks):
    folder, checkpoints, saved = saved_case(case)
    assert_same(saved, ranks(world, load, folder, layout, checkpoints, bucket)[0])


def draw_case(seed: int):
    """A random small model and two valid layouts of it."""
    r = random.Random(seed)
    family = r.choice(["qwen3", "qwen3", "llama", "qwen2"])
    size = dict(
        family=family,
        hidden_size=2 * r.randint(12, 40),
        intermediate_size=2 * r.randint(10, 70) + r.randint(0, 1),
        num_hidden_layers=r.choice([2, 4]),
        head_dim=2 * r.randint(4, 12),
        vocab_size=r.randint(40, 500),
        tie_word_embeddings=r.random() < 0.6,
    )
    if family == "llama":
        size["hidden_size"] = 4 * size["head_dim"]

    def layout():
        chosen = r.choice([{}, PP2, TP2, CP2, VPP2 if size["num_hidden_layers"] == 4 else PP2])
        if chosen is TP2 and size["intermediate_size"] % 2:
            chosen = {}
        extra = r.choice([{}, OVERLAP, OVERLAP, REPLICATED])
        world = r.randint(1, 3 if not chosen else 2) * (2 if chosen else 1)
        return world, chosen | extra, r.choice([None, r.randint(500, 20_000)]) if extra is OVERLAP else None

    return size, layout(), layout()


@pytest.mark.parametrize("seed", range(8))
def test_random_models_and_layouts_restore_every_bit(seed, ranks, tmp_path):
    size, first, second = draw_case(seed)
    folder = write_random_model(tmp_path / "model", **size)
    saved = ranks(first[0], save, folder, first[1], str(tmp_path / "saved"), first[2])[0]
    for world, layout, bucket in (first, second):
        assert_same(saved, ranks(world, load, folder, layout, str(tmp_path / "saved"), bucket)[0])


# ---------------------------------------------------------------------- many data-parallel ranks
def stored_of_every_rank(_: int, folder: str, layout: dict, world: int, bucket: int | None):
    """What every rank of a large world would write, without running them: (rows of each rank, straddling rows)."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_g2rl.policy import runtime
    from megatron_g2rl.policy.checkpoint import optimizer_state

    split_into_buckets(bucket)
    rows, fragments = [], []
    for rank in range(world):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        policy = make_policy(folder, layout)
        shards = optimizer_state.state_shards(policy.optimizer)
        blocks, parts = optimizer_state.rows_of(shards)
        rows.append([(b.piece.key, b.piece.stored, b.piece.offset, b.piece.shape) for b in blocks if b.writable])
        fragments.append([(p.fragment, p.block.piece) for p in parts if p.block.writable])
        runtime.stop()
    stage = world // layout.get("pipeline_parallel", 1)
    for first in range(0, world, stage):
        held_by = fragments[first : first + stage]
        owners = optimizer_state.row_owners([[fragment for fragment, _ in held] for held in held_by])
        for rank, (fragment, piece) in ((r, part) for r, held in enumerate(held_by, first) for part in held):
            if owners[fragment.row] == rank - first:
                row = piece.narrow(fragment.row[2], fragment.row[2] + 1).named("optimizer.state.exp_avg.")
                rows[rank].append((row.key, row.stored, row.offset, row.shape))
    return rows


@pytest.mark.parametrize(
    "world, layout, bucket",
    [(7, {}, None), (24, {}, None), (24, OVERLAP, 3_001), (20, PP2 | OVERLAP, 3_001)],
    ids=["dp7", "dp24", "dp24_buckets", "pp2_dp10_buckets"],
)
def test_many_ranks_write_every_element_once(world, layout, bucket, ranks, tmp_path):
    folder = write_random_model(
        tmp_path / "model", hidden_size=36, intermediate_size=53, vocab_size=90, tie_word_embeddings=True
    )
    rows = ranks(1, stored_of_every_rank, folder, layout, world, bucket)[0]
    counts: dict[str, torch.Tensor] = {}
    for key, stored, offset, shape in (block for held in rows for block in held):
        if key.startswith("optimizer.state.exp_avg."):
            count = counts.setdefault(key, torch.zeros(stored, dtype=torch.int))
            count[tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))] += 1
    assert len(counts) > 8
    assert not [key for key, count in counts.items() if not (count == 1).all()]
