"""The products with the vocabulary: logits, and the gradients of hidden states and weight.

Logits are float32 regardless of the dtype of the weights (float64 for float64): rounding them to bfloat16 would change
a log-prob by up to 2**-9 of the largest logit, some hundredths of a nat. On a GPU 16-bit operands are multiplied with
float32 results; elsewhere a block of the weight is converted. Both passes use the same products, so that an unchanged
policy has an importance ratio of exactly 1.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Dtype of all sums: float64 for float64 inputs, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Products:
    """Products of hidden states with the rows of this rank's vocabulary shard, without padding rows."""

    def __init__(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        weight: Float[Tensor, "rows hidden"],
        temperature: float,
    ):
        self.dtype = accumulation_dtype(hidden)
        self.narrow = hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)
        """Whether products have 16-bit operands and float32 results."""
        self.weight = weight
        # float32 operands are scaled by the temperature directly; 16-bit operands would be rounded by it.
        self.scale = 1 / temperature if self.narrow else 1.0
        """Factor still to be applied to the logits."""
        self.folded = 1.0 if self.narrow else 1 / temperature
        self.hidden = hidden if self.narrow else hidden.to(self.dtype)
        if self.folded != 1.0:
            self.hidden = self.hidden * self.folded

    def select(self, tokens: Int[Tensor, "tokens"]) -> Products:
        """The products of the hidden states of `tokens`, which are copied, with the same rows."""
        selected = copy.copy(self)
        selected.hidden = self.hidden.index_select(0, tokens)
        return selected

    @property
    def operand_dtype(self) -> torch.dtype:
        """Dtype in which the gradient of the logits is needed."""
        return self.hidden.dtype

    def rows(self, block: slice) -> Float[Tensor, "columns hidden"]:
        """Rows of the weight, as an operand."""
        return self.weight[block].to(self.operand_dtype)

    def logits(self, at: slice, rows: Tensor, out: Tensor | None = None) -> Float[Tensor, "tile columns"]:
        """Temperature-scaled logits / `scale` of the tokens `at`, in the accumulation dtype; into `out` if given."""
        if self.narrow:
            return torch.mm(self.hidden[at], rows.t(), out_dtype=torch.float32)
        return torch.mm(self.hidden[at], rows.t(), out=out)

    def add_hidden_gradient(self, total: Float[Tensor, "tile hidden"], gradient: Tensor, rows: Tensor) -> None:
        """total += gradient [tile, columns] @ rows; call `finish_hidden_gradient` after the last tile."""
        if self.narrow:
            total += torch.mm(gradient, rows, out_dtype=torch.float32)
        else:
            total.addmm_(gradient, rows)

    def finish_hidden_gradient(self, total: Float[Tensor, "tokens hidden"]) -> None:
        """Apply the temperature factor that is folded into the operand."""
        if self.folded != 1.0:
            total *= self.folded

    def add_weight_gradient(self, total: Float[Tensor, "columns hidden"], gradient: Tensor, at: slice) -> None:
        """total += gradient^T @ hidden[at]."""
        if self.narrow:
            total += torch.mm(gradient.t(), self.hidden[at], out_dtype=torch.float32)
        else:
            total.addmm_(gradient.t(), self.hidden[at].to(total.dtype))


def times_rows(left: Float[Tensor, "n rows"], weight: Float[Tensor, "rows hidden"], block: int = 16_384) -> Tensor:
    """left @ weight in left's dtype; a weight of another dtype is converted `block` rows at a time."""
    if left.dtype == weight.dtype:
        return left @ weight
    result = left.new_zeros(left.shape[0], weight.shape[1])
    for start in range(0, weight.shape[0], block):
        part = slice(start, start + block)
        result.addmm_(left[:, part], weight[part].to(left.dtype))
    return result
