"""The variants that bench_trl_step.py compares, each a separate process that runs a step when its turn comes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import resource
import statistics
import sys
import time
import zlib
from typing import Any

WAYS = {
    # name: (trainer, rollout engine, our exploration: its method, or a source of Φ other than the update itself)
    "g2rl-transformers": ("ours", "transformers", "gradient"),
    "g2rl-exact-transformers": ("ours", "transformers", "exact"),
    "g2rl-topk-transformers": ("ours", "transformers", "sampler_topk"),
    "grpo-transformers": ("ours", "transformers", "none"),
    "g2rl-vllm": ("ours", "vllm", "gradient"),
    "g2rl-exact-vllm": ("ours", "vllm", "exact"),
    "g2rl-topk-vllm": ("ours", "vllm", "sampler_topk"),
    "grpo-vllm": ("ours", "vllm", "none"),
    "trl-transformers": ("trl", "transformers", ""),
    "trl-vllm": ("trl", "vllm", ""),
}
EXPLORATION = {
    "none": {"method": "none"},
    "gradient": {"method": "gradient"},
    "exact": {"method": "gradient", "source": "exact"},
    "sampler_topk": {"method": "gradient", "source": "sampler_topk"},
}
KV_CACHE_MB = 512
PROMPT_TOKENS = 128
LEARNING_RATE = 1e-6
SIGMA = 0.8
"""Standard deviation of the logarithm of the unequal lengths."""
PHASES = ("rollout", "reward", "score", "update", "weights")
OUR_PHASES = {"score": "old_logprobs", "weights": "weight_sync"}


def reward(text: str, answer: str) -> float:
    """One of three rewards that depends only on the text: costs nothing and differs within nearly every group."""
    return zlib.crc32(text.encode()) % 3 - 1.0


def response_lengths(args: argparse.Namespace) -> list[int]:
    """Lengths of the responses of every step, in the order of prompts and then of the group.

    Unequal lengths are quantiles of a log-normal distribution with median `--tokens` / 4, limited to `--tokens`.
    """
    count = args.prompts * args.group_size
    if args.lengths == "equal":
        return [args.tokens] * count
    scores = [statistics.NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    lengths = [min(args.tokens, max(1, round(args.tokens / 4 * math.exp(SIGMA * score)))) for score in scores]
    return random.Random(0).sample(lengths, count)


class Turns:
    """The worker's side of alternating: `wait` for the turn, then report the measurements of the step with `done`."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # output of libraries goes to the log
        self.start: float | None = None

    def wait(self) -> None:
        self.answers.write("{}\n")
        self.answers.flush()
        if not sys.stdin.readline():
            sys.exit()
        self.start = time.perf_counter()

    def done(self, **measured: Any) -> None:
        import torch

        measured |= dict(step=time.perf_counter() - self.start, threads=torch.get_num_threads())
        measured |= dict(memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        self.answers.write(json.dumps(measured) + "\n")
        self.answers.flush()


def run_ours(args: argparse.Namespace, turns: Turns, engine: str, method: str) -> None:
    from megatron_g2rl.cli import app
    from megatron_g2rl.rewards.distribute import ScoredRewards
    from megatron_g2rl.training import trainer

    class Paced(trainer.Trainer):
        """The trainer of `g2rl train`, which waits for its turn before each step and reports tokens and timings."""

        def report(self, experience, *arguments, **options):
            self.experience = experience
            super().report(experience, *arguments, **options)

        def train_step(self):
            turns.wait()
            result = super().train_step()
            metrics = json.loads((self.folder / "metrics.jsonl").read_text().splitlines()[-1])
            assert metrics["update/count"] == 1 and metrics["update/skipped"] == 0, metrics
            groups = self.experience.groups
            fused = self.fused_update.applies(
                groups, ScoredRewards(self.experience.rewards, self.experience.correct, {})
            )
            assert fused == (method == "gradient"), "the step was not made as its name says"
            seconds = {phase: metrics[f"time/{OUR_PHASES.get(phase, phase)}_s"] for phase in PHASES}
            seconds["score"] += metrics["time/reference_s"]
            turns.done(
                **seconds,
                prompt_tokens=sum(len(g.prompt.token_ids) * len(g.responses) for g in groups),
                response_tokens=sum(len(r.token_ids) for r in self.experience.responses),
            )
            return result

    responses = args.prompts * args.group_size
    settings: dict[str, Any] = {
        "run": {"name": args.worker, "directory": str(args.folder / "runs")},
        "model": {"path": str(args.folder / "model")},
        "data": {"source": str(args.folder / "prompts.jsonl"), "template": "plain", "max_prompt_tokens": PROMPT_TOKENS},
        "rollout": {"engine": engine, "max_response_tokens": args.tokens, "kv_cache_mb": KV_CACHE_MB},
        "reward": {"function": "trl_step_ways:reward", "workers": 1},
        "exploration": EXPLORATION[method] | {"measure_geometry": False},
        "algorithm": {"kl_coefficient": args.kl_coefficient, "drop_uniform_groups": False},
        "policy": {"device": "cpu", "precision": "fp32"},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "trainer": {
            "steps": args.warm_up + args.steps + 1,  # the last one never starts, so that no step includes the run's end
            "prompts_per_step": args.prompts,
            "group_size": args.group_size,
            "responses_per_update": responses,
        },
        "checkpoint": {"every_steps": 1_000_000},
        "logging": {"tensorboard": False, "responses_every_steps": 0},
    }
    file = args.folder / f"{args.worker}.json"  # JSON is YAML
    file.write_text(json.dumps(settings))
    trainer.Trainer = Paced
    if args.lengths == "unequal":
        end_our_responses(engine, response_lengths(args), args.vocabulary - 1)
    app(["train", str(file)])


def end_our_responses(engine_name: str, lengths: list[int], end: int) -> None:
    """Make our engines end each response at its length: with the end token, or in vLLM with its own `max_tokens`."""
    from megatron_g2rl.rollout import transformers as plain
    from megatron_g2rl.rollout.vllm import VllmEngine

    length_of: dict[int, int] = {}  # by the seed of the response
    engine = VllmEngine if engine_name == "vllm" else plain.TransformersEngine
    generate, parameters, uniform, invert = engine.generate, VllmEngine._parameters, plain.uniform, plain.invert

    def remember(self, request):
        sampling = request.sampling
        seeds = [sampling.seed(prompt, index) for prompt in request.prompts for index in range(sampling.group_size)]
        length_of.update(zip(seeds, lengths, strict=True))
        return generate(self, request)

    def limited(self, sampling, seed):
        return parameters(self, dataclasses.replace(sampling, max_response_tokens=length_of[seed]), seed)

    def marked(seeds, position):
        last = [length_of[seed] == position + 1 for seed in seeds.tolist()]
        return uniform(seeds, position).masked_fill(seeds.new_tensor(last, dtype=bool), 2.0)

    def ended(logprobs, uniforms):
        tokens, values = invert(logprobs, uniforms.where(uniforms < 1, 0.0))
        last = uniforms > 1
        return tokens.masked_fill(last, end), values.where(~last, logprobs[:, end])

    engine.generate, VllmEngine._parameters = remember, limited
    plain.uniform, plain.invert = marked, ended


def end_trl_responses(model: Any, lengths: list[int], end: int) -> None:
    """Make `model.generate` end each response at its length with the end token."""
    import torch

    limits = torch.tensor(lengths)
    generate = model.generate

    def ended(*arguments: Any, **options: Any):
        width = options["input_ids"].shape[1]

        def force(ids, scores):
            last = (limits == ids.shape[1] - width + 1).nonzero().squeeze(1)
            scores[last] = -torch.inf
            scores[last, end] = 0.0
            return scores

        return generate(*arguments, **options, logits_processor=[force])

    model.generate = ended


def run_trl(args: argparse.Namespace, turns: Turns, engine: str) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Timed(GRPOTrainer):
        """TRL's trainer with the phases of a step timed."""

        def _generate(self, prompts):
            start = time.perf_counter()
            self.weights = 0.0
            result = super()._generate(prompts)
            measured.update(rollout=time.perf_counter() - start - self.weights, weights=self.weights)
            measured.update(prompt_tokens=sum(map(len, result[0])), response_tokens=sum(map(len, result[1])))
            return result

        def _generate_and_score_completions(self, inputs):
            start = time.perf_counter()
            result = super()._generate_and_score_completions(inputs)
            before = time.perf_counter() - start
            measured.update(score=before - sum(measured[name] for name in ("rollout", "weights", "reward")))
            return result

        def _calculate_rewards(self, *arguments):
            start = time.perf_counter()
            result = super()._calculate_rewards(*arguments)
            measured.update(reward=time.perf_counter() - start)
            return result

        def training_step(self, *arguments):
            start = time.perf_counter()
            result = super().training_step(*arguments)
            before = sum(measured[name] for name in ("rollout", "weights", "reward", "score"))
            self.begun = start + before  # start of the update, which ends with the step
            return result

    class Pace(TrainerCallback):
        def on_train_begin(self, *arguments, **options):
            turns.wait()

        def on_step_end(self, arguments, state, control, **options):
            turns.done(**measured, update=time.perf_counter() - trainer.begun)
            turns.wait()

    measured: dict[str, float] = {}
    responses = args.prompts * args.group_size
    config = GRPOConfig(
        output_dir=str(args.folder / args.worker),
        per_device_train_batch_size=responses,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        num_generations=args.group_size,
        max_completion_length=args.tokens,
        max_steps=args.warm_up + args.steps + 1,  # the last one never starts: no step includes the end
        beta=args.kl_coefficient,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=False,
        use_vllm=engine == "vllm",
        vllm_max_model_length=PROMPT_TOKENS + args.tokens,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = [json.loads(line) for line in (args.folder / "prompts.jsonl").read_text().splitlines()]
    trainer = Timed(
        model=str(args.folder / "model"),
        reward_funcs=lambda completions, **_: [reward(text, "") for text in completions],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [row["problem"] for row in rows]}),
        processing_class=AutoTokenizer.from_pretrained(args.folder / "model", padding_side="left"),
        callbacks=[Pace()],
    )
    if args.lengths == "unequal":
        end_trl_responses(trainer.model, response_lengths(args), args.vocabulary - 1)
    if config.use_vllm:
        sync_weights = trainer.vllm_generation.sync_weights

        def timed() -> None:
            start = time.perf_counter()
            sync_weights()
            trainer.weights += time.perf_counter() - start

        trainer.vllm_generation.sync_weights = timed
    trainer.train()


def work(args: argparse.Namespace) -> None:
    turns = Turns()
    import torch

    torch.set_num_threads(args.threads)
    trainer, engine, method = WAYS[args.worker]
    if trainer == "ours":
        run_ours(args, turns, engine, method)
    else:
        run_trl(args, turns, engine)
