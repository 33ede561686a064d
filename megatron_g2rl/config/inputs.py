"""Checks of the keys that name folders, files, hub names and built-in tasks, so that a missing one fails early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.sections.evaluation import EvaluationConfig
from megatron_g2rl.config.source import read_yaml
from megatron_g2rl.config.tree import Config

BUILTIN = "builtin:"
PROMPT_FILES = (".jsonl", ".json", ".parquet", ".arrow", ".jsonl.gz", ".json.gz")


def source_problems(config: Config) -> Iterator[str]:
    """Problems with the combination of model and data in `config`."""
    if config.model.path.startswith(BUILTIN):
        yield (
            f"model.path={config.model.path}: there are no built-in models; create one with `g2rl warm-start "
            "examples/quickstart/model.yaml`, and name its folder"
        )
    if config.data.source is not None and config.data.sources:
        yield "data.source and data.sources are both set: set one of them to null"
    weights = [part.weight for part in config.data.sources]
    if None in weights and any(weights):
        yield "data.sources: some have a weight and some do not; give a weight to all of them or to none"
    if config.evaluation is not None and config.data.sources and not _names_problems(config.evaluation):
        yield "data.sources names several sources: set evaluation.source to the one to evaluate on"
    if config.data.template == "plain" and "{problem}" not in config.data.plain_template:
        yield "data.plain_template has no {problem}: every prompt would be the same; add it where the problem goes"


def _names_problems(evaluation: EvaluationConfig) -> bool:
    return evaluation.source is not None or not evaluation.has_own_set


def file_problems(config: Config) -> Iterator[str]:
    """Problems with the files and folders that `config` names, on this machine."""
    if not config.model.path.startswith(BUILTIN):
        for problem in model_folder_problems(config.model.path):
            yield problem + _how_to_create(config)
    for key, source in _prompt_sources(config):
        yield from prompt_file_problems(key, source)
    yield from encoder_problems(config)


def named_files(config: Config) -> Iterator[tuple[str, str]]:
    """Keys and values that can only be files or folders, on any machine."""
    if _is_local(config.model.path):
        yield "model.path", config.model.path
    for key, source in _prompt_sources(config):
        if _is_local(source) or source.endswith(PROMPT_FILES):
            yield key, source
    if (encoder := config.exploration.encoder) is not None and _is_local(encoder):
        yield "exploration.encoder", encoder


def _prompt_sources(config: Config) -> Iterator[tuple[str, str]]:
    key = "data.sources" if config.data.sources else "data.source"
    yield from ((key, part.source) for part in config.data.each_source())
    if config.evaluation is not None and config.evaluation.source is not None:
        yield "evaluation.source", config.evaluation.data(config.data).source


def model_folder_problems(model: str, key: str = "model.path") -> Iterator[str]:
    """Problems with `model`, the value of `key`, as a folder or Hub name of a model, on this machine."""
    path = Path(model).expanduser()
    if model and path.is_dir():
        return
    if model and path.exists():
        yield f"{key}={model} is a file: name the folder that contains it"
    elif not _can_be_hub_name(model):
        hub = "" if not model or _is_local(model) else ", and it is not a Hugging Face Hub name"
        yield f"{key}={model}: there is no such folder (relative paths start at {Path.cwd()}){hub}"


def encoder_problems(config: Config) -> Iterator[str]:
    """Problems with `exploration.encoder` on this machine; nothing if it is not set."""
    encoder = config.exploration.encoder
    if encoder is None:
        return
    yield from model_folder_problems(encoder, "exploration.encoder")
    folder = Path(encoder).expanduser()
    if folder.is_dir() and not (folder / "modules.json").is_file():
        yield (
            f"exploration.encoder={encoder} has no modules.json, so it is not a sentence-transformers model; name one, "
            "such as sentence-transformers/all-MiniLM-L6-v2"
        )


def _how_to_create(config: Config) -> str:
    """The command that creates the model, if a warm-start file next to the configuration creates it; else empty."""
    file = Path((config.origin_of("model.path") or "").rpartition(":")[0])
    for beside in sorted(file.parent.glob("*.yaml")) if file.is_file() else ():
        with suppress(ConfigError):
            output = read_yaml(beside).value.get("output")
            if output is not None and Path(str(output.value)) == Path(config.model.path):
                return f". To create it: g2rl warm-start {beside}"
    return ""


def is_hub_name(model: str) -> bool:
    """Whether `model.path` is taken as a Hugging Face Hub name: no local path, and a valid name."""
    return not Path(model).expanduser().exists() and _can_be_hub_name(model)


def _can_be_hub_name(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError  # only where the answer matters
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not _is_local(name)


def prompt_file_problems(key: str, source: str) -> Iterator[str]:
    """Problems with `source`, the value of `key`, as a source of prompts."""
    path = Path(source).expanduser()
    if not source or ((_is_local(source) or source.endswith(PROMPT_FILES)) and not path.exists()):
        yield f"{key}={source}: there is no such file or folder (relative paths start at {Path.cwd()})"
    elif path.is_file() and not source.endswith(PROMPT_FILES):
        yield f"{key}={source}: a prompt file ends in one of {', '.join(PROMPT_FILES)}"
    elif path.is_dir() and not any(file.name.endswith(PROMPT_FILES) for file in path.rglob("*")):
        yield f"{key}={source}: the folder has no file that ends in one of {', '.join(PROMPT_FILES)}"


def _is_local(name: str) -> bool:
    """Whether a name can only be a path: Hub names have at most one slash and start with none of these characters."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1
