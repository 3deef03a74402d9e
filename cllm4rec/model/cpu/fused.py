"""Layers with constant weights, run on a CPU with fused operations and prepacked weights.

A plain matrix product rearranges the weights on every call, which at the few hundred rows of a scoring pass costs nearly as
much as the product itself. Bias, activation and residual each take another pass over memory. oneDNN's operators fuse all of
this. `FrozenLinear` does so for one product of any model. `FrozenGPT2Layer` is a whole GPT-2 layer around attention in
blocks, with an explicit backward pass.

Shapes: S slots (the rows of a product), K inputs, N outputs, H heads × D features per head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.pytorch_utils import Conv1D

from cllm4rec.model.cpu.attention import Blocks, attention, attention_backward
from cllm4rec.model.divided import is_divided

_MLP_CHUNK = 1024
"""Inner features of an MLP per product: one product of 3,072 by 768 takes longer than three of 1,024 by 768."""


class FusedProduct:
    """`x W + b` fused with the operation that follows. The weights are prepacked on first use."""

    def __init__(self, matrix_KN: Tensor, bias_N: Tensor | None) -> None:
        self.matrix_KN, self.bias_N = matrix_KN, bias_N
        self._packed: Tensor | None = None

    def apply(self, rows_SK: Tensor, gelu: nn.GELU | None = None) -> Tensor:
        """`x W + b`, or `gelu(x W + b)`, (S, N)."""
        operator = torch.ops.mkldnn._linear_pointwise
        activation, approximate = ("gelu", gelu.approximate) if gelu else ("none", None)
        output: Tensor = operator(rows_SK, self._packed_weight(), self.bias_N, activation, [], approximate)
        return output

    def apply_and_add(self, rows_SK: Tensor, residual_SN: Tensor) -> Tensor:
        """`x W + b + residual`, (S, N)."""
        operator = torch.ops.mkldnn._linear_pointwise.binary
        output: Tensor = operator(rows_SK, residual_SN, self._packed_weight(), self.bias_N, "add")
        return output

    def _packed_weight(self) -> Tensor:
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.matrix_KN.T.contiguous())
        return self._packed


class FrozenLinear(nn.Module):
    """`x W + b` with the parameter names of the layer that it replaces."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, is_transposed: bool) -> None:
        """is_transposed: `weight` is (N, K) as in nn.Linear; otherwise it is (K, N) as in GPT-2's Conv1D."""
        super().__init__()
        self.weight, self.bias, self._is_transposed = weight, bias, is_transposed
        self._fused: FusedProduct | None = None

    @classmethod
    def from_layer(cls, layer: nn.Module) -> FrozenLinear | None:
        """A replacement that shares the weights of a layer, or None if the layer is not linear or is trained."""
        if not isinstance(layer, nn.Linear | Conv1D) or layer.weight.requires_grad:
            return None
        parameters = dict(layer.named_parameters(recurse=False))
        return cls(parameters["weight"], parameters.get("bias"), is_transposed=isinstance(layer, nn.Linear))

    @property
    def matrix(self) -> Tensor:
        """The weight as (K, N)."""
        return self.weight.T if self._is_transposed else self.weight

    @property
    def fused(self) -> FusedProduct:
        if self._fused is None:
            self._fused = FusedProduct(self.matrix, self.bias)
        return self._fused

    def forward(self, inputs: Tensor) -> Tensor:
        rows_SK = inputs.reshape(-1, inputs.shape[-1])
        is_trained = torch.is_grad_enabled() and inputs.requires_grad
        if not is_trained and runs_fused(inputs, self.weight):
            product = self.fused.apply(rows_SK)
        elif is_trained and is_divided(self.weight):
            product = _DividedProduct.apply(rows_SK, self)  # type: ignore[no-untyped-call]
        elif self.bias is None:
            product = rows_SK @ self.matrix
        else:
            product = torch.addmm(self.bias, rows_SK, self.matrix)
        return product.view(*inputs.shape[:-1], -1)

    def __getstate__(self) -> dict[str, Any]:
        """Without the prepacked weights, which cannot be copied or pickled and are packed again on first use."""
        return {**self.__dict__, "_fused": None}


