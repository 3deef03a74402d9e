"""Speed of training steps for each kind of document, ours and the reference. Steps use the components of the training loop."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch

from cllm4rec.arrays.ragged import chunks
from cllm4rec.config import TrainingConfig
from cllm4rec.data.documents import Documents, Kind, Prompts
from cllm4rec.experiments.benchmark.corpora import Corpora, Corpus
from cllm4rec.experiments.benchmark.figures import Figures, ratio, repeats, summarize
from cllm4rec.experiments.benchmark.reference import BATCH, Reference
from cllm4rec.experiments.benchmark.work import Work
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.batch import batch_to_device
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.training.engine import make_engine
from cllm4rec.training.epochs import EpochBuilder
from cllm4rec.training.loop import packer_for
from cllm4rec.training.phases import COLLABORATIVE, CONTENT, Phase

PHASES = (
    Phase("interaction", COLLABORATIVE, ("interactions",), 1, 1e-3, lambda_c=1.0),
    Phase("recommendation", COLLABORATIVE, ("recommendations",), 1, 1e-3, lambda_c=1.0),
    Phase("text", CONTENT, ("texts",), 1, 1e-3, lambda_c=1.0),
    Phase("mixed", COLLABORATIVE + CONTENT, ("interactions", "texts"), 1, 1e-3, lambda_c=1.0),
)
"""The phases whose steps are measured; figures have the names of the phases."""
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How steps are measured. Batch sizes are `training.micro_batch_tokens`, `model.max_tokens` and `score.batch_users`.

    seconds: the time per kind of step, after which a slow machine takes no further steps.
    precision: that of our implementation; the reference is in fp32.
    """

    micro_batch_tokens: int = 8192
    max_tokens: int = 256
    batch_users: int = 512
    steps: int = 15
    reference_steps: int = 7
    seconds: float = 45.0
    seed: int = 0
    device: str = "cpu"
    precision: torch.dtype = torch.bfloat16


def training(
    corpora: Corpora, backbone: Backbone, setting: Setting, rate: Callable[[], float], say: Callable[[str], None]
) -> Figures:
    """Figures of `interaction`, `recommendation`, `text` and `mixed` steps. `backbone` is in fp32 and is not changed.

    rate: measures the machine's current rate in `setting.precision`, FLOP/s; called after each step.
    """
    result: Figures = {}
    for phase in PHASES:
        kind, corpus = phase.name, corpora.texts if "texts" in phase.reads else corpora.histories
        documents = epoch_of(phase, corpus, corpora.prompts, setting)
        ours = our_steps(documents, corpus, copy.deepcopy(backbone), phase, setting, rate)
        result[kind] = ours | {"corpus": corpus.name}
        if kind != "mixed":
            reference = reference_steps(documents, corpus, backbone, phase, setting)
            unit = "tokens_per_s" if kind == "text" else "users_per_s"
            result[kind] |= {"vs_reference": ratio(ours, reference, unit), "reference": reference}
        say(f"training {kind}: {ours['tokens_per_s']:,.0f} tokens/s, {ours['useful_flops_per_s'] / 1e9:,.0f} GFLOP/s")
    return result


def epoch_of(phase: Phase, corpus: Corpus, prompts: Prompts, setting: Setting) -> Documents:
    """The documents of the first epoch of a phase, in their order."""
    builder = EpochBuilder(prompts, corpus.token_space, setting.max_tokens, setting.seed)
    ((stream, _),) = phase.streams(builder, corpus.documents(prompts), 0)
    return Documents.concat(list(stream))


def our_steps(
    documents: Documents, corpus: Corpus, backbone: Backbone, phase: Phase, setting: Setting, rate: Callable[[], float]
) -> Figures:  # fmt: skip
    """Packing, forward pass, backward pass and optimizer of each step, after two warm-up steps."""
    model = CLLM4Rec(backbone, corpus.token_space, seed=setting.seed)
    model.train_only(phase.trained)
    model.compute_in(setting.precision)
    model.to(setting.device)
    engine = make_engine(model, TrainingConfig(engine="torch"), phase.learning_rate, users=np.arange(corpus.num_users))
    packer = packer_for(backbone, corpus.token_space, setting.micro_batch_tokens, setting.max_tokens)
    meter, device, work = _StepMeter(corpus), torch.device(setting.device), Work.of(model)
    steps = repeats(setting.steps, setting.seconds, warm_up=2)
    for counts, batch in zip(steps, _timed(packer.batches([documents]), meter), strict=False):
        losses = engine.forward(batch_to_device(batch, device), phase.lambda_c)
        engine.backward(losses.total / batch.num_documents)
        float(losses.total.detach())  # the training loop logs the loss, for which a GPU has to finish
        engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        meter.add(counts, batch.num_documents, batch.num_users, batch.num_tokens, work.training_step(batch), rate)
        meter.fill.append(batch.num_tokens / batch.grids[0].segment_RT.size)
    return meter.figures() | {"fill": float(np.median(meter.fill))}


def reference_steps(
    documents: Documents, corpus: Corpus, backbone: Backbone, phase: Phase, setting: Setting
) -> Figures:
    model = CLLM4Rec(backbone, corpus.token_space, seed=setting.seed).to(setting.device)
    model.train_only(phase.trained)
    reference, meter = Reference(model), _StepMeter(corpus)
    optimizer = reference.optimizer(phase.learning_rate)
    batches = map(documents.take, chunks(len(documents), BATCH))
    steps = repeats(setting.reference_steps, setting.seconds, warm_up=1)
    for counts, batch in zip(steps, _timed(batches, meter), strict=False):
        reference.step(batch, phase.lambda_c, optimizer)
        num_users = int(np.isin(batch.kind, [Kind.INTERACTIONS, Kind.RECOMMENDATION]).sum())
        meter.add(counts, len(batch), num_users, int(batch.lengths.sum()))
    return meter.figures()


class _StepMeter:
    """Rates of steps, one sample per step. `start_step` starts the clock of a step."""

    def __init__(self, corpus: Corpus) -> None:
        self._began = 0.0
        self.fill: list[float] = []
        self._samples: dict[str, list[float]] = {}
        # In text steps, users/s is texts/s divided by the average number of texts per user.
        self._texts_per_user = max(1.0, len(corpus.words) / corpus.num_users)

    def start_step(self) -> None:
        self._began = time.perf_counter()

    def add(
        self, counts: bool, num_documents: int, num_users: int, num_tokens: int, flops: float = 0.0,
        rate: Callable[[], float] | None = None,
    ) -> None:  # fmt: skip
        seconds = time.perf_counter() - self._began
        if not counts:
            return
        amounts = {
            "users_per_s": num_users or num_documents / self._texts_per_user,
            "documents_per_s": num_documents,
            "tokens_per_s": num_tokens,
        }
        if rate is not None:
            amounts |= {"useful_flops_per_s": flops, "flops_share": flops / rate()}
        for name, amount in amounts.items():
            self._samples.setdefault(name, []).append(amount / seconds)

    def figures(self) -> Figures:
        return summarize(self._samples)


def _timed(batches: Iterator[T], meter: _StepMeter) -> Iterator[T]:
    """Start the clock of a step before its batch is made, because packing is part of the step."""
    while True:
        meter.start_step()
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch
