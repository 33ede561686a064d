"""The model of the quickstart's configurations for tests: with random weights, made once per session."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path


@cache
def quickstart_model() -> Path:
    """Its folder; removed when the session ends."""
    from megatron_g2rl.data.tiny_model import make_tiny_model
    from megatron_g2rl.registry import TASKS

    folder = Path(tempfile.mkdtemp(prefix="g2rl-model-"))
    atexit.register(shutil.rmtree, folder)
    return make_tiny_model(folder / "models" / "quickstart", task=TASKS["arithmetic"], seed=0)


def link_quickstart_model(folder: Path) -> None:
    """Link it to where the quickstart's configurations look for it from `folder`."""
    (folder / "models").symlink_to(quickstart_model().parent)
