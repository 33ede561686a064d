"""G2RL (arXiv 2512.15687) on one device, top to bottom, using only torch and transformers.

    python examples/g2rl_single_file.py                 # G2RL
    python examples/g2rl_single_file.py --strength 0    # the same run without exploration: GRPO

A small Qwen3 learns to add up three digits step by step. A short supervised warm-up teaches it the format. Then every
step samples a group of responses to each problem, verifies them, measures which of them would push the model in a
direction that the others of their group do not (Φ and ν), scales the rewards accordingly, and makes a few GRPO updates.
The run takes about two minutes of CPU time, in which the mean reward rises from about -0.1 to +0.1 (pass@1 from 45% to
57%).

Not covered here but in megatron_g2rl: large models and vocabularies, parallelism, checkpoints, prompts of different
lengths, the other mappings, protection against overflow. docs/method.md explains the mathematics and its decisions.
"""

import argparse
import copy
import random
import re
import time

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ---- The task. "8+4+9" is answered by "=12+9=21\boxed{21}<end>" or "=8+13=21..." or "=17+4=21...": each link adds any
# two of the numbers that are left. All paths are equally correct, so there is something to explore.
VOCABULARY = ["<end>", "\\boxed{", "}", "=", "+", *"0123456789"]
END, TERMS = 0, 3
PROMPT = 2 * TERMS - 1  # tokens of a prompt. All prompts have the same length, so no left padding is needed


def encode(text):
    return [VOCABULARY.index(token) for token in re.findall(r"<end>|\\boxed\{|.", text)]


def make_problem(rng):
    """A prompt, its answer, and one of its correct responses, drawn at random."""
    numbers = [rng.randint(1, 9) for _ in range(TERMS)]
    prompt, answer, response = "+".join(map(str, numbers)), sum(numbers), ""
    while len(numbers) > 1:
        first, second = sorted(rng.sample(range(len(numbers)), 2))
        numbers[first] += numbers.pop(second)
        response += "=" + "+".join(map(str, numbers))
    return prompt, answer, response + f"\\boxed{{{answer}}}<end>"


def verify(tokens, answer):
    """+1 if the response ends with the correct boxed answer, else -1. The path to the answer does not matter."""
    text = "".join(VOCABULARY[token] for token in tokens)
    return 1.0 if text.partition("<end>")[0].endswith(f"\\boxed{{{answer}}}") else -1.0


# ---- The method: P problems, G responses each, R = P * G responses of at most L tokens, H hidden units, V tokens.
def token_logprobs(hidden, head, tokens, temperature=1.0):
    """log p of all tokens [R, L, V] and of the given ones [R, L], from the LM head's input [R, L, H]."""
    table = (hidden @ head.T / temperature).log_softmax(-1)  # the sampling temperature; another one is another policy
    return table, table.gather(-1, tokens[..., None]).squeeze(-1)


def features(table, head, tokens, mask):
    """Φ [R, H] (docs/method.md, section 1, equations 5-8).

    The gradient of log p(y_t) with respect to the last hidden state is (onehot(y_t) - p_t) W / T: the direction in
    which the token pushes the model. Φ is the mean of T times that over a response: a fingerprint of its update.
    """
    # It is linear in onehot - p, so sum that over the response first, [R, V], and multiply by W [V, H] once per
    # response: once per token would cost as much as the LM head itself. None of this needs a backward pass.
    mask = mask.to(table.dtype)
    counts = torch.zeros_like(table[:, 0]).scatter_add_(1, tokens, mask)  # sum of onehot(y_t)
    expected = torch.einsum("rl,rlv->rv", mask, table.exp())  # sum of p_t
    return (counts - expected) @ head / mask.sum(1, keepdim=True).clamp(min=1)


def novelty(phi, rewards):
    """ν [P, G] in [0, 1], and the mean cosine (docs/method.md, section 2, equations 9-11).

    How little of a response's direction is already covered by the others of its group, weighted toward those with a
    higher reward: 0 for copies, 1 for a direction orthogonal to all others. (The cosine is squared, so the opposite
    direction is not novel either.)
    """
    unit = F.normalize(phi.double(), dim=-1)  # float64: the root below turns an error of 1e-7 into 3e-4
    similarity = (unit @ unit.mT).clamp(-1, 1)
    diagonal = torch.eye(rewards.shape[1], dtype=torch.bool, device=rewards.device)
    weights = rewards.double()[:, None, :].masked_fill(diagonal, -torch.inf).softmax(-1)  # exp(r_j) / sum over j != i
    nu = (1 - (weights * similarity.square()).sum(-1)).clamp(min=0).sqrt()
    return nu, similarity[:, ~diagonal].mean()


def shape_rewards(rewards, nu, strength=0.5, clip=3.0):
    """Shaped rewards [P, G] by the mapping `correct_only` (docs/method.md, section 3, equations 12-13).

    ν is rescaled to m in [0, 1] among the correct responses of the group, and their r becomes r (1 + λ m): the more
    novel a correct response is, the more it earns, within bounds. Incorrect responses keep their rewards.
    """
    correct = rewards > 0
    low = nu.where(correct, torch.inf).amin(-1, keepdim=True)
    spread = nu.where(correct, -torch.inf).amax(-1, keepdim=True) - low
    m = (nu - low) / spread.clamp(min=1e-6)
    m = m.where(correct & (spread >= 1e-6), 0)  # equal ν carry no signal; avoid 0/0
    return (rewards * (1 + strength * m)).clamp(-clip, clip)


