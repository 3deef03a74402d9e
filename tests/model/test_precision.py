"""bfloat16 where the device multiplies it, float32 elsewhere, in training as in scoring."""

import pytest
import torch
from support.directories import write_prepared, write_random_model
from support.parity import phases, train

from cllm4rec.model import precision
from cllm4rec.model.precision import precision_on
from cllm4rec.model.saved_model import SavedModel


@pytest.fixture(params=[True, False], ids=["multiplies bf16", "does not"])
def wanted(request, monkeypatch):
    """The precision of a CPU that has bf16 products or has none."""
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: request.param)
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
def test_a_cpu_computes_in_what_it_multiplies(instructions, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert precision_on("cpu", bf16=True) == expected
    assert precision_on("cpu", bf16=False) == torch.float32


@pytest.mark.parametrize(("has_it", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_that_only_emulates_bf16_computes_in_float32(has_it, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it or including_emulation)
    assert precision_on(torch.device("cuda:0"), bf16=True) == expected


def test_a_model_trained_in_bf16_is_loaded_in_what_is_here(wanted, tmp_path):
    directory = write_random_model(tmp_path, write_prepared(tmp_path / "prepared"), seed=0, bf16=True)
    model = SavedModel.from_pretrained(directory, device="cpu").ranker.model
    assert (model.precision, model.backbone.dtype) == (wanted, wanted)


def test_a_run_trains_in_what_is_here_and_says_so(wanted):
    _, log = train(phases()[:2], bf16=True)
    assert {entry["precision"] for entry in log if entry["event"] == "epoch"} == {str(wanted).removeprefix("torch.")}
