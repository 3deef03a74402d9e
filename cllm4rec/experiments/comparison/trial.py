"""One method on one split: tune it on the validation split, keep the best setting, rank the items of the test users.

    <output_dir>/runs/compare/<seed>/
      prepared/             the split
      backbone_<size>_<digest>/
                            a language model trained on the texts, shared by all method runs that start from it
      <method>/             result.json (all settings tried, the chosen one, its learning curve, seconds, memory),
                            lists.parquet (user, items: ranked); for cllm4rec also its tables
      sweep_<name>_<value>/ the same for one value of a sweep, without tables

A method run uses one thread of one process, without Ray, so that several can run in parallel.

Shapes: B users, K list length.
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
from cllm4rec.evaluation.baseline import Budget, TrainingData, item_texts_with_reviews
from cllm4rec.evaluation.stage import rank_with_scorer
from cllm4rec.experiments.baselines.registry import make
from cllm4rec.experiments.comparison.controls import random_weights, shuffled_texts
from cllm4rec.experiments.comparison.language import backbone_directory, starting_backbone, text_vectors
from cllm4rec.experiments.comparison.methods import DEPENDS_ON, MODEL, VARIANTS, config_of, grid_points_of, phases_of
from cllm4rec.metrics.protocol import HeldOut, Validation, rank_with
from cllm4rec.metrics.ranking import compute, depth
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.backbone_files import load_backbone
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
"""The artifact kind of the directories of finished method runs."""


@dataclasses.dataclass(frozen=True)
class Data:
    """A split, loaded once for all settings that are tried on it."""

    catalog: Catalog
    prompt_tokens: PromptTokens
    histories: Histories
    documents: Documents
    item_texts: list[str]
    """The text of an item for the baselines: its own text, followed by its training reviews."""

    @classmethod
    def load(cls, prepared_dir: str) -> Data:
        catalog, prompt_tokens = Catalog.load(prepared_dir), PromptTokens.load(prepared_dir)
        texts = item_texts_with_reviews(prepared_dir, catalog)
        return cls(catalog, prompt_tokens, load_histories(prepared_dir), load_documents(prepared_dir), texts)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A trained method: its ranking function, its validation values by epoch, and the model if it is a variant of CLLM4Rec."""

    rank: Callable[[HeldOut], IntArray]
    curve: list[dict[str, Any]]
    model: CLLM4Rec | None = None


