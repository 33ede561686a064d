"""The typed configuration tree. Every field is followed by its documentation; docs/configuration.md is made from it.

Units are in the names. A value that cannot be right by itself is refused here; what depends on several values is in
`checks.py`. `loading.py` reads YAML and the command line into this tree.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr

LARGEST = 2**32 - 1
"""No count and no seed is larger."""
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
CallSeconds = Annotated[float, Field(gt=0, le=1_000_000)]
"""Seconds that a timer of the operating system can count."""
Fraction = Annotated[float, Field(gt=0, le=1)]
Duration = Annotated[str, Field(pattern=r"^(\d+d)?(\d+h)?(\d+m)?(\d+s)?$", min_length=2)]
"""A length of time such as 3h50m, 2d12h or 90s; `stopping.seconds_of` reads it."""


def _usable_path(path: str | Path) -> str | Path:
    text = str(path)
    if "\0" in text:
        raise ValueError("has a zero byte in it, which no path can have")
    if len(os.fsencode(text)) > 4_000 or any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        raise ValueError("is longer than a path can be")
    try:
        Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"cannot be found: {error}") from None
    return path


FilePath = Annotated[Path, AfterValidator(_usable_path)]
Name = Annotated[str, AfterValidator(_usable_path)]
"""A folder, a file, or a name of the Hugging Face hub or of this package."""


def _usable_pattern(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from None
    if groups > 1:
        raise ValueError(f"has {groups} groups; at most one can be the answer, write the others as (?:...)")
    return pattern


AnswerPattern = Annotated[str, AfterValidator(_usable_pattern)]
"""A preset of `data.answer_regex` (all of which are regular expressions too) or a regular expression."""


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class RunConfig(Section):
    """What this run is called and where it writes."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")] = "run"
    """Name of the run; its files go to `directory`/`name`."""
    directory: FilePath = Path("runs")
    """Folder of all runs."""
    seed: NonNegative = 0
    """Seed of data order, sampling and shuffling. Results do not depend on the number of ranks."""


class ModelConfig(Section):
    """The model that is trained."""

    path: Name
    """Folder (or hub name) of a Hugging Face checkpoint, or `builtin:tiny` for the generated quickstart model."""


class WarmStartConfig(Section):
    """Supervised warm start of the built-in model, run by the same Megatron policy; cached by content."""

    steps: Positive = 300
    """Supervised optimizer steps."""
    demonstrations_per_step: Positive = 64
    """Worked examples of the built-in task in each step."""
    learning_rate: PositiveFloat = 2e-3
    """Peak learning rate of the warm start."""


class SourceConfig(Section):
    """One of several sources of prompts; what it leaves out is as in `data`."""

    source: Name
    """As `data.source`."""
    weight: PositiveFloat | None = None
    """How often it is drawn from, relative to the others; either every source has one or none has."""
    subset: str | None = None
    split: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    answer_regex: AnswerPattern | None = None


