"""The one training loop: phases are data, the engine is a protocol, Ray does not appear.

    weights = train(make_model, prompts, phases, shard, config, log=log)

It needs a model, a worker's documents and somewhere to keep checkpoints. `cllm4rec.training.ray_trainer` gives it Ray's,
`cllm4rec.training.local_trainer` this process's.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.config import Config
from cllm4rec.data.documents import Documents, Kind, Prompts
from cllm4rec.errors import TrainingError
from cllm4rec.metrics.protocol import Validation
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.batch import batch_to_device
from cllm4rec.model.cllm4rec import CLLM4Rec, Losses
from cllm4rec.model.packing import Batch, Packer, PairPacker
from cllm4rec.model.precision import precision_on
from cllm4rec.model.ranker import Ranker, merged
from cllm4rec.model.sampling import ItemSampler
from cllm4rec.training.checkpoints import Checkpoint, Progress
from cllm4rec.training.engine import Engine, make_engine
from cllm4rec.training.epochs import EpochBuilder
from cllm4rec.training.estimate import seconds_per_epoch
from cllm4rec.training.phases import Phase
from cllm4rec.typing import IntArray

Log = Callable[[dict[str, Any]], None]

# Of the paper's three metrics the least noisy on a few hundred users, and the one that still differs in a small catalog.
VALIDATION_METRIC = "ndcg@100"
VALIDATION_DEPTH = 100
# Lists of a million users at that depth are 1.2 GB.
_VALIDATED_AT_ONCE = 16_384


@dataclasses.dataclass(frozen=True)
class Shard:
    """One worker's part of the data. Workers may have different numbers of documents."""

    documents: Documents
    validation: Validation | None


def train(
    make_model: Callable[[], CLLM4Rec],
    prompts: Prompts,
    phases: list[Phase],
    shard: Shard,
    config: Config,
    *,
    log: Log,
    save: Callable[[Checkpoint], None] = lambda checkpoint: None,
    resumed: Checkpoint | None = None,
) -> dict[str, Tensor]:
    """Train through all phases and return the weights of each phase's best epoch, by parameter name.

    make_model: the model as it is before the first phase, on the worker's device; called once per phase.
    save: called by every worker after `checkpoint_every_epochs` epochs and at the end of each phase.
    resumed: continue after it; the result equals an uninterrupted run's bit for bit on the same machine.
    Raises TrainingError at the first loss that is not finite.
    """
    checkpoint = resumed or Checkpoint(Progress(), {}, {})
    for number in range(checkpoint.progress.phase, len(phases)):
        if phases[number].epochs:
            run = PhaseRun(make_model, prompts, phases[number], shard, config, log)
            checkpoint = train_phase(run, number, checkpoint, save)
    return checkpoint.best


@dataclasses.dataclass(frozen=True)
class PhaseRun:
    """What one phase is trained with."""

    make_model: Callable[[], CLLM4Rec]
    prompts: Prompts
    phase: Phase
    shard: Shard
    config: Config
    log: Log


