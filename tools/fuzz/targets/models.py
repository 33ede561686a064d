"""Hugging Face folders: configuration, tokenizer, chat template, index and tensors."""

from __future__ import annotations

import json
import struct
from random import Random
from typing import Any

from tools.fuzz.case import Work
from tools.fuzz.values import change_bytes, change_text, change_tree, change_value

CONFIG_KEYS: dict[str, Any] = {
    "rope_scaling": {"type": "yarn", "factor": 4.0},
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    "sliding_window": 4096,
    "use_sliding_window": False,
    "layer_types": ["full_attention", "sliding_attention"],
    "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
    "quantization_config": {"quant_method": "fp8"},
    "attention_bias": True,
    "num_experts": 4,
    "torch_dtype": "bfloat16",
    "eos_token_id": [1, 2],
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": False,
}
TEMPLATES = (
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ messages[0].content.__class__.__mro__ }}",
    "{{ raise_exception('no') }}",
    "{% for m in messages %}{{ m.role }}",
    "{{ 1/0 }}",
    "{{ 'x' * 10**10 }}",
    "{{ messages | tojson }}",
    "{% set a = [] %}{% for i in range(99) %}{% set _ = a.append(a) %}{% endfor %}{{ a }}",
    "{{ undefined.a.b }}",
    "",
    "{{ messages[0]['content'] }}<think>",
    "\ud800",
    "{{ cycler.__init__.__globals__ }}",
)


def make(work: Work) -> None:
    """`train`, `convert` or `doctor` of a changed model folder."""
    work.copy("model", "config.yaml", "problems.jsonl")
    kind = work.random.random()
    if kind < 0.55:
        work.arguments = ["train", "config.yaml"]
    elif kind < 0.9:
        dtype = work.random.choice(("keep", "keep", "fp16", "bf16"))
        work.arguments = ["convert", "hf-to-megatron", "model", "out", "--dtype", dtype]
    else:
        work.arguments = ["train", "config.yaml", "--dry-run"]
    for random in work.changes():
        random.choices(_CHANGES, weights=_WEIGHTS)[0](work, random)


def _change_config(work: Work, random: Random) -> None:
    if random.random() < 0.4:
        name = random.choice(sorted(CONFIG_KEYS))
        value = CONFIG_KEYS[name] if random.random() < 0.5 else change_value(CONFIG_KEYS[name], random)
        _merge(work, "model/config.json", {name: value})
    else:
        work.change_json("model/config.json", random)


def _merge(work: Work, name: str, added: dict) -> None:
    file = work.folder / name
    if not work.is_regular(name):
        return
    try:
        tree = json.loads(file.read_bytes())
    except ValueError:
        tree = {}
    file.write_text(json.dumps((tree if isinstance(tree, dict) else {}) | added))


def _change_generation(work: Work, random: Random) -> None:
    file = work.folder / "model" / "generation_config.json"
    if not file.exists() and not file.is_symlink():
        file.write_text('{"eos_token_id": [1], "temperature": 1.0, "top_k": 20}')
    work.change_json("model/generation_config.json", random)


def _change_tokenizer(work: Work, random: Random) -> None:
    work.change_json(random.choice(("model/tokenizer.json", "model/tokenizer_config.json")), random)


def _change_template(work: Work, random: Random) -> None:
    file = work.folder / "model" / "chat_template.jinja"
    if not work.is_regular("model/chat_template.jinja"):
        return
    before = file.read_text()
    text = random.choice(TEMPLATES) if random.random() < 0.6 else change_text(before, random)
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def _change_index(work: Work, random: Random) -> None:
    name = "model.safetensors"
    header = _header(work.folder / "model" / name) if work.is_regular(f"model/{name}") else None
    tensors = [key for key in header or {"x": 0} if key != "__metadata__"]
    if (work.folder / "model" / f"{name}.index.json").exists() and not work.is_regular(f"model/{name}.index.json"):
        return
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, name)}
    (work.folder / "model" / f"{name}.index.json").write_text(json.dumps(index))
    work.change_json(f"model/{name}.index.json", random)
    if random.random() < 0.3:
        file = random.choice(("../x.safetensors", "/proc/self/mem", ".", "", "a/b", "model.safetensors\0", "x" * 300))
        _merge(work, f"model/{name}.index.json", {"weight_map": dict.fromkeys(tensors, file)})


def _header(file) -> dict | None:
    try:
        data = file.read_bytes()
        return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    except (OSError, ValueError, struct.error, MemoryError, OverflowError, AttributeError):
        return None


def _change_tensors(work: Work, random: Random) -> None:
    file = work.folder / "model" / "model.safetensors"
    if not work.is_regular("model/model.safetensors"):
        return
    header = _header(file)
    if header is None or random.random() < 0.15:
        if file.is_file():
            file.write_bytes(change_bytes(file.read_bytes(), random))
        return
    data = file.read_bytes()
    body = data[8 + struct.unpack("<Q", data[:8])[0] :]
    if random.random() < 0.2:
        at = random.randrange(0, max(1, len(body) - 4), 4)
        number = random.choice((float("nan"), float("inf"), -1e38, 7e4, 1e-45))
        body = body[:at] + struct.pack("<f", number) + body[at + 4 :]
    else:
        header = change_tree(header, random)
    text = json.dumps(header).encode()
    size = len(text) if random.random() < 0.95 else random.choice((0, 1, 2**31, 2**63, 2**64 - 1))
    file.write_bytes(struct.pack("<Q", size) + text + body)


def _add_tensors(work: Work, random: Random) -> None:
    """Add a second file, with the same tensors or with an LM head."""
    if not work.is_regular("model/model.safetensors"):
        return
    data = (work.folder / "model" / "model.safetensors").read_bytes()
    if random.random() < 0.5:
        text = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [128, 64], "data_offsets": [0, 32768]}}).encode()
        data = struct.pack("<Q", len(text)) + text + b"\0" * 32768
    (work.folder / "model" / random.choice(("z.safetensors", "model-00002-of-00002.safetensors"))).write_bytes(data)


def _replace(work: Work, random: Random) -> None:
    names = sorted(file.name for file in (work.folder / "model").iterdir())
    work.replace_file(f"model/{random.choice([*names, 'model.safetensors.index.json'])}", random)


_CHANGES = (_change_config, _change_generation, _change_tokenizer, _change_template, _change_index, _change_tensors,
            _add_tensors, _replace)  # fmt: skip
_WEIGHTS = (35, 8, 12, 8, 10, 15, 4, 8)
