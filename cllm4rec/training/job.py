"""The description of a training run, for Ray workers and for local training, and its log file."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from torch import Tensor

from cllm4rec.config import Config
from cllm4rec.data.prepared import load_token_space
from cllm4rec.errors import ArtifactError
from cllm4rec.model.adapter import add_adapter
from cllm4rec.model.backbone_files import has_adapter, load_backbone, new_backbone
from cllm4rec.model.cllm4rec import CLLM4Rec, new_model
from cllm4rec.model.precision import precision_on
from cllm4rec.model.saved_model import load_tables
from cllm4rec.storage import files
from cllm4rec.training import zero3
from cllm4rec.training.checkpoints import Checkpoint
from cllm4rec.training.free_memory import free_memory
from cllm4rec.training.memory import Sizes, check_memory, training_memory
from cllm4rec.training.phases import Phase

METRICS = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class Start:
    """The tables that training starts from: a finished directory and its kind."""

    directory: str
    kind: str

    def tables(self) -> dict[str, Tensor]:
        """The four tables and the dense parameters beside them, by name. Raises ArtifactError if the directory is damaged."""
        return load_tables(self.directory, self.kind)


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """Everything that a worker needs. Paths are absolute.

    backbone_dir: None for the untrained backbone that the config describes.
    start: None to start from new tables.
    fingerprint: the digest of all inputs. A checkpoint with another fingerprint is not resumed.
    """

    config: Config
    phases: list[Phase]
    prepared_dir: str
    backbone_dir: str | None
    start: Start | None
    fingerprint: str

    @property
    def trains_adapter(self) -> bool:
        """Whether the adapter of the backbone is trained. Otherwise it may be merged with the weights."""
        return any("adapter" in phase.trained for phase in self.phases)

    def check_memory(self, device: torch.device, num_sharing: int = 1) -> None:
        """Raise ResourceError if a stock model will not fit into the memory of this worker. Loads nothing.

        num_sharing: the workers on this machine, which share its memory.
        """
        if isinstance(self.config.model.backbone, str) and self.backbone_dir is not None:
            _, space = load_token_space(self.prepared_dir)
            sizes = Sizes(space.num_users, space.num_items, space.num_words)
            plan = training_memory(self.config, sizes, device.type)
            check_memory(plan, free_memory(device, num_sharing), "a training worker")

    def make_model(self, device: torch.device) -> CLLM4Rec:
        """The model before the first phase.

        If the workers will divide it (`zero3`), its parameters stay memory-mapped on the CPU.
        """
        prompt_tokens, token_space = load_token_space(self.prepared_dir)
        config, is_divided = self.config, zero3.divides(self.config.training)
        if self.backbone_dir is None:
            backbone = new_backbone(
                config.model, prompt_tokens.num_words, config.seed, None if is_divided else torch.float32
            )
            if self.trains_adapter and config.backbone.adapter is not None:
                add_adapter(backbone, config.backbone.adapter, config.seed)
        else:
            precision = None if is_divided else precision_on(device, config.training.bf16)
            merge = not self.trains_adapter
            if self.trains_adapter and not has_adapter(self.backbone_dir):
                raise ArtifactError(f"{self.backbone_dir} has no adapter to train; run cllm4rec pretrain --force first")
            on = "cpu" if is_divided else str(device)
            backbone = load_backbone(self.backbone_dir, config.model.max_tokens, precision, on, merge)
        if self.start is None:
            model = new_model(config.model, backbone, token_space, config.seed)
        else:
            without_values = config.model.model_copy(update={"table_std": 0.0})
            model = new_model(without_values, backbone, token_space, config.seed)
            tables = self.start.tables()
            for name, weight in model.own_parameters().items():
                if is_divided:
                    weight.data = tables[name]
                else:
                    weight.data.copy_(tables[name])
        return model if is_divided else model.to(device)


class LogFile:
    """`metrics.jsonl`: one line per step and epoch. The first worker writes it at the end of each epoch."""

    def __init__(self, uri: str, is_first: bool, tensorboard: bool) -> None:
        self._uri, self._is_first = uri, is_first
        self._unwritten: list[str] = []
        self._num_written = self._step = 0
        self._writer: Any = None
        if is_first and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Outside the run directory, which is removed when its stage is done.
            runs, stage, _ = files.absolute(uri).rsplit("/", 2)
            self._writer = SummaryWriter(files.join(runs, "tensorboard", stage))

    def resume(self, checkpoint: Checkpoint | None, phases: list[Phase]) -> None:
        """Start with an empty file, or with the lines up to a checkpoint: later steps are run again."""
        if not self._is_first:
            return
        num_lines = checkpoint.progress.num_log_lines if checkpoint else 0
        existed = files.exists(self._uri)
        lines = files.read_bytes(self._uri).splitlines() if num_lines and existed else []
        kept = lines[:num_lines]
        files.write_bytes(self._uri, b"".join(line + b"\n" for line in kept))
        self._num_written = len(kept)
        if checkpoint:
            phase, epoch = checkpoint.progress.phase, checkpoint.progress.epoch
            after = f"{phases[phase].name} epoch {epoch}" if epoch else phases[phase - 1].name
            self({"event": "resumed", "after": after})
        elif existed:
            self({"event": "resumed", "after": None})

    def __call__(self, entry: dict[str, Any]) -> None:
        if not self._is_first:
            return
        self._unwritten.append(json.dumps(entry) + "\n")
        if self._writer is not None and entry["event"] == "step":
            self._step += 1
            for name in ("loss", "items", "words", "penalty"):
                self._writer.add_scalar(f"{entry['phase']}/{name}", entry[name], self._step)
        if entry["event"] != "step":
            self.flush()

    def flush(self) -> int:
        """Write the pending lines and return the number of lines in the file."""
        if self._unwritten:
            files.append_bytes(self._uri, "".join(self._unwritten).encode())
            self._num_written += len(self._unwritten)
            self._unwritten = []
        return self._num_written

    def close(self) -> None:
        self.flush()
        if self._writer is not None:
            self._writer.close()
