"""Kill a small training run at random moments, resume it each time, and compare its result with an undisturbed run.

    python tools/chaos.py --kills 20
    python tools/chaos.py --kills 6 --phases rollout,checkpoint -- trainer.ranks=2 policy.tensor_parallel=2

Real processes, forked from this one, which has imported everything; SIGKILL reaches all of a run at the same time.
Kill i happens in the next phase of the list, in a random step, after a random fraction of that phase's duration. Equal
means: every number of every line of metrics.jsonl and evaluation.jsonl except wall-clock times, and every bit of every
tensor of the final model. Exit code 1 if they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.table import Table
from safetensors.torch import load_file

from megatron_g2rl.config.terminal import table_console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.fuzz.forking import ForkedCommand, run_forked  # noqa: E402

PHASES = ("rollout", "update", "checkpoint", "old_logprobs", "evaluation", "weight_sync", "loading")
QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart"
SETTINGS = [
    "data.max_rows=300",
    "trainer.prompts_per_step=4",
    "trainer.group_size=4",
    "trainer.responses_per_update=8",
    "algorithm.drop_uniform_groups=false",
    "exploration.mapping=centered",
    "checkpoint.every_steps=3",
    "evaluation.prompts=4",
    "evaluation.responses_per_prompt=2",
    "evaluation.every_steps=4",
    "reward.workers=1",
    "reward.deadline_s=120",
    "logging.tensorboard=false",
]
TIMED = ("time/", "cost/", "throughput/", "reward/latency_s")
LIMIT_S = 600


class Different(Exception):
    """The killed run and the undisturbed one have different results."""


@dataclass(frozen=True)
class Kill:
    """One kill and the state of the run at that moment."""

    phase: str
    step: int
    checkpoint: str
    """Latest complete checkpoint."""
    saving: bool
    """Whether a checkpoint was being written."""
    groups: int
    """Groups of responses in the journal."""


def create_model(folder: Path, overrides: list[str]) -> list[str]:
    """Create the model of the runs with a short warm start, unless `overrides` name one; the override that names it."""
    if any(override.startswith("model.path=") for override in overrides):
        return []
    arguments = ["warm-start", str(QUICKSTART / "model.yaml"), f"output={folder / 'model'}", "steps=60"]
    made = run_forked(arguments, folder, folder / "model.log", limit_s=LIMIT_S)
    if made.code:
        raise SystemExit(f"the warm start failed: {made.text}")
    return [f"model.path={folder / 'model'}"]


def arguments(folder: Path, name: str, overrides: list[str]) -> list[str]:
    """Arguments of `g2rl` for one run."""
    location = [f"run.directory={folder}", f"run.name={name}"]
    return ["train", str(QUICKSTART / "arithmetic.yaml"), *SETTINGS, *location, *overrides]


def start(folder: Path, name: str, overrides: list[str]) -> ForkedCommand:
    """Start or resume a run; the output of its attempt N goes to `name`.N.log."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return ForkedCommand(
        arguments(folder, name, overrides), Path.cwd(), next_log(folder, name), environment=environment
    )


def next_log(folder: Path, name: str) -> Path:
    """The file for the output of the next attempt of a run."""
    return folder / f"{name}.{len(list(folder.glob(f'{name}.*.log')))}.log"


def read_status(run: Path) -> dict:
    """status.json of a run; {} if it does not exist yet."""
    try:
        return json.loads((run / "status.json").read_text())
    except FileNotFoundError:
        return {}


def undisturbed(folder: Path, overrides: list[str]) -> dict[str, float]:
    """Run to the end; the longest duration of each phase in seconds, as observed from outside."""
    process, run = start(folder, "undisturbed", overrides), folder / "undisturbed"
    longest: dict[str, float] = defaultdict(float)
    seen: dict = {}
    while process.poll() is None:
        status = read_status(run)
        if seen and (status.get("phase"), status.get("step")) != (seen.get("phase"), seen.get("step")):
            longest[seen["phase"]] = max(longest[seen["phase"]], status["time"] - seen["time"])
            seen = status
        seen = seen or status
        time.sleep(0.002)
    if process.returncode:
        raise SystemExit(f"the undisturbed run failed with exit code {process.returncode}: {process.output}")
    return longest


