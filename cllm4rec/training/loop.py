"""The one training loop: stages are data, the engine is a protocol, Ray is nowhere.

It needs a model, a worker's documents and somewhere to keep checkpoints; `cllm4rec.training.ray_trainer` hands it Ray's.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import Config
from cllm4rec.data.documents import Documents, Kind, Prompts
from cllm4rec.errors import TrainingError
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.batch import TensorBatch
from cllm4rec.model.cllm4rec import CLLM4Rec, Losses
from cllm4rec.model.packing import Batch, Packer, PairPacker
from cllm4rec.model.precision import precision_on
from cllm4rec.model.ranker import Ranker, merged
from cllm4rec.model.sampling import ItemSampler
from cllm4rec.training.checkpoints import Checkpoint, Progress
from cllm4rec.training.engine import Engine, EngineSettings, make_engine
from cllm4rec.training.epochs import EpochBuilder
from cllm4rec.training.phases import Phase

Log = Callable[[dict[str, Any]], None]


class Validation(Protocol):
    """What ranks are compared with after an epoch; `cllm4rec.metrics.protocol.Validation` is the real one."""

    @property
    def users(self) -> npt.NDArray[np.int64]:
        """User indices."""

    @property
    def read(self) -> Ragged:
        """What a list is made from, and may not hold."""

    def take(self, rows: npt.NDArray[np.int64]) -> Validation:
        """Some of the users."""

    def metrics(self, ranked_BK: npt.NDArray[np.int64]) -> dict[str, float]:
        """Sums over users, and their `count`, so that workers can be added up."""


# Of the paper's three the least noisy on a few hundred users, and the one that says something in a small catalog.
VALIDATION_METRIC = "ndcg@100"
VALIDATION_DEPTH = 100
# Lists of a million users at that depth are 1.2 GB.
_VALIDATED_AT_ONCE = 16_384


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What the loop needs to know besides the stages."""

    engine: Literal["deepspeed", "torch"]
    accumulation: int
    gradient_clipping: float | None
    zero_stage: int
    bf16: bool
    micro_batch_tokens: int
    max_tokens: int
    checkpoint_every_epochs: int
    seed: int
    sampled_items: int | None = None


def run_settings(config: Config) -> RunSettings:
    """What a config says of them."""
    training = config.training
    return RunSettings(
        engine=training.engine,
        accumulation=config.accumulation,
        gradient_clipping=training.gradient_clipping,
        zero_stage=training.zero_stage,
        bf16=training.bf16,
        micro_batch_tokens=training.micro_batch_tokens,
        max_tokens=config.model.max_tokens,
        checkpoint_every_epochs=training.checkpoint_every_epochs,
        seed=config.seed,
        sampled_items=training.sampled_items,
    )


@dataclasses.dataclass(frozen=True)
class Shard:
    """One worker's part of the data. Workers may have different numbers of documents."""

    documents: Documents
    validation: Validation | None


def run(
    make_model: Callable[[], CLLM4Rec],
    prompts: Prompts,
    phases: list[Phase],
    shard: Shard,
    settings: RunSettings,
    *,
    log: Log,
    save: Callable[[Checkpoint], None] = lambda checkpoint: None,
    resumed: Checkpoint | None = None,
) -> dict[str, Tensor]:
    """Train through all stages and return the weights of each stage's best epoch, by parameter name.

    make_model: the model as it is before the first stage, on the worker's device; called once a stage.
    save: called by every worker after `checkpoint_every_epochs` epochs and at each stage's end.
    resumed: go on after it; the result equals an uninterrupted run's bit for bit on the same machine.
    Raises TrainingError at the first loss that is not finite.
    """
    loop = _Loop(make_model, prompts, shard, settings, log, save)
    checkpoint = resumed or Checkpoint(Progress(), {}, {})
    for number in range(checkpoint.progress.phase, len(phases)):
        if phases[number].epochs:
            checkpoint = loop.run_phase(number, phases[number], checkpoint)
    return checkpoint.best


