"""The typed configuration tree. Every field is followed by its documentation, from which docs/configuration.md is made.

Names include units. Values that are invalid on their own are rejected here; `checks.py` has the cross-field checks.
`loading.py` reads YAML and the command line into this tree.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from megatron_g2rl.registry import BASELINES, ENGINES, FAMILIES, MAPPINGS

LARGEST = 2**32 - 1
"""Upper limit of all counts and seeds."""
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
CallSeconds = Annotated[float, Field(gt=0, le=1_000_000)]
"""Seconds, within the range of an operating-system timer."""
Fraction = Annotated[float, Field(gt=0, le=1)]
Duration = Annotated[str, Field(pattern=r"^(\d+d)?(\d+h)?(\d+m)?(\d+s)?$", min_length=2)]
"""A duration such as 3h50m, 2d12h or 90s; parsed by `stopping.seconds_of`."""


def _usable_path(path: str | Path) -> str | Path:
    text = str(path)
    if "\0" in text:
        raise ValueError("contains a zero byte, which is not allowed in a path")
    if len(os.fsencode(text)) > 4_000 or any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        raise ValueError("is longer than a path can be")
    try:
        Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"cannot be expanded: {error}") from None
    return path


FilePath = Annotated[Path, AfterValidator(_usable_path)]
Name = Annotated[str, AfterValidator(_usable_path)]
"""A folder, a file, a Hugging Face Hub name, or a built-in name of this package."""


def _usable_pattern(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"is not a valid regular expression: {error}") from None
    if groups > 1:
        raise ValueError(f"has {groups} groups; only one can capture the answer, write the others as (?:...)")
    return pattern


def _comma_separated(value: object) -> object:
    """A list that may be written as one text, as on the command line."""
    if isinstance(value, str):
        value = [name for part in value.split(",") if (name := part.strip())]
    return tuple(value) if isinstance(value, list) else value


AnswerPattern = Annotated[str, AfterValidator(_usable_pattern)]
"""A preset of `data.answer_regex` or a regular expression; the preset names are valid expressions themselves."""


# A registered name or the import path of the user's own code (docs/extending.md); `keys.py` reads the registry.
MappingName = Annotated[str, AfterValidator(MAPPINGS.check), MAPPINGS]
BaselineName = Annotated[str, AfterValidator(BASELINES.check), BASELINES]
EngineName = Annotated[str, AfterValidator(ENGINES.check), ENGINES]
FamilyName = Annotated[str, AfterValidator(FAMILIES.check), FAMILIES]


class Section(BaseModel):
    """A frozen section of settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class RunConfig(Section):
    """Name and output directory of the run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")] = "run"
    """Name of the run; its files are written to `directory`/`name`."""
    directory: FilePath = Path("runs")
    """Parent folder of all runs."""
    seed: NonNegative = 0
    """Seed of data order, sampling and shuffling. Results do not depend on the number of ranks."""


class ModelConfig(Section):
    """The model to train."""

    path: Name
    """Folder (or Hub name) of a Hugging Face checkpoint; `g2rl warm-start` creates one for a built-in task."""
    family: FamilyName | None = None
    """Table of the model's layers, for a `model_type` that is not registered; null: that of its `model_type`."""


class SourceConfig(Section):
    """One of several prompt sources; keys that it omits have their value from `data`."""

    source: Name
    """As `data.source`."""
    weight: PositiveFloat | None = None
    """Relative sampling frequency; set it for every source or for none."""
    subset: str | None = None
    split: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    answer_regex: AnswerPattern | None = None


