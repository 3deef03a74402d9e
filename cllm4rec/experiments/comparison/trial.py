"""One row of the comparison on one split: tune on the validation split, keep the best, list the test users' items.

    <output_dir>/runs/compare/<seed>/
      prepared/             the split
      backbone_<what>/      a language model that rows begin from, trained once for all that begin from the same
      <method>/             result.json (every setting tried, the chosen one, its learning curve, seconds, memory),
                            lists.parquet (user, items: ranked), for cllm4rec its tables as well
      sweep_<name>_<value>/ the same for one value of a sweep, without tables

Everything runs on one thread of one process, without Ray, so that rows may run side by side.

Lengths: B users, J items.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import Config
from cllm4rec.data.documents import Documents, Kind
from cllm4rec.data.prepared import PromptTokens, load_documents, load_histories
from cllm4rec.errors import DataError, TrainingError
from cllm4rec.evaluation.baseline import Budget, Training, item_texts_with_reviews
from cllm4rec.evaluation.stage import rank_with_scorer
from cllm4rec.experiments.baselines.registry import make
from cllm4rec.experiments.comparison.language import backbone_directory, starting_backbone, text_vectors
from cllm4rec.experiments.comparison.methods import AFTER, MODEL, VARIANTS, config_of, phases_of, points_of
from cllm4rec.metrics.protocol import HeldOut, Validation, rank_with
from cllm4rec.metrics.ranking import compute, depth
from cllm4rec.model.backbone import load_backbone
from cllm4rec.model.cllm4rec import CLLM4Rec, new_model
from cllm4rec.model.ranker import Ranker
from cllm4rec.model.saved_model import load_tables
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.storage.artifacts import is_current, read_manifest, write_directory
from cllm4rec.storage.files import digest_of, join, read_json, read_tables, write_json, write_table
from cllm4rec.storage.tensors import save_tensors
from cllm4rec.training.local_trainer import single_process
from cllm4rec.training.loop import VALIDATION_METRIC, Shard, load_parameters, train
from cllm4rec.training.table_init import initial_tables
from cllm4rec.typing import IntArray

KIND = "compared"
"""Of the directories of finished rows."""


@dataclasses.dataclass(frozen=True)
class Data:
    """A split, read once for all settings tried on it."""

    catalog: Catalog
    prompt_tokens: PromptTokens
    histories: Histories
    documents: Documents
    item_texts: list[str]
    """What the baselines read of an item: its own text, then the training reviews of it."""

    @classmethod
    def load(cls, prepared_dir: str) -> Data:
        catalog, prompt_tokens = Catalog.load(prepared_dir), PromptTokens.load(prepared_dir)
        texts = item_texts_with_reviews(prepared_dir, catalog)
        return cls(catalog, prompt_tokens, load_histories(prepared_dir), load_documents(prepared_dir), texts)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A trained method: how it ranks, its validation by epoch, and the model where it is a variant of CLLM4Rec."""

    rank: Callable[[HeldOut], IntArray]
    curve: list[dict[str, Any]]
    model: CLLM4Rec | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A method on one split. `config` is that split's, as `of_split` gives it.

    label: of a row that is not tuned but trained once, as `config` says, in a directory of this name: a sweep's.
    """

    config: Config
    name: str
    label: str = ""

    @property
    def directory(self) -> str:
        return self.config.run.directory(self.label or self.name)

    @property
    def points(self) -> list[dict[str, Any]]:
        """The settings to try."""
        return [{}] if self.label else points_of(self.name, self.config)

    @property
    def varied(self) -> Config:
        """The config as its method changes it."""
        return config_of(self.name, self.config, {})

    def inputs(self) -> dict[str, str]:
        """Digests of everything the result depends on."""
        config = self.config
        settings: dict[str, Any] = {
            "points": self.points,
            "evaluate": config.evaluate.model_dump(exclude={"published"}),
            "seed": config.seed,
        }
        settings |= {} if self.label else {"minutes": config.compare.minutes}
        inputs = {"prepared": read_manifest(config.run.prepared, "prepared").digest}
        if self.name in VARIANTS:
            sections = ("model", "pretrain", "finetune", "training")
            settings |= {section: getattr(self.varied, section).model_dump() for section in sections}
        if self.backbone is not None:
            inputs["backbone"] = read_manifest(self.backbone, "backbone").digest
        if self.name in AFTER:
            inputs[AFTER[self.name]] = read_manifest(config.run.directory(AFTER[self.name]), KIND).digest
        return inputs | {"method": digest_of(settings)}

    @property
    def backbone(self) -> str | None:
        """Directory of the trained language model it begins from; None where it has none or an untrained one."""
        is_read = self.name == "m6_retrieval" or (self.name in VARIANTS and self.varied.backbone.epochs)
        return backbone_directory(self.varied) if is_read else None

    def is_done(self) -> bool:
        return is_current(self.directory, KIND, self.inputs())


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished row as it was written down."""

    facts: dict[str, Any]
    ranked: IntArray


