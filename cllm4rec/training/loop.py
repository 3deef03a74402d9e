"""The training loop. Phases are data, the engine is an interface, and Ray is not imported.

    weights = train(make_model, prompts, phases, shard, config, log=log)

`cllm4rec.training.ray_trainer` runs it in Ray Train workers, `cllm4rec.training.local_trainer` in the current process.
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
from cllm4rec.model.ranker import Ranker
from cllm4rec.model.sampling import ItemSampler
from cllm4rec.training import zero3
from cllm4rec.training.checkpoints import Checkpoint, Progress
from cllm4rec.training.engine import Engine, make_engine
from cllm4rec.training.epochs import EpochBuilder
from cllm4rec.training.estimate import seconds_per_epoch
from cllm4rec.training.phases import Phase
from cllm4rec.training.schedule import fixed
from cllm4rec.training.shares import Value, whole
from cllm4rec.typing import IntArray

Log = Callable[[dict[str, Any]], None]

# The least noisy of the paper's three metrics on a few hundred users, and the most sensitive one in a small catalog.
VALIDATION_METRIC = "ndcg@100"
VALIDATION_DEPTH = 100
# Lists of this depth for a million users take 1.2 GB.
_VALIDATED_AT_ONCE = 16_384


@dataclasses.dataclass(frozen=True)
class Shard:
    """The data of one worker. Workers may have different numbers of documents."""

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
) -> dict[str, Value]:
    """Train all phases and return the weights of the best epoch of each, by parameter name: with ZeRO-3 this worker's shares.

    make_model: returns the model before the first phase, on the device of the worker. Called once or twice per phase.
    log: receives one entry per step, per epoch, and per phase the expected time.
    save: called by every worker after every `checkpoint_every_epochs` epochs and at the end of each phase.
    resumed: the checkpoint to continue from. The result is bit-identical to an uninterrupted run on the same machine.
    Raises TrainingError at the first loss that is not finite.
    """
    checkpoint = resumed or Checkpoint(Progress(), {}, {})
    if resumed:
        # Ray may delete the files that hold divided tensors.
        own = zero3.own_share if zero3.divides(config.training) else whole
        checkpoint = dataclasses.replace(resumed, best={name: own(value) for name, value in resumed.best.items()})
    for number in range(checkpoint.progress.phase, len(phases)):
        if phases[number].epochs:
            run = PhaseRun(make_model, prompts, phases[number], shard, config, log)
            checkpoint = train_phase(run, number, checkpoint, save)
    return checkpoint.best


@dataclasses.dataclass(frozen=True)
class PhaseRun:
    """The inputs of one phase."""

    make_model: Callable[[], CLLM4Rec]
    prompts: Prompts
    phase: Phase
    shard: Shard
    config: Config
    log: Log


def train_phase(run: PhaseRun, number: int, checkpoint: Checkpoint, save: Callable[[Checkpoint], None]) -> Checkpoint:
    """Train phase `number` to its end, starting from a checkpoint of this phase or of the end of the previous one."""
    phase, config, previous, progress = run.phase, run.config, checkpoint.best, checkpoint.progress
    model = run.make_model()
    model.train_only(phase.trained)
    device = model.collaborative_items.device
    if zero3.divides(config.training):
        device = zero3.local_device()
        precisions = model.precisions(precision_on(device, config.training.bf16))
        zero3.divide(model, precisions, config.training.cpu_offload)
    precision = precision_on(device, config.training.bf16)
    load_parameters(model, previous)
    if checkpoint.state:
        load_parameters(model, checkpoint.state)
    else:
        progress = Progress(phase=number, num_log_lines=progress.num_log_lines)
        if phase.collaborative_from_content:
            init_collaborative_from_content(model)
    model.compute_in(precision)
    if config.training.gradient_checkpointing:
        model.backbone.checkpoint_layers()
    users = _row_wise_users(config, phase, run.shard.documents)
    engine = make_engine(model, config.training, phase.learning_rate, config.accumulation, users)
    steps = _Steps(run, model, engine)
    if checkpoint.state:
        engine.load_moments(checkpoint.state, (steps.empty_batch, 0.0))
    best = dict(previous)
    if not zero3.divides(config.training):
        _log_expected_time(run, model, steps, phase.epochs - progress.epoch)

    for epoch in range(progress.epoch, phase.epochs):
        started, totals = time.monotonic(), _Totals()
        for step, (micro_batches, trained, sizes) in enumerate(steps.iter_epoch(epoch), 1):
            if phase.alternate:
                model.train_only(trained)
            totals.add(sizes, steps.run_step(micro_batches, sizes.documents, epoch, step))
        is_due = (epoch + 1) % (config.training.validate_every_epochs or 1) == 0 or epoch + 1 == phase.epochs
        metrics: dict[str, float] = {}
        if is_due and phase.validate is not None:
            with engine.ranking(steps.empty_batch) as encode:
                ranker = Ranker(model, run.prompts, config.model.max_tokens, phase.validate, encode=encode)
                metrics = _validate(ranker, run.shard, engine)
        metric = metrics.get(VALIDATION_METRIC)
        progress.epoch = epoch + 1
        if is_due and (metric is None or progress.best_metric is None or metric > progress.best_metric):
            progress.best_metric, progress.best_epoch = metric, epoch + 1
            best = {**previous, **engine.weights()}
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
    """The size of one step, summed over all workers."""

    documents: float
    users: float
    tokens: float


@dataclasses.dataclass
class _Totals:
    """The totals of an epoch, summed over all workers."""

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
            model.backbone, model.token_space, fixed(config.training.micro_batch_tokens), config.model.max_tokens
        )
        self.empty_batch = batch_to_device(self.packer.empty(), self.device)
        size = config.training.sampled_items if Kind.INTERACTIONS in phase.kinds else None
        self.sampler = ItemSampler.from_documents(self.documents, model.token_space, size, config.seed)

    def iter_epoch(self, epoch: int) -> Iterator[tuple[list[Batch], tuple[str, ...], _Sizes]]:
        """For each step: this worker's micro-batches, the parameters that they train, and the size of the whole step.

        Each document of each worker occurs once. Workers step together until all have used their documents; a worker without
        documents left gets no micro-batches.
        """
        document_streams = self.phase.streams(self.builder, self.documents, epoch)
        streams = [(self.packer.batches(parts), trained) for parts, trained in document_streams]
        while streams:
            for stream in list(streams):
                batches, trained = stream
                micro_batches = list(itertools.islice(batches, self.accumulation))
                sizes = _Sizes(*self.engine.sum(*_sizes(micro_batches)))
                if sizes.documents == 0:
                    streams.remove(stream)
                else:
                    yield micro_batches, trained, sizes

    def run_step(self, micro_batches: list[Batch], num_documents: float, epoch: int, step: int) -> float:
        """Take one optimizer step and return the loss, summed over documents and workers.

        num_documents: of all workers. Raises TrainingError if the loss is not finite.
        """
        sums = np.zeros(4)
        sample = self.sampler.draw(epoch, step) if self.sampler else None
        for number in range(self.accumulation):
            inputs = self.empty_batch
            if number < len(micro_batches):
                inputs = batch_to_device(micro_batches[number], self.device, sample=sample)
            losses: Losses = self.engine.forward(inputs, self.phase.lambda_c)
            self.engine.backward(losses.total / num_documents)
            sums += [float(loss.detach()) for loss in losses]
        total, items, words, penalty = self.engine.sum(*sums.tolist())
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss of {self.phase.name}, epoch {epoch + 1}, step {step} is {total}; the last checkpoint is kept: "
                "lower the learning rate or set training.bf16=false, then run the same command again"
            )
        self.engine.step()
        means = {"loss": total, "items": items, "words": words, "penalty": penalty}
        self.log(
            {"event": "step", "phase": self.phase.name, "epoch": epoch + 1, "step": step, "documents": num_documents}
            | {name: value / num_documents for name, value in means.items()}
        )
        return total


def _log_expected_time(run: PhaseRun, model: CLLM4Rec, steps: _Steps, epochs: int) -> None:
    """Log the expected duration of the remaining epochs."""
    documents, validation = run.shard.documents, run.shard.validation
    seconds = seconds_per_epoch(model, run.phase, documents, validation, steps.builder, steps.packer)
    if seconds is not None and epochs:
        run.log({"event": "expected", "phase": run.phase.name, "epochs": epochs, "seconds": epochs * seconds})


def packer_for(
    backbone: Backbone, token_space: TokenSpace, micro_batch_tokens: int, max_tokens: int
) -> Packer | PairPacker:
    """The packer for the inputs of the backbone."""
    if backbone.is_encoder_decoder:
        return PairPacker(token_space, micro_batch_tokens, backbone.start_token)
    return Packer(token_space, micro_batch_tokens, max_tokens)


def load_parameters(model: CLLM4Rec, weights: Mapping[str, Value]) -> None:
    """Copy the weights into the parameters of the same names. Other entries, such as Adam's moments, are ignored."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in weights:
                zero3.set_values(weight, weights[name])