@dataclasses.dataclass(frozen=True)
class MethodRun:
    """One method on one split. `config` is the configuration of the split (see `of_split`).

    label: if set, the method is not tuned but trained once as configured, in a directory of this name (a sweep's run).
    """

    config: Config
    name: str
    label: str = ""

    @property
    def directory(self) -> str:
        return self.config.run.directory(self.label or self.name)

    @property
    def grid_points(self) -> list[dict[str, Any]]:
        """The settings to try."""
        return [{}] if self.label else grid_points_of(self.name, self.config)

    @property
    def varied(self) -> Config:
        """The configuration with the changes of the method."""
        return config_of(self.name, self.config, {})

    def inputs(self) -> dict[str, str]:
        """Digests of everything that the result depends on."""
        config = self.config
        settings: dict[str, Any] = {
            "points": self.grid_points,
            "evaluate": config.evaluate.model_dump(exclude={"published"}),
            "seed": config.seed,
        }
        settings |= {} if self.label else {"minutes": config.compare.minutes}
        inputs = {"prepared": read_manifest(config.run.prepared, "prepared").digest}
        if self.name in VARIANTS:
            sections = ("model", "pretrain", "finetune", "training")
            settings |= {section: getattr(self.varied, section).model_dump() for section in sections}
            if self.varied.backbone.adapter is not None:
                settings["adapter"] = self.varied.backbone.adapter.model_dump()
        if self.backbone is not None:
            inputs["backbone"] = read_manifest(self.backbone, "backbone").digest
        if self.name in DEPENDS_ON:
            needed = DEPENDS_ON[self.name]
            inputs[needed] = read_manifest(config.run.directory(needed), KIND).digest
        return inputs | {"method": digest_of(settings)}

    @property
    def backbone(self) -> str | None:
        """Directory of the trained language model that the run starts from; None if there is no such model."""
        is_read = self.name == "m6_retrieval" or (self.name in VARIANTS and self.varied.backbone.epochs)
        return backbone_directory(self.varied) if is_read else None

    def is_done(self) -> bool:
        return is_current(self.directory, KIND, self.inputs())


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a finished method run: `summary` is the content of result.json, `ranked` the lists (B×K)."""

    summary: dict[str, Any]
    ranked: IntArray


def of_split(config: Config, seed: int) -> Config:
    """The configuration of one split seed, with an output_dir of its own."""
    split = config.data.split.model_copy(update={"seed": seed})
    data = config.data.model_copy(update={"split": split})
    folder = join(config.run.runs, "compare", str(seed))
    return config.model_copy(update={"output_dir": folder, "data": data})


def run_method(run: MethodRun) -> str:
    """Tune, train and write one method run; returns its directory.

    If the data lack what the method reads, the result says so and has no lists. The same holds if a sweep's value cannot be
    trained. Raises TrainingError if no setting of a method can be trained.
    """
    torch.set_num_threads(1)
    reset_peak_memory()
    started, config, inputs = time.monotonic(), run.config, run.inputs()
    data = Data.load(config.run.prepared)
    tried: list[dict[str, Any]] = []
    best: Fitted | None = None
    skipped = ""
    for params in run.grid_points:
        if tried and time.monotonic() - started > 60 * config.compare.minutes:
            break
        trial_started = time.monotonic()
        try:
            fitted = fit(run.name, params, data, config)
        except DataError as error:
            skipped = str(error)
            break
        except TrainingError as error:
            tried.append({"params": params, "failed": str(error)})
            continue
        values = validate(fitted, data)
        is_best = best is None or values[VALIDATION_METRIC] > _best_value(tried)
        best = fitted if is_best else best
        tried.append({"params": params, "validation": values, "seconds": time.monotonic() - trial_started})
    if best is None and not skipped and run.label:
        skipped = str(tried[-1]["failed"])
    if best is None and not skipped:
        raise TrainingError(f"no setting of {run.name} could be trained: {tried[-1]['failed']}")
    summary = {"name": run.name, "skipped": skipped, "tried": tried, "seconds": time.monotonic() - started}
    _write(run, inputs, best, data, summary)
    return run.directory


def _best_value(tried: list[dict[str, Any]]) -> float:
    return max(float(trial["validation"][VALIDATION_METRIC]) for trial in tried if "validation" in trial)


def _write(run: MethodRun, inputs: dict[str, str], best: Fitted | None, data: Data, summary: dict[str, Any]) -> None:
    with write_directory(run.directory, kind=KIND, inputs=inputs, config=run.config.model_dump(mode="json")) as draft:
        if best is not None:
            succeeded = [trial for trial in summary["tried"] if "validation" in trial]
            # The test split is ranked once, with the setting that the validation split has chosen.
            chosen = max(succeeded, key=lambda trial: float(trial["validation"][VALIDATION_METRIC]))
            held_out = HeldOut.test(data.histories, run.config.evaluate.read, run.config.evaluate.mask)
            summary |= {"chosen": chosen["params"], "validation": chosen["validation"], "curve": best.curve}
            lists = Ragged.from_lists(best.rank(held_out)).to_arrow()
            write_table(pa.table({"user": held_out.users, "items": lists}), draft.path("lists.parquet"))
            if run.name == MODEL and not run.label and best.model is not None:
                tables = {name: table.data for name, table in best.model.tables().items()}
                save_tensors(tables, draft.path("tables.safetensors"))
        write_json(draft.path("result.json"), summary | {"peak_memory_mb": peak_memory_mb()})


def read_result(run: MethodRun) -> Result:
    """The result that `run_method` wrote. Raises ArtifactError if the run is not finished."""
    read_manifest(run.directory, KIND)
    summary = read_json(join(run.directory, "result.json"))
    if summary["skipped"]:
        return Result(summary, np.empty((0, depth()), np.int64))
    lists = Ragged.from_arrow(read_tables([join(run.directory, "lists.parquet")])["items"])
    return Result(summary, lists.values.reshape(len(lists), -1).astype(np.int64))


def validate(fitted: Fitted, data: Data) -> dict[str, float]:
    """Mean metrics over the users with a validation item. They choose the setting."""
    held_out = HeldOut.of(data.histories, "validation", "train", "train")
    return {name: float(values.mean()) for name, values in compute(fitted.rank(held_out), held_out.relevant).items()}


def fit(name: str, params: dict[str, Any], data: Data, config: Config) -> Fitted:
    """Train one setting. Raises DataError if the data lack what the method reads, TrainingError if the loss is not finite."""
    if name in VARIANTS:
        return fit_variant(name, config_of(name, config, params), data)
    baseline = make(name, **params).fit(training_data_of(name, data, config))

    def rank(held_out: HeldOut) -> IntArray:
        return rank_with(baseline, held_out.users, held_out.read, held_out.masked, data.catalog.num_items, depth())

    curve = [{"phase": "fit", VALIDATION_METRIC: value} for value in getattr(baseline, "curve", [])]
    return Fitted(rank, curve)


def training_data_of(name: str, data: Data, config: Config) -> TrainingData:
    """The training data of a baseline, with text vectors or CLLM4Rec's tables for the methods that read them."""
    budget = Budget(max_seconds=60 * config.compare.minutes)
    training = TrainingData.of(
        data.histories, data.catalog, item_texts=data.item_texts, seed=config.seed, budget=budget
    )
    if name == "m6_retrieval":
        backbone = load_backbone(backbone_directory(config_of(name, config, {})), config.model.max_tokens)
        if backbone.is_encoder_decoder:
            raise DataError("m6_retrieval embeds texts with a decoder, but model.backbone is an encoder-decoder")
        token_space = data.catalog.token_space(data.prompt_tokens.num_words)
        read = functools.partial(text_vectors, backbone=backbone, token_space=token_space, config=config)
        users = read(data.catalog.user_texts) if any(data.catalog.user_texts) else None
        return dataclasses.replace(training, item_text_vectors=read(data.item_texts), user_text_vectors=users)
    if name in DEPENDS_ON:
        tables = load_tables(config.run.directory(DEPENDS_ON[name]), KIND)
        user_table, item_table = (tables[f"collaborative_{kind}"].numpy() for kind in ("users", "items"))
        return dataclasses.replace(training, user_table=user_table, item_table=item_table)
    return training