def of_split(config: Config, seed: int) -> Config:
    """The config of one split seed: everything of it lies in a folder of its own."""
    split = config.data.split.model_copy(update={"seed": seed})
    data = config.data.model_copy(update={"split": split})
    folder = join(config.run.runs, "compare", str(seed))
    return config.model_copy(update={"output_dir": folder, "data": data})


def run_row(row: Row) -> str:
    """Tune, train and write one row; returns its directory. A row that this data cannot feed says why instead.

    Raises TrainingError where no setting of a method can be trained; a sweep may try what cannot, and says so, too.
    """
    torch.set_num_threads(1)
    forget_peak_memory()
    started, config, inputs = time.monotonic(), row.config, row.inputs()
    data = Data.load(config.run.prepared)
    tried: list[dict[str, Any]] = []
    best: Fitted | None = None
    skipped = ""
    for params in row.points:
        if tried and time.monotonic() - started > 60 * config.compare.minutes:
            break
        trial_started = time.monotonic()
        try:
            fitted = fit(row.name, params, data, config)
        except DataError as error:
            skipped = str(error)
            break
        except TrainingError as error:
            tried.append({"params": params, "failed": str(error)})
            continue
        reached = validate(fitted, data)
        is_best = best is None or reached[VALIDATION_METRIC] > _best_value(tried)
        best = fitted if is_best else best
        tried.append({"params": params, "validation": reached, "seconds": time.monotonic() - trial_started})
    if best is None and not skipped and row.label:
        skipped = str(tried[-1]["failed"])
    if best is None and not skipped:
        raise TrainingError(f"no setting of {row.name} could be trained: {tried[-1]['failed']}")
    facts = {"name": row.name, "skipped": skipped, "tried": tried, "seconds": time.monotonic() - started}
    _write(row, inputs, best, data, facts)
    return row.directory


def _best_value(tried: list[dict[str, Any]]) -> float:
    return max(float(trial["validation"][VALIDATION_METRIC]) for trial in tried if "validation" in trial)


def _write(row: Row, inputs: dict[str, str], best: Fitted | None, data: Data, facts: dict[str, Any]) -> None:
    with write_directory(row.directory, kind=KIND, inputs=inputs, config=row.config.model_dump(mode="json")) as draft:
        if best is not None:
            succeeded = [trial for trial in facts["tried"] if "validation" in trial]
            # The one look at the test split, by the setting that validation chose.
            chosen = max(succeeded, key=lambda trial: float(trial["validation"][VALIDATION_METRIC]))
            held_out = HeldOut.test(data.histories, row.config.evaluate.read, row.config.evaluate.mask)
            facts |= {"chosen": chosen["params"], "validation": chosen["validation"], "curve": best.curve}
            lists = Ragged.from_lists(best.rank(held_out)).to_arrow()
            write_table(pa.table({"user": held_out.users, "items": lists}), draft.path("lists.parquet"))
            if row.name == MODEL and not row.label and best.model is not None:
                tables = {name: table.data for name, table in best.model.tables().items()}
                save_tensors(tables, draft.path("tables.safetensors"))
        write_json(draft.path("result.json"), facts | {"peak_memory_mb": peak_memory_mb()})


def read_row(row: Row) -> Result:
    """What `run_row` wrote. Raises ArtifactError where the row is not finished."""
    read_manifest(row.directory, KIND)
    facts = read_json(join(row.directory, "result.json"))
    if facts["skipped"]:
        return Result(facts, np.empty((0, depth()), np.int64))
    lists = Ragged.from_arrow(read_tables([join(row.directory, "lists.parquet")])["items"])
    return Result(facts, lists.values.reshape(len(lists), -1).astype(np.int64))


