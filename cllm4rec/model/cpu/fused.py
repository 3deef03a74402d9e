"""Layers whose weights do not change, run on a CPU with operations fused and weights laid out once.

A product of plain tensors arranges the weights anew on every call, which at the few hundred rows of a scoring pass costs
nearly as much as the product itself; bias, activation and residual are a pass over memory each. oneDNN's own operators do
all of it at once. `FrozenLinear` is that for one product of any model; `FrozenGPT2Layer` is a whole layer of GPT-2 around
attention in blocks, with its gradient written out.

Lengths: S slots (the rows of a product), K inputs, N outputs, H heads × D numbers a head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.pytorch_utils import Conv1D

from cllm4rec.model.cpu.attention import Blocks, attention, attention_backward

_PART = 1024
"""Inner numbers of an MLP at a time: a product of 3,072 by 768 takes longer than three of 1,024 by 768."""


class FusedProduct:
    """`x W + b` and what comes after it at once, by weights that are laid out when they are first used."""

    def __init__(self, matrix_KN: Tensor, bias_N: Tensor | None) -> None:
        self.matrix_KN, self.bias_N = matrix_KN, bias_N
        self._layout: Tensor | None = None

    def then(self, rows_SK: Tensor, gelu: nn.GELU | None = None) -> Tensor:
        """(S, N)."""
        operator = torch.ops.mkldnn._linear_pointwise
        activation, approximate = ("gelu", gelu.approximate) if gelu else ("none", None)
        done: Tensor = operator(rows_SK, self._laid_out(), self.bias_N, activation, [], approximate)
        return done

    def plus(self, rows_SK: Tensor, residual_SN: Tensor) -> Tensor:
        """`x W + b + residual`, (S, N)."""
        operator = torch.ops.mkldnn._linear_pointwise.binary
        done: Tensor = operator(rows_SK, residual_SN, self._laid_out(), self.bias_N, "add")
        return done

    def _laid_out(self) -> Tensor:
        if self._layout is None:
            self._layout = torch.ops.mkldnn._reorder_linear_weight(self.matrix_KN.T.contiguous())
        return self._layout


class FrozenLinear(nn.Module):
    """`x W + b` under the names of the layer it replaces."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, is_transposed: bool) -> None:
        """is_transposed: `weight` is (N, K), as in nn.Linear, and not (K, N), as in GPT-2."""
        super().__init__()
        self.weight, self.bias, self._is_transposed = weight, bias, is_transposed
        self._fused: FusedProduct | None = None

    @classmethod
    def of(cls, layer: nn.Module) -> FrozenLinear | None:
        """The same as another layer, sharing its weights; None where that is no linear one."""
        if not isinstance(layer, nn.Linear | Conv1D):
            return None
        parameters = dict(layer.named_parameters(recurse=False))
        return cls(parameters["weight"], parameters.get("bias"), is_transposed=isinstance(layer, nn.Linear))

    @property
    def matrix(self) -> Tensor:
        """(K, N)."""
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
            product = self.fused.then(rows_SK)
        elif self.bias is None:
            product = rows_SK @ self.matrix
        else:
            product = torch.addmm(self.bias, rows_SK, self.matrix)
        return product.view(*inputs.shape[:-1], -1)

    def __getstate__(self) -> dict[str, Any]:
        """Without laid-out weights, which can be neither copied nor sent and are made anew."""
        return {**self.__dict__, "_fused": None}


