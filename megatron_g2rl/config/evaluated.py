"""What `g2rl evaluate --checkpoint` names: a run, one of its checkpoints, a Hugging Face folder, or a Hub model.

Only names and files are inspected here, so that a mistake is reported before anything is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.inputs import is_hub_name
from megatron_g2rl.config.run_files import MANIFEST, is_megatron_folder

_STEP = re.compile(r"step_(\d{8})")
_GENERIC = ("checkpoints", "hf")


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate."""

    label: str
    """Name of its results: `mine_step_00000200`, `Qwen--Qwen3-0.6B`."""
    path: str
    """Folder or Hub name of its weights: a Hugging Face folder, or a Megatron folder to be converted."""
    step: int
    """Training steps behind the weights, from the folder's name; 0 if it has none. Seeds depend on it."""

    @property
    def is_megatron(self) -> bool:
        """Whether the weights have to be converted."""
        return is_megatron_folder(self.path)


def find_models(names: Sequence[str]) -> list[EvaluatedModel]:
    """The models of `--checkpoint`.

    Raises:
        ConfigError: lists everything that is not a model, and models that would have the same name.
    """
    models: list[EvaluatedModel] = []
    problems: list[str] = []
    for name in names:
        try:
            models.append(_find(name))
        except ConfigError as error:
            problems.append(f"--checkpoint {error}")
    labels = [model.label for model in models]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        paths = ", ".join(model.path for model in models if model.label == label)
        problems.append(f"{paths} would both be called {label}: evaluate them in two commands with their own --output")
    if problems:
        raise ConfigError.listing("the models cannot be evaluated", problems)
    return models


def _find(name: str) -> EvaluatedModel:
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ConfigError(f"{name} is a file: give the folder that contains it")
    if not folder.is_dir():
        if is_hub_name(name):
            return EvaluatedModel(name.replace("/", "--"), name, 0)
        raise ConfigError(f"{name}: there is no such folder (relative paths start at {Path.cwd()})")
    if is_megatron_folder(folder):
        if not (folder / MANIFEST).is_file():
            raise ConfigError(f"{name} is not complete: it has no {MANIFEST}")
        return _model(folder)
    if (folder / "config.json").is_file():
        return _model(folder)
    checkpoints = folder if folder.name == "checkpoints" else folder / "checkpoints"
    complete = sorted(p for p in checkpoints.glob("step_*") if _STEP.fullmatch(p.name) and (p / MANIFEST).is_file())
    if not complete:
        raise ConfigError(
            f"{name} is neither a model (it has no config.json) nor a run with a complete checkpoint "
            "(checkpoints/step_*)"
        )
    exported = checkpoints.parent / "hf" / complete[-1].name
    return _model(exported if (exported / "config.json").is_file() else complete[-1])


def _model(folder: Path) -> EvaluatedModel:
    full = folder.resolve()
    step = _STEP.fullmatch(full.name)
    label = full.name
    if step or label == "model":  # the name of the run is the distinctive one
        label = f"{next(p.name for p in full.parents if p.name not in _GENERIC)}_{label}"
    return EvaluatedModel(label, str(folder), int(step[1]) if step else 0)


def training_settings(path: str) -> dict[str, Any] | None:
    """The configuration of the run whose checkpoint or export `path` is; None for other weights, or if unreadable."""
    folder = Path(path).resolve().parent
    if folder.name not in _GENERIC:
        return None
    file = folder.parent / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None
