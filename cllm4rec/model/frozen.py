"""Linear layers whose weights do not change, laid out once as the CPU's bf16 units read them.

A product of plain tensors arranges the weights anew on every call. At the one or two hundred rows of a scoring pass that
costs nearly as much as the product itself; at the thousands of a training step it does not show, so these stay plain.

Lengths: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class FrozenLinear(nn.Module):
    """`x W + b` under the names of the layer it replaces; a plain product but for inference in bf16 on a CPU."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, is_transposed: bool) -> None:
        """is_transposed: `weight` is (N, K), as in nn.Linear, and not (K, N), as in GPT-2."""
        super().__init__()
        self.weight, self.bias, self._is_transposed = weight, bias, is_transposed
        self._layout: Tensor | None = None

    @classmethod
    def of(cls, layer: nn.Module) -> FrozenLinear | None:
        """The same as another layer, sharing its weights; None where that is no linear one."""
        if not isinstance(layer, nn.Linear | Conv1D):
            return None
        parameters = dict(layer.named_parameters(recurse=False))
        return cls(parameters["weight"], parameters.get("bias"), is_transposed=isinstance(layer, nn.Linear))

    def forward(self, inputs: Tensor) -> Tensor:
        weight_KN = self.weight.T if self._is_transposed else self.weight
        rows_MK = inputs.reshape(-1, inputs.shape[-1])
        if self._is_laid_out(inputs):
            if self._layout is None:
                self._layout = torch.ops.mkldnn._reorder_linear_weight(weight_KN.T.contiguous())
            product: Tensor = torch.ops.mkldnn._linear_pointwise(rows_MK, self._layout, self.bias, "none", [], "")
        elif self.bias is None:
            product = rows_MK @ weight_KN
        else:
            product = torch.addmm(self.bias, rows_MK, weight_KN)
        return product.view(*inputs.shape[:-1], -1)

    def _is_laid_out(self, inputs: Tensor) -> bool:
        is_trained = torch.is_grad_enabled() and inputs.requires_grad
        return inputs.dtype == torch.bfloat16 and inputs.device.type == "cpu" and not is_trained and can_lay_out()

    def __getstate__(self) -> dict[str, Any]:
        """Without the layout, which can be neither copied nor sent and is made anew."""
        return {**self.__dict__, "_layout": None}


@functools.cache
def can_lay_out() -> bool:
    """Whether this torch and CPU have bf16 products of weights in a layout of their own."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]