def fit_variant(name: str, config: Config, data: Data) -> Fitted:
    """CLLM4Rec with the settings of a variant, trained by the common training loop on plain torch."""
    variant, token_space = VARIANTS[name], data.catalog.token_space(data.prompt_tokens.num_words)
    documents = shuffled_texts(data.documents, config.seed) if variant.texts == "shuffled" else data.documents
    curve: list[dict[str, Any]] = []

    def make_backbone() -> Backbone:
        if variant.randomizes_backbone:
            return random_weights(config)
        return starting_backbone(config, data.prompt_tokens.num_words)

    start = initial_tables(config, make_backbone(), token_space, lambda: [documents])
    if variant.texts == "none":
        documents = documents.of_kinds([Kind.INTERACTIONS])

    def make_model() -> CLLM4Rec:
        backbone = make_backbone()
        model = new_model(config.model, backbone, token_space, config.seed)
        load_parameters(model, start)
        return model

    weights = train(
        make_model,
        data.prompt_tokens.prompts,
        phases_of(name, config),
        Shard(documents, Validation(data.histories)),
        single_process(config),
        log=lambda entry: curve.append(_curve_point(entry)) if f"validation_{VALIDATION_METRIC}" in entry else None,
    )
    model = make_model()
    load_parameters(model, weights)
    prompt = "recommendation" if config.finetune.epochs else "interactions"
    ranker = Ranker(model.eval(), data.prompt_tokens.prompts, config.model.max_tokens, prompt)  # type: ignore[arg-type]
    scorer = Scorer(ranker, data.catalog, name)
    return Fitted(lambda held_out: rank_with_scorer(scorer, held_out, config.score.batch_users), curve, model)


def _curve_point(entry: dict[str, Any]) -> dict[str, Any]:
    return {"phase": entry["phase"], VALIDATION_METRIC: entry[f"validation_{VALIDATION_METRIC}"], "loss": entry["loss"]}


def reset_peak_memory() -> None:
    """Start a new measurement of peak memory, so that each method run in a process has its own. Linux only."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Peak memory of this process since `reset_peak_memory`; on other systems than Linux since its start."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
