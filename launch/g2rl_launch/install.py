"""The launch environment: where it is, how it is created, and how a command enters it. Standard library only."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import megatron_g2rl
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.errors import UserError

COMMANDS = ("launch", "sweep", "status", "logs", "cancel")
"""Commands of g2rl that run in the launch environment."""
PACKAGES = {
    "megatron_g2rl": Path(megatron_g2rl.__file__).resolve().parent,
    "g2rl_launch": Path(__file__).resolve().parent,
}
"""Folders of the packages that the launch environment imports."""
MAIN = PACKAGES["g2rl_launch"] / "__main__.py"
REQUIREMENTS = PACKAGES["g2rl_launch"] / "requirements.txt"
_METADATA = "Metadata-Version: 2.1\nName: g2rl-launch\nVersion: {}\n"
_ENTRY_POINTS = "[nemo_run.cli]\ng2rl = g2rl_launch.api\n"


def enter(arguments: list[str]) -> None:
    """Continue `g2rl ARGUMENTS` in the launch environment; returns if this is that environment or if there is none."""
    if not arguments or arguments[0] not in COMMANDS or "--install" in arguments:
        return
    try:
        python = launch_python()
    except ConfigError:  # reported where nemo-run is needed: `status` and `--render` work without it
        return
    if python != sys.executable:
        os.environ["G2RL_PYTHON"] = sys.executable
        os.execv(python, [python, str(MAIN), *arguments])


def launch_python() -> str:
    """The Python that imports nemo_run: this one, $G2RL_LAUNCH_PYTHON, or that of `g2rl launch --install`.

    Raises ConfigError if there is none.
    """
    if importlib.util.find_spec("nemo_run"):
        return sys.executable
    configured = os.environ.get("G2RL_LAUNCH_PYTHON")
    if configured:
        if not os.access(configured, os.X_OK) or not Path(configured).is_file():
            raise ConfigError(
                f"nemo-run is not installed: G2RL_LAUNCH_PYTHON={configured} is not a program. Unset it and call "
                "`g2rl launch --install`, or write the job script with --render FILE"
            )
        return configured
    installed = launch_venv() / "bin" / "python"
    if installed.is_file():
        return str(installed)
    raise ConfigError(
        "nemo-run is not installed. `g2rl launch --install` installs it into a separate environment; or set "
        "G2RL_LAUNCH_PYTHON to a Python that has it; or write the job script with --render FILE and sbatch it"
    )


def launch_venv() -> Path:
    """Folder of the environment that `install` creates."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "g2rl" / "launch"


def install() -> Path:
    """Create the launch environment and return its folder; UserError, with pip's last lines, if that fails."""
    folder = launch_venv()
    python = str(folder / "bin" / "python")
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [python, "-m", "pip", "install", "--quiet", "--requirement", str(REQUIREMENTS)],
        [python, str(MAIN), "--link"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last_lines = (done.stdout + done.stderr).strip().splitlines()[-10:]
            raise UserError("\n".join([f"{shlex.join(command)} failed:", *last_lines]))
    return folder


def link(site_packages: Path) -> None:
    """Make both packages importable in an environment, and visible to nemo-run's own commands."""
    for name, folder in PACKAGES.items():
        linked = site_packages / name
        if linked.is_dir() and not linked.is_symlink():
            continue  # installed by pip
        linked.unlink(missing_ok=True)
        linked.symlink_to(folder)
    metadata = site_packages / f"g2rl_launch-{megatron_g2rl.__version__}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(_METADATA.format(megatron_g2rl.__version__))
    (metadata / "entry_points.txt").write_text(_ENTRY_POINTS)