class DataConfig(Section):
    """Where prompts come from and how they are rendered (docs/data.md)."""

    source: Name | None = None
    """A hub name, a local file (.jsonl, .json, both also as .gz, .parquet, .arrow), a folder of such files, or
    `builtin:NAME` (a generated task). Required unless `sources` is set."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources instead of one: a list of mappings with `source`, and where they differ from the keys here
    `subset`, `split`, `prompt_column`, `answer_column`, `answer_regex`; with `weight`, how often each is drawn from."""
    subset: str | None = None
    """Configuration name of a hub dataset, or of a folder in the layout of one."""
    split: str = "train"
    """Split of a hub dataset or folder."""
    prompt_column: str = "problem"
    """Column that holds the problem: a text or a list of chat messages. Dots lead into nested columns."""
    answer_column: str = "answer"
    """Column that holds the reference answer: a text, a number or a list of them (`reward_model.ground_truth`)."""
    answer_regex: AnswerPattern | None = None
    """How the reference is taken out of its column: `gsm8k` (after ####), `boxed` (the last box), `last_number`, or a
    regular expression whose last match counts (its first group, if it has one). null: all of it."""
    max_unverifiable: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Largest fraction of references that no response could match, such as prose; more is an error. 1: any."""
    template: Literal["chat", "plain"] = "chat"
    """`chat`: the tokenizer's chat template with the generation prompt; `plain`: `plain_template`."""
    plain_template: str = "{problem}\n"
    """Text of a plain prompt; `{problem}` and `{system}` are replaced."""
    system_prompt: str = "Please reason step by step, and put your final answer within \\boxed{}."
    """System message of a chat prompt that has none of its own, `{system}` of a plain one. Empty: none."""
    chat_template_kwargs: dict[str, bool | int | float | str | None] = {}
    """Variables of the chat template, such as `{enable_thinking: false}`."""
    max_prompt_tokens: Positive = 1024
    """Longer prompts count as bad rows."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a malformed row does: stop with its line, or be left out and counted."""
    shuffle: bool = True
    """Draw a new order of the prompts in every epoch (from `run.seed`); false keeps the file's order."""

    @property
    def label(self) -> str:
        """The source or sources, for messages."""
        return self.source if self.source is not None else ", ".join(part.source for part in self.sources)

    def each_source(self) -> tuple[DataConfig, ...]:
        """The configuration of each source by itself."""
        if not self.sources:
            return (self,)
        parts = [part.model_dump(exclude={"weight"}, exclude_none=True) for part in self.sources]
        return tuple(self.model_copy(update={"sources": (), "subset": None, **part}) for part in parts)


class RolloutConfig(Section):
    """How responses are sampled."""

    engine: Literal["transformers", "vllm"] = "vllm"
    """`vllm`: an engine inside the training ranks; `transformers`: light, for small models on CPU."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the score and update passes use the same."""
    max_response_tokens: Positive = 8192
    """A response is truncated after this many tokens."""
    stop: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = ()
    """Texts that end a response too, beside what ends a turn of the chat template and the end-of-sequence tokens; they
    stay in the response."""
    incomplete_responses: Literal["wrong", "scored"] = "wrong"
    """What a truncated response, or one that never ends its thinking, is: `wrong`: never correct, and empty for reward
    functions, but for those that take `finish_reason` or `tokens`; `scored`: a response like any other."""
    tensor_parallel: Positive = 1
    """Ranks that share one vLLM engine."""
    gpu_memory_fraction: Fraction = 0.5
    """Share of GPU memory that vLLM may take while it is awake (CUDA only)."""
    kv_cache_mb: Positive = 512
    """KV cache of one vLLM engine in MiB (CPU only)."""
    enforce_eager: bool = True
    """Run vLLM without CUDA graphs and compilation: starts faster, samples slower."""


FunctionPath = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
"""`package.module:name`."""
Arguments = dict[str, bool | int | float | str | None]


class RewardFunctionConfig(Section):
    """One of several reward functions; what it leaves out is as in `reward`."""

    function: FunctionPath
    """As `reward.function`."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """What its reward is multiplied by before all are added up; 0: it is only measured."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] | None = None
    """What its metrics are called (`reward/NAME/mean`); null: the part of `function` after the colon."""
    arguments: Arguments = {}
    """Keyword arguments of this one."""
    deadline_s: CallSeconds | None = None
    batch_size: Positive | None = None

    @property
    def label(self) -> str:
        """The name of its metrics."""
        return self.name or self.function.rpartition(":")[2]


