"""Fused layers compute what the layers that they replace compute."""

import copy
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.parity import ARCHITECTURES, parity
from torch import nn
from transformers import AttentionInterface, GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.pytorch_utils import Conv1D

from cllm4rec.model.attention import IMPLEMENTATION, DocumentLayout, attend
from cllm4rec.model.cpu.fused import FrozenGPT2Layer, FrozenLinear, can_prepack

PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-6)])
LAYERS = [lambda: nn.Linear(48, 80), lambda: nn.Linear(48, 80, bias=False), lambda: Conv1D(80, 48)]


def plain_and_frozen(make, dtype):
    torch.manual_seed(0)
    layer = make().to(dtype).requires_grad_(False)
    return layer, FrozenLinear.from_layer(layer)


def product_and_gradient(layer, dtype):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(3, 7, 48, generator=generator).to(dtype).requires_grad_()
    output = layer(inputs)
    output.backward(torch.randn(output.shape, generator=generator).to(dtype))
    return output, inputs.grad


@pytest.mark.parametrize("make", LAYERS)
@PRECISIONS
def test_products_and_gradients_are_those_of_the_layer(make, dtype, tolerance):
    layer, frozen = plain_and_frozen(make, dtype)
    for found, expected in zip(product_and_gradient(frozen, dtype), product_and_gradient(layer, dtype), strict=True):
        assert found.shape == expected.shape
        assert torch.allclose(found.float(), expected.float(), atol=tolerance)


@pytest.mark.parametrize("make", LAYERS)
@PRECISIONS
def test_inference_gives_the_same_products(make, dtype, tolerance):
    layer, frozen = plain_and_frozen(make, dtype)
    inputs = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.allclose(frozen(inputs).float(), layer(inputs).float(), atol=tolerance)
    assert frozen(inputs).shape == (3, 7, 80)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_used_layer_can_be_copied_and_pickled(copied):
    _, frozen = plain_and_frozen(LAYERS[2], torch.bfloat16)
    inputs = torch.randn(5, 48).bfloat16()
    output = frozen(inputs)
    assert torch.equal(copied(frozen)(inputs), output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_prepacked_once_and_only_for_inference(dtype):
    if not can_prepack(dtype):
        pytest.skip("this CPU has no products with prepacked weights")
    _, frozen = plain_and_frozen(LAYERS[0], dtype)
    inputs = torch.randn(2, 48, dtype=dtype)
    frozen(inputs.clone().requires_grad_())
    assert frozen.fused._packed is None
    frozen(inputs)
    packed = frozen.fused._packed
    assert packed is not None
    frozen(inputs)
    assert frozen.fused._packed is packed


def gpt2_layers(dtype, gelu="none"):
    """A layer whose attention runs in blocks, and its frozen copy."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_head=4, n_layer=1, attn_pdrop=0.0, resid_pdrop=0.0)
    config._attn_implementation = IMPLEMENTATION
    layer = GPT2Block(config, layer_idx=0).to(dtype).requires_grad_(False)
    layer.mlp.act = nn.GELU(gelu)
    with torch.no_grad():
        layer.mlp.c_fc.weight.mul_(30)  # to a range in which GELU and its tanh approximation differ
    layer.ln_1.weight.normal_(1.0, 0.2)
    layer.ln_2.bias.normal_(0.0, 0.2)
    inner = copy.deepcopy(layer)
    for part in (inner.attn, inner.mlp):
        part.c_proj = FrozenLinear.from_layer(part.c_proj)
    inner.attn.c_attn, inner.mlp.c_fc = (
        FrozenLinear.from_layer(inner.attn.c_attn),
        FrozenLinear.from_layer(inner.mlp.c_fc),
    )
    return layer, FrozenGPT2Layer.from_layer(inner)


@PRECISIONS
@pytest.mark.parametrize("gelu", ["none", "tanh"])
@pytest.mark.parametrize("chunk", [1024, 80])
def test_a_frozen_layer_of_gpt2_gives_its_states_and_gradients(dtype, tolerance, gelu, chunk, monkeypatch):
    monkeypatch.setattr("cllm4rec.model.cpu.fused._MLP_CHUNK", chunk)  # 256 inner features: one part, or 86 + 86 + 84
    AttentionInterface.register(IMPLEMENTATION, attend)
    segment_RT = np.repeat([[1, 2, 3, 0]], [20, 5, 30, 5], axis=1)
    layout = DocumentLayout(segment_RT, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    inputs, weights = (torch.randn(1, 60, 64, generator=generator).to(dtype) for _ in range(2))
    results = []
    for layer in gpt2_layers(dtype, gelu):
        trained_inputs = inputs.clone().requires_grad_()
        trained = layer(trained_inputs, attention_mask=None, layout=layout)
        trained.backward(weights)
        with torch.inference_mode():
            results.append((trained.detach(), layer(inputs, attention_mask=None, layout=layout), trained_inputs.grad))
    for expected, found in zip(*results, strict=True):
        # In bf16 this is the rounding error, relative to the rounded values.
        assert float((found - expected).float().norm() / expected.float().norm()) < tolerance


def test_concurrent_threads_get_all_parts_of_an_mlp(monkeypatch):
    monkeypatch.setattr("cllm4rec.model.cpu.fused._MLP_CHUNK", 32)
    monkeypatch.setattr("cllm4rec.model.cpu.fused.FusedProduct", lambda *_: time.sleep(0.005))
    _, layer = gpt2_layers(torch.bfloat16)
    with ThreadPoolExecutor(4) as threads:
        counts = [threads.submit(lambda: len(layer.mlp_parts)) for _ in range(4)]
    assert [count.result() for count in counts] == [8, 8, 8, 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_frozen_backbone_keeps_its_weights_and_their_names(architecture, dtype):
    model = parity().make_model(architecture)
    before = {name: weight.to(dtype) for name, weight in model.backbone.model.state_dict().items()}
    model.train_only(())
    model.compute_in(dtype)
    model.compute_in(dtype)  # as each phase of training does
    after = model.backbone.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any(isinstance(module, FrozenLinear) for module in model.backbone.modules())
    assert any(isinstance(module, FrozenGPT2Layer) for module in model.backbone.modules()) == (architecture == "gpt2")


def test_a_backbone_that_is_trained_keeps_its_layers():
    model = parity().make_model("gpt2")
    model.train_only(("backbone",))
    model.compute_in(torch.bfloat16)
    assert not any(isinstance(module, FrozenLinear) for module in model.backbone.modules())
