"""Time a complete training step against TRL's GRPOTrainer: same model, prompts, group size, tokens, threads, on a CPU.

    OMP_NUM_THREADS=1 python tools/bench/bench_trl_step.py                                  # a small random model
    OMP_NUM_THREADS=1 python tools/bench/bench_trl_step.py --model models/smollm2-135m --ways trl-transformers g2rl-vllm

Every variant is a separate process. All stay alive and alternate step by step, so that other load on the machine
affects all of them equally; ratios are computed per round. Our variants run the trainer of `g2rl train`; TRL's run its
GRPOTrainer without gradient checkpointing, in float32, with the complete batch in one pass. A step consists of
generation, rewards, passes, one optimizer update with all responses, the weight update of the rollout engine, and
metrics.

By default no response ends early: the LM head's row of the only end token points away from all hidden states. With
`--lengths unequal` the responses of a step have lengths as in training, the same ones in every variant and step: the
end token is forced at these lengths (our vLLM gets a `max_tokens` per response). The tokens of each step are counted on
both sides; different counts are an error.

With `--kl-coefficient 0`, TRL's default, TRL on transformers makes no pass before the update: it uses the update's own
log-probs as the old ones. So do our GRPO, G2RL, whose update computes Φ itself, and G2RL with Φ from the rollout
engine's top-K. `g2rl-exact-*` is G2RL with an old-log-prob pass (`exploration.source=exact`), which it needs where a
step has several updates; `--ways g2rl-transformers g2rl-exact-transformers grpo-transformers` compares them.
TRL's `score` is everything between generation and update except rewards, and its `update` everything from there to the
end of the step. `--ways trl-vllm` runs TRL's colocated vLLM, which needs compatible versions of TRL and vLLM.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from trl_step_ways import PHASES, WAYS, response_lengths, work

MAY_FAIL = ("trl-vllm",)
BY_DEFAULT = [name for name in WAYS if name not in MAY_FAIL]
QUESTION = "What is {} + {} ? Think step by step , write down what you carry , and end with the sum ."
END_LOGIT = 200.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="Hugging Face folder; default: a small random Llama")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=BY_DEFAULT, help="variants to measure")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the measured ones")
    parser.add_argument("--prompts", type=int, default=4, help="prompts per step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of every response, or of the longest")
    parser.add_argument(
        "--lengths", choices=["equal", "unequal"], default="equal", help="lengths of a step's responses"
    )
    parser.add_argument("--kl-coefficient", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.lengths == "unequal" and "trl-vllm" in args.ways:
        parser.error("--lengths unequal does not support trl-vllm, whose responses cannot be ended at given lengths")
    return args


# Model and prompts, created once by the parent process.


def write_model(source: Path | None, folder: Path) -> int:
    """Write a float32 model whose only end token, the last of its vocabulary, is never sampled; its vocabulary size."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    torch.manual_seed(0)
    if source is None:
        write_random_model(folder)
    model = AutoModelForCausalLM.from_pretrained(source or folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source or folder)
    end = model.config.vocab_size - 1
    ids = tokenizer(QUESTION.format(12, 34), return_tensors="pt").input_ids
    with torch.no_grad():  # the end token's row of the LM head points away from the hidden states
        hidden = model.model(torch.cat([ids, torch.randint(end, (1, 256))], 1)).last_hidden_state[0, 1:]
        mean = hidden.mean(0)
        model.lm_head.weight[end] = -END_LOGIT * mean / mean.square().sum()
        assert (hidden @ model.lm_head.weight[end]).max() < -END_LOGIT / 4, (
            "this model's end token cannot be suppressed"
        )
    tokenizer.eos_token, tokenizer.pad_token = tokenizer.convert_ids_to_tokens([end, 0])
    assert tokenizer.eos_token_id == end
    model.config.eos_token_id, model.config.pad_token_id = end, 0
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.config.vocab_size


def write_random_model(folder: Path, vocabulary: int = 8192) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = dict(vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=6, head_dim=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.05))
    model.model.embed_tokens.weight.data[:, 0] = 0.5  # as in trained models, hidden states share a common direction
    model.save_pretrained(folder)
    ids = {"[UNK]": 0} | {str(index): index for index in range(1, vocabulary)}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", padding_side="left").save_pretrained(folder)


