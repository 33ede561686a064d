"""Models that `build_chunks` builds with Transformer Engine's layers and with torch's, described as JSON.

    python tests/transformer_engine_layers.py SOURCES VERSION FAMILY=FOLDER ...

Runs in its own process: Transformer Engine's extension is a stand-in (`transformer_engine_stub`), and so is CUDA.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

WORLD = 2
"""Ranks of the layout whose parameter attributes are compared."""


def main(sources: str, version: str, *models: str) -> dict:
    """Family -> kind of layers -> parameters with their attributes, tensors of checkpoints, bits after a round trip."""
    import transformer_engine_stub

    transformer_engine_stub.install(Path(sources), version)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_g2rl.config.sections.model import PolicyConfig
    from megatron_g2rl.policy import runtime

    folders = dict(model.split("=", 1) for model in models)
    found: dict = {family: {"te": {}, "torch": {}} for family in folders}
    alone = dict(precision="bf16", device="cpu", layer_spec="torch")
    shared = alone | dict(tensor_parallel=WORLD, sequence_parallel=True)
    for world, layout, families in (
        (1, alone, list(folders)),
        (WORLD, shared, [family for family in folders if family != "qwen3_moe"]),
        (WORLD, shared | dict(expert_parallel=WORLD), [family for family in folders if family == "qwen3_moe"]),
    ):
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        settings = PolicyConfig(**layout)
        here = runtime.start(settings, seed=0)
        for family in families:
            for kind, result in found[family].items():
                architecture, chunks = build(folders[family], settings, here, kind)
                result |= round_trip(chunks, architecture, folders[family]) if world == 1 else marks(chunks)
        runtime.stop()
    return found


def build(folder: str, settings, here, kind: str):
    from megatron_g2rl.policy import model, specs
    from megatron_g2rl.policy.models.architecture import read_architecture

    specs.choose_layer_spec = model.choose_layer_spec = lambda policy, device: kind
    architecture, available = read_architecture(folder), torch.cuda.is_available
    torch.cuda.is_available = lambda: kind == "te"
    try:
        config = model.transformer_config(architecture, settings, here.device)
        return architecture, model.build_chunks(architecture, config, settings, here)
    finally:
        torch.cuda.is_available = available


def round_trip(chunks, architecture, folder: str) -> dict:
    from megatron_g2rl.policy.checkpoint.state import weight_blocks
    from megatron_g2rl.policy.hf.tensor_folder import TensorFolder
    from megatron_g2rl.policy.hf.weights import HFWeights
    from megatron_g2rl.policy.model import unwrap

    weights = HFWeights(chunks, architecture)
    weights.load(folder)
    source, models = TensorFolder(folder), [unwrap(chunk) for chunk in chunks]
    streamed = {name: tensor.clone() for name, tensor in weights.stream()}
    expected = architecture.family.hf_names(architecture.layers, architecture.experts or 0, architecture.tied)
    blocks, _ = weight_blocks(models)
    engine = {
        type(m).__name__ for model in models for m in model.modules() if "transformer_engine" in type(m).__module__
    }
    return {
        "names": sorted(streamed) == sorted(expected),
        "changed": [name for name, x in streamed.items() if not torch.equal(x, source.read(name).to(torch.bfloat16))],
        "stored": sorted([b.piece.key, list(b.piece.offset), list(b.piece.shape)] for b in blocks),
        "engine": sorted(engine),
        "in_16_bit": sorted(
            name
            for model in models
            for name, m in model.named_modules()
            if getattr(m, "fuse_wgrad_accumulation", None) is False
        ),
    }


def marks(chunks) -> dict:
    from megatron_g2rl.policy.model import unwrap
    from megatron_g2rl.policy.models.families import canonical_name

    parameters = [(canonical_name(n), p) for chunk in chunks for n, p in unwrap(chunk).named_parameters()]
    return {
        mark: sorted(name for name, parameter in parameters if getattr(parameter, mark, False))
        for mark in ("tensor_model_parallel", "sequence_parallel")
    } | {"expert": sorted(name for name, parameter in parameters if not getattr(parameter, "allreduce", True))}


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here.parent), str(here)]
    os.environ |= {"OMP_NUM_THREADS": "1"}
    warnings.simplefilter("ignore")
    print(json.dumps(main(*sys.argv[1:])))