class FrozenGPT2Layer(GPT2Block):  # type: ignore[misc]
    """A layer of GPT-2 of the same parts and names as the one it replaces, and as transformers runs it where not fused."""

    def __init__(self, layer: GPT2Block) -> None:
        """`layer` has FrozenLinear for its four products and torch's GELU."""
        nn.Module.__init__(self)
        for name, part in layer.named_children():
            self.add_module(name, part)
        self._mlp_parts: list[tuple[FusedProduct, FusedProduct]] = []

    @classmethod
    def of(cls, layer: nn.Module) -> FrozenGPT2Layer | None:
        """The same as another layer; None where that is no layer of GPT-2 as we know it."""
        if type(layer) is not GPT2Block or hasattr(layer, "crossattention"):
            return None
        mlp: Any = layer.mlp
        return cls(layer) if isinstance(mlp.act, nn.GELU) else None

    def forward(self, hidden_states: Tensor, *others: Any, layout: Any = None, **named: Any) -> Tensor:
        """layout: the grid's `DocumentLayout`; None is a call from elsewhere, which runs as transformers would."""
        if layout is None or not runs_fused(hidden_states, self.mlp.c_fc.weight):
            own: Tensor = super().forward(hidden_states, *others, layout=layout, **named)
            return own
        blocks: Blocks = layout.blocks
        hidden_SK = hidden_states.flatten(0, 1)
        is_trained = torch.is_grad_enabled() and hidden_states.requires_grad
        done: Tensor = (
            _GPT2Layer.apply(hidden_SK, self, blocks)  # type: ignore[no-untyped-call]
            if is_trained
            else _gpt2_layer(hidden_SK, self, blocks, keep=False)[0]
        )
        return done.view(hidden_states.shape)

    @property
    def mlp_parts(self) -> list[tuple[FusedProduct, FusedProduct]]:
        """The two products of the MLP for some of its inner numbers at a time, whose outcomes add up to the whole's."""
        if not self._mlp_parts:
            inward, outward = self.mlp.c_fc, self.mlp.c_proj
            num_parts = max(1, inward.matrix.shape[1] // _PART)
            cuts = inward.matrix.chunk(num_parts, 1), inward.bias.chunk(num_parts), outward.matrix.chunk(num_parts)
            parts: list[tuple[FusedProduct, FusedProduct]] = []
            for matrix, bias, back in zip(*cuts, strict=True):
                parts.append((FusedProduct(matrix, bias), FusedProduct(back, None if parts else outward.bias)))
            self._mlp_parts = parts  # all of them at once: several threads rank with one model
        return self._mlp_parts

    def __getstate__(self) -> dict[str, Any]:
        """Without laid-out weights, as FrozenLinear."""
        return {**self.__dict__, "_mlp_parts": []}


class _GPT2Layer(torch.autograd.Function):
    """A layer around attention in blocks, whose weights get no gradient: (S, K) → (S, K)."""

    @staticmethod
    def forward(ctx: Any, hidden_SK: Tensor, layer: Any, blocks: Blocks) -> Tensor:
        done, kept = _gpt2_layer(hidden_SK, layer, blocks, keep=True)
        ctx.save_for_backward(*kept)
        ctx.layer, ctx.blocks = layer, blocks
        return done

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_SK,), layer, attention_ = grad_outputs, ctx.layer, ctx.layer.attn
        hidden_SK, mean_1, scale_1, middle_SK, mean_2, scale_2, *kept = ctx.saved_tensors
        parts = layer.mlp_parts
        grad_normed_SK = torch.zeros_like(grad_SK)
        inner, kept = kept[: len(parts)], kept[len(parts) :]
        for (inward, outward), inner_SN in zip(parts, inner, strict=True):
            grad_inner_SN = torch.ops.aten.gelu_backward(
                grad_SK @ outward.matrix_KN.T, inner_SN, approximate=layer.mlp.act.approximate
            )
            grad_normed_SK.addmm_(grad_inner_SN, inward.matrix_KN.T)
        grad_middle_SK = _norm_backward(layer.ln_2, grad_normed_SK, middle_SK, mean_2, scale_2) + grad_SK
        grad_attended = (grad_middle_SK @ attention_.c_proj.matrix.T).view(len(grad_SK), -1, attention_.head_dim)
        grad_states = attention_backward(grad_attended, kept, attention_.scaling, ctx.blocks)
        grad_normed_SK = grad_states.flatten(1) @ attention_.c_attn.matrix.T
        grad_hidden_SK = _norm_backward(layer.ln_1, grad_normed_SK, hidden_SK, mean_1, scale_1) + grad_middle_SK
        return grad_hidden_SK, None, None


def _gpt2_layer(hidden_SK: Tensor, layer: Any, blocks: Blocks, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The layer's output, and with `keep` what its way back needs; without, the activation is part of its product."""
    attention_ = layer.attn
    normed_SK, *norm_1 = _norm(layer.ln_1, hidden_SK)
    states = attention_.c_attn.fused.then(normed_SK).view(len(hidden_SK), -1, attention_.head_dim)
    attended, kept = attention(states, attention_.scaling, blocks)
    middle_SK = attention_.c_proj.fused.plus(attended.flatten(1), hidden_SK)
    normed_SK, *norm_2 = _norm(layer.ln_2, middle_SK)
    done, inner = middle_SK, []
    for inward, outward in layer.mlp_parts:
        if keep:
            inner.append(inward.then(normed_SK))
            done = outward.plus(layer.mlp.act(inner[-1]), done)
        else:
            done = outward.plus(inward.then(normed_SK, layer.mlp.act), done)
    return done, (hidden_SK, *norm_1, middle_SK, *norm_2, *inner, *kept) if keep else ()


def _norm(norm: nn.LayerNorm, hidden_SK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The normed states, and the mean and reciprocal deviation of each slot."""
    return torch.native_layer_norm(hidden_SK, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _norm_backward(norm: nn.LayerNorm, grad_SK: Tensor, hidden_SK: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    grad: Tensor = torch.ops.aten.native_layer_norm_backward(
        grad_SK, hidden_SK, norm.normalized_shape, mean, scale, norm.weight, norm.bias, [True, False, False]
    )[0]
    return grad


def runs_fused(inputs: Tensor, weight: Tensor) -> bool:
    """Whether these are for oneDNN: of one precision, on a CPU that has it, and weights that are here (ZeRO-3 parts them)."""
    is_here = not hasattr(weight, "ds_id")
    return inputs.dtype == weight.dtype and inputs.device.type == "cpu" and is_here and can_lay_out(inputs.dtype)


@functools.cache
def can_lay_out(precision: torch.dtype) -> bool:
    """Whether this torch and CPU have products of weights in a layout of their own."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return precision == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