class DataConfig(Section):
    """Prompt sources and rendering (docs/data.md)."""

    source: Name | None = None
    """A Hub name, a local file (.jsonl, .json, both also as .gz, .parquet, .arrow), a folder of such files, or
    `builtin:NAME` (a generated task). Required unless `sources` is set."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources instead of one: a list of mappings with `source`, optionally `weight` (relative sampling
    frequency), and `subset`, `split`, `prompt_column`, `answer_column`, `answer_regex` if they differ from `data`."""
    subset: str | None = None
    """Configuration name of a Hub dataset, or of a folder with the same layout."""
    split: str = "train"
    """Split of a Hub dataset or folder."""
    prompt_column: str = "problem"
    """Column with the problem: a string or a list of chat messages. Dots access nested columns."""
    answer_column: str = "answer"
    """Column with the reference answer: a string, a number or a list of them (`reward_model.ground_truth`)."""
    answer_regex: AnswerPattern | None = None
    """How to extract the reference from its column: `gsm8k` (after ####), `boxed` (the last box), `last_number`, or a
    regular expression whose last match counts (its first group, if it has one). null: the full text."""
    max_unverifiable: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Largest allowed fraction of references that no response can match, such as prose. 1: no limit."""
    template: Literal["chat", "plain"] = "chat"
    """`chat`: the tokenizer's chat template with the generation prompt; `plain`: `plain_template`."""
    plain_template: str = "{problem}\n"
    """Template of a plain prompt; `{problem}` and `{system}` are replaced."""
    system_prompt: str = "Please reason step by step, and put your final answer within \\boxed{}."
    """System message of a chat prompt that has none of its own, or `{system}` of a plain one. Empty: none."""
    chat_template_kwargs: dict[str, bool | int | float | str | None] = {}
    """Variables of the chat template, such as `{enable_thinking: false}`."""
    max_prompt_tokens: Positive = 1024
    """Longer prompts are treated as bad rows."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Malformed rows: `error` stops and names the line; `skip` drops and counts them."""
    shuffle: bool = True
    """Shuffle the prompts in every epoch (from `run.seed`); false keeps the order of the file."""

    @property
    def label(self) -> str:
        """The source or sources, for messages."""
        return self.source if self.source is not None else ", ".join(part.source for part in self.sources)

    def each_source(self) -> tuple[DataConfig, ...]:
        """The configuration of each single source."""
        if not self.sources:
            return (self,)
        parts = [part.model_dump(exclude={"weight"}, exclude_none=True) for part in self.sources]
        return tuple(self.model_copy(update={"sources": (), "subset": None, **part}) for part in parts)


class RolloutConfig(Section):
    """How responses are generated."""

    engine: EngineName = "vllm"
    """`vllm`: vLLM inside the training ranks; `transformers`: lightweight, for small models on CPU; or an
    engine of your own (docs/extending.md)."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; log-probs in training use the same temperature."""
    max_response_tokens: Positive = 8192
    """A response is truncated after this many tokens."""
    stop: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = ()
    """Stop strings in addition to the end of turn of the chat template and the end-of-sequence tokens; they stay
    in the response."""
    incomplete_responses: Literal["wrong", "scored"] = "wrong"
    """Treatment of responses that are truncated or never end their thinking: `wrong`: never correct, and passed to
    reward functions as empty unless they accept `finish_reason` or `tokens`; `scored`: like any other response."""
    tensor_parallel: Positive = 1
    """Tensor-parallel ranks of one vLLM engine."""
    gpu_memory_fraction: Fraction = 0.5
    """Fraction of GPU memory that vLLM may use while it is awake (CUDA only)."""
    kv_cache_mb: Positive = 512
    """KV cache of one vLLM engine in MiB (CPU only)."""
    enforce_eager: bool = True
    """Run vLLM without CUDA graphs and compilation: faster startup, slower generation."""


FunctionPath = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
"""`package.module:name`."""
Arguments = dict[str, bool | int | float | str | None]


