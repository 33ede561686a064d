"""Check and time the head on one GPU; needs only this repository and torch.

    python tools/bench/gpu_head.py                            # about ten minutes on one H100
    python tools/bench/gpu_head.py --device cpu --small       # the same at toy sizes, seconds

First, correctness: score and update pass in float32 and bfloat16 against float64. Then the device's measured roofline
(one large copy, one large matrix product) and, relative to it, time and memory of (a) the score head with and without
Φ, from cuBLAS products and (with Φ, on a GPU) as one Triton kernel, (b) the update head against plain logits, at the
head sizes of Qwen3-0.6B, 4B and 32B. Plain logits are skipped if they do not fit. (c) If the policy's packages are
installed, `bench_passes.py` runs both passes of a small model, with torch layers and, if installed, Transformer Engine
layers: one real step with the optimizer. Exits with an error if a check or a pass fails.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from turns import peak_mb, ratio, show, take_turns  # noqa: E402

from megatron_g2rl.policy.head import score_tokens, token_logprobs  # noqa: E402

SIZES = {"Qwen3-0.6B": (1024, 151_936), "Qwen3-4B": (2560, 151_936), "Qwen3-32B": (5120, 151_936)}
SMALL = {"toy": (64, 1_000)}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
"""Allowed relative error to float64: float32 sums thousands of terms; bfloat16 rounds the logits' gradients."""


def inputs(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    g = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=g, device=device)
    states, weight = draw(tokens, hidden).to(dtype), (draw(vocabulary, hidden) / hidden**0.5 * 3).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=g, device=device)
    return [states.requires_grad_(), weight.requires_grad_(), targets]


def chunk(memory_mb: int, vocabulary: int) -> int:
    """As `config.ledger.head_chunk_tokens`, whose module needs more packages than torch."""
    return max(16, memory_mb * 2**20 // (3 * 4 * vocabulary))


def update(data, memory_mb: int, buffer=None):
    states, weight, targets = data
    weight.grad_added_to_main_grad = False
    values = token_logprobs(
        states, weight, targets, chunk_tokens=chunk(memory_mb, len(weight)), with_entropy=True, main_grad=buffer
    )
    return torch.autograd.grad(-values[0].sum() - 0.01 * values[1].sum(), (states, weight))


def plain(data):
    """Full logits, float32 after the product; log-probs and entropy from log_softmax."""
    states, weight, targets = data
    table = torch.log_softmax((states @ weight.t()).float(), -1)
    logprobs = table.gather(1, targets[:, None]).squeeze(1)
    return torch.autograd.grad(-logprobs.sum() + 0.01 * (table.exp() * table).sum(), (states, weight))


def torch_cross_entropy(data):
    states, weight, targets = data
    return torch.autograd.grad(F.cross_entropy((states @ weight.t()).float(), targets, reduction="sum"), data[:2])


def score(data, responses: int, memory_mb: int, features: bool):
    states, weight, targets = data
    owner = torch.arange(len(targets), device=targets.device) * responses // max(len(targets), 1)
    return score_tokens(
        states, weight, targets, owner, responses, features=features, chunk_tokens=chunk(memory_mb, len(weight))
    )


def score_from_prior(data, prior, responses: int, kernel: str):
    """The old-log-prob head with Φ from known log-probs, as one Triton kernel."""
    states, weight, targets = data
    owner = torch.arange(len(targets), device=targets.device) * responses // max(len(targets), 1)
    lengths = torch.bincount(owner, minlength=responses).tolist()
    runs = [(row, length) for row, length in enumerate(lengths) if length]
    options = dict(prior_logprobs=prior, runs=runs, kernel=kernel)
    return lambda: score_tokens(states, weight, targets, owner, responses, **options)


def check(dtype: torch.dtype, device: str, small: bool) -> list[tuple[str, float]]:
    """(what, relative error against float64) of both passes, with tiles much smaller than the logits."""
    data = inputs(*((100, 32, 700) if small else (600, 1024, 20_011)), dtype, device)
    exact = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in data]
    states, weight, targets = exact
    table = torch.log_softmax(states @ weight.t(), -1)
    logprobs, entropy = table.gather(1, targets[:, None]).squeeze(1), -(table.exp() * table).sum(1)
    expected = torch.autograd.grad(-logprobs.sum() - 0.01 * entropy.sum(), (states, weight))
    with torch.no_grad():
        phi = weight[targets] - table.exp() @ weight
        owner = torch.arange(len(targets), device=device) * 4 // len(targets)
        features = torch.zeros(4, phi.shape[1], dtype=phi.dtype, device=device).index_add_(0, owner, phi)
        features /= torch.bincount(owner, minlength=4)[:, None]
    scores = score(data, 4, 1, True)
    buffer = torch.zeros_like(data[1], dtype=torch.float32)
    hidden_gradient, _ = update(data, 1, buffer)
    again = token_logprobs(*data, chunk_tokens=33).detach()
    pairs = {
        "log-probs": (scores.logprobs, logprobs),
        "entropy": (scores.entropy, entropy),
        "Φ": (scores.features, features),
        "gradient of hidden states": (hidden_gradient, expected[0]),
        "gradient of the weight (in Megatron's buffer)": (buffer, expected[1]),
        "ratio of an unchanged policy": ((again - scores.logprobs).exp(), torch.ones_like(again).double()),
    }
    if device == "cuda":
        for kernel in ("triton", "triton_deterministic"):
            fused = score_from_prior(data, scores.logprobs, 4, kernel)()
            pairs |= {
                f"log-probs, {kernel}": (fused.logprobs, logprobs),
                f"entropy, {kernel}": (fused.entropy, entropy),
                f"Φ, {kernel}": (fused.features, features),
            }
    with torch.no_grad():
        return [(name, float((a.double() - b).norm() / b.norm())) for name, (a, b) in pairs.items()]