class RewardConfig(Section):
    """How responses are judged (docs/rewards.md)."""

    function: FunctionPath = "megatron_g2rl.rewards:math_reward"
    """`package.module:name` of a function or a class. It takes a response and its reference answer, or what its
    parameters are called after, and returns a number in [-1, 1] or a pair (reward, correct)."""
    functions: tuple[RewardFunctionConfig, ...] = ()
    """Several functions instead of one, whose weighted rewards are added up: a list of mappings with `function`,
    `weight`, `name`, `arguments`, and where they differ from the keys here `deadline_s` and `batch_size`."""
    correct_by: str | None = None
    """With `functions`: the name of the one that decides whether a response is correct. Required for two or more."""
    correct_above: float = 0.0
    """A response is correct when its reward, by the function that decides it, is above this; a function that returns a
    pair (reward, correct) says it itself."""
    arguments: Arguments = {}
    """Keyword arguments of `function`, or of the class when it is constructed, such as `{url: "http://node7:8000"}`."""
    workers: Positive = 2
    """Worker processes on each rank; each loads every function once."""
    deadline_s: CallSeconds = 5.0
    """Seconds one call may take before its worker is killed and the response counts as wrong."""
    batch_size: Positive = 16
    """Most responses of one call of a batch function, or of one worker's concurrent calls of an async function."""

    def each_function(self) -> tuple[RewardFunctionConfig, ...]:
        """The functions, with everything that they leave out."""
        parts = self.functions or (RewardFunctionConfig(function=self.function, arguments=self.arguments),)
        return tuple(
            part.model_copy(
                update={
                    "deadline_s": part.deadline_s or self.deadline_s,
                    "batch_size": part.batch_size or self.batch_size,
                }
            )
            for part in parts
        )

    def uses(self, function: str) -> bool:
        """Whether a function is among them."""
        return any(part.function == function for part in self.each_function())

    @property
    def key(self) -> str:
        """The key that names the function or functions."""
        return "reward.functions" if self.functions else "reward.function"

    @property
    def decides_correctness(self) -> int:
        """Which of `each_function` decides whether a response is correct."""
        labels = [part.label for part in self.each_function()]
        return labels.index(self.correct_by) if self.correct_by else 0


class ExplorationConfig(Section):
    """The exploration term: which responses are favoured inside a group (docs/method.md, sections 1-3)."""

    method: Literal["none", "gradient"] = "gradient"
    """`gradient`: G2RL; `none`: plain GRPO."""
    measure_geometry: bool = True
    """With `none`: compute Φ all the same and log its geometry, so that a baseline can be compared with G2RL."""
    source: Literal["exact", "sampler_topk"] = "exact"
    """Where Φ comes from: the score pass, or an estimate from the most probable tokens that the sampler reports."""
    top_k: Positive = 100
    """With `sampler_topk`: how many of the most probable tokens are reported at each position (docs/internals/topk.md).
    Close to the size of the vocabulary (the quickstart's is 128) they are the full softmax: Φ is as with `exact`."""
    root: bool = True
    """Square root in the exploration score (equation 11)."""
    mapping: Literal["centered", "literal", "linear", "logistic", "saturating"] = "centered"
    """How the exploration score scales the reward (docs/method.md, section 3)."""
    strength: Annotated[float, Field(ge=0, le=2)] = 0.5
    """λ, the strength of the scaling."""
    reward_clip: PositiveFloat = 3.0
    """Bound on the absolute value of a shaped reward."""

    @property
    def wants_features(self) -> bool:
        """Whether Φ is computed at all."""
        return self.method == "gradient" or self.measure_geometry

    @property
    def top_logprobs(self) -> int:
        """How many of the most probable tokens the sampler reports at each position of a training response."""
        return self.top_k if self.wants_features and self.source == "sampler_topk" else 0


