"""One of two processes with different megatron-cores that exchange checkpoints: `python other_version.py ARGUMENTS`.

Each saves checkpoints and converts a model, and then continues from what the other one wrote: in one process, because
importing Megatron takes longer than all of this. `ARGUMENTS` is a JSON object: model, experts (folders of models),
layouts (name -> [world, layout]), own, partner (folders of the two processes).
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent


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


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 800
    while not file.exists():
        if time.monotonic() > deadline:
            sys.exit(f"the other process did not write {file.name}")
        time.sleep(0.1)


def convert(direction: str, source: Path, target: Path) -> None:
    from megatron_g2rl.cli import app

    app(["convert", direction, str(source), str(target)], standalone_mode=False)


def main() -> None:
    """Write `result.pt`: the version of megatron-core, and by layout the results of the ranks that saved and loaded."""
    from forked_ranks import run_ranks

    arguments = json.loads(sys.argv[1])
    own, partner = Path(arguments["own"]), Path(arguments["partner"])
    results = {"saved": {}, "loaded": {}}
    for work, name, folder in ((save_and_train, "saved", own), (load_and_train, "loaded", partner)):
        for layout, (world, settings) in arguments["layouts"].items():
            inputs = (arguments["model"], settings, str(folder / layout))
            results[name][layout] = run_ranks(world, work, *inputs, timeout_s=400.0)
        (own / name).touch()
        wait_for(partner / name)
    # Last: the conversion starts threads, and ranks are forked.
    convert("hf-to-megatron", Path(arguments["experts"]), own / "megatron")
    (own / "converted").touch()
    wait_for(partner / "converted")
    convert("megatron-to-hf", partner / "megatron", own / "hf")
    torch.save((version("megatron-core"), results), own / "result.pt")


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent), str(TESTS)]
    main()