def init_collaborative_from_content(model: CLLM4Rec) -> None:
    """Set z^l to z^c after the warm-up: the most probable z^l given z^c without interactions (Eq. 3, lambda_l = 0)."""
    with torch.no_grad():
        for table in ("users", "items"):
            content = getattr(model, f"content_{table}")
            zero3.local_values(getattr(model, f"collaborative_{table}")).copy_(zero3.local_values(content))


def _row_wise_users(config: Config, phase: Phase, documents: Documents) -> IntArray | None:
    """The users whose rows this worker steps row by row, or None if the user tables are stepped as dense parameters.

    Row-wise steps are impossible with ZeRO-3, which partitions all tables itself; with alternating steps, which freeze
    tables of a shared optimizer; and with clipping, which needs the norm of the gradients of all workers.
    """
    if zero3.divides(config.training) or phase.alternate or config.training.gradient_clipping is not None:
        return None
    return np.unique(documents.user[documents.user >= 0])


def _sizes(batches: list[Batch]) -> tuple[float, float, float]:
    return (
        float(sum(batch.num_documents for batch in batches)),
        float(sum(batch.num_users for batch in batches)),
        float(sum(batch.num_tokens for batch in batches)),
    )


def _validate(ranker: Ranker, shard: Shard, engine: Engine) -> dict[str, float]:
    """Means over the validation users of all workers. Empty if the phase does not validate or there are no such users."""
    validation = shard.validation
    if ranker.prompt is None or validation is None:
        return {}
    sums: Counter[str] = Counter()
    for begin in itertools.count(0, _VALIDATED_AT_ONCE):
        chunk = validation.take(np.arange(begin, min(begin + _VALIDATED_AT_ONCE, len(validation.users))))
        ranked_BK, _ = ranker.top_k(chunk.users, chunk.read, chunk.read.unique(), VALIDATION_DEPTH)
        sums.update(chunk.metrics(ranked_BK))
        if not engine.sum(float(begin + _VALIDATED_AT_ONCE < len(validation.users)))[0]:
            break  # on all workers together: with ZeRO-3, they rank together
    names = sorted(sums)
    totals = dict(zip(names, engine.sum(*(sums[name] for name in names)), strict=True))
    count = totals.pop("count")
    return {name: total / count for name, total in totals.items()} if count else {}