def kill_family(process: ForkedCommand) -> None:
    """Send SIGKILL to a process and all its descendants."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(LIMIT_S)


def killed_once(folder: Path, overrides: list[str], phase: str, step: int, delay: float) -> Kill | None:
    """Start or resume the run and kill it `delay` seconds into the first `phase` at or after `step`.

    Returns None if the run ended before that.
    """
    run = folder / "killed"
    (run / "status.json").unlink(missing_ok=True)
    process = start(folder, "killed", overrides)
    deadline = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        status = read_status(run)
        if status.get("phase") == phase and (status["step"] >= step or phase == "loading"):
            time.sleep(delay)
            break
        time.sleep(0.002)
    alive = process.poll() is None
    status = read_status(run)
    kill_family(process)
    if not alive:
        if process.returncode:
            raise SystemExit(f"the run failed by itself with exit code {process.returncode}: {process.output}")
        return None
    saved = sorted((run / "checkpoints").glob("step_*"))
    return Kill(
        phase=str(status.get("phase")),
        step=status.get("step", 0),
        checkpoint=saved[-1].name if saved else "none",
        saving=any((run / "checkpoints").glob(".partial*")),
        groups=sum(len(file.read_bytes().splitlines()) for file in run.glob("rollouts/*") if file.is_file()),
    )


def compare(folder: Path, name: str = "killed") -> dict[str, int]:
    """Compare a run in `folder` with the undisturbed one; the number of lines, tensors and parameters compared.

    Raises:
        Different: names the first difference.
    """
    counts = {}
    for file in ("metrics.jsonl", "evaluation.jsonl"):
        a, b = (_lines(folder / run / file) for run in ("undisturbed", name))
        if len(a) != len(b):
            raise Different(f"{file}: {len(a)} lines undisturbed, {len(b)} {name}")
        for one, other in zip(a, b, strict=True):
            keys = [key for key in one | other if one.get(key) != other.get(key)]
            if keys:
                values = f"{one.get(keys[0])} undisturbed, {other.get(keys[0])} {name}"
                raise Different(f"{file}, step {one['step']}: {keys[0]} is {values} ({len(keys)} keys differ)")
        counts[f"{file} lines"] = len(a)
    a, b = (_tensors(folder / run / "model") for run in ("undisturbed", name))
    unequal = [key for key in a if key not in b or not torch.equal(a[key], b[key])]
    if unequal or len(a) != len(b):
        raise Different(f"{len(unequal)} of {len(a)} tensors of the final model differ, {unequal[:1]} first")
    return counts | {"tensors": len(a), "parameters": sum(t.numel() for t in a.values())}


def _lines(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMED)} for line in lines]


def _tensors(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(model.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def main() -> int:
    """Run, kill, resume, compare; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None, help="steps of the run (default: 2 per kill, at least 6)")
    parser.add_argument("--phases", default=",".join(PHASES), help="phases to kill the run in, one after the other")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--folder", type=Path, default=None, help="folder of the runs, kept (default: a temporary one)")
    parser.add_argument("overrides", nargs="*", help="key=value overrides of the run's configuration")
    options = parser.parse_args()
    steps = options.steps or max(6, 2 * options.kills)
    overrides, phases = [f"trainer.steps={steps}", *options.overrides], options.phases.split(",")
    moments, console = random.Random(options.seed), table_console(120)
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="chaos_"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    table = Table("kill", "phase", "step", "latest checkpoint", "checkpoint being written", "groups in the journal")
    overrides += create_model(folder, overrides)
    longest = undisturbed(folder, overrides)
    for i in range(options.kills):
        phase = phases[i % len(phases)]
        step = moments.randrange(i * steps // options.kills, (i + 1) * steps // options.kills)
        kill = killed_once(folder, overrides, phase, step, moments.random() * longest.get(phase, 0.1))
        if kill is None:
            console.print(f"the run ended before it could be killed in {phase} of step {step}")
            break
        table.add_row(str(i + 1), kill.phase, str(kill.step), kill.checkpoint, str(kill.saving), str(kill.groups))
    last = start(folder, "killed", overrides)
    code = last.wait(LIMIT_S)
    console.print(table)
    try:
        if code:
            raise Different(f"the last attempt ended with exit code {code}: {last.output}")
        counts = compare(folder)
    except Different as error:
        console.print(f"DIFFERENT: {error}. All files are in {folder}")
        return 1
    console.print("equal to the undisturbed run: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))
    if options.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
