"""Measures saving and loading a checkpoint against Megatron's own saving in its `fully_reshardable` format.

    torchrun --nproc-per-node=2 tools/bench/bench_checkpoint.py --layers 8 --hidden 512

The ways take turns in one run. Ours includes the manifest with checksums and the digests of the optimizer state, whose
own time is a row of its own; Megatron's has neither. Rank 0 prints the table. Megatron's save needs a layout without
padding between buckets to be correct; its time does not depend on that.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the system's temporary folder")
    a = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    import torch
    import torch.distributed as dist
    from random_models import write_random_model
    from small_policy import make_policy, train
    from turns import ratio, show, take_turns

    torch.set_num_threads(1)
    if "RANK" not in os.environ:
        from megatron_g2rl.distributed.ranks import set_single_rank_env

        set_single_rank_env()
    dist.init_process_group("gloo")
    place: list = [tempfile.mkdtemp(dir=a.folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(place, src=0)
    folder = Path(place[0])
    if dist.get_rank() == 0:
        size = dict(hidden_size=a.hidden, intermediate_size=3 * a.hidden, num_hidden_layers=a.layers)
        heads = dict(num_attention_heads=a.hidden // 64, num_key_value_heads=a.hidden // 64, head_dim=64)
        write_random_model(folder / "model", vocab_size=a.vocabulary, **size, **heads)
    dist.barrier()
    policy = make_policy(str(folder / "model"), dict(precision="bf16"))
    train(policy, 1)
    ways = make_ways(policy, folder)
    times = take_turns(ways, a.repeats)
    if dist.get_rank() == 0:
        parameters = sum(p.numel() for chunk in policy.chunks for p in chunk.parameters())
        rows = [[name, *ratio(times, name, "save (Megatron)")] for name in ways]
        title = f"{dist.get_world_size()} ranks, {parameters / 1e6:.0f}M parameters, bf16"
        show(title, ["way", "seconds", "of Megatron's save"], rows)
        shutil.rmtree(folder)
    dist.barrier()
    dist.destroy_process_group()


def make_ways(policy, folder: Path):
    """Name -> what is measured; every way is a collective."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from megatron_g2rl.policy.checkpoint.checkpoints import latest, load
    from megatron_g2rl.policy.checkpoint.optimizer_state import digests, state_shards
    from megatron_g2rl.policy.checkpoint.pieces import SHARDING
    from megatron_g2rl.policy.checkpoint.save import Checkpoints
    from megatron_g2rl.policy.model import unwrap

    checkpoints = Checkpoints(policy, folder / "ours", keep=1, asynchronous=False)
    steps = iter(range(1, 1_000))

    def save(step: int) -> None:
        checkpoints.save(step, {})
        checkpoints.finish(wait=True)

    def megatron() -> None:
        target = folder / "megatron"
        if dist.get_rank() == 0:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
        dist.barrier()
        state = {"model": unwrap(policy.chunks[0]).sharded_state_dict(metadata=SHARDING)}
        state["optimizer"] = policy.optimizer.megatron.sharded_state_dict(state["model"], metadata=SHARDING)
        dist_checkpointing.save(state, str(target))

    return {
        "save (Megatron)": megatron,
        "save (ours)": lambda: save(next(steps)),
        "of it, digests": lambda: digests(state_shards(policy.optimizer)),
        "load with digests (ours)": lambda: load(latest(folder / "ours"), policy),
    }


if __name__ == "__main__":
    main()