def write_prompts(file: Path, count: int) -> None:
    """Write prompts of equal length: sums of two two-digit numbers."""
    pairs = itertools.islice(itertools.cycle(itertools.product(range(11, 99), repeat=2)), 7, 7 + 41 * count, 41)
    rows = [{"problem": QUESTION.format(a, b) + "\n", "answer": str(a + b)} for a, b in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# The parent process: lets the workers alternate and prints the table.


class Way:
    """The parent's side of a worker process."""

    def __init__(self, name: str, folder: Path, threads: int, vocabulary: int) -> None:
        self.name, self.steps, self.log = name, [], folder / f"{name}.log"
        bench_folder = str(Path(__file__).resolve().parent)
        environment = os.environ | dict(
            PYTHONPATH=os.pathsep.join([bench_folder, *filter(None, [os.environ.get("PYTHONPATH")])]),  # for `reward`
            OMP_NUM_THREADS=str(threads),
            HF_HUB_OFFLINE="1",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_KVCACHE_SPACE="1",  # GiB, TRL's
            VLLM_CPU_OMP_THREADS_BIND="nobind",
        )
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--folder", str(folder)]
        command += ["--vocabulary", str(vocabulary)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True)
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def read(self) -> dict[str, float] | None:
        """The worker's next message; None if the process has ended."""
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def turn(self) -> bool:
        """Run one step; False if the process has ended instead."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        measured = self.read()
        if measured:
            self.steps.append(measured)
        return measured is not None

    def work_done(self) -> set[tuple[float, ...]]:
        """The distinct (prompt tokens, response tokens, threads) of its steps."""
        return {(step["prompt_tokens"], step["response_tokens"], step["threads"]) for step in self.steps}

    def end(self) -> None:
        """Let the process clean up, which it does when its input is closed; kill it if it does not end."""
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def why(self) -> str:
        lines = [line.strip() for line in self.log.read_text().splitlines() if line.strip()]
        return next((line for line in reversed(lines) if "Error" in line), (lines or ["no output"])[-1])[:300]


def take_all_turns(ways: list[Way], rounds: int) -> dict[str, str]:
    """Run the steps of all variants in turn; returns those that ended early, with the reason."""
    ended: dict[str, str] = {}
    for way in ways:
        if way.read() is None:  # the first message comes after loading
            ended[way.name] = way.why()
    for _ in range(rounds):
        for way in ways:
            if way.name not in ended and not (way.turn() and way.read() is not None):
                ended[way.name] = way.why()
    return ended


def table(args: argparse.Namespace, ways: list[Way], load: tuple[float, float, float]) -> None:
    from turns import ratio, show

    counted = {way.name: way.steps[args.warm_up :] for way in ways}
    times = {name: [step["step"] for step in steps] for name, steps in counted.items()}
    bases = [name for name in ("trl-transformers", "trl-vllm") if name in times]
    rows = []
    for name, steps in counted.items():
        middle = {key: statistics.median(step[key] for step in steps) for key in steps[0]}
        middle["other"] = statistics.median(step["step"] - sum(step[phase] for phase in PHASES) for step in steps)
        ratios = [ratio(times, base, name)[1] for base in bases]
        seconds = [f"{middle[phase]:.3f}" for phase in (*PHASES, "other")]
        speeds = [f"{middle['response_tokens'] / middle[phase]:,.0f}" for phase in ("step", "rollout")]
        rows.append([name, f"{middle['step']:.3f}", *ratios, *seconds, *speeds])
        rows[-1].append(f"{max(step['memory'] for step in steps):,.0f}")
    first = next(iter(counted.values()))[0]
    lengths = sorted(response_lengths(args))
    spread = f"{lengths[0]} to {lengths[-1]} per response, median {statistics.median(lengths):g}"
    show(
        f"{args.model.name if args.model else 'random Llama, 6 layers, H=256, V=8,192'}; a step is {args.prompts} "
        f"prompts x {args.group_size} responses, {first['prompt_tokens']:,} prompt and {first['response_tokens']:,} "
        f"response tokens ({spread}) in every variant, KL {args.kl_coefficient:g}, {args.threads} threads; medians of "
        f"{args.steps} steps after {args.warm_up}; load before and after {load[0]:.1f} and {os.getloadavg()[0]:.1f}",
        [
            "variant",
            "step s",
            *(f"{base} / this" for base in bases),
            *(f"{phase} s" for phase in (*PHASES, "other")),
            "tokens/s",
            "rollout tokens/s",
            "peak MiB",
        ],
        rows,
    )


def main() -> int:
    args = arguments()
    if args.worker:
        work(args)
        return 0
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabulary = write_model(args.model, folder / "model")
        write_prompts(folder / "prompts.jsonl", args.prompts * (args.warm_up + args.steps + 1))
        ways = [Way(way, folder, args.threads, vocabulary) for way in args.ways]
        try:
            ended = take_all_turns(ways, args.warm_up + args.steps)
            for way, why in ended.items():
                sys.stderr.write(f"{way} did not run: {why}\n")
            if not all(way in MAY_FAIL for way in ended):
                return 1
            completed = [way for way in ways if way.name not in ended]
            work_done = {way.name: way.work_done() for way in completed}
            if len({work for works in work_done.values() for work in works}) > 1:
                sys.stderr.write(f"workloads differ (prompt tokens, response tokens, threads): {work_done}\n")
                return 1
            if completed:
                table(args, completed, load)
        finally:
            for way in ways:
                way.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