class RewardFunctionConfig(Section):
    """One of several reward functions; keys that it omits have their value from `reward`."""

    function: FunctionPath
    """As `reward.function`."""
    weight: float = 1.0
    """Weight of its reward in the sum; 0: only logged."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] | None = None
    """Name of its metrics (`reward/NAME/mean`); null: the part of `function` after the colon."""
    arguments: Arguments = {}
    """Keyword arguments of this function."""
    deadline_s: CallSeconds | None = None
    batch_size: Positive | None = None

    @property
    def label(self) -> str:
        """The name of its metrics."""
        return self.name or self.function.rpartition(":")[2]


class RewardConfig(Section):
    """How responses are scored (docs/rewards.md)."""

    function: FunctionPath = "megatron_g2rl.rewards:math_reward"
    """`package.module:name` of a function or a class. It takes a response and its reference answer, or the values that
    its parameter names select, and returns a number in [-1, 1] or a pair (reward, correct)."""
    functions: tuple[RewardFunctionConfig, ...] = ()
    """Several functions instead of one, whose weighted rewards are summed: a list of mappings with `function`,
    `weight`, `name`, `arguments`, and `deadline_s` and `batch_size` where they differ from the keys in this section."""
    correct_by: str | None = None
    """With `functions`: name of the function that decides whether a response is correct. Required for two or more."""
    correct_above: float = 0.0
    """A response is correct if its reward, by the deciding function, is above this value; ignored for functions that
    return a pair (reward, correct)."""
    arguments: Arguments = {}
    """Keyword arguments of `function`, or of the constructor of a class, such as `{url: "http://node7:8000"}`."""
    workers: Positive = 2
    """Worker processes per rank; each loads every function once."""
    deadline_s: CallSeconds = 5.0
    """Time limit of one call in seconds; after it, the worker is killed and the response is scored as incorrect."""
    batch_size: Positive = 16
    """Maximum responses per call of a batch function, or concurrent calls of an async function per worker."""

    def each_function(self) -> tuple[RewardFunctionConfig, ...]:
        """All reward functions, with omitted values filled in."""
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
        """Whether `function` is one of the reward functions."""
        return any(part.function == function for part in self.each_function())

    @property
    def key(self) -> str:
        """The configuration key that names the function or functions."""
        return "reward.functions" if self.functions else "reward.function"

    @property
    def decides_correctness(self) -> int:
        """Index in `each_function` of the function that decides whether a response is correct."""
        labels = [part.label for part in self.each_function()]
        return labels.index(self.correct_by) if self.correct_by else 0


class ExplorationConfig(Section):
    """The exploration term: which responses are favored within a group (docs/method.md, sections 1-3)."""

    method: Literal["none", "gradient"] = "gradient"
    """`gradient`: G2RL; `none`: plain GRPO."""
    measure_geometry: bool = True
    """With `none`: still compute Φ and log its geometry, so that a baseline can be compared with G2RL."""
    source: Literal["exact", "sampler_topk"] = "exact"
    """Source of Φ: `exact`: the old-log-prob pass; `sampler_topk`: an estimate from the top-K tokens that the rollout
    engine reports."""
    top_k: Positive = 100
    """With `sampler_topk`: number of most probable tokens reported at each position (docs/internals/topk.md). With the
    size of the vocabulary (128 in the quickstart) they are the full softmax, and Φ is the same as with `exact`."""
    prior_tolerance: NonNegativeFloat | None = None
    """With `exact`: the rollout engine's log-probs serve as the prior of a faster sweep over the vocabulary, and tokens
    whose probabilities they miss by more than this fraction are swept again (docs/internals/head.md). null: 0.001 with
    policy.precision=fp32, 0.02 with bf16; 0: log-probs of the engine are not used."""
    root: bool = True
    """Take the square root in the novelty ν (equation 11)."""
    mapping: MappingName = "centered"
    """How the novelty ν scales the reward (docs/method.md, section 3); or a function of your own
    (docs/extending.md)."""
    strength: Annotated[float, Field(ge=0, le=2)] = 0.5
    """λ, the strength of the scaling."""
    reward_clip: PositiveFloat = 3.0
    """Bound on the absolute value of a shaped reward."""

    @property
    def wants_features(self) -> bool:
        """Whether Φ is computed."""
        return self.method == "gradient" or self.measure_geometry

    def prior_tolerance_in(self, precision: Literal["fp32", "bf16"]) -> float:
        """`prior_tolerance` for a `policy.precision`; 0 if Φ is not computed by the old-log-prob pass."""
        if not self.wants_features or self.source != "exact":
            return 0.0
        if self.prior_tolerance is not None:
            return self.prior_tolerance
        return 1e-3 if precision == "fp32" else 2e-2

    @property
    def top_logprobs(self) -> int:
        """Number of most probable tokens that the rollout engine reports per position of a training response."""
        return self.top_k if self.wants_features and self.source == "sampler_topk" else 0


class AlgorithmConfig(Section):
    """Advantages and loss (docs/method.md, section 4)."""

    normalize_std: bool = True
    """Divide advantages by the standard deviation of the group (false: Dr. GRPO)."""
    baseline: BaselineName = "group_mean"
    """Baseline subtracted from a reward: the group mean, or the mean of the other responses (RLOO); or a function
    of your own (docs/extending.md)."""
    drop_uniform_groups: bool = True
    """Exclude groups whose shaped rewards are all equal from the updates: their advantages are zero."""
    dynamic_sampling_rounds: NonNegative = 0
    """Extra sampling rounds per step that replace dropped groups with new prompts; 0: none."""
    clip_low: PositiveFloat = 0.2
    """Lower clip range of the ratio (1 - clip_low)."""
    clip_high: PositiveFloat = 0.2
    """Upper clip range of the ratio (1 + clip_high); larger than clip_low: clip-higher."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """Bound on the loss of negative advantages at ratio > dual_clip; null: none."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio per token, or the length-normalized ratio of the response (GSPO)."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_mean_token_sum"] = "token_mean"
    """How token losses are aggregated over all responses of the update."""
    kl_coefficient: NonNegativeFloat = 0.001
    """Weight of the KL term to the frozen reference model; 0: no reference model is kept."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL term."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    importance_cap: PositiveFloat | None = 2.0
    """Cap of the truncated importance weight (trainer over rollout engine) of each token; null: no correction."""


class PolicyConfig(Section):
    """Megatron: parallel layout, precision and layer implementation."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA if available."""
    layer_spec: Literal["auto", "te", "torch"] = "auto"
    """`te`: Transformer Engine; `torch`: RMSNorm and scaled_dot_product_attention; `auto`: te if it can run."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of weights and activations; master weights, gradients and reductions are always fp32."""
    tensor_parallel: Positive = 1
    """Tensor-parallel ranks."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over the tensor-parallel ranks."""
    pipeline_parallel: Positive = 1
    """Pipeline stages."""
    virtual_stages: Positive = 1
    """Model chunks per pipeline stage (above 1: interleaved schedule)."""
    pipeline_layout: Annotated[str, Field(pattern=r"^\d{1,4}(\*\d{1,4})?(,\d{1,4}(\*\d{1,4})?)*$")] | None = None
    """Layers of each stage in model order, such as `12*7,10` (seven stages of 12 and one of 10); with virtual stages,
    layers of each chunk. null: an equal split."""
    context_parallel: Positive = 1
    """Context-parallel ranks, over which each sequence is split."""
    expert_parallel: Positive = 1
    """Expert-parallel ranks, over which the experts of a mixture-of-experts model are split."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over the data-parallel ranks."""
    offload_optimizer: bool = False
    """Keep the Adam state in host memory between updates: frees GPU memory for rollouts at the cost of two copies per
    step."""
    overlap_communication: bool = False
    """Overlap gradient reduction (and parameter gathering) with computation."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, core attention, or entire layers."""
    head_memory_mb: Positive = 256
    """Memory in MiB for one chunk of vocabulary logits and the tables derived from them; it sets the chunk size of the
    LM head in tokens."""
    head_kernel: Literal["torch", "triton", "triton_deterministic"] = "torch"
    """How a GPU computes Φ (exploration.prior_tolerance): `torch`: exact sweep of cuBLAS products and compiled
    elementwise functions; `triton`: one kernel that never writes logits, not yet run on a GPU; `triton_deterministic`:
    the same without float atomics."""