def train_phase(run: PhaseRun, number: int, checkpoint: Checkpoint, save: Callable[[Checkpoint], None]) -> Checkpoint:
    """Train phase `number` to its end, starting from `checkpoint`, which is of this phase or of the one before."""
    phase, config, before, progress = run.phase, run.config, checkpoint.best, checkpoint.progress
    model = run.make_model()
    load_parameters(model, before)
    if checkpoint.state:
        load_parameters(model, checkpoint.state)
    else:
        progress = Progress(phase=number, num_log_lines=progress.num_log_lines)
        if phase.collaborative_from_content:
            init_collaborative_from_content(model)
    model.train_only(phase.trained)
    model.compute_in(precision_on(model.collaborative_items.device, config.training.bf16))
    users = _users_by_row(config, phase, run.shard.documents)
    engine = make_engine(model, config.training, phase.learning_rate, config.accumulation, users)
    steps = _Steps(run, model, engine)
    if checkpoint.state:
        engine.load_moments(checkpoint.state, (steps.blank, 0.0))
    # ZeRO-3 leaves no worker a whole model to rank with, so it ranks with a copy; serving needs a device for it anyway.
    is_partitioned = config.training.zero_stage == 3 and config.training.engine == "deepspeed"
    ranked = run.make_model() if is_partitioned else model
    best = dict(before)
    if not is_partitioned:
        _log_expected_time(run, model, steps, phase.epochs - progress.epoch)

    for epoch in range(progress.epoch, phase.epochs):
        started, totals = time.monotonic(), _Totals()
        for step, (micro_batches, trained, sizes) in enumerate(steps.of_epoch(epoch), 1):
            if phase.alternate:
                model.train_only(trained)
            totals.add(sizes, steps.take(micro_batches, sizes.documents, epoch, step))
        engine.sync_lazy_rows()
        if ranked is not model:
            load_parameters(ranked, engine.weights())
        metrics = _validate(Ranker(ranked, run.prompts, config.model.max_tokens, phase.validate), run.shard, engine)
        metric = metrics.get(VALIDATION_METRIC)
        progress.epoch = epoch + 1
        if metric is None or progress.best_metric is None or metric > progress.best_metric:
            progress.best_metric, progress.best_epoch = metric, epoch + 1
            best = {**before, **engine.weights()}
        is_stopped = metric is not None and epoch + 1 - progress.best_epoch >= phase.patience
        run.log(
            {
                "event": "epoch",
                "phase": phase.name,
                "epoch": epoch + 1,
                "epochs": phase.epochs,
                "precision": str(model.precision).removeprefix("torch."),
                "best_epoch": progress.best_epoch,
                "stopped": is_stopped,
                **totals.per_epoch(time.monotonic() - started),
                **{f"validation_{name}": value for name, value in metrics.items()},
            }
        )
        if is_stopped:
            break
        if (epoch + 1) % config.training.checkpoint_every_epochs == 0 and epoch + 1 < phase.epochs:
            save(Checkpoint(progress, engine.state(), best))
    done = Checkpoint(Progress(phase=number + 1, num_log_lines=progress.num_log_lines), {}, best)
    save(done)
    return done


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Of one step, over all workers."""

    documents: float
    users: float
    tokens: float


@dataclasses.dataclass
class _Totals:
    """Of an epoch, over all workers."""

    documents: float = 0.0
    users: float = 0.0
    tokens: float = 0.0
    loss: float = 0.0

    def add(self, sizes: _Sizes, loss: float) -> None:
        self.documents += sizes.documents
        self.users += sizes.users
        self.tokens += sizes.tokens
        self.loss += loss

    def per_epoch(self, seconds: float) -> dict[str, float]:
        return {
            "seconds": seconds,
            "loss": self.loss / max(1.0, self.documents),
            "users_per_s": self.users / seconds,
            "tokens_per_s": self.tokens / seconds,
        }


class _Steps:
    """The optimizer steps of a phase's epochs."""

    def __init__(self, run: PhaseRun, model: CLLM4Rec, engine: Engine) -> None:
        config, phase = run.config, run.phase
        self.phase, self.engine, self.log = phase, engine, run.log
        self.documents, self.accumulation = run.shard.documents, config.accumulation
        self.device = model.collaborative_items.device
        self.builder = EpochBuilder(run.prompts, model.token_space, config.model.max_tokens, config.seed)
        self.packer = packer_for(
            model.backbone, model.token_space, config.training.micro_batch_tokens, config.model.max_tokens
        )
        self.blank = batch_to_device(self.packer.empty(), self.device)
        size = config.training.sampled_items if Kind.INTERACTIONS in phase.kinds else None
        self.sampler = ItemSampler.of(self.documents, model.token_space, size, config.seed)

    def of_epoch(self, epoch: int) -> Iterator[tuple[list[Batch], tuple[str, ...], _Sizes]]:
        """Each step's micro batches, what they train, and the step's size: all documents of all workers once.

        Workers step together until all are out of documents; a worker without any left gets no micro batches.
        """
        made = self.phase.streams(self.builder, self.documents, epoch)
        streams = [(self.packer.batches(parts), trained) for parts, trained in made]
        while streams:
            for stream in list(streams):
                batches, trained = stream
                micro_batches = list(itertools.islice(batches, self.accumulation))
                sizes = _Sizes(*self.engine.sum(*_sizes(micro_batches)))
                if sizes.documents == 0:
                    streams.remove(stream)
                else:
                    yield micro_batches, trained, sizes

    def take(self, micro_batches: list[Batch], num_documents: float, epoch: int, step: int) -> float:
        """One optimizer step; returns the summed loss of all workers. Raises TrainingError where it is not finite."""
        parts = np.zeros(4)
        sample = self.sampler.draw(epoch, step) if self.sampler else None
        for place in range(self.accumulation):
            inputs = self.blank
            if place < len(micro_batches):
                inputs = batch_to_device(micro_batches[place], self.device, sample=sample)
            losses: Losses = self.engine.forward(inputs, self.phase.lambda_c)
            self.engine.backward(losses.total / num_documents)
            parts += [float(part.detach()) for part in losses]
        total, items, words, penalty = self.engine.sum(*parts.tolist())
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss of {self.phase.name}, epoch {epoch + 1}, step {step} is {total}; the last checkpoint is kept: "
                "lower the learning rate or set training.bf16=false, then run again"
            )
        self.engine.step()
        means = {"loss": total, "items": items, "words": words, "penalty": penalty}
        self.log(
            {"event": "step", "phase": self.phase.name, "epoch": epoch + 1, "step": step, "documents": num_documents}
            | {name: value / num_documents for name, value in means.items()}
        )
        return total


