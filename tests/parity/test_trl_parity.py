"""Advantages, losses and their gradients equal those of TRL's own trainers on the same inputs.

The trainers are TRL's, built on a model of a few hundred parameters; only their inputs are replaced: the sampled
tokens (`_generate`) and the log-probabilities (`_get_per_token_logps_and_entropies`). The numbers compared come out of
TRL's `_generate_and_score_completions` and `_compute_loss`.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from loss_keywords import training_loss
from torch import Tensor

from megatron_g2rl.algorithm import (
    group_advantages,
    kl_penalty,
    policy_loss,
    truncated_importance_weights,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL warns about a vLLM version it does not list; no engine is used here
    trl = pytest.importorskip("trl", reason="TRL is the independent source of these tests")
    GRPOTrainer, RLOOTrainer = trl.GRPOTrainer, trl.RLOOTrainer  # TRL imports them and warns on first access

RESPONSES, TOKENS, GROUP_SIZE = 6, 7, 3
MAX_COMPLETION = 11
# Both compute in float64 with the same operations in a different order: about 1e-16 on values of order one.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
# TRL keeps rewards in float32: 6e-8 relative, divided by a standard deviation that is at least 0.1 here.
FLOAT32 = {"rtol": 3e-6, "atol": 3e-6}
REWARDS = [1.0, -1.0, -1.0, 0.25, -0.5, 1.5]


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["[PAD]", "[EOS]", "[UNK]", "one", "two", "three"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", padding_side="left"
    )


def tiny_model(folder):
    """A model with its own folder, from which TRL loads the reference."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"vocab_size": 6, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(folder)
    return Qwen3ForCausalLM.from_pretrained(folder).train()  # TRL's scale depends on the mode


class Scripted:
    """Feeds given log-probabilities and responses to a TRL trainer; everything else is TRL's."""

    scored: tuple[Tensor, Tensor]

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return (*self.scored, None)


def responses_to(prompts: list) -> tuple[list, list, list]:
    """Token ids of prompts and responses, and the responses' texts."""
    return [[5]] * len(prompts), [[3, 4, 1]] * len(prompts), ["one two"] * len(prompts)


class ScriptedGRPO(Scripted, GRPOTrainer):
    def _generate(self, prompts):
        prompt_ids, response_ids, texts = responses_to(prompts)
        return prompt_ids, response_ids, None, texts, None, {}, None, None


class ScriptedRLOO(Scripted, RLOOTrainer):
    def _generate(self, prompts):
        return responses_to(prompts)


@pytest.fixture
def trainer(tmp_path):
    """Builds a TRL trainer with the given options of TRL's configuration."""
    from datasets import Dataset

    def build(kind: str = "grpo", **options):
        trainer_class, config = {
            "grpo": (ScriptedGRPO, trl.GRPOConfig),
            "rloo": (ScriptedRLOO, trl.RLOOConfig),
        }[kind]
        return trainer_class(
            model=tiny_model(tmp_path / "model"),
            reward_funcs=lambda completions, **_: REWARDS[: len(completions)],
            args=config(
                output_dir=str(tmp_path),
                per_device_train_batch_size=RESPONSES,
                num_generations=GROUP_SIZE,
                max_completion_length=MAX_COMPLETION,
                use_cpu=True,
                bf16=False,
                report_to=[],
                **options,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["three"] * RESPONSES}),
            processing_class=tiny_tokenizer(),
        )

    return build


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Log-probabilities far enough apart that every kind of clipping happens, responses of several lengths."""
    draw = torch.Generator().manual_seed(28)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    lengths = torch.tensor([7, 3, 5, 1, 6, 4])
    old = -normal(RESPONSES, TOKENS).abs()
    return {
        "mask": torch.arange(TOKENS)[None] < lengths[:, None],
        "old": old,
        "logprobs": old + 0.9 * normal(RESPONSES, TOKENS),
        "reference": old + 0.4 * normal(RESPONSES, TOKENS),
        "rollout": old + 0.5 * normal(RESPONSES, TOKENS),
        "entropy": normal(RESPONSES, TOKENS).abs(),
        "advantages": torch.tensor([1.2, -0.7, -0.4, 0.3, -1.9, 0.8], dtype=torch.float64),
    }


def trl_loss(trainer, batch: dict[str, Tensor], **more: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
    """TRL's loss, its gradient with respect to the log-probabilities, and its metrics."""
    logprobs = batch["logprobs"].clone().requires_grad_()
    trainer.scored = (logprobs, batch["entropy"])
    trainer.current_gradient_accumulation_steps = 1
    ids = torch.zeros(RESPONSES, TOKENS, dtype=torch.long)
    loss = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1] + 1,
            "completion_ids": ids,
            "completion_mask": batch["mask"].long(),
            "advantages": batch["advantages"],
            "old_per_token_logps": batch["old"],
            "ref_per_token_logps": batch["reference"],
            "num_items_in_batch": batch["mask"].sum(),
            **more,
        },
    )
    loss.backward()
    return loss.detach(), logprobs.grad, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def our_loss(batch: dict[str, Tensor], **options) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    logprobs = batch["logprobs"].clone().requires_grad_()
    loss, metrics = training_loss(logprobs, batch["old"], batch["advantages"], batch["mask"], **options)
    loss.backward()
    return loss.detach(), logprobs.grad, metrics


