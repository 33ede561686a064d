"""The ways that bench_trl_step.py compares, each in a process of its own that makes a step when it is told to."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import zlib
from typing import Any

WAYS = {
    # name: (what runs, sampler, our exploration.method)
    "g2rl-transformers": ("ours", "transformers", "gradient"),
    "grpo-transformers": ("ours", "transformers", "none"),
    "g2rl-vllm": ("ours", "vllm", "gradient"),
    "grpo-vllm": ("ours", "vllm", "none"),
    "trl-transformers": ("trl", "transformers", ""),
    "trl-vllm": ("trl", "vllm", ""),
}
KV_CACHE_MB = 512
PROMPT_TOKENS = 128
LEARNING_RATE = 1e-6


def reward(text: str, answer: str) -> float:
    """One of three rewards, by the text alone: costs nothing and differs within nearly every group."""
    return zlib.crc32(text.encode()) % 3 - 1.0


class Turns:
    """The worker's side of taking turns: `wait` for the word, then `done` with what the step took."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a library prints goes to the log
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


def run_ours(args: argparse.Namespace, turns: Turns, sampler: str, method: str) -> None:
    from megatron_g2rl import trainer
    from megatron_g2rl.cli import app

    class Paced(trainer.Trainer):
        """The trainer of `g2rl train`, step by step; counts tokens and reads its metrics."""

        def collect(self, *arguments, **options):
            self.experience = super().collect(*arguments, **options)
            return self.experience

        def train_step(self):
            turns.wait()
            went_on = super().train_step()
            metrics = json.loads((self.folder / "metrics.jsonl").read_text().splitlines()[-1])
            assert metrics["update/count"] == 1 and metrics["update/skipped"] == 0, metrics
            groups = self.experience.groups
            turns.done(
                rollout=metrics["time/rollout_s"],
                weights=metrics["time/weights_s"],
                prompt_tokens=sum(len(g.prompt.token_ids) * len(g.responses) for g in groups),
                response_tokens=sum(len(r.token_ids) for r in self.experience.responses),
            )
            return went_on

    responses = args.prompts * args.group_size
    settings: dict[str, Any] = {
        "run": {"name": args.worker, "directory": str(args.folder / "runs")},
        "model": {"path": str(args.folder / "model")},
        "data": {"source": str(args.folder / "prompts.jsonl"), "template": "plain", "max_prompt_tokens": PROMPT_TOKENS},
        "rollout": {"engine": sampler, "max_response_tokens": args.tokens, "kv_cache_mb": KV_CACHE_MB},
        "reward": {"function": "trl_step_ways:reward", "workers": 1},
        "exploration": {"method": method, "measure_geometry": False},
        "algorithm": {"kl_coefficient": args.kl_coefficient, "drop_uniform_groups": False},
        "policy": {"device": "cpu", "precision": "fp32"},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "trainer": {
            "steps": args.warm_up + args.steps + 1,  # one more, that is never begun: the end of a run is no step
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
    app(["train", str(file)])


def run_trl(args: argparse.Namespace, turns: Turns, sampler: str) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Timed(GRPOTrainer):
        """TRL's trainer with a clock around its sampling."""

        def _generate(self, prompts):
            start = time.perf_counter()
            self.weights = 0.0
            result = super()._generate(prompts)
            measured.update(rollout=time.perf_counter() - start - self.weights, weights=self.weights)
            measured.update(prompt_tokens=sum(map(len, result[0])), response_tokens=sum(map(len, result[1])))
            return result

    class Pace(TrainerCallback):
        def on_train_begin(self, *arguments, **options):
            turns.wait()

        def on_step_end(self, arguments, state, control, **options):
            turns.done(**measured)
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
        max_steps=args.warm_up + args.steps + 1,  # one more, that is never begun: the end of training is no step
        beta=args.kl_coefficient,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=False,
        use_vllm=sampler == "vllm",
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
    if config.use_vllm:
        give = trainer.vllm_generation.sync_weights

        def timed() -> None:
            start = time.perf_counter()
            give()
            trainer.weights += time.perf_counter() - start

        trainer.vllm_generation.sync_weights = timed
    trainer.train()


def work(args: argparse.Namespace) -> None:
    turns = Turns()
    import torch

    torch.set_num_threads(args.threads)
    what, sampler, method = WAYS[args.worker]
    if what == "ours":
        run_ours(args, turns, sampler, method)
    else:
        run_trl(args, turns, sampler)