def _log_expected_time(run: PhaseRun, model: CLLM4Rec, steps: _Steps, epochs: int) -> None:
    """Say before the first epoch how long the phase may take."""
    documents, validation = run.shard.documents, run.shard.validation
    seconds = seconds_per_epoch(model, run.phase, documents, validation, steps.builder, steps.packer)
    if seconds is not None and epochs:
        run.log({"event": "expected", "phase": run.phase.name, "epochs": epochs, "seconds": epochs * seconds})


def packer_for(
    backbone: Backbone, token_space: TokenSpace, micro_batch_tokens: int, max_tokens: int
) -> Packer | PairPacker:
    """Lays documents out as the backbone reads them."""
    if backbone.pairs:
        return PairPacker(token_space, micro_batch_tokens, backbone.start_token)
    return Packer(token_space, micro_batch_tokens, max_tokens)


def load_parameters(model: CLLM4Rec, weights: Mapping[str, Tensor]) -> None:
    """Copy the parameters that `weights` names into the model; other entries (Adam's moments) are ignored."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in weights:
                weight.copy_(weights[name])


def init_collaborative_from_content(model: CLLM4Rec) -> None:
    """z^l := z^c after the warm-up: the most probable z^l given z^c before an interaction is read (Eq. 3, lambda_l = 0)."""
    with torch.no_grad():
        model.collaborative_users.copy_(model.content_users)
        model.collaborative_items.copy_(model.content_items)


def _users_by_row(config: Config, phase: Phase, documents: Documents) -> IntArray | None:
    """The users whose rows this worker steps one by one, or None if the users tables have to be stepped whole.

    ZeRO-3 partitions every table over the workers by itself, alternating steps hold tables of the one optimizer, and
    clipping needs the norm of all gradients, which no worker has.
    """
    is_partitioned = config.training.engine == "deepspeed" and config.training.zero_stage == 3
    if is_partitioned or phase.alternate or config.training.gradient_clipping is not None:
        return None
    return np.unique(documents.user[documents.user >= 0])


def _sizes(batches: list[Batch]) -> tuple[float, float, float]:
    return (
        float(sum(batch.num_documents for batch in batches)),
        float(sum(batch.num_users for batch in batches)),
        float(sum(batch.num_tokens for batch in batches)),
    )


def _validate(ranker: Ranker, shard: Shard, engine: Engine) -> dict[str, float]:
    """Means over all workers' validation users; empty if the phase has no prompt to rank by or there are no such users."""
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
