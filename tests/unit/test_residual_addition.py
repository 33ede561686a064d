"""Why `bias_dropout_fusion` stays off: the models have no bias and no dropout, and nothing else can be fused."""

from __future__ import annotations

import pytest
import torch
from random_models import write_random_model
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Names of the operations that reach a device."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen2", "llama"])
def test_the_residual_of_a_layer_is_one_addition(family, tmp_path):
    from megatron_g2rl.config.sections.model import PolicyConfig
    from megatron_g2rl.policy.model import transformer_config
    from megatron_g2rl.policy.models.architecture import read_architecture

    architecture = read_architecture(write_random_model(tmp_path / "model", family))
    config = transformer_config(architecture, PolicyConfig(device="cpu"), torch.device("cpu"))
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    assert not config.bias_dropout_fusion and not config.add_bias_linear
    for training in (True, False):
        x, residual = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
        with Operations() as forward:
            out = get_bias_dropout_add(training, config.bias_dropout_fusion)((x, None), residual, config.hidden_dropout)
        assert forward.names == ["add"]
        upstream = torch.randn(2, 3, 4)
        with Operations() as backward:
            gradients = torch.autograd.grad(out, (x, residual), upstream)
        assert set(backward.names) <= {"detach"} and all(torch.equal(g, upstream) for g in gradients)
