"""The method: exploration, advantages and loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_g2rl.config.sections.base import (
    BaselineName,
    MappingName,
    MethodName,
    Name,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)

WITHOUT_FEATURES = ("none", "hidden", "semantic", "partition", "elliptical")
"""Registered exploration methods that do not use Φ."""
MAPPING_OF_METHOD = {
    "none": "correct_only",
    "gradient": "correct_only",
    "hidden": "correct_only",
    "semantic": "label_bands",
    "partition": "product",
    "elliptical": "within_class",
}
"""The mapping that belongs to each registered method."""


class ExplorationConfig(Section):
    """The exploration term: which responses are favored within a group (docs/method.md, sections 1-3)."""

    method: MethodName = "gradient"
    """What makes a response novel (docs/method.md, section 6). `gradient`: the direction of its update (G2RL);
    `hidden`: its mean last hidden state; `semantic`: the embedding of its text (EVOL-RL); `partition`: a rare final
    answer (DARLING); `elliptical`: a mean hidden state that is rare in the step (RepExp); `none`: nothing (GRPO)."""
    measure_geometry: bool = True
    """With methods other than `gradient`: still compute Φ and log its geometry, so that they can be compared."""
    source: Literal["auto", "exact", "sampler_topk"] = "auto"
    """Source of Φ: `auto`: the update itself where a step has one update and each group fits into a micro-batch
    (docs/method.md, section 8), else the old-log-prob pass; `exact`: always the old-log-prob pass; `sampler_topk`: an
    estimate from the top-K tokens that the rollout engine reports."""
    top_k: Positive = 100
    """With `sampler_topk`: number of most probable tokens reported at each position (docs/internals/topk.md). If it
    equals the size of the vocabulary (128 in the quickstart), they are the full softmax, and Φ is that of `auto`."""
    prior_tolerance: NonNegativeFloat | None = None
    """With `auto` and `exact`: the rollout engine's log-probs allow a faster sweep over the vocabulary; tokens whose
    probabilities they miss by more than this fraction are swept again (docs/internals/head.md). null: 0.001 with
    policy.precision=fp32, 0.02 with bf16; 0: log-probs of the engine are not used."""
    root: bool = True
    """Take the square root in the novelty ν (equation 11)."""
    mapping: MappingName | None = None
    """How the novelty ν scales the reward (docs/method.md, section 3); or a function of your own
    (docs/extending.md). null: the one that belongs to the method, `correct_only` for `gradient`."""
    strength: Annotated[float, Field(ge=0, le=2)] = 0.5
    """λ, the strength of the scaling."""
    reward_clip: PositiveFloat = 3.0
    """Bound on the absolute value of a shaped reward."""
    uniform_groups: Literal["shaped", "base"] = "shaped"
    """Groups whose rewards are all equal have no advantage: `shaped`: equal shaped rewards; `base`: equal base rewards,
    so that groups whose responses are all correct or all incorrect are not shaped."""
    encoder: Name | None = None
    """With `method=semantic`: folder or Hub name of a sentence-transformers model."""
    encoder_device: Name = "cpu"
    """Device of the encoder, such as `cpu` or `cuda`."""
    encoder_batch_size: Positive = 64
    """Texts per forward pass of the encoder."""

    @model_validator(mode="before")
    @classmethod
    def _fill_mapping(cls, values: Any) -> Any:
        """Show the mapping that is used, so that runs are compared by it."""
        if not isinstance(values, dict) or values.get("mapping") is not None:
            return values
        mapping = MAPPING_OF_METHOD.get(str(values.get("method", "gradient")))
        return values if mapping is None else values | {"mapping": mapping}

    @property
    def wants_features(self) -> bool:
        """Whether Φ is computed; a method of your own gets it."""
        return self.method not in WITHOUT_FEATURES or self.measure_geometry

    @property
    def is_exact(self) -> bool:
        """Whether Φ is computed by a pass of the policy over the responses."""
        return self.wants_features and self.source != "sampler_topk"

    def prior_tolerance_in(self, precision: Literal["fp32", "bf16"]) -> float:
        """`prior_tolerance` for a `policy.precision`; 0 if Φ is not computed by a pass over the responses."""
        if not self.is_exact:
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
    """Divide advantages by the standard deviation of the group (false: Dr. GRPO). With a critic: subtract the mean over
    the tokens of the step, and divide by their standard deviation."""
    baseline: BaselineName = "group_mean"
    """Baseline subtracted from a reward: the group mean, or the mean of the other responses (RLOO); or a function
    of your own (docs/extending.md). `critic`: values of a second model, learned with the policy (PPO)."""
    critic_learning_rate: PositiveFloat = 1e-5
    """With `baseline=critic`: peak learning rate of the critic; the rest of `optimizer` is shared."""
    critic_warmup_steps: NonNegative = 0
    """With `baseline=critic`: first steps of the run, in which only the critic is updated."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """With `baseline=critic`: discount per token."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 1.0
    """With `baseline=critic`: λ of the generalized advantage estimates; 1: the complete return; lower: less variance,
    and the bias of the critic."""
    value_clip: PositiveFloat | None = 0.5
    """With `baseline=critic`: bound on the change of a value in a step that lowers its loss; null: none."""
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
    use_kl_in_reward: bool = False
    """Subtract the KL term from the reward (with a group baseline: summed over the response) instead of adding it to
    the loss; every step then has an old-log-prob pass. `kl_estimator=k1` is the usual choice."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    importance_cap: PositiveFloat | None = 2.0
    """Cap of the truncated importance weight (trainer over rollout engine); null: no correction."""
    importance_level: Literal["token", "sequence"] = "token"
    """One importance weight for each token, or the product of those of all tokens for the complete response."""
    rejection_bounds: tuple[PositiveFloat, PositiveFloat] | None = None
    """Responses whose probability ratio (trainer over rollout engine, all tokens) is outside of these bounds, such as
    `[0.5, 2]`, are masked in the policy term; null: none."""
    overlong_buffer_tokens: Positive | None = None
    """DAPO's soft over-long penalty: over this many tokens before `rollout.max_response_tokens`, the shaped reward
    falls by up to 1; null: none."""
    mask_truncated_responses: bool = False
    """Exclude responses truncated at `rollout.max_response_tokens` from the updates (DAPO's over-long filtering); they
    still count in the statistics of their groups."""

    @field_validator("rejection_bounds")
    @classmethod
    def _enclose_one(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds is not None and not bounds[0] < 1 < bounds[1]:
            raise ValueError("must enclose 1, the ratio where trainer and rollout engine agree: such as [0.5, 2]")
        return bounds
