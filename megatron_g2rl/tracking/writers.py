"""Writers for the metrics and responses of a run: JSON lines, TensorBoard, Weights & Biases.

Each writer is opened at the step from which a run resumes; entries that an earlier process wrote at or after that step
are discarded.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_g2rl.config import Config, install_hints
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.tracking.responses import ResponseRow, responses_page

log = logging.getLogger(__name__)

# Characters that json does not escape but that some programs treat as line ends or terminal commands, and lone
# surrogates, which UTF-8 cannot encode.
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class StepLines:
    """A JSON Lines file whose objects start with the step; every write is appended and flushed."""

    def __init__(self, path: Path, first_step: int):
        """Open for a run that resumes at `first_step`; lines of that step and later ones are removed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.last_step: int | None = None
        """Step of the last line that was kept."""
        if not path.is_file():
            return
        partial = path.with_name(path.name + ".partial")
        with path.open("rb") as lines, partial.open("wb") as kept:
            for number, line in enumerate(lines, start=1):
                row = step_of_line(line)
                if row is None:
                    log.warning("%s:%d: removed a corrupt line", path, number)
                elif row["step"] < first_step:
                    kept.write(line.rstrip(b"\n") + b"\n")
                    self.last_step = row["step"]
        os.replace(partial, path)

    def write(self, step: int, *rows: Mapping[str, object]) -> None:
        """Append one line per row; non-finite numbers are written as null."""
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                text = json.dumps({"step": step} | {k: _finite(v) for k, v in row.items()}, ensure_ascii=False)
                file.write(_UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n")


def step_of_line(line: bytes) -> dict | None:
    """The object in a line of such a file; None: the line is truncated, corrupt or has no step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # includes invalid UTF-8
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


class TensorBoardWriter:
    """TensorBoard event files in a folder, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, first_step: int):
        """Open for a run that resumes at `first_step`; TensorBoard ignores later steps of earlier files."""
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, step: int, metrics: Mapping[str, float], responses: list[ResponseRow]) -> None:
        """Add the finite metrics of a step and, if there are any, its responses as one text."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)
        if responses:
            self._writer.add_text("responses", responses_page(responses), step)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class WandbWriter:
    """A Weights & Biases run; resumed with the same id, which is stored in the run folder."""

    def __init__(self, folder: Path, config: Config):
        """Start or resume.

        Raises:
            ConfigError: wandb is not installed.
        """
        try:
            import wandb
        except ImportError:
            raise ConfigError(install_hints.missing_wandb(config.logging.wandb_project)) from None
        id_file = folder / "wandb_id"
        if not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=config.run.name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json"),
        )
        # wandb's own step counter never decreases, so repeated steps would be dropped; `step` is a metric instead.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the finite metrics of a step."""
        self._run.log({"step": step} | {name: value for name, value in metrics.items() if math.isfinite(value)})

    def close(self) -> None:
        """Wait until everything has been sent."""
        self._run.finish()


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
