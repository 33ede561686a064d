"""The head's GPU path on meta tensors: dtypes, shapes and memory, but no values."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_g2rl.policy.head import softmax, token_logprobs
from megatron_g2rl.policy.head.products import Products
from megatron_g2rl.policy.head.sweep import sweep
from megatron_g2rl.policy.head.tiles import update_tiles


@pytest.fixture(autouse=True)
def meta_is_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.is_meta), raising=False)
    monkeypatch.setattr(softmax, "_fused", lambda function: function)


class _Memory(TorchDispatchMode):
    """Peak number of bytes of the storages allocated inside the context, without those of `inputs`."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {StorageWeakRef(x.untyped_storage()) for x in inputs}
        self.storages, self.peak, self.inside_kernel = {}, 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.inside_kernel:
            self.note(result)
        return result

    def note(self, result):
        for x in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(x) and (storage := StorageWeakRef(x.untyped_storage())) not in self.inputs:
                self.storages[storage] = x.untyped_storage().nbytes()
        self.storages = {storage: size for storage, size in self.storages.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.storages.values()))

    def compiled(self, function):
        """`function` as one fused kernel: only its results use memory, intermediate values do not."""

        def kernel(*args):
            self.inside_kernel = True
            results = function(*args)
            self.inside_kernel = False
            self.note(results)
            return results

        return kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("observe", [None, lambda *tile: None], ids=["without_features", "with_features"])
def test_the_forward_pass_of_the_update_stays_within_its_memory_budget(dtype, keep, observe, monkeypatch):
    tokens, vocabulary, chunk = 2048, 4096, 256
    hidden = torch.empty(tokens, 64, dtype=dtype, device="meta")
    weight = torch.empty(vocabulary, 64, dtype=dtype, device="meta")
    targets = torch.zeros(tokens, dtype=torch.long, device="meta")
    tiles = update_tiles(tokens, vocabulary, chunk, hidden.device)
    memory = _Memory(hidden, weight, targets)
    monkeypatch.setattr(softmax, "_fused", memory.compiled)
    with memory:
        state = softmax.RunningSoftmax(targets, torch.float32)
        kept = sweep(Products(hidden, weight, 1.0), state, 0, tiles, keep=keep, observe=observe)
    assert bool(kept) == keep
    assert all(z.dtype == torch.float32 for z in kept.values())
    table = 4 * chunk * vocabulary
    # A tile, its exponentials if Φ needs them, and the kept tiles, plus a dozen values per token.
    tables = 1 + (observe is not None) + keep
    assert 1 <= memory.peak / (tables * table) < 1.06


@pytest.mark.parametrize("buffer", [True, False], ids=["main_grad", "returned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtypes_of_the_update_are_consistent(dtype, buffer):
    hidden = torch.empty(300, 64, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(1000, 64, dtype=dtype, device="meta", requires_grad=True)
    targets = torch.zeros(300, dtype=torch.long, device="meta")
    main_grad = torch.empty(1000, 64, device="meta") if buffer else None
    where = dict(temperature=0.7, vocab_size=990, chunk_tokens=32)
    values = token_logprobs(hidden, weight, targets, with_entropy=True, main_grad=main_grad, **where)
    assert all(x.dtype == torch.float32 and x.is_meta for x in values)
    found = torch.autograd.grad(values[0].sum() + values[1].sum(), (hidden, weight))
    assert [(x.dtype, x.shape, x.is_meta) for x in found] == [(dtype, x.shape, True) for x in (hidden, weight)]