def roofline(device: str, small: bool, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes per second of one large copy, FLOP per second of one large matrix product)."""
    n = 256 if small else 8192
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    source = torch.empty((2**20 if small else 2**30) // 4, device=device)
    target = torch.empty_like(source)
    times = take_turns({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 10, device)
    return 2 * source.nbytes / min(times["copy"]), 2 * n**3 / min(times["product"])


def rows_of(name: str, tokens: int, a: argparse.Namespace, rates: tuple[float, float]) -> list[tuple[str, ...]]:
    """Table rows of one head size and number of tokens."""
    hidden, vocabulary = (SMALL if a.small else SIZES)[name]
    data = inputs(tokens, hidden, vocabulary, getattr(torch, a.dtype), a.device)
    buffer = torch.zeros_like(data[1], dtype=torch.float32)
    # Logits, their float32 copy, log_softmax, exponentials and gradients.
    fits = a.device == "cpu" or tokens * vocabulary * 20 < torch.cuda.mem_get_info()[0]
    ways = {
        "score without Φ": lambda: score(data, a.responses, a.memory_mb, False),
        "score": lambda: score(data, a.responses, a.memory_mb, True),
        "update": lambda: update(data, a.memory_mb, buffer),
    }
    if a.device == "cuda":
        prior = ways["score without Φ"]().logprobs
        for kernel in ("triton", "triton_deterministic"):
            ways[f"score, {kernel}"] = score_from_prior(data, prior, a.responses, kernel)
    if fits:
        ways |= {"plain logits, entropy": lambda: plain(data), "torch cross_entropy": lambda: torch_cross_entropy(data)}
    times = take_turns(ways, a.repeats, a.device)
    rows = []
    for way in ways:
        passes = 1 if way.startswith("score") else 3
        # Time of the matrix products alone; ours recomputes one of four, which counts as overhead.
        ideal = passes * 2 * tokens * hidden * vocabulary / rates[1]
        fraction = ideal / sorted(times[way])[len(times[way]) // 2]
        base = "score without Φ" if way.startswith("score") else "update"
        rows.append(
            (
                name,
                f"{tokens:,}",
                way,
                *ratio(times, way, base),
                f"{peak_mb(ways[way], a.device):.0f}",
                f"{fraction:.0%}",
            )
        )
    return rows


PASSES = ("megatron", "transformers", "pydantic", "jaxtyping")
"""Packages that a complete pass needs."""
SMALL_PASSES = "--vocabulary 500 --hidden 128 --layers 1 --responses 2 --prompt-tokens 4 --response-tokens 8"
GPU_PASSES = "--vocabulary 151936 --hidden 1024 --layers 4 --prompt-tokens 256 --response-tokens 768"


def passes(a: argparse.Namespace) -> list[str]:
    """Measure complete passes of a small model for each kind of layer that can run here; names of the failed ones."""
    missing = [name for name in PASSES if importlib.util.find_spec(name) is None]
    if missing:
        sys.stdout.write(f"Complete passes are skipped: not installed: {', '.join(missing)}.\n")
        return []
    kinds = ["torch"]
    if a.device == "cuda" and importlib.util.find_spec("transformer_engine") is not None:
        kinds.append("te")
    else:
        sys.stdout.write("The step with Transformer Engine is skipped: it needs a GPU and the package.\n")
    sizes = (SMALL_PASSES if a.small else GPU_PASSES).split()
    precision = "fp32" if a.device == "cpu" else "bf16"
    failed = []
    for kind in kinds:
        sys.stdout.flush()
        command = [sys.executable, str(HERE / "bench_passes.py"), *sizes, "--device", a.device, "--layer-spec", kind]
        command += ["--precision", precision, "--repeats", str(a.repeats)]
        path = os.pathsep.join(filter(None, (str(HERE.parents[1]), os.environ.get("PYTHONPATH"))))
        if subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode:
            failed.append(f"complete passes with {kind} layers")
    return failed


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--small", action="store_true", help="toy sizes")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="dtype of the timings")
    p.add_argument("--tokens", type=int, nargs="*", help="default: 4096, 16384 and 65536")
    p.add_argument("--responses", type=int, default=16)
    p.add_argument("--memory-mb", type=int, default=1024, help="policy.head_memory_mb")
    p.add_argument("--repeats", type=int, default=5)
    a = p.parse_args()
    failed = []
    for dtype in TOLERANCE:
        errors = check(dtype, a.device, a.small)
        rows = [(name, f"{error:.1e}", f"{TOLERANCE[dtype]:.0e}") for name, error in errors]
        show(f"{dtype}", ("against float64", "relative error", "allowed"), rows, a.device)
        failed += [f"{name} in {dtype}" for name, error in errors if not error < TOLERANCE[dtype]]
    rates = roofline(a.device, a.small, getattr(torch, a.dtype))
    rows = []
    for name in SMALL if a.small else SIZES:
        for tokens in a.tokens or ([128] if a.small else [4096, 16_384, 65_536]):
            rows += rows_of(name, tokens, a, rates)
    note = (
        f"Measured roofline: {rates[0] / 1e9:.0f} GB/s (copy), {rates[1] / 1e12:.2f} TFLOP/s ({a.dtype} product). "
        "Score rows are relative to the score without Φ, the others to the update; fraction: time of a pass's products "
        "(one forward, three with both gradients) at that rate, divided by the measured time."
    )
    header = ("head", "tokens", "variant", "median s", "ratio", "peak MiB", "fraction of the roofline")
    show(f"{a.dtype}, {a.memory_mb} MiB", header, rows, a.device, note)
    failed += passes(a)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