def group_advantages(shaped):
    """Advantages [P, G]: how much better a response is than its group (docs/method.md, section 4, equation 4).

    If all responses of a group are correct, rewards are equal and GRPO learns nothing. Shaped rewards still differ.
    """
    spread = shaped.amax(-1, keepdim=True) - shaped.amin(-1, keepdim=True)
    scaled = (shaped - shaped.mean(-1, keepdim=True)) / (shaped.std(-1, keepdim=True) + 1e-6)
    return scaled.where(spread > 1e-6, 0)  # rounding error divided by rounding error is not an advantage


def policy_loss(logp, old_logp, reference_logp, advantages, mask, clip=0.2, dual_clip=3.0, kl_coefficient=0.001):
    """Clipped loss plus KL to the reference, a mean over tokens (docs/method.md, section 4, equations 2-3)."""
    # In the first update of a step the ratio is 1 and nothing is clipped. In later updates the responses come from a
    # slightly older policy: a token whose ratio changed by more than 20% in the desired direction gets no gradient.
    ratio, advantages = (logp - old_logp).exp(), advantages[:, None]
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip, 1 + clip) * advantages)
    # For A < 0 the loss has no upper bound: one token that became much more likely could dominate the batch.
    loss = loss.where(advantages >= 0, torch.minimum(loss, -dual_clip * advantages))
    kl = torch.expm1(reference_logp - logp) - (reference_logp - logp)  # the estimator k3: unbiased, never negative
    return ((loss + kl_coefficient * kl) * mask).sum() / mask.sum()  # every token of the update has equal weight


# ---- The model.
def make_model(layers):
    config = Qwen3Config(
        vocab_size=len(VOCABULARY), hidden_size=128, intermediate_size=384, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, initializer_range=0.06, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(DEVICE)


def read(model, ids):
    """Hidden states that predict the response tokens of ids [R, PROMPT + L], these tokens, and their mask."""
    tokens = ids[:, PROMPT:]
    # The model without the LM head ends with the final norm, whose output is the head's input. The state at position
    # t - 1 predicts the token at t, hence the shift by one. Padding is on the right: causal attention never sees it.
    hidden = model.model(ids).last_hidden_state[:, PROMPT - 1 : -1]
    # The model chose the first <end>, so it counts; later ones are padding (the pad token is the end token).
    ends = (tokens == END).long()
    return hidden, tokens, ends.cumsum(1) - ends == 0


def step(optimizer, model, loss):
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def warm_up(model, rng, steps, batch=64, learning_rate=3e-3):
    """Supervised steps on correct responses: reinforcement learning needs some correct samples to start with."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    for _ in range(steps):
        rows = [torch.tensor(encode(p + r)) for p, _, r in (make_problem(rng) for _ in range(batch))]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=END).to(DEVICE)
        hidden, tokens, mask = read(model, ids)
        _, logp = token_logprobs(hidden, model.lm_head.weight, tokens)
        step(optimizer, model, -(logp * mask).sum() / mask.sum())
        schedule.step()


# ---- The loop.
def train(
    steps=60, problems=32, group=8, updates=4, strength=0.5, learning_rate=2e-4, warm_up_steps=150, layers=4, seed=0
):
    """Warm up, then train with reinforcement learning; print a line per step and return the mean rewards."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = make_model(layers)
    warm_up(model, rng, warm_up_steps)
    reference = copy.deepcopy(model).requires_grad_(False)
    head, mean_rewards = model.lm_head.weight, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    # Adam's first updates have full size whatever the gradient: at the full learning rate they would undo the warm-up.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1.0, (update + 1) / 20))
    for number in range(steps):
        start = time.perf_counter()
        # 1. Sample. The rewards printed below are those before this step's updates.
        prompts, answers, _ = zip(*(make_problem(rng) for _ in range(problems)), strict=True)
        ids = torch.tensor([encode(prompt) for prompt in prompts], device=DEVICE).repeat_interleave(group, dim=0)
        # top_k=0: by default `generate` samples only from the 50 most probable tokens; with a vocabulary larger than
        # this one, p_t would then not be the sampling distribution.
        sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=32)
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), **sampling)
        # 2. Verify.
        pairs = zip(ids[:, PROMPT:].tolist(), (answer for answer in answers for _ in range(group)), strict=True)
        rewards = torch.tensor([verify(*pair) for pair in pairs], device=DEVICE).view(problems, group)
        # 3. One pass without gradients: the old log-probs, which the loss needs anyway, and Φ from the same softmax.
        with torch.no_grad():
            hidden, tokens, mask = read(model, ids)
            table, old_logp = token_logprobs(hidden, head, tokens)
            phi = features(table, head, tokens, mask)
            _, reference_logp = token_logprobs(read(reference, ids)[0], reference.lm_head.weight, tokens)
        # 4. Explore: from Φ to advantages, within each group.
        nu, mean_cosine = novelty(phi.view(problems, group, -1), rewards)
        advantages = group_advantages(shape_rewards(rewards, nu, strength)).flatten().float()
        # 5. Update. Each update uses a random subset of the responses of all groups.
        for rows in torch.randperm(len(ids), device=DEVICE).chunk(updates):
            hidden, tokens, mask = read(model, ids[rows])
            _, logp = token_logprobs(hidden, head, tokens)
            step(optimizer, model, policy_loss(logp, old_logp[rows], reference_logp[rows], advantages[rows], mask))
            schedule.step()
        correct = (rewards > 0).float()
        mean_rewards.append(rewards.mean().item())
        print(
            f"step {number + 1:3d}  mean reward {mean_rewards[-1]:+.3f}  pass@1 {correct.mean():.3f}  pass@{group} "
            f"{correct.amax(1).mean():.3f}  mean cosine {mean_cosine:+.3f}  {time.perf_counter() - start:.1f} s",
            flush=True,
        )
    return mean_rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--strength", type=float, default=0.5, help="λ of the reward shaping; 0 is GRPO")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))
