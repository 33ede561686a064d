"""Digests of the inputs that a configuration names: a file can change while its name stays the same.

Checkpoints store them, and a resumed run compares them. Large weight files are sampled; all other files are read fully.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import xxhash

from megatron_g2rl.config import Config
from megatron_g2rl.config.code_files import imported_files, named_code
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.data.prompts import PromptDataset
from megatron_g2rl.records import Prompt

SAMPLES, SAMPLE_BYTES = 64, 65_536
"""Number and bytes of the evenly spaced samples that are read from a large file: 4 MiB per file in total."""
_ROWS_AT_ONCE = 10_000
_MODEL_FILES = (".json", ".safetensors", ".jinja", ".txt", ".model")


def contents(
    config: Config, model: Path, prompts: Sequence[Prompt], evaluation_sets: Mapping[str, Sequence[Prompt]]
) -> dict[str, str]:
    """Map each configuration key to a short description and digest of the input that it names.

    Args:
        config: the run's configuration.
        model: folder of `model.path`.
        prompts: rows of `data.source` or `data.sources`.
        evaluation_sets: prompts of each evaluation set; the name of the run's own set is empty.
    """
    digests = {"data.sources" if config.data.sources else "data.source": rows_digest(prompts)}
    digests["model.path"] = folder_digest(model)
    rows = {name: rows_digest(part) for name, part in evaluation_sets.items()}
    if "" in rows:
        digests["evaluation.source"] = rows.pop("")
    if rows:
        digests["evaluation.benchmarks"] = "; ".join(f"{name}: {digest}" for name, digest in rows.items())
    codes: dict[str, list[str | None]] = {}
    for key, path in named_code(config):
        codes.setdefault(key, []).append(code_digest(path))
    named = {key: "; ".join(code or "no file" for code in found) for key, found in codes.items() if any(found)}
    return digests | named


def check_contents(before: Mapping[str, str], now: Mapping[str, str], config: Config, where: object) -> None:
    """Refuse to resume when the contents of an input have changed.

    Args:
        before: digests from the checkpoint; a key missing there is not compared.
        now: current digests.
        config: its `checkpoint.allow_changed` lists the keys that may differ.
        where: the checkpoint, for the message.

    Raises:
        ConfigError: lists every key whose contents changed.
    """
    allowed = set(config.checkpoint.allow_changed)
    changed = [key for key in now if key in before and before[key] != now[key] and key not in allowed]
    if changed:
        raise ConfigError.listing(
            f"the contents of these inputs have changed since {where} was saved, and resuming would mix two runs: "
            "restore them, choose another run.name, or resume anyway with "
            f"checkpoint.allow_changed={','.join(changed)}",
            [f"{key}: {before[key]} -> {now[key]}" for key in changed],
        )


def rows_digest(prompts: Sequence[Prompt]) -> str:
    """Number and digest of the rows, in order: id, problem, answer and reward columns of each."""
    digest = xxhash.xxh3_128()
    for row in _rows(prompts):
        digest.update(repr(row).encode("utf-8", "surrogatepass"))
    return f"{len(prompts)} rows, {digest.hexdigest()}"


def _rows(prompts: Sequence[Prompt]) -> Iterator[tuple[int | str, ...]]:
    """Yield the rows as they are in the source; the keys and files that render them are compared separately.

    Other columns are included only if the reward functions take them.
    """
    if not isinstance(prompts, PromptDataset):
        yield from ((prompt.id, prompt.text, prompt.answer) for prompt in prompts)
        return
    names = ["id", "problem", "answer", *(["columns"] if prompts.has_columns else [])]
    for batch in prompts.rows.select_columns(names).iter(_ROWS_AT_ONCE):
        yield from zip(*(batch[name] for name in names), strict=True)


def folder_digest(folder: Path) -> str:
    """Number and digest of a model's files: names, sizes, and contents (large files sampled).

    Other files in the folder, such as runs in a working directory, are ignored.
    """
    digest = xxhash.xxh3_128()
    files = [path for path in folder.glob("*") if path.suffix in _MODEL_FILES] + list(folder.glob("megatron/*"))
    files = sorted(path for path in files if path.is_file())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            if size <= SAMPLES * SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for part in range(SAMPLES):
                file.seek(part * (size - SAMPLE_BYTES) // (SAMPLES - 1), os.SEEK_SET)
                digest.update(file.read(SAMPLE_BYTES))
    return f"{len(files)} files, {digest.hexdigest()}"


def code_digest(function: str) -> str | None:
    """Digest of the source files of `package.module:name`: the module, its packages, and their local imports.

    For installed packages, only the module's own file is included.

    Returns:
        Name of the module's file, number of files and digest; None if it is not found or is not a file.
    """
    module = function.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        return None
    file = Path(spec.origin).resolve()
    root = file.parents[module.count(".") + (file.stem == "__init__")]
    imported = [] if _is_installed(file) else [path.resolve() for path in imported_files(root, module)]
    files = sorted({file, *(path for path in imported if not _is_installed(path))})
    if len(files) == 1:
        return f"{file.name}, {xxhash.xxh3_128_hexdigest(file.read_bytes())}"
    digest = xxhash.xxh3_128()
    for path in files:
        name = path.relative_to(root) if path.is_relative_to(root) else path.name  # behind a link
        digest.update(f"{name}\0".encode("utf-8", "surrogateescape"))
        digest.update(path.read_bytes())
    return f"{file.name} and {len(files) - 1} more files, {digest.hexdigest()}"


def _is_installed(file: Path) -> bool:
    """Whether a file belongs to an installed package or to this package."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = [Path(sysconfig.get_path(name)).resolve() for name in names] + [Path(__file__).resolve().parents[1]]
    return any(file.is_relative_to(folder) for folder in folders)