class AlgorithmConfig(Section):
    """Advantages and loss (docs/method.md, section 4)."""

    normalize_std: bool = True
    """Divide advantages by the group's standard deviation (false: Dr. GRPO)."""
    baseline: Literal["group_mean", "leave_one_out"] = "group_mean"
    """What is subtracted from a reward: the group's mean, or the mean of the others (RLOO)."""
    drop_uniform_groups: bool = True
    """Leave groups whose shaped rewards are all equal out of the updates: their advantages are zero."""
    dynamic_sampling_rounds: NonNegative = 0
    """Extra sampling rounds that replace dropped groups by new prompts; 0: none."""
    clip_low: PositiveFloat = 0.2
    """Lower clip range of the ratio (1 - clip_low)."""
    clip_high: PositiveFloat = 0.2
    """Upper clip range of the ratio (1 + clip_high); larger than clip_low: clip-higher."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """Bound on the loss of negative advantages at ratio > dual_clip; null: none."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or the length-normalised ratio of the response (GSPO)."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_mean_token_sum"] = "token_mean"
    """How token losses become one number, over the whole update."""
    kl_coefficient: NonNegativeFloat = 0.001
    """Weight of the KL term to the frozen reference; 0: no reference is kept."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    importance_cap: PositiveFloat | None = 2.0
    """Cap of the truncated importance weight trainer/sampler of each token; null: no correction."""


class PolicyConfig(Section):
    """Megatron: layout, precision and layer implementation."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is one."""
    layer_spec: Literal["auto", "te", "torch"] = "auto"
    """`te`: Transformer Engine; `torch`: RMSNorm and scaled_dot_product_attention; `auto`: te where it can run."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Weights and activations; master weights, gradients and reductions are fp32 in both."""
    tensor_parallel: Positive = 1
    """Tensor-parallel ranks."""
    sequence_parallel: bool = False
    """Split norms and dropouts over the tensor-parallel ranks along the sequence."""
    pipeline_parallel: Positive = 1
    """Pipeline stages."""
    virtual_stages: Positive = 1
    """Model chunks of each pipeline stage (interleaved schedule when above 1)."""
    pipeline_layout: Annotated[str, Field(pattern=r"^\d{1,4}(\*\d{1,4})?(,\d{1,4}(\*\d{1,4})?)*$")] | None = None
    """Layers of each stage in the order of the model, such as `12*7,10` (seven stages of 12 and one of 10); with
    virtual stages, of each chunk. null: equal parts."""
    context_parallel: Positive = 1
    """Ranks that share one sequence."""
    expert_parallel: Positive = 1
    """Ranks that share the experts of a mixture-of-experts model."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over the data-parallel ranks."""
    offload_optimizer: bool = False
    """Keep Adam's state in host memory between updates: room for the sampler, for two copies of it a step."""
    overlap_communication: bool = False
    """Overlap gradient reduction (and parameter gathering) with computation."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that are computed again in the backward pass: none, core attention, whole layers."""
    head_memory_mb: Positive = 256
    """Memory for one chunk of vocabulary logits and what is made of them, in MiB: how many tokens the head takes."""


class OptimizerConfig(Section):
    """Adam and its schedule."""

    learning_rate: PositiveFloat = 5e-7
    """Peak learning rate."""
    min_learning_rate: NonNegativeFloat = 0.0
    """Learning rate at the end of a decaying schedule."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Decay over all updates of the run."""
    warmup_updates: NonNegative = 0
    """Updates of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """First-moment decay."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Second-moment decay."""
    epsilon: PositiveFloat = 1e-8
    """Adam's epsilon."""
    gradient_clip: PositiveFloat = 1.0
    """Bound on the global gradient norm."""


class TrainerConfig(Section):
    """The loop."""

    steps: Positive = 100
    """Steps of the run; one step = one rollout batch and the updates made from it."""
    prompts_per_step: Positive = 16
    """Prompts (= groups) sampled in each step."""
    group_size: Positive = 16
    """Responses to each prompt."""
    responses_per_update: Positive = 16
    """Responses of one optimizer update, drawn across groups."""
    epochs_per_step: Positive = 1
    """Passes over the responses of a step."""
    tokens_per_microbatch: Positive = 16384
    """Token budget of one micro-batch on one data-parallel rank (prompts and padding included)."""
    ranks: Positive = 1
    """Processes that `g2rl train` starts when it is not already inside torchrun or Slurm."""
    max_nonfinite_updates: Positive = 3
    """Consecutive updates skipped for a non-finite loss or gradient before the run stops."""
    stop_after: Duration | None = None
    """Time after which the run saves and ends with exit code 75, such as 3h50m; leave room for an update and a save."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates of a step when all of its groups are used."""
        return self.prompts_per_step * self.group_size // self.responses_per_update * self.epochs_per_step