class _DividedProduct(torch.autograd.Function):
    """The product of a FrozenLinear whose weights ZeRO-3 divides: (S, K) → (S, N).

    The backward pass reads the weights anew, when they are gathered again. Saved tensors would keep those of all layers.
    """

    @staticmethod
    def forward(ctx: Any, rows_SK: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return rows_SK @ layer.matrix if layer.bias is None else torch.addmm(layer.bias, rows_SK, layer.matrix)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] @ ctx.layer.matrix.T, None


class FrozenGPT2Layer(GPT2Block):  # type: ignore[misc]
    """A GPT-2 layer with the submodules and names of the one that it replaces. Falls back to transformers if not fused."""

    def __init__(self, layer: GPT2Block) -> None:
        """layer: with a FrozenLinear for each of its four products and with torch's GELU."""
        nn.Module.__init__(self)
        for name, part in layer.named_children():
            self.add_module(name, part)
        self._mlp_parts: list[tuple[FusedProduct, FusedProduct]] = []

    @classmethod
    def from_layer(cls, layer: nn.Module) -> FrozenGPT2Layer | None:
        """A replacement that shares the submodules of a layer, or None if it is not a frozen, decoder-only GPT-2 layer."""
        if type(layer) is not GPT2Block or hasattr(layer, "crossattention"):
            return None
        attention_: Any
        mlp: Any
        attention_, mlp = layer.attn, layer.mlp
        products = (attention_.c_attn, attention_.c_proj, mlp.c_fc, mlp.c_proj)
        is_frozen = all(isinstance(product, FrozenLinear) for product in products)
        return cls(layer) if is_frozen and isinstance(mlp.act, nn.GELU) else None

    def forward(self, hidden_states: Tensor, *args: Any, layout: Any = None, **kwargs: Any) -> Tensor:
        """layout: the `DocumentLayout` of the grid. Without it, transformers' own implementation runs."""
        if layout is None or not runs_fused(hidden_states, self.mlp.c_fc.weight):
            unfused: Tensor = super().forward(hidden_states, *args, layout=layout, **kwargs)
            return unfused
        blocks: Blocks = layout.blocks
        hidden_SK = hidden_states.flatten(0, 1)
        is_trained = torch.is_grad_enabled() and hidden_states.requires_grad
        output: Tensor = (
            _GPT2Layer.apply(hidden_SK, self, blocks)  # type: ignore[no-untyped-call]
            if is_trained
            else _gpt2_layer(hidden_SK, self, blocks, save=False)[0]
        )
        return output.view(hidden_states.shape)

    @property
    def mlp_parts(self) -> list[tuple[FusedProduct, FusedProduct]]:
        """The two products of the MLP, split by inner features. The outputs of all parts add up to that of the MLP."""
        if not self._mlp_parts:
            up, down = self.mlp.c_fc, self.mlp.c_proj
            num_parts = max(1, up.matrix.shape[1] // _MLP_CHUNK)
            chunks = up.matrix.chunk(num_parts, 1), up.bias.chunk(num_parts), down.matrix.chunk(num_parts)
            parts: list[tuple[FusedProduct, FusedProduct]] = []
            for up_matrix, up_bias, down_matrix in zip(*chunks, strict=True):
                down_bias = None if parts else down.bias
                parts.append((FusedProduct(up_matrix, up_bias), FusedProduct(down_matrix, down_bias)))
            self._mlp_parts = parts  # in one assignment: several threads rank with the same model
        return self._mlp_parts

    def __getstate__(self) -> dict[str, Any]:
        """Without the prepacked weights, as in FrozenLinear."""
        return {**self.__dict__, "_mlp_parts": []}


class _GPT2Layer(torch.autograd.Function):
    """A layer around attention in blocks, without gradients for its weights: (S, K) → (S, K)."""

    @staticmethod
    def forward(ctx: Any, hidden_SK: Tensor, layer: Any, blocks: Blocks) -> Tensor:
        output, saved = _gpt2_layer(hidden_SK, layer, blocks, save=True)
        ctx.save_for_backward(*saved)
        ctx.layer, ctx.blocks = layer, blocks
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_SK,), layer, attention_ = grad_outputs, ctx.layer, ctx.layer.attn
        hidden_SK, mean_1, scale_1, middle_SK, mean_2, scale_2, *saved = ctx.saved_tensors
        parts = layer.mlp_parts
        grad_normed_SK = torch.zeros_like(grad_SK)
        inner, saved = saved[: len(parts)], saved[len(parts) :]
        for (up, down), inner_SN in zip(parts, inner, strict=True):
            grad_inner_SN = torch.ops.aten.gelu_backward(
                grad_SK @ down.matrix_KN.T, inner_SN, approximate=layer.mlp.act.approximate
            )
            grad_normed_SK.addmm_(grad_inner_SN, up.matrix_KN.T)
        grad_middle_SK = _norm_backward(layer.ln_2, grad_normed_SK, middle_SK, mean_2, scale_2) + grad_SK
        grad_attended = (grad_middle_SK @ attention_.c_proj.matrix.T).view(len(grad_SK), -1, attention_.head_dim)
        grad_states = attention_backward(grad_attended, saved, attention_.scaling, ctx.blocks)
        grad_normed_SK = grad_states.flatten(1) @ attention_.c_attn.matrix.T
        grad_hidden_SK = _norm_backward(layer.ln_1, grad_normed_SK, hidden_SK, mean_1, scale_1) + grad_middle_SK
        return grad_hidden_SK, None, None