@dataclasses.dataclass(frozen=True)
class _Loop:
    """What is the same for all stages of a run."""

    make_model: Callable[[], CLLM4Rec]
    prompts: Prompts
    shard: Shard
    settings: RunSettings
    log: Log
    save: Callable[[Checkpoint], None]

    def run_phase(self, number: int, phase: Phase, checkpoint: Checkpoint) -> Checkpoint:
        """Go on with a stage after `checkpoint`, which may be of its own or of the stage before. Returns it done."""
        settings, before, progress = self.settings, checkpoint.best, checkpoint.progress
        model = self.make_model()
        load_parameters(model, before)
        if checkpoint.state:
            load_parameters(model, checkpoint.state)
        else:
            progress = Progress(phase=number, num_log_lines=progress.num_log_lines)
            if phase.collaborative_from_content:
                init_collaborative_from_content(model)
        model.train_only(phase.trained)
        model.compute_in(precision_on(model.collaborative_items.device, settings.bf16))
        owned = _users_by_row(settings, phase, self.shard.documents)
        engine = make_engine(model, _engine_settings(settings, phase), owned)
        steps = _Steps(phase, model, engine, self)
        if checkpoint.state:
            engine.load_moments(checkpoint.state, (steps.blank, 0.0))
        # ZeRO-3 leaves no worker a whole model to rank with, so it ranks with a copy; serving needs one device to hold it anyway.
        is_parted = settings.zero_stage == 3 and settings.engine == "deepspeed"
        ranked = self.make_model() if is_parted else model
        best = dict(before)

        for epoch in range(progress.epoch, phase.epochs):
            started = time.monotonic()
            totals = steps.epoch(epoch)
            engine.flush()
            if ranked is not model:
                load_parameters(ranked, engine.weights())
            ranker = Ranker(ranked, self.prompts, settings.max_tokens, phase.validate)
            metrics = _validate(ranker, self.shard, engine)
            metric = metrics.get(VALIDATION_METRIC)
            progress.epoch = epoch + 1
            if metric is None or progress.best_metric is None or metric > progress.best_metric:
                progress.best_metric, progress.best_epoch = metric, epoch + 1
                best = {**before, **engine.weights()}
            stops = metric is not None and epoch + 1 - progress.best_epoch >= phase.patience
            elapsed_s = time.monotonic() - started
            self.log(
                {
                    "event": "epoch",
                    "phase": phase.name,
                    "epoch": epoch + 1,
                    "epochs": phase.epochs,
                    "seconds": elapsed_s,
                    "precision": str(model.precision).removeprefix("torch."),
                    "loss": totals.loss / max(1.0, totals.documents),
                    "users_per_s": totals.users / elapsed_s,
                    "tokens_per_s": totals.tokens / elapsed_s,
                    "best_epoch": progress.best_epoch,
                    "stopped": stops,
                }
                | {f"validation_{name}": value for name, value in metrics.items()}
            )
            if stops:
                break
            if (epoch + 1) % settings.checkpoint_every_epochs == 0 and epoch + 1 < phase.epochs:
                self.save(Checkpoint(progress, engine.state(), best))
        done = Checkpoint(Progress(phase=number + 1, num_log_lines=progress.num_log_lines), {}, best)
        self.save(done)
        return done


@dataclasses.dataclass
class _Totals:
    """Of an epoch, over all workers."""

    documents: float = 0.0
    users: float = 0.0
    tokens: float = 0.0
    loss: float = 0.0


