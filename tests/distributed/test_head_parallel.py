"""The head over vocabulary shards and over shared sequences equals the head on one rank, in float64."""

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
    """Scores and gradients with the vocabulary and the tokens cut over ranks."""
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
    where = dict(temperature=0.9, vocab_start=v * rows, vocab_size=VOCAB, tp_group=groups[s], chunk_tokens=4)
    scores = score_tokens(hidden, shard, targets, response, RESPONSES, reduce_group=dist.group.WORLD, **where)
    logprobs, entropy = token_logprobs(hidden, shard, targets, with_entropy=True, **where)
    (logprobs * pull[0] + entropy * pull[1]).sum().backward()
    dist.destroy_process_group()
    return dict(
        mine=mine,
        rows=slice(v * rows, (v + 1) * rows),
        logprobs=logprobs.detach(),
        scored=(scores.logprobs, scores.entropy),
        features=scores.features,
        hidden=hidden.grad,
        weight=shard.grad,
    )


@pytest.mark.parametrize("vocabulary_ranks, sequence_ranks", [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_cutting_vocabulary_and_tokens_over_ranks_changes_nothing(ranks, vocabulary_ranks, sequence_ranks):
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
    torch.testing.assert_close(weight_gradient, weight.grad, **close)