SETTINGS = {
    # name: (TRL's options, ours, factor from ours to TRL's)
    "dapo_is_token_mean": ({"loss_type": "dapo"}, {"aggregation": "token_mean"}, 1.0),
    "bnpo_is_token_mean": ({"loss_type": "bnpo"}, {"aggregation": "token_mean"}, 1.0),
    "grpo_is_sequence_mean": ({"loss_type": "grpo"}, {"aggregation": "sequence_mean"}, 1.0),
    # TRL divides by the constant max_completion_length; docs/method.md, section 4, does not
    "dr_grpo_is_sequence_mean_token_sum": (
        {"loss_type": "dr_grpo"},
        {"aggregation": "sequence_mean_token_sum"},
        1 / MAX_COMPLETION,
    ),
    "gspo_is_sequence_ratio": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05},
        {"aggregation": "sequence_mean", "ratio": "sequence", "clip_low": 0.05, "clip_high": 0.05},
        1.0,
    ),
    "clip_higher": (
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
        {"aggregation": "token_mean", "clip_low": 0.2, "clip_high": 0.28},
        1.0,
    ),
    # TRL's two-sided clipping of the ratio at delta is the dual clip where the advantage is negative
    "delta_is_dual_clip": ({"loss_type": "dapo", "delta": 3.0}, {"aggregation": "token_mean", "dual_clip": 3.0}, 1.0),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_equal_trl(name, trainer, batch):
    theirs, ours, factor = SETTINGS[name]
    expected, expected_gradient, _ = trl_loss(trainer(beta=0.0, **theirs), batch)
    loss, gradient, _ = our_loss(batch, **{"dual_clip": None, **ours})
    torch.testing.assert_close(loss * factor, expected, **EXACT)
    torch.testing.assert_close(gradient * factor, expected_gradient, **EXACT)


def test_every_kind_of_clipping_occurs_in_the_compared_batch(batch):
    _, _, metrics = our_loss(batch)
    for name in ("clip_fraction_low", "clip_fraction_high", "dual_clip_fraction"):
        assert metrics[name] > 0, name
    _, _, metrics = our_loss(batch, **SETTINGS["gspo_is_sequence_ratio"][1])
    for name in ("clip_fraction_low", "clip_fraction_high"):
        assert 0 < metrics[name] < 0.5, name


@pytest.mark.parametrize("loss_type, aggregation", [("dapo", "token_mean"), ("grpo", "sequence_mean")])
def test_k3_kl_to_the_reference_equals_trl(loss_type, aggregation, trainer, batch):
    # beyond a log-ratio of about 2.6 megatron_g2rl clamps it (docs/method.md, section 4), TRL does not; the batch
    # stays below
    assert kl_penalty(batch["logprobs"], batch["reference"]).max() < 10
    # TRL 1.16 multiplies the KL by the importance ratio by default (arXiv 2512.02556); we do not
    trl_trainer = trainer(beta=0.1, loss_type=loss_type, use_bias_correction_kl=False)
    expected, expected_gradient, logged = trl_loss(trl_trainer, batch)
    loss, gradient, metrics = our_loss(
        batch,
        reference_logprobs=batch["reference"],
        kl_coefficient=0.1,
        aggregation=aggregation,
        dual_clip=None,
    )
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradient, expected_gradient, **EXACT)
    assert metrics["kl"].item() == pytest.approx(logged["kl"], rel=1e-12)