class CheckpointConfig(Section):
    """Saving and resuming (docs/checkpoints.md)."""

    every_steps: Positive = 20
    """Save after this many steps, and always at the end or when asked to stop."""
    keep: Positive = 2
    """Latest checkpoints kept."""
    best_metric: Literal["pass_at_1", "pass_at_n", "majority_at_n"] | None = "pass_at_1"
    """Keep also the checkpoint with the best value of this in `evaluation`, if there is one; null: the latest only."""
    asynchronous: bool = True
    """Write checkpoints in the background while training goes on."""
    resume: bool = True
    """Go on from the newest checkpoint of the run when there is one."""
    on_damage: Literal["error", "previous"] = "error"
    """When the newest checkpoint is damaged: stop and say so, or set it aside and go on from the one before it."""
    load_optimizer: bool = True
    """On resume, load the optimizer and schedule; false: start them anew (other than the run would have gone on)."""
    allow_changed: str = ""
    """Keys, separated by commas, that may differ on resume though they make it another run (`data.source`)."""
    export_hf_every: Positive | None = None
    """Write the weights as a Hugging Face folder to `hf/step_N` of the run after every so many steps; null: never."""


class LoggingConfig(Section):
    """What a run writes beside metrics.jsonl (docs/metrics.md)."""

    tensorboard: bool = True
    """Write metrics and responses for TensorBoard too, to `tensorboard` in the folder of the run."""
    wandb_project: str | None = None
    """Weights & Biases project that gets the metrics too; null: none, and wandb need not be installed."""
    responses_every_steps: NonNegative = 10
    """Write a few responses to responses.jsonl every so many steps, the first one included; 0: never."""


class EvaluationConfig(Section):
    """Evaluation set, answered before the first step, every few steps and after the last. null: as in `data`."""

    source: Name | None = None
    """Where the problems come from, as `data.source`; null: `data.source` itself."""
    subset: str | None = None
    """Configuration name of a hub dataset; null: that of `data` for its source, none for another one."""
    split: str = "test"
    """Split of a hub dataset, folder or built-in task."""
    prompt_column: str | None = None
    """Column that holds the problem; null: as in `data`."""
    answer_column: str | None = None
    """Column that holds the reference answer; null: as in `data`."""
    answer_regex: AnswerPattern | None = None
    """How the reference is taken out of its column; null: as in `data` for its source, all of it for another one."""
    template: Literal["chat", "plain"] | None = None
    """As `data.template`; null: the same."""
    plain_template: str | None = None
    """As `data.plain_template`; null: the same."""
    system_prompt: str | None = None
    """As `data.system_prompt`; null: the same."""
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None
    """As `data.chat_template_kwargs`; null: the same."""
    max_prompt_tokens: Positive | None = None
    """As `data.max_prompt_tokens`; null: the same."""
    max_response_tokens: Positive | None = None
    """As `rollout.max_response_tokens`; null: the same."""
    prompts: Positive | None = None
    """Problems that every evaluation asks, the same in all runs; null: all of the source."""
    responses_per_prompt: Positive = 16
    """Responses to each problem: n of pass@n and maj@n; pass@1 is their mean."""
    temperature: PositiveFloat = 0.8
    """Sampling temperature of evaluations."""
    every_steps: Positive = 20
    """Evaluate after this many steps."""

    def data(self, training: DataConfig) -> DataConfig:
        """The data of the evaluation set: its own settings, and those of training for what it leaves out."""
        names = ("prompt_column", "answer_column", "answer_regex", "template", "plain_template", "system_prompt")
        names += ("chat_template_kwargs", "max_prompt_tokens", "subset")
        set_here = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.source is not None:
            set_here = {"source": self.source, "sources": (), "subset": None, "answer_regex": None, **set_here}
        return training.model_copy(update={"split": self.split, **set_here})


class Config(Section):
    """Everything that defines a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    warm_start: WarmStartConfig | None = None
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    exploration: ExplorationConfig = ExplorationConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    policy: PolicyConfig = PolicyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig | None = None

    _places: dict[str, str] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any) -> None:
        """Remember the places that validation was told of as its context: key to `file.yaml:12` or `command line`."""
        self._places = dict(context or {})

    def __eq__(self, other: object) -> bool:
        """Whether both say the same, wherever it was written."""
        if not isinstance(other, Config):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in Config.model_fields)

    def place_of(self, key: str) -> str | None:
        """Where the value of a key such as `model.path` was written (`file.yaml:12`); None: nowhere, a default."""
        return self._places.get(key)