def _gpt2_layer(hidden_SK: Tensor, layer: Any, blocks: Blocks, save: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output of a layer and, with `save`, the tensors that its backward pass needs. Without it, GELU is fused too."""
    attention_ = layer.attn
    normed_SK, *norm_1 = _norm(layer.ln_1, hidden_SK)
    states = attention_.c_attn.fused.apply(normed_SK).view(len(hidden_SK), -1, attention_.head_dim)
    attended, saved = attention(states, attention_.scaling, blocks)
    middle_SK = attention_.c_proj.fused.apply_and_add(attended.flatten(1), hidden_SK)
    normed_SK, *norm_2 = _norm(layer.ln_2, middle_SK)
    output, inner = middle_SK, []
    for up, down in layer.mlp_parts:
        if save:
            inner.append(up.apply(normed_SK))
            output = down.apply_and_add(layer.mlp.act(inner[-1]), output)
        else:
            output = down.apply_and_add(up.apply(normed_SK, layer.mlp.act), output)
    return output, (hidden_SK, *norm_1, middle_SK, *norm_2, *inner, *saved) if save else ()


def _norm(norm: nn.LayerNorm, hidden_SK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The normalized states, and the mean and reciprocal standard deviation of each slot."""
    return torch.native_layer_norm(hidden_SK, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _norm_backward(norm: nn.LayerNorm, grad_SK: Tensor, hidden_SK: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    grad: Tensor = torch.ops.aten.native_layer_norm_backward(
        grad_SK, hidden_SK, norm.normalized_shape, mean, scale, norm.weight, norm.bias, [True, False, False]
    )[0]
    return grad


def runs_fused(inputs: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can run a product: same precision, on a supported CPU, with weights that ZeRO-3 does not divide."""
    is_on_cpu = inputs.device.type == "cpu"
    return inputs.dtype == weight.dtype and is_on_cpu and not is_divided(weight) and can_prepack(inputs.dtype)


@functools.cache
def can_prepack(precision: torch.dtype) -> bool:
    """Whether this torch and this CPU support products with prepacked weights."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return precision == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
