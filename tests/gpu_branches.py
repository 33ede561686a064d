"""Runs the GPU branches of the code on a CPU, with equivalents of CUDA's operations."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_g2rl.policy import specs
from megatron_g2rl.policy.head import score, softmax, tiles, update

GPU = torch.device("cuda")


def take(monkeypatch) -> None:
    """Make float32 and 16-bit tensors report that they are on a GPU; float64 is left for the reference of a test."""
    product = torch.mm

    def mm(a, b, out_dtype=None, *, out=None):
        if out_dtype is not None:
            return product(a.to(out_dtype), b.to(out_dtype))
        return product(a, b) if out is None else product(a, b, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.dtype != torch.float64), raising=False)
    monkeypatch.setattr(softmax, "_fused", lambda function: function)
    for module in (score, update):
        for name in ("update_tiles", "score_tiles"):
            if hasattr(module, name):
                cut = getattr(tiles, name)
                monkeypatch.setattr(module, name, lambda t, v, c, device, cut=cut: cut(t, v, c, GPU))
    monkeypatch.setattr(specs, "varlen_attn", varlen_attn)


def varlen_attn(query, key, value, query_cu, key_cu, longest_query, longest_key, *, scale, window_size, enable_gqa):
    """What torch.nn.attention.varlen.varlen_attn computes with window_size=(-1, 0), in float32, and without loops over
    sequences: causal at the end of the keys of each sequence."""
    assert window_size == (-1, 0) and query_cu.dtype == key_cu.dtype == torch.int32
    groups = query.shape[1] // key.shape[1] if enable_gqa else 1
    q, k, v = (x.float().transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(groups, dim=0) for x in (k, v))
    place_q, place_k = (torch.arange(x.shape[0], dtype=torch.int32) for x in (query, key))
    of_q, of_k = (
        torch.searchsorted(cu[1:].contiguous(), place, right=True)
        for cu, place in ((query_cu, place_q), (key_cu, place_k))
    )
    last = query_cu.shape[0] - 2
    left_q = query_cu[1:][of_q.clamp(max=last)] - place_q
    left_k = key_cu[1:][of_k.clamp(max=last)] - place_k
    seen = (of_q[:, None] == of_k) & (left_q[:, None] <= left_k)
    weights = (q @ k.transpose(1, 2)) * (query.shape[2] ** -0.5 if scale is None else scale)
    weights = weights.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).to(query.dtype)


def _tensors(values) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(values) if torch.is_tensor(x)]


class NoHostSync(TorchDispatchMode):
    """Fails where the host would wait for a GPU: where a value, or a size that depends on values, is read."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_consecutive",
        "unique_dim",
        "equal",
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in _tensors(args[1:]))
        if by_mask and name.startswith("index_put"):
            by_mask = _tensors(args[2])[0].numel() > 1  # filling in one value needs no positions
        if name in self.WAITING or by_mask or (name == "repeat_interleave" and "output_size" not in (kwargs or {})):
            raise AssertionError(f"aten.{name} makes the host wait for the device")
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self._tolist = torch.Tensor.tolist

        def refused(tensor):
            raise AssertionError("Tensor.tolist makes the host wait for the device")

        torch.Tensor.tolist = refused
        return super().__enter__()

    def __exit__(self, *exception):
        torch.Tensor.tolist = self._tolist
        return super().__exit__(*exception)
