"""The benchmark: the reference has the project's loss and lists, and useful operations are counted correctly."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.parity import MAX_TOKENS, all_kinds, parity

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.commands import benchmark
from cllm4rec.config import BackboneSize, load_config
from cllm4rec.data.documents import Documents, Kind
from cllm4rec.errors import ConfigError, ResourceError
from cllm4rec.experiments.benchmark import machine as machine_module
from cllm4rec.experiments.benchmark.corpora import load_corpora
from cllm4rec.experiments.benchmark.figures import repeats, summarize
from cllm4rec.experiments.benchmark.growth import cost_of_additional_users, run_observed
from cllm4rec.experiments.benchmark.reference import Reference
from cllm4rec.experiments.benchmark.report import report
from cllm4rec.experiments.benchmark.training import PHASES, Setting, epoch_of, our_steps, reference_steps
from cllm4rec.experiments.benchmark.work import Work, document_lengths
from cllm4rec.model.batch import batch_to_device
from cllm4rec.model.built_backbone import build_backbone
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.model.packing import Packer
from cllm4rec.model.ranker import Ranker
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.training.phases import COLLABORATIVE, CONTENT

ROOT = Path(__file__).parents[2]
WORLD = parity()
HISTORIES = WORLD.world.histories


def model() -> CLLM4Rec:
    perturbed = WORLD.make_model()
    with torch.no_grad():
        for number, table in enumerate(perturbed.tables().values()):
            table += 0.05 * torch.randn(table.shape, generator=torch.Generator().manual_seed(number))
    return perturbed


def documents_of(kind: Kind) -> Documents:
    return all_kinds().of_kinds([kind]).take(np.arange(20))


def total_and_gradients(tested: CLLM4Rec, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    tested.zero_grad()
    loss.backward()
    gradients = {name: table.grad for name, table in tested.tables().items() if table.grad is not None}
    return loss.item(), {name: gradient.clone() for name, gradient in gradients.items()}


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_the_references_loss_and_gradients_are_the_projects(kind):
    tested, documents = model(), documents_of(kind)
    tested.train_only(COLLABORATIVE + CONTENT)
    batch = next(iter(Packer(tested.token_space, 40 * MAX_TOKENS, MAX_TOKENS).batches([documents])))
    ours, our_gradients = total_and_gradients(tested, tested(batch_to_device(batch, torch.device("cpu")), 0.7).total)
    plain, plain_gradients = total_and_gradients(tested, Reference(tested).loss(documents, 0.7))
    assert plain == pytest.approx(ours, rel=1e-4)
    for name, gradient in plain_gradients.items():
        assert torch.allclose(gradient, our_gradients[name], atol=1e-4 * gradient.abs().max().item()), name


def test_the_reference_ranks_as_the_scorer():
    tested = model()
    read = HISTORIES.together("train", "validation")
    # The Scorer reads histories in order of items.
    order = np.lexsort((read.values, read.rows))
    sorted_read = type(read)(read.values[order], read.offsets)
    prompts = WORLD.prompts.recommendation(WORLD.token_space, HISTORIES.user, sorted_read, Ragged.empty(len(read)))
    items, _ = Scorer(Ranker(tested, WORLD.prompts, MAX_TOKENS), WORLD.world.catalog, "").top_k(HISTORIES.user, read, 5)
    assert Reference(tested).top_k(prompts, read, 5).tolist() == items.tolist()


def test_useful_work_is_that_of_products_written_out():
    tested = model()
    width, layers = tested.backbone.width, 2
    batch = next(
        iter(Packer(tested.token_space, 40 * MAX_TOKENS, MAX_TOKENS).batches([documents_of(Kind.INTERACTIONS)]))
    )
    lengths = documents_of(Kind.INTERACTIONS).lengths
    assert sorted(document_lengths(batch)) == sorted(lengths)
    products = 0.0
    for length in lengths.tolist():
        for inner, outer in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
            products += layers * 2 * (2 * length * inner * outer)  # forward, and the gradient of the input
        for place in range(length):
            products += layers * 3 * 2 * (2 * (place + 1) * width)  # two products per pair, each counted three times
    products += 3 * (2 * len(batch.item_slots) * width * tested.token_space.num_items)
    assert Work.of(tested).training_step(batch) == pytest.approx(products)
    forward = Work.of(tested).scoring(np.array([3]))
    assert forward == 2 * 3 * 12 * width**2 * layers + layers * 6 * 4 * width + 2 * width * tested.token_space.num_items


def test_the_machines_rate_is_that_of_its_fastest_product(monkeypatch):
    monkeypatch.setattr(machine_module, "SHAPES", ((64, 64, 64), (256, 256, 256)))
    monkeypatch.setattr(machine_module, "_COPY_BYTES", 1 << 16)
    figures = machine_module.machine(repeats=3)
    for name in ("fp32_flops_per_s", "bf16_flops_per_s", "copy_bytes_per_s"):
        low, high = figures["spread"][name]
        assert 0 < low <= figures[name] <= high
    assert "fp32 matrix products" in report({"machine": figures})
    assert machine_module.rate_sampler(torch.float32)() > 0


def test_a_part_that_does_not_exist_is_named_in_one_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "jobs.benchmark", "--only", "machine,rain"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert json.loads(done.stdout.splitlines()[-1])["error"].startswith("--only has unknown parts: rain;")


def test_a_gpu_that_is_not_there_is_asked_for_in_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cuda needs a GPU"):
        benchmark.run(load_config("benchmark", []), argparse.Namespace(device="cuda"))


def test_the_bare_loop_is_measured_on_a_machine_without_ray_and_deepspeed(tmp_path):
    """As on a GPU machine with torch and transformers only."""
    words = ["--only", "training,scoring", "--output", str(tmp_path), "--threads", "1", "model.max_tokens=160",
             "training.micro_batch_tokens=160", "score.batch_users=400",
             "model.backbone={layers: 1, width: 8, heads: 1, vocab_size: 50257}"]  # fmt: skip
    code = (
        "import runpy, sys\n"
        "for name in ('ray', 'deepspeed', 'deltalake', 'implicit'): sys.modules[name] = None\n"
        "from cllm4rec.experiments.benchmark import figures, machine\n"
        "rates = ('fp32_flops_per_s', 'bf16_flops_per_s', 'copy_bytes_per_s')\n"
        "machine.machine = lambda **_: figures.summarize({rate: [1e9] for rate in rates}) | {'threads': 1}\n"
        "machine.rate_sampler = lambda *_: lambda: 1e9\n"
        f"sys.argv = ['jobs.benchmark', *{words!r}]\n"
        "runpy.run_module('jobs.benchmark', run_name='__main__')\n"
    )
    environment = os.environ | {"CLLM4REC_SHARED": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = (tmp_path / "report.md").read_text()
    assert "### Training" in report
    assert "### Scoring" in report


def test_a_programs_peak_memory_and_last_line_are_seen():
    code = "import json, time; held = bytearray(200_000_000); time.sleep(1); print(json.dumps({'held': len(held)}))"
    seconds, peak_mb, figures = run_observed([sys.executable, "-c", code])
    assert figures == {"held": 200_000_000}
    assert seconds >= 1.0
    assert 200 <= peak_mb < 400
    with pytest.raises(ResourceError, match="no such thing"):
        run_observed([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_a_additional_user_costs_what_is_left_without_the_start():
    small = {"users": 1_000, "prepare_s": 11.0, "epoch_s": 1.0, "score_s": 5.0}
    large = {"users": 11_000, "prepare_s": 31.0, "epoch_s": 11.0, "score_s": 5.5}
    assert cost_of_additional_users(small, large) == pytest.approx(
        {
            "prepare_ms_per_additional_user": 2.0,
            "epoch_ms_per_additional_user": 1.0,
            "score_ms_per_additional_user": 0.05,
        }
    )
    text = report({"growth": {"users": [small, large | cost_of_additional_users(small, large)]}})
    assert "| 1,000 | 11 | 1 | 5 | – | – | – |" in text


def test_figures_are_medians_with_their_spread():
    assert summarize({"users_per_s": [3.0, 1.0, 10.0]}) == {"users_per_s": 3.0, "spread": {"users_per_s": [1.0, 10.0]}}


@pytest.mark.parametrize(("seconds", "counted"), [(1e9, 5), (0.0, 3)])
def test_a_slow_machine_takes_fewer_goes_and_at_least_three(seconds, counted):
    assert list(repeats(5, seconds, warm_up=2)) == [False] * 2 + [True] * counted


def test_without_shared_data_the_sample_world_stands_in_and_the_report_says_so(tmp_path):
    corpora = load_corpora(tmp_path)
    assert any("CLLM4REC_SHARED" in note for note in corpora.notes)
    assert corpora.histories.histories.lengths.min() >= 1
    assert corpora.texts.words.lengths.max() <= 128
    assert "CLLM4REC_SHARED" in report({"notes": list(corpora.notes)})


def test_real_histories_and_reviews_are_read_from_the_shared_data(shared_dir):
    corpora = load_corpora(shared_dir)
    beauty, instruments = corpora.histories, corpora.texts
    assert (beauty.num_users, beauty.num_items, len(beauty.histories.values)) == (22_363, 12_101, 198_502)
    assert (instruments.num_users, instruments.num_items, len(instruments.histories.values)) == (1_429, 900, 10_261)
    assert 10_000 < len(instruments.words) <= 10_261
    assert corpora.notes == ()


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_every_kind_of_step_is_measured_in_the_same_units_as_the_reference(phase, tmp_path):
    corpora = load_corpora(tmp_path)
    backbone = build_backbone(BackboneSize(layers=1, width=8, heads=1, vocab_size=50257), 50257, 160, 0)
    setting = Setting(micro_batch_tokens=320, max_tokens=160, steps=2, reference_steps=1)
    documents = epoch_of(phase, corpora.texts, corpora.prompts, setting)
    ours = our_steps(documents, corpora.texts, backbone, phase, setting, lambda: 2e9)
    assert {"users_per_s", "documents_per_s", "tokens_per_s", "useful_flops_per_s", "spread", "fill"} <= set(ours)
    assert len(ours["spread"]["users_per_s"]) == 2
    assert ours["flops_share"] == pytest.approx(ours["useful_flops_per_s"] / 2e9)
    if phase.name != "mixed":
        plain_backbone = build_backbone(BackboneSize(layers=1, width=8, heads=1, vocab_size=50257), 50257, 160, 0)
        plain = reference_steps(documents, corpora.texts, plain_backbone, phase, setting)
        assert {"users_per_s", "tokens_per_s"} <= set(plain)
