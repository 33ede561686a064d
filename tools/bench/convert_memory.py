"""Measure memory and time of converting a random checkpoint in both directions.

    python tools/bench/convert_memory.py --gb 2.5 --folder /somewhere/with/room

Prints a table of seconds and of two peaks above the memory after imports: resident memory (VmHWM), and anonymous memory
(sampled). Mapped pages of the source's files count as resident, but the kernel can reclaim them. Each direction runs in
a separate process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SHAPE = dict(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
VOCABULARY = 151936


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.5, help="size of the checkpoint in bf16, in GB")
    parser.add_argument(
        "--folder", type=Path, default=None, help="folder for checkpoints; default: the system's temporary one"
    )
    parser.add_argument("--direction", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.direction:
        measure(*arguments.direction)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        table(Path(name), arguments.gb)


def table(folder: Path, gigabytes: float) -> None:
    from rich.console import Console
    from rich.table import Table

    layers, embedding, layer = make(folder / "hf", gigabytes)
    title = f"{layers} layers of {layer / 1e6:.0f} MB, two embeddings of {embedding / 1e6:.0f} MB, bf16"
    shown = Table("direction", "checkpoint, GB", "peak, MB", "peak anonymous, MB", "seconds", title=title)
    for direction, source, target in (("hf_to_megatron", "hf", "m"), ("megatron_to_hf", "m", "back")):
        command = [sys.executable, __file__, "--direction", direction, str(folder / source), str(folder / target)]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        m = json.loads(answer)
        size = sum(f.stat().st_size for f in (folder / source).rglob("*") if f.is_file()) / 1e9
        shown.add_row(direction, f"{size:.2f}", f"{m['peak']:.0f}", f"{m['anonymous']:.0f}", f"{m['seconds']:.1f}")
    Console(width=110).print(shown)


def make(folder: Path, gigabytes: float) -> tuple[int, int, int]:
    """Write a random untied Qwen3; returns (layers, bytes of an embedding, bytes of a layer)."""
    import torch
    import transformers

    from megatron_g2rl.policy.hf.tensor_folder import Header, write_tensors

    def build(layers: int):
        config = transformers.Qwen3Config(
            **SHAPE, num_hidden_layers=layers, vocab_size=VOCABULARY, tie_word_embeddings=False, dtype="bfloat16"
        )
        with torch.device("meta"):
            return config, transformers.AutoModelForCausalLM.from_config(config)

    _, one = build(1)
    layer = 2 * sum(p.numel() for n, p in one.named_parameters() if ".layers." in n)
    embedding = 2 * VOCABULARY * SHAPE["hidden_size"]
    layers = max(1, round((gigabytes * 1e9 - 2 * embedding) / layer))
    config, model = build(layers)
    folder.mkdir()
    config.save_pretrained(folder)
    headers = {name: Header(tuple(t.shape), torch.bfloat16) for name, t in model.state_dict().items()}
    tensors = ((name, torch.randn(h.shape, dtype=torch.bfloat16)) for name, h in headers.items())
    write_tensors(folder, headers, tensors, 10**9)
    return layers, embedding, layer


def memory() -> dict[str, int]:
    """Memory of this process in KiB: peak resident, resident and anonymous."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0]: int(line[1]) for line in lines if line[0] in ("VmHWM:", "VmRSS:", "RssAnon:")}


def measure(direction: str, source: str, target: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_g2rl.policy.hf import convert

    before, anonymous, done = memory(), [], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            anonymous.append(memory()["RssAnon:"])

    thread = threading.Thread(target=sample)
    thread.start()
    start = time.monotonic()
    getattr(convert, direction)(source, target)
    seconds = time.monotonic() - start
    done.set()
    thread.join()
    peak = (memory()["VmHWM:"] - before["VmRSS:"]) / 1e3 * 1.024
    most = (max(anonymous) - before["RssAnon:"]) / 1e3 * 1.024
    sys.stdout.write("\n" + json.dumps({"peak": peak, "anonymous": most, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