class _Steps:
    """The optimizer steps of a stage's epochs."""

    def __init__(self, phase: Phase, model: CLLM4Rec, engine: Engine, loop: _Loop) -> None:
        settings = loop.settings
        self.phase, self.model, self.engine, self.log = phase, model, engine, loop.log
        self.documents, self.accumulation = loop.shard.documents, settings.accumulation
        self.device = model.collaborative_items.device
        self.builder = EpochBuilder(loop.prompts, model.token_space, settings.max_tokens, settings.seed)
        self.packer = packer_for(model.backbone, model.token_space, settings.micro_batch_tokens, settings.max_tokens)
        self.blank = TensorBatch.of(self.packer.empty(), self.device)
        size = settings.sampled_items if Kind.INTERACTIONS in phase.kinds else None
        self.sampler = ItemSampler.of(self.documents, model.token_space, size, settings.seed)

    def epoch(self, epoch: int) -> _Totals:
        """All documents of all workers once. Raises TrainingError at the first loss that is not finite."""
        totals, step = _Totals(), 0
        made = self.phase.streams(self.builder, self.documents, epoch)
        streams = [(self.packer.batches(parts), trained) for parts, trained in made]
        while streams:
            for stream in list(streams):
                batches, trained = stream
                micro_batches = list(itertools.islice(batches, self.accumulation))
                # Workers step together until all are out of documents; who has none left runs blank batches.
                num_documents, num_users, num_tokens = self.engine.sum(*_sizes(micro_batches))
                if num_documents == 0:
                    streams.remove(stream)
                    continue
                if self.phase.alternate:
                    self.model.train_only(trained)
                step += 1
                totals.loss += self._step(micro_batches, num_documents, epoch, step)
                totals.documents += num_documents
                totals.users += num_users
                totals.tokens += num_tokens
        return totals

    def _step(self, micro_batches: list[Batch], num_documents: float, epoch: int, step: int) -> float:
        """One optimizer step; returns the summed loss of all workers."""
        parts = np.zeros(4)
        sample = self.sampler.draw(epoch, step) if self.sampler else None
        for place in range(self.accumulation):
            inputs = self.blank
            if place < len(micro_batches):
                inputs = TensorBatch.of(micro_batches[place], self.device, sample=sample)
            losses: Losses = self.engine.forward(inputs, self.phase.lambda_c)
            self.engine.backward(losses.total / num_documents)
            parts += [float(part.detach()) for part in losses]
        total, items, words, penalty = self.engine.sum(*parts.tolist())
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss of stage {self.phase.name}, epoch {epoch + 1}, step {step} is {total}; the last checkpoint "
                "is kept: lower the learning rate or set training.bf16=false, then run again"
            )
        self.engine.step()
        means = {"loss": total, "items": items, "words": words, "penalty": penalty}
        self.log(
            {"event": "step", "phase": self.phase.name, "epoch": epoch + 1, "step": step, "documents": num_documents}
            | {name: value / num_documents for name, value in means.items()}
        )
        return total


def packer_for(
    backbone: Backbone, token_space: TokenSpace, micro_batch_tokens: int, max_tokens: int
) -> Packer | PairPacker:
    """Lays documents out as the backbone reads them."""
    if backbone.pairs:
        return PairPacker(token_space, micro_batch_tokens, backbone.start_token)
    return Packer(token_space, micro_batch_tokens, max_tokens)


def load_parameters(model: CLLM4Rec, weights: Mapping[str, Tensor]) -> None:
    """Copy the parameters that `weights` names into the model; other entries (Adam's moments) are passed over."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in weights:
                weight.copy_(weights[name])


def init_collaborative_from_content(model: CLLM4Rec) -> None:
    """z^l := z^c after the warm-up: the most probable z^l given z^c before an interaction is read (Eq. 3, lambda_l = 0)."""
    with torch.no_grad():
        model.collaborative_users.copy_(model.content_users)
        model.collaborative_items.copy_(model.content_items)


def _engine_settings(settings: RunSettings, phase: Phase) -> EngineSettings:
    return EngineSettings(
        settings.engine, phase.learning_rate, settings.accumulation, settings.gradient_clipping, settings.zero_stage
    )


def _users_by_row(settings: RunSettings, phase: Phase, documents: Documents) -> npt.NDArray[np.int64] | None:
    """The users whose rows this worker steps one by one, or None where users tables have to be stepped whole.

    ZeRO-3 parts every table over the workers by itself, alternating steps hold tables of the one optimizer, and clipping
    needs the norm of all gradients, which no worker has.
    """
    parted = settings.engine == "deepspeed" and settings.zero_stage == 3
    if parted or phase.alternate or settings.gradient_clipping is not None:
        return None
    return np.unique(documents.user[documents.user >= 0])


def _sizes(batches: list[Batch]) -> tuple[float, float, float]:
    return (
        float(sum(batch.num_documents for batch in batches)),
        float(sum(batch.num_users for batch in batches)),
        float(sum(batch.num_tokens for batch in batches)),
    )


def _validate(ranker: Ranker, shard: Shard, engine: Engine) -> dict[str, float]:
    """Means over all workers' validation users; empty where the stage has no prompt to rank by or nobody to rank for."""
    validation = shard.validation
    if ranker.prompt is None or validation is None:
        return {}
    sums: Counter[str] = Counter()
    for begin in range(0, max(1, len(validation.users)), _VALIDATED_AT_ONCE):
        some = validation.take(np.arange(begin, min(begin + _VALIDATED_AT_ONCE, len(validation.users))))
        ranked_BK, _ = ranker.top_k(some.users, some.read, merged(some.read), VALIDATION_DEPTH)
        sums.update(some.metrics(ranked_BK))
    names = sorted(sums)
    totals = dict(zip(names, engine.sum(*(sums[name] for name in names)), strict=True))
    count = totals.pop("count")
    return {name: total / count for name, total in totals.items()} if count else {}
