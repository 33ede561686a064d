"""Saves, or loads and trains, in a process with another megatron-core: `python other_version.py WORK ARGUMENTS`.

`ARGUMENTS` is a JSON object: folder, layouts (name -> [world, layout]), checkpoints, out.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent


def harness():
    """tests/distributed/conftest.py, which starts ranks."""
    spec = importlib.util.spec_from_file_location("distributed_conftest", TESTS / "distributed" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_and_train(rank: int, folder: str, layout: dict, checkpoints: str):
    from small_policy import export, make_policy, save_policy, train

    policy = make_policy(folder, layout)
    train(policy, 3)
    save_policy(policy, Path(checkpoints), 3, {"step": 3}, keep=1)
    return optimizer_state(policy), train(policy, 2), export(policy)


def load_and_train(rank: int, folder: str, layout: dict, checkpoints: str):
    from small_policy import export, load_policy, make_policy, train

    policy = make_policy(folder, layout)
    load_policy(policy, Path(checkpoints, "step_00000003"))
    return optimizer_state(policy), train(policy, 2), export(policy)


def optimizer_state(policy) -> list[torch.Tensor]:
    """Master weights and moments of this rank, in the order of the optimizer."""
    inner = getattr(policy.optimizer.megatron, "chained_optimizers", [policy.optimizer.megatron])
    tensors = []
    for main, state in (item for one in inner for item in one.optimizer.state.items()):
        tensors += [main.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()]
    return tensors


WORK = {"save": save_and_train, "load": load_and_train}


def main() -> None:
    """Do the work for each layout and write (version of megatron-core, name -> results of the ranks) to `out`."""
    work, arguments = WORK[sys.argv[1]], json.loads(sys.argv[2])
    run_ranks, results = harness().run_ranks, {}
    for name, (world, layout) in arguments["layouts"].items():
        inputs = (arguments["folder"], layout, str(Path(arguments["checkpoints"], name)))
        results[name] = run_ranks(world, work, *inputs, timeout_s=150.0)
    torch.save((version("megatron-core"), results), arguments["out"])


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent), str(TESTS)]
    main()
