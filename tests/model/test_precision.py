"""bfloat16 if the device multiplies it natively, otherwise float32, in training and in scoring."""

import pytest
import torch
from support.directories import write_prepared, write_random_model
from support.parity import phases, train

from cllm4rec.model import precision
from cllm4rec.model.precision import precision_on
from cllm4rec.model.saved_model import SavedModel


@pytest.fixture(params=[True, False], ids=["native bf16", "no bf16"])
def expected_precision(request, monkeypatch):
    """The precision of a CPU with and without bfloat16 instructions."""
    monkeypatch.setattr(precision, "has_native_bf16", lambda device: request.param)
    return torch.bfloat16 if request.param else torch.float32


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ({"avx512_f": True, "avx512_vnni": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": False}, torch.float32),
    ],
)
def test_a_cpu_computes_in_bf16_only_with_native_instructions(instructions, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert precision_on("cpu", bf16=True) == expected
    assert precision_on("cpu", bf16=False) == torch.float32


@pytest.mark.parametrize(("has_it", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_that_only_emulates_bf16_computes_in_float32(has_it, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it or including_emulation)
    assert precision_on(torch.device("cuda:0"), bf16=True) == expected


def test_a_model_trained_in_bf16_is_loaded_in_the_precision_of_this_machine(expected_precision, tmp_path):
    directory = write_random_model(tmp_path, write_prepared(tmp_path / "prepared"), seed=0, bf16=True)
    model = SavedModel.from_pretrained(directory, device="cpu").ranker.model
    assert (model.precision, model.backbone.dtype) == (expected_precision, expected_precision)


def test_a_run_trains_in_the_precision_of_this_machine_and_logs_it(expected_precision):
    _, log = train(phases()[:2], bf16=True)
    logged = {entry["precision"] for entry in log if entry["event"] == "epoch"}
    assert logged == {str(expected_precision).removeprefix("torch.")}