def test_entropy_bonus_equals_trl(trainer, batch):
    # TRL's bonus is always a token mean, so it is compared where the policy term is a token mean too
    leaf = batch["entropy"].clone().requires_grad_()
    expected, _, logged = trl_loss(trainer(beta=0.0, loss_type="dapo", entropy_coef=0.05), {**batch, "entropy": leaf})
    expected_gradient, leaf.grad = leaf.grad, None
    loss, metrics = training_loss(
        batch["logprobs"],
        batch["old"],
        batch["advantages"],
        batch["mask"],
        entropy=leaf,
        entropy_coefficient=0.05,
        dual_clip=None,
    )
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, **EXACT)
    torch.testing.assert_close(leaf.grad, expected_gradient, **EXACT)
    assert metrics["entropy"].item() == pytest.approx(logged["entropy"], rel=1e-12)
    assert metrics["policy_loss"].item() == pytest.approx(logged["policy_loss"], rel=1e-12)


def test_clip_fractions_equal_trl(trainer, batch):
    _, _, logged = trl_loss(trainer(beta=0.0, loss_type="dapo"), batch)
    _, _, metrics = our_loss(batch, dual_clip=None)
    # TRL computes these fractions in float32
    assert metrics["clip_fraction_low"].item() == pytest.approx(logged["clip_ratio/low_mean"], rel=1e-6)
    assert metrics["clip_fraction_high"].item() == pytest.approx(logged["clip_ratio/high_mean"], rel=1e-6)


def test_importance_weights_multiply_the_loss_as_in_trl(trainer, batch):
    trl_trainer = trainer(beta=0.0, loss_type="dapo")
    trl_trainer.use_vllm = True  # only the branch of the loss; no engine is built
    weights = truncated_importance_weights(batch["old"], batch["rollout"], batch["mask"], cap=1.5)
    expected, expected_gradient, _ = trl_loss(trl_trainer, batch, importance_sampling_ratio=weights)
    loss, gradient, _ = our_loss(batch, dual_clip=None, importance_weights=weights)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradient, expected_gradient, **EXACT)


@pytest.mark.parametrize("scale, normalize", [("group", True), ("none", False)])
def test_group_advantages_equal_trl(scale, normalize, trainer):
    trl_trainer = trainer(beta=0.0, scale_rewards=scale, gradient_accumulation_steps=1)
    trl_trainer.scored = (torch.zeros(RESPONSES, 3), torch.zeros(RESPONSES, 3))
    expected = trl_trainer._generate_and_score_completions([{"prompt": "three"}] * RESPONSES)["advantages"]
    group = torch.arange(RESPONSES) // GROUP_SIZE
    # TRL's epsilon is 1e-4, ours (verl's) is 1e-6: docs/method.md, section 4
    advantages = group_advantages(torch.tensor(REWARDS), group, normalize_std=normalize, epsilon=1e-4)
    torch.testing.assert_close(advantages, expected, **FLOAT32)


def test_leave_one_out_advantages_equal_trl(trainer):
    trl_trainer = trainer("rloo", beta=0.0, normalize_advantages=False)
    trl_trainer.scored = (torch.zeros(RESPONSES, 3), torch.zeros(RESPONSES, 3))
    expected = trl_trainer._generate_and_score_completions([{"prompt": "three"}] * RESPONSES)["advantages"]
    group = torch.arange(RESPONSES) // GROUP_SIZE
    advantages = group_advantages(torch.tensor(REWARDS), group, normalize_std=False, baseline="leave_one_out")
    torch.testing.assert_close(advantages, expected, **FLOAT32)


def test_policy_loss_returns_the_policy_term_alone(batch):
    alone, _ = policy_loss(batch["logprobs"], batch["old"], batch["advantages"], batch["mask"])
    torch.testing.assert_close(alone, our_loss(batch)[0], rtol=0, atol=0)