def validate(fitted: Fitted, data: Data) -> dict[str, float]:
    """Means over the users with a validation item; what settings are chosen by."""
    held_out = HeldOut.of(data.histories, "validation", "train", "train")
    return {name: float(values.mean()) for name, values in compute(fitted.rank(held_out), held_out.relevant).items()}


def fit(name: str, params: dict[str, Any], data: Data, config: Config) -> Fitted:
    """Train one setting. Raises DataError where the data lack what the method reads, TrainingError at a bad loss."""
    if name in VARIANTS:
        return fit_variant(name, config_of(name, config, params), data)
    baseline = make(name, **params).fit(training_of(name, data, config))

    def rank(held_out: HeldOut) -> IntArray:
        return rank_with(baseline, held_out.users, held_out.read, held_out.masked, data.catalog.num_items, depth())

    curve = [{"phase": "fit", VALIDATION_METRIC: value} for value in getattr(baseline, "curve", [])]
    return Fitted(rank, curve)


def training_of(name: str, data: Data, config: Config) -> Training:
    """What a baseline may learn from, with the vectors or tables of CLLM4Rec's parts where it reads those."""
    budget = Budget(max_seconds=60 * config.compare.minutes)
    training = Training.of(data.histories, data.catalog, item_texts=data.item_texts, seed=config.seed, budget=budget)
    if name == "m6_retrieval":
        backbone = load_backbone(backbone_directory(config_of(name, config, {})), config.model.max_tokens)
        if backbone.is_encoder_decoder:
            raise DataError("m6_retrieval embeds texts with a decoder, and model.backbone is an encoder-decoder")
        token_space = data.catalog.token_space(data.prompt_tokens.num_words)
        read = functools.partial(text_vectors, backbone=backbone, token_space=token_space, config=config)
        users = read(data.catalog.user_texts) if any(data.catalog.user_texts) else None
        return dataclasses.replace(training, item_text_vectors=read(data.item_texts), user_text_vectors=users)
    if name in AFTER:
        tables = load_tables(config.run.directory(AFTER[name]), KIND)
        user_table, item_table = (tables[f"collaborative_{kind}"].numpy() for kind in ("users", "items"))
        return dataclasses.replace(training, user_table=user_table, item_table=item_table)
    return training


def fit_variant(name: str, config: Config, data: Data) -> Fitted:
    """CLLM4Rec under the settings of a variant, trained by the one loop on plain torch."""
    token_space = data.catalog.token_space(data.prompt_tokens.num_words)
    documents = data.documents if VARIANTS[name].reads_texts else data.documents.of_kinds([Kind.INTERACTIONS])
    curve: list[dict[str, Any]] = []

    start = initial_tables(
        config, starting_backbone(config, data.prompt_tokens.num_words), token_space, lambda: [data.documents]
    )

    def make_model() -> CLLM4Rec:
        backbone = starting_backbone(config, data.prompt_tokens.num_words)
        model = new_model(config.model, backbone, token_space, config.seed)
        load_parameters(model, start)
        return model

    weights = train(
        make_model,
        data.prompt_tokens.prompts,
        phases_of(name, config),
        Shard(documents, Validation(data.histories)),
        single_process(config),
        log=lambda entry: curve.append(_told(entry)) if f"validation_{VALIDATION_METRIC}" in entry else None,
    )
    model = make_model()
    load_parameters(model, weights)
    prompt = "recommendation" if config.finetune.epochs else "interactions"
    ranker = Ranker(model.eval(), data.prompt_tokens.prompts, config.model.max_tokens, prompt)  # type: ignore[arg-type]
    scorer = Scorer(ranker, data.catalog, name)
    return Fitted(lambda held_out: rank_with_scorer(scorer, held_out, config.score.batch_users), curve, model)


def _told(entry: dict[str, Any]) -> dict[str, Any]:
    return {"phase": entry["phase"], VALIDATION_METRIC: entry[f"validation_{VALIDATION_METRIC}"], "loss": entry["loss"]}


def forget_peak_memory() -> None:
    """Begin a new peak: a process that runs several rows would show its largest for all. Only Linux can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Most memory this process had since `forget_peak_memory`; since its start where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