class OptimizerConfig(Section):
    """Adam and its learning-rate schedule."""

    learning_rate: PositiveFloat = 5e-7
    """Peak learning rate."""
    min_learning_rate: NonNegativeFloat = 0.0
    """Learning rate at the end of a decaying schedule."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning-rate decay over all updates of the run."""
    warmup_updates: NonNegative = 0
    """Number of updates of linear warm-up."""
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
    """The training loop."""

    steps: Positive = 100
    """Steps of the run; one step = one rollout batch and its optimizer updates."""
    prompts_per_step: Positive = 16
    """Prompts (= groups) sampled in each step."""
    group_size: Positive = 16
    """Responses to each prompt."""
    responses_per_update: Positive = 16
    """Responses per optimizer update, drawn across groups."""
    epochs_per_step: Positive = 1
    """Epochs over the responses of a step."""
    tokens_per_microbatch: Positive = 16384
    """Token budget of one micro-batch on one data-parallel rank (prompts and padding included)."""
    ranks: Positive = 1
    """Processes that `g2rl train` starts when it is not already inside torchrun or Slurm."""
    max_nonfinite_updates: Positive = 3
    """Consecutive updates skipped for a non-finite loss or gradient before the run stops."""
    stop_after: Duration | None = None
    """Time after which the run saves and exits with code 75, such as 3h50m; leave time for an update and a save."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates per step if no group is dropped."""
        return self.prompts_per_step * self.group_size // self.responses_per_update * self.epochs_per_step


