"""Where the numbers and responses of a run go: JSON lines, TensorBoard, Weights & Biases.

Each writer is opened at the step a run goes on from; what an earlier process wrote after that step is taken back.
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

# What json leaves as it is and some programs take for a line's end or a command to the terminal, and halves of
# characters, which UTF-8 cannot hold.
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class StepLines:
    """A file of JSON lines that start with the step; appended and flushed."""

    def __init__(self, path: Path, first_step: int):
        """Open for a run that goes on at `first_step`; lines from there on, of before a kill, are removed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.last_step: int | None = None
        """Step of the last line that was found and kept."""
        if not path.is_file():
            return
        partial = path.with_name(path.name + ".partial")
        with path.open("rb") as lines, partial.open("wb") as kept:
            for number, line in enumerate(lines, start=1):
                row = step_of_line(line)
                if row is None:
                    log.warning("%s:%d: left out a broken line", path, number)
                elif row["step"] < first_step:
                    kept.write(line.rstrip(b"\n") + b"\n")
                    self.last_step = row["step"]
        os.replace(partial, path)

    def write(self, step: int, *rows: Mapping[str, object]) -> None:
        """Append one line a row; a number that is not finite is written as null."""
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                text = json.dumps({"step": step} | {k: _finite(v) for k, v in row.items()}, ensure_ascii=False)
                file.write(_UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def step_of_line(line: bytes) -> dict | None:
    """The object of a line of such a file; None: it is cut off, damaged or no line of one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # also what is no UTF-8
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


class TensorBoardWriter:
    """Events in a folder that `tensorboard --logdir` shows."""

    def __init__(self, folder: Path, first_step: int):
        """Open for a run that goes on at `first_step`; TensorBoard drops that step and later ones of earlier files."""
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, step: int, metrics: Mapping[str, float], responses: list[ResponseRow]) -> None:
        """Add the finite numbers of a step and, when there are some, its responses as one text."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)
        if responses:
            self._writer.add_text("responses", responses_page(responses), step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandbWriter:
    """A run at Weights & Biases; resumed under the same id, which is kept in the folder of the run."""

    def __init__(self, folder: Path, config: Config):
        """Start or resume.

        Raises:
            ConfigError: wandb is not installed.
        """
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"logging.wandb_project={config.logging.wandb_project}, but wandb is not installed: "
                f"{install_hints.WANDB}, or set logging.wandb_project to null"
            ) from None
        known = folder / "wandb_id"
        if not known.is_file():
            known.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=config.run.name,
            id=known.read_text(),
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json"),
        )
        # Its own counter never goes back, so the lines of repeated steps would be lost; ours is a column.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the finite numbers of a step."""
        self._run.log({"step": step} | {name: value for name, value in metrics.items() if math.isfinite(value)})

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
