"""The head over vocabulary shards and over split sequences equals the head on one rank, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

TOKENS, HIDDEN, VOCAB, PADDED, RESPONSES = 19, 10, 29, 36, 3


def make_inputs():
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=g, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    response = torch.randint(-1, RESPONSES, (TOKENS,), generator=g)
    pull = torch.randn(2, TOKENS, generator=g, dtype=torch.float64)
    return hidden, weight, targets, response, pull


def head_on_ranks(rank: int, vocabulary_ranks: int, sequence_ranks: int):
    """Scores and gradients with the vocabulary and the tokens split over ranks."""
    from megatron_g2rl.policy.head import score_tokens, token_logprobs

    dist.init_process_group("gloo")
    v, s = rank % vocabulary_ranks, rank // vocabulary_ranks
    members = torch.arange(dist.get_world_size()).view(sequence_ranks, vocabulary_ranks).tolist()
    groups = [dist.new_group(ranks) for ranks in members]
    hidden, weight, targets, response, pull = make_inputs()
    mine = torch.arange(TOKENS) % sequence_ranks == s
    hidden, targets, response, pull = hidden[mine], targets[mine], response[mine], pull[:, mine]
    rows = PADDED // vocabulary_ranks
    shard = weight[v * rows : (v + 1) * rows].clone().requires_grad_()
    hidden.requires_grad_()
    where = dict(temperature=0.9, vocab_start=v * rows, vocab_size=VOCAB, tp_group=groups[s], chunk_tokens=2)
    reductions, original = [], dist.all_reduce

    def counting(*args, **kwargs):
        reductions.append(args[0].shape)
        return original(*args, **kwargs)

    dist.all_reduce = counting
    scores = score_tokens(hidden, shard, targets, response, RESPONSES, reduce_group=dist.group.WORLD, **where)
    counts = [len(reductions)]
    logprobs, entropy = token_logprobs(hidden, shard, targets, with_entropy=True, **where)
    counts.append(len(reductions) - sum(counts))
    (logprobs * pull[0] + entropy * pull[1]).sum().backward()
    counts.append(len(reductions) - sum(counts))
    dist.destroy_process_group()
    return dict(
        mine=mine,
        counts=counts,
        response_tokens=int((response >= 0).sum()),
        rows=slice(v * rows, (v + 1) * rows),
        logprobs=logprobs.detach(),
        scored=(scores.logprobs, scores.entropy),
        features=scores.features,
        hidden=hidden.grad,
        weight=shard.grad,
    )


@pytest.mark.same_for_both
@pytest.mark.parametrize("vocabulary_ranks, sequence_ranks", [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_splitting_vocabulary_and_tokens_over_ranks_changes_nothing(ranks, vocabulary_ranks, sequence_ranks):
    results = ranks(vocabulary_ranks * sequence_ranks, head_on_ranks, vocabulary_ranks, sequence_ranks)
    hidden, weight, targets, response, pull = make_inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    table = torch.log_softmax(hidden @ weight[:VOCAB].t() / 0.9, -1)
    logprobs, entropy = table.gather(1, targets[:, None]).squeeze(1), -(table.exp() * table).sum(1)
    (logprobs * pull[0] + entropy * pull[1]).sum().backward()
    # Φ by its definition, one token at a time.
    phi = weight.detach()[targets] - table.detach().exp() @ weight.detach()[:VOCAB]
    features = torch.stack([phi[response == i].mean(0) for i in range(RESPONSES)])
    weight_gradient = torch.zeros_like(weight)
    close = dict(rtol=1e-10, atol=1e-12)
    for r in results:
        here = response[r["mine"]] >= 0
        torch.testing.assert_close(r["logprobs"], logprobs.detach()[r["mine"]], **close)
        torch.testing.assert_close(r["scored"][0][here], logprobs.detach()[r["mine"]][here], **close)
        torch.testing.assert_close(r["scored"][1][here], entropy.detach()[r["mine"]][here], **close)
        torch.testing.assert_close(r["features"], features, **close)
        torch.testing.assert_close(r["hidden"], hidden.grad[r["mine"]], **close)
        weight_gradient[r["rows"]] += r["weight"]
        # Two for each chunk of 2 or 4 tokens and one for Φ; for the update two and one, for any number of chunks.
        score, forward, backward = r["counts"]
        if vocabulary_ranks > 1:
            assert score <= 2 * -(-r["response_tokens"] // 2) + 1 and (forward, backward) == (2, 1)
        else:
            assert (score, forward, backward) == (1, 0, 0)
    torch.testing.assert_close(weight_gradient, weight.grad, **close)


def prior_on_ranks(rank: int, vocabulary_ranks: int, sequence_ranks: int, chunk_tokens: int, wrong: dict[int, float]):
    """Scores from a prior and the shapes of the collectives, with the vocabulary and the tokens split over ranks."""
    from megatron_g2rl.policy.head import score_tokens, tiles

    tiles.CPU_TILE, tiles.CPU_COLUMNS = 12, 4
    dist.init_process_group("gloo")
    v, s = rank % vocabulary_ranks, rank // vocabulary_ranks
    members = torch.arange(dist.get_world_size()).view(sequence_ranks, vocabulary_ranks).tolist()
    groups = [dist.new_group(ranks) for ranks in members]
    hidden, weight, targets, response, _ = make_inputs()
    table = torch.log_softmax(hidden @ weight[:VOCAB].t() / 0.9, -1)
    prior = table.gather(1, targets[:, None]).squeeze(1)
    for token, nats in wrong.items():
        prior[token] += nats
    mine = torch.arange(TOKENS) % sequence_ranks == s
    rows = PADDED // vocabulary_ranks
    shapes, original = [], dist.all_reduce

    def counting(x, *args, **kwargs):
        shapes.append(tuple(x.shape))
        return original(x, *args, **kwargs)

    dist.all_reduce = counting
    scores = score_tokens(
        hidden[mine],
        weight[v * rows : (v + 1) * rows],
        targets[mine],
        response[mine],
        RESPONSES,
        prior_logprobs=prior[mine],
        prior_tolerance=1e-3,
        temperature=0.9,
        vocab_start=v * rows,
        vocab_size=VOCAB,
        tp_group=groups[s],
        chunk_tokens=chunk_tokens,
        reduce_group=dist.group.WORLD,
    )
    dist.destroy_process_group()
    return mine, scores, shapes


@pytest.mark.same_for_both
@pytest.mark.parametrize("vocabulary_ranks, sequence_ranks", [(2, 1), (4, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(
    "wrong, chunk_tokens",
    [({}, 1), ({}, 1000), ({1: 0.1, 5: 3.0, 6: -500.0, 9: 700.0, 12: float("nan")}, 2)],
    ids=["right_small_tiles", "right", "wrong"],
)
def test_a_prior_takes_three_collectives_whatever_the_tiles(
    ranks, vocabulary_ranks, sequence_ranks, wrong, chunk_tokens
):
    world = vocabulary_ranks * sequence_ranks
    results = ranks(world, prior_on_ranks, vocabulary_ranks, sequence_ranks, chunk_tokens, wrong)
    hidden, weight, targets, response, _ = make_inputs()
    table = torch.log_softmax(hidden @ weight[:VOCAB].t() / 0.9, -1)
    logprobs, entropy = table.gather(1, targets[:, None]).squeeze(1), -(table.exp() * table).sum(1)
    phi = weight[targets] - table.exp() @ weight[:VOCAB]
    features = torch.stack([phi[response == i].mean(0) for i in range(RESPONSES)])
    close = dict(rtol=1e-10, atol=1e-12)
    for mine, scores, shapes in results:
        here = response[mine] >= 0
        torch.testing.assert_close(scores.logprobs[here], logprobs[mine][here], **close)
        torch.testing.assert_close(scores.entropy[here], entropy[mine][here], **close)
        torch.testing.assert_close(scores.features, features, **close)
        tokens = int(here.sum())
        # The target logits, the sums, Φ; and the maximum and sums of the tokens whose prior is useless.
        expected = [(tokens,), (2, tokens)] * (vocabulary_ranks > 1) + [(RESPONSES, HIDDEN + 1)]
        if wrong and vocabulary_ranks > 1:
            useless = sum(bool(mine[t] and response[t] >= 0) for t in (6, 9, 12))
            expected[2:2] = [(useless,), (3, useless)] if useless else []
        assert shapes == expected
        assert (scores.swept_again > 0) == (bool(wrong) and any(mine[t] and response[t] >= 0 for t in wrong))


def policy_on_ranks(rank: int, folder: str, layout: dict, into_buffer: bool):
    """(rows multiplied with the vocabulary in the old-log-prob pass, in the update pass, gradients) of one layout."""
    from layout_cases import TEMPERATURE, sequences, weighted_loss

    from megatron_g2rl.config.sections.model import OptimizerConfig, PolicyConfig
    from megatron_g2rl.policy import head, runtime
    from megatron_g2rl.policy.head.products import Products
    from megatron_g2rl.policy.policy import Policy

    settings = PolicyConfig(**(dict(precision="fp32", device="cpu", head_memory_mb=1) | layout))
    optimizer = OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_updates=1)
    place = runtime.start(settings, seed=1)
    policy = Policy(
        folder, settings, optimizer, place, temperature=TEMPERATURE, tokens_per_microbatch=20, total_updates=10
    )
    rows, original, update = [], Products.__init__, head.token_logprobs

    def counting(self, hidden, *rest):
        rows.append(len(hidden))
        original(self, hidden, *rest)

    def returning(*args, main_grad=None, **kwargs):
        assert main_grad is not None, "data parallelism has made no buffer"
        return update(*args, main_grad=main_grad if into_buffer else None, **kwargs)

    Products.__init__, head.token_logprobs = counting, returning
    batch = sequences(policy.architecture.vocab_size)
    policy.score(batch, features=True)
    scored = sum(rows)
    # Two updates: the second gathers the parameters that the first left on other ranks.
    for _ in range(2):
        outcome, metrics, _ = policy.update(batch, weighted_loss)
        assert outcome.applied
    result = (scored, sum(rows) - scored, {name: x.clone() for name, x in policy.hf_weights()}, outcome.gradient_norm)
    runtime.stop()
    return result


OVERLAP = dict(overlap_communication=True, distributed_optimizer=True)


@pytest.mark.parametrize(
    "layout, tied, shares",
    [
        (dict(), True, 2),
        (dict(), False, 2),
        (dict(tensor_parallel=2, sequence_parallel=True), True, 1),
        (dict(context_parallel=2), False, 2),
        (dict(pipeline_parallel=2), True, 1),
    ],
    ids=["dp2_tied", "dp2", "tp2_sp_tied", "cp2", "pp2_tied"],
)
def test_the_gradient_buffer_equals_autograd_and_only_response_tokens_reach_the_vocabulary(
    ranks, model_folder, layout, tied, shares
):
    from layout_cases import LENGTHS

    folder = model_folder("qwen3", tied)
    buffer = ranks(2, policy_on_ranks, folder, layout | OVERLAP, True)
    returned = ranks(2, policy_on_ranks, folder, layout | OVERLAP, False)
    tokens = sum(response for _, response in LENGTHS)
    last = buffer[1:] if "pipeline_parallel" in layout else buffer
    # Where ranks split the tokens, their parts add up; forward and backward of two updates are four passes.
    assert sum(r[0] for r in last) * shares == tokens * len(last)
    assert sum(r[1] for r in last) * shares == 4 * tokens * len(last)
    assert buffer[0][3] == pytest.approx(returned[0][3], rel=1e-5)
    for name, weight in returned[0][2].items():
        # Adam divides by the root of tiny second moments: 1% of the change by two updates of 1e-3.
        assert (buffer[0][2][name] - weight).abs().max() < 2e-5, name