class CheckpointConfig(Section):
    """Saving and resuming (docs/checkpoints.md)."""

    every_steps: Positive = 20
    """Steps between checkpoints; one is also saved at the end and on a stop request."""
    keep: Positive = 2
    """Number of latest checkpoints to keep."""
    best_metric: Literal["pass_at_1", "pass_at_n", "maj_at_n"] | None = "pass_at_1"
    """Also keep the checkpoint with the best value of this evaluation metric, if there is one; null: latest only."""
    asynchronous: bool = True
    """Write checkpoints in the background while training continues."""
    resume: bool = True
    """Resume from the latest checkpoint of the run if there is one."""
    on_corruption: Literal["error", "previous"] = "error"
    """If the latest checkpoint is corrupt: `error` stops; `previous` sets it aside and uses the previous one."""
    load_optimizer: bool = True
    """Load the optimizer and schedule on resume; false: reinitialize them (the run then differs from an uninterrupted
    one)."""
    allow_changed: Annotated[tuple[str, ...], BeforeValidator(_comma_separated)] = ()
    """Keys that may differ on resume although they define the experiment, such as `[data.source]`; on the command line
    also `data.source,run.seed`."""
    export_hf_every: Positive | None = None
    """Steps between exports of the weights as a Hugging Face folder (`hf/step_N` in the run folder); null: never."""


class LoggingConfig(Section):
    """Outputs in addition to metrics.jsonl (docs/metrics.md)."""

    tensorboard: bool = True
    """Also write metrics and responses for TensorBoard, to `tensorboard` in the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project to which metrics are also sent; null: none, and wandb is not required."""
    responses_every_steps: NonNegative = 10
    """Steps between writes of a few responses to responses.jsonl, starting with the first step; 0: never."""


class EvaluationConfig(Section):
    """Evaluation before the first step, every few steps and after the last. Keys that are null are as in `data`."""

    source: Name | None = None
    """Source of the problems, as `data.source`; null: `data.source` itself."""
    subset: str | None = None
    """Configuration name of a Hub dataset; null: that of `data` for the same source, none for a different one."""
    split: str = "test"
    """Split of a Hub dataset, folder or built-in task."""
    prompt_column: str | None = None
    """Column with the problem; null: as in `data`."""
    answer_column: str | None = None
    """Column with the reference answer; null: as in `data`."""
    answer_regex: AnswerPattern | None = None
    """How to extract the reference from its column; null: as in `data` for the same source, the full text for a
    different one."""
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
    """Number of problems per evaluation, the same selection in all runs; null: all problems of the source."""
    responses_per_prompt: Positive = 16
    """Responses per problem: n of pass@n and maj@n; pass@1 is the mean over them."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature in evaluations; 0: greedy decoding, with one response per problem."""
    top_p: Fraction = 1.0
    """Nucleus sampling in evaluations: total probability of the tokens that can be sampled; 1: all."""
    top_k: NonNegative = 0
    """Number of most probable tokens that can be sampled in evaluations; 0: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Smallest probability of a token that can be sampled in evaluations, relative to the most probable; 0: none."""
    benchmarks: Annotated[tuple[str, ...], BeforeValidator(_comma_separated)] = ()
    """Evaluation sets declared in files: names such as `aime24`, or paths of your own files (docs/evaluation.md). The
    set that the keys above describe is then evaluated only if `source` is set."""
    every_steps: Positive = 20
    """Steps between evaluations."""

    @property
    def has_own_set(self) -> bool:
        """Whether the set that the keys of this section describe is evaluated."""
        return self.source is not None or not self.benchmarks

    def data(self, training: DataConfig) -> DataConfig:
        """The data settings of the evaluation set: its own, and those of training where omitted."""
        names = ("prompt_column", "answer_column", "answer_regex", "template", "plain_template", "system_prompt")
        names += ("chat_template_kwargs", "max_prompt_tokens", "subset")
        updates = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.source is not None:
            updates = {"source": self.source, "sources": (), "subset": None, "answer_regex": None, **updates}
        return training.model_copy(update={"split": self.split, **updates})


class Config(Section):
    """Everything that defines a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
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

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any) -> None:
        """Store the validation context: the origin of each key, `file.yaml:12` or `command line`."""
        self._origins = dict(context or {})

    def __eq__(self, other: object) -> bool:
        """Whether both have the same values, regardless of origin."""
        if not isinstance(other, Config):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in Config.model_fields)

    def origin_of(self, key: str) -> str | None:
        """Where the value of a key such as `model.path` was written (`file.yaml:12`); None: it is a default."""
        return self._origins.get(key)
