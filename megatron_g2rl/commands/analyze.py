"""`g2rl analyze`: checks the results of `g2rl evaluate` before torch is imported, then starts the ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_g2rl.commands.imports import without_collections
from megatron_g2rl.commands.on_ranks import run_on_ranks
from megatron_g2rl.config import Config
from megatron_g2rl.config.checks import check_machine, layout_problems
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.evaluated import EvaluatedModel, find_models
from megatron_g2rl.config.inputs import encoder_problems
from megatron_g2rl.config.loading import load_config
from megatron_g2rl.config.world import world_size

SUMMARY = "summary.json"
MOST = 24
"""Results that the page can distinguish, by color and dashes."""


@dataclass(frozen=True)
class AnalyzedResult:
    """The responses of one model to one benchmark."""

    folder: Path
    """Folder of the results, from `g2rl evaluate`."""
    label: str
    """`MODEL on BENCHMARK`."""
    model: EvaluatedModel
    temperature: float
    """Sampling temperature; 1 for greedy responses."""


@dataclass(frozen=True)
class AnalysisCommand:
    """A checked command line."""

    config: Config
    results: tuple[AnalyzedResult, ...]
    output: Path


def check_command(
    config_path: Path, overrides: Sequence[str], folders: Sequence[Path], output: Path
) -> AnalysisCommand:
    """Read the configuration and look for the results and their models.

    Args:
        config_path: the configuration: layout, precision and encoder.
        overrides: keys to set in it.
        folders: results of `g2rl evaluate`: folders of a model on a benchmark, or folders above them.
        output: folder of the analysis.

    Raises:
        ConfigError: everything that is wrong, in one message.
    """
    config = load_config(config_path, overrides)
    problems = [*layout_problems(config.policy, world_size(config), "trainer.ranks"), *encoder_problems(config)]
    results = []
    for folder in folders:
        found = sorted(path.parent for path in folder.rglob(SUMMARY)) if folder.is_dir() else []
        if not found:
            problems.append(f"{folder} has no {SUMMARY}: give a folder that g2rl evaluate wrote")
        for each in found:
            try:
                results.append(_result(each))
            except ConfigError as error:
                problems += error.problems
    if not folders:
        problems.append("nothing to analyze: give a folder that g2rl evaluate wrote, such as evaluations")
    if len(results) > MOST:
        problems.append(f"{len(results)} results are too many for one page: give at most {MOST}")
    labels = [result.label for result in results]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        places = ", ".join(str(result.folder) for result in results if result.label == label)
        problems.append(f"{places} are both called {label}: analyze them in two commands")
    if output.exists() and not output.is_dir():
        problems.append(f"--output {output} is a file: give a folder")
    if problems:
        raise ConfigError.listing("the analysis cannot start", problems)
    check_machine(config)
    return AnalysisCommand(config, tuple(results), output)


def _result(folder: Path) -> AnalyzedResult:
    try:
        summary = json.loads((folder / SUMMARY).read_text())
        path, name, label = summary["path"], summary["benchmark"], summary["model"]
        temperature = float(summary["settings"]["temperature"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / SUMMARY} is not the summary of an evaluation: {error!r}") from error
    (model,) = find_models([path])
    return AnalyzedResult(folder, f"{label} on {name}", model, temperature or 1.0)


def run_command(command: AnalysisCommand, arguments: Sequence[str]) -> int:
    """Analyze on all ranks; returns the exit code.

    Args:
        command: what to analyze.
        arguments: of `g2rl`, for the ranks.
    """
    config = command.config

    def work() -> int:
        with without_collections():
            from megatron_g2rl.commands.offline_analysis import analyze

        analyze(config, command.results, command.output)
        return 0

    return run_on_ranks(work, config.trainer.ranks, arguments, config.policy.device, command.output)
