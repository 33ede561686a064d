"""Φ from the top-K over vocabulary shards and over split responses equals that of one rank, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

TOKENS, HIDDEN, VOCAB, PADDED, RESPONSES, TOP = 40, 6, 29, 36, 3, 4


def make_inputs():
    g = torch.Generator().manual_seed(7)
    weight = torch.randn(PADDED, HIDDEN, generator=g, dtype=torch.float64)
    table = torch.log_softmax(torch.randn(TOKENS, VOCAB, generator=g, dtype=torch.float64), 1)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    response = torch.randint(-1, RESPONSES, (TOKENS,), generator=g)
    top = table.topk(TOP, 1)
    return top.indices, top.values, targets, weight, response, table.gather(1, targets[:, None]).squeeze(1)


def features_on_ranks(rank: int, vocabulary_ranks: int, sequence_ranks: int):
    """The feature with the vocabulary and the tokens split over ranks."""
    from megatron_g2rl.exploration import features_from_topk

    dist.init_process_group("gloo")
    v, s = rank % vocabulary_ranks, rank // vocabulary_ranks
    members = torch.arange(dist.get_world_size()).view(sequence_ranks, vocabulary_ranks).tolist()
    groups = [dist.new_group(ranks) for ranks in members]
    ids, logprobs, targets, weight, response, own = make_inputs()
    mine = torch.arange(TOKENS) % sequence_ranks == s
    rows = PADDED // vocabulary_ranks
    features = features_from_topk(
        ids[mine],
        logprobs[mine],
        targets[mine],
        weight[v * rows : (v + 1) * rows],
        response[mine],
        RESPONSES,
        target_logprobs=own[mine],
        vocab_start=v * rows,
        vocab_size=VOCAB,
        tp_group=groups[s],
        reduce_group=dist.group.WORLD,
    )
    dist.destroy_process_group()
    return features


@pytest.mark.parametrize("vocabulary_ranks, sequence_ranks", [(2, 1), (1, 2), (2, 2)])
def test_splitting_vocabulary_and_tokens_over_ranks_changes_no_estimate(ranks, vocabulary_ranks, sequence_ranks):
    from megatron_g2rl.exploration import features_from_topk

    results = ranks(vocabulary_ranks * sequence_ranks, features_on_ranks, vocabulary_ranks, sequence_ranks)
    ids, logprobs, targets, weight, response, own = make_inputs()
    expected = features_from_topk(ids, logprobs, targets, weight[:VOCAB], response, RESPONSES, target_logprobs=own)
    for features in results:
        # float64: only the order of sums differs.
        torch.testing.assert_close(features, expected, rtol=1e-11, atol=1e-13)
