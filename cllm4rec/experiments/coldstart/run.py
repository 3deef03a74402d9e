"""Runs the experiment and writes `coldstart/`: metrics.json and report.md."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cllm4rec.arrays.ids import Catalog
from cllm4rec.config import Config
from cllm4rec.data.prepared import load_histories
from cllm4rec.data.tokenizer import Encoder
from cllm4rec.errors import ConfigError, DataError
from cllm4rec.experiments.coldstart.protocol import ALL_METRICS, COLD_METRICS, Split, Trained
from cllm4rec.experiments.coldstart.report import NAMES, markdown
from cllm4rec.extension.text_kernels import Texts
from cllm4rec.extension.text_reader import ShowCount, layers_of, read_texts
from cllm4rec.extension.text_regression import Reading, readings
from cllm4rec.metrics.intervals import compared_with, interval
from cllm4rec.model.precision import precision_on
from cllm4rec.model.stock_backbone import pretrained_backbone, random_backbone
from cllm4rec.storage.artifacts import Manifest, read_manifest, write_directory
from cllm4rec.storage.files import digest_of, join, write_bytes, write_json
from cllm4rec.typing import Float32Array, FloatArray

logger = logging.getLogger(__name__)

KIND = "coldstart"
NOISE_WIDTH = 64
REFERENCE = "words"
"""The reader with which the others are compared."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """What is read of the texts: the texts with the states of a model, and the readings to choose from."""

    texts: Texts
    readings: list[Reading]


def coldstart(config: Config, show_count: ShowCount) -> Manifest:
    """Run all splits of `coldstart.seeds` on the prepared data. Raises ConfigError without a stock backbone, DataError without
    texts of items."""
    catalog = Catalog.load(config.run.prepared)
    if not any(catalog.item_texts):
        raise DataError("coldstart reads the items' own texts, and there are none; set data.items")
    histories = load_histories(config.run.prepared)
    readers = _readers(config, catalog, show_count)
    values: dict[str, list[dict[str, FloatArray]]] = {name: [] for name in NAMES}
    warm_only: list[dict[str, FloatArray]] = []
    chosen: dict[str, list[str]] = {name: [] for name in NAMES}
    for seed in config.coldstart.seeds:
        split = Split.of(histories, catalog, config.coldstart.fraction, seed)
        trained = Trained.of(split, catalog, config.seed)
        warm_only.append(trained.among_all(None))
        for name in NAMES:
            rows_CD, reading = _predicted(name, trained, readers)
            values[name].append(trained.among_cold(rows_CD) | _renamed(trained.among_all(rows_CD)))
            chosen[name].append(reading)
        means = {name: float(np.nanmean(values[name][-1]["recall@10"])) for name in NAMES}
        logger.info(
            f"split {seed}: {len(split.cold_items)} cold items, recall@10 among them: "
            + ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
        )
    metrics = _metrics(config, values, warm_only, chosen)
    return _write(config, metrics)


def _readers(config: Config, catalog: Catalog, show_count: ShowCount) -> dict[str, Reader]:
    texts, model = catalog.item_texts, config.model
    if not isinstance(model.backbone, str):
        raise ConfigError("coldstart compares readers of a pretrained model; set model.backbone to its name or folder")
    generator = np.random.default_rng(config.seed)
    noise = generator.standard_normal((1, len(texts), NOISE_WIDTH)).astype(np.float32)
    precision = precision_on("cpu", config.training.bf16)
    read = {
        "lm": pretrained_backbone(model.backbone, model.revision, model.max_tokens, precision),
        "random_lm": random_backbone(model.backbone, model.revision, model.max_tokens, config.seed, precision),
    }
    readers = {
        "noise": Reader(Texts(texts, (0,), noise), list(readings((0,), "language_model"))),
        "words": Reader(Texts(texts), list(readings((), "words"))),
    }
    encoder = Encoder.load(join(config.run.prepared, "tokenizer"))
    for name, backbone in read.items():
        if torch.cuda.is_available():
            backbone.to("cuda")
        layers = layers_of(config.extend.layers, backbone.num_layers)
        logger.info(f"reading {len(texts):,} texts with {'random' if name == 'random_lm' else 'pretrained'} weights")
        found = read_texts(texts, encoder, config.data.max_text_tokens, backbone, layers, show_count)
        readers[name] = Reader(found, list(readings(layers, "language_model")))
        readers[f"{name}_words"] = Reader(found, list(readings(layers)))
    return readers


def _predicted(name: str, trained: Trained, readers: Mapping[str, Reader]) -> tuple[Float32Array, str]:
    """The rows of the cold items, and what was read."""
    cold = trained.split.cold_items
    if name == "mean_row":
        return np.repeat(trained.rows_WD.mean(axis=0, keepdims=True), len(cold), axis=0), "nothing"
    reader = readers[name]
    regression = trained.regression(reader.texts, reader.readings)
    return regression.predict(reader.texts.take(cold)), f"{regression.reading}, r2 {regression.solution.r2:.3f}"


def _renamed(values: dict[str, FloatArray]) -> dict[str, FloatArray]:
    return {f"warm_{name}": value_I for name, value_I in values.items()}


def _metrics(
    config: Config,
    values: Mapping[str, list[dict[str, FloatArray]]],
    warm_only: list[dict[str, FloatArray]],
    chosen: Mapping[str, list[str]],
) -> dict[str, Any]:
    samples, seed = config.evaluate.bootstrap_samples, config.seed
    names = [*COLD_METRICS, *(f"warm_{name}" for name in ALL_METRICS)]
    stacked = {
        metric: {name: np.stack([split[metric] for split in splits], axis=1) for name, splits in values.items()}
        for metric in names
    }
    baseline = {f"warm_{name}": np.stack([split[name] for split in warm_only], axis=1) for name in ALL_METRICS}
    return {
        "seeds": list(config.coldstart.seeds),
        "fraction": config.coldstart.fraction,
        "backbone": config.model.backbone,
        "results": {
            name: {metric: interval(_users_with_values(stacked[metric][name]), samples, seed) for metric in names}
            for name in values
        },
        "by_split": {
            name: [float(np.nanmean(column_I)) for column_I in stacked[COLD_METRICS[0]][name].T] for name in values
        },
        "without_new_items": {
            metric: interval(_users_with_values(value_IS), samples, seed) for metric, value_IS in baseline.items()
        },
        "paired": {
            metric: compared_with(
                REFERENCE,
                {name: _users_with_values(value_IS) for name, value_IS in stacked[metric].items()},
                samples,
                seed,
            )
            for metric in COLD_METRICS
        },
        "chosen": dict(chosen),
    }


def _users_with_values(value_IS: FloatArray) -> FloatArray:
    """Without the users who have no value in any split; the same users for every reader."""
    return np.asarray(value_IS[~np.isnan(value_IS).all(axis=1)])


def _write(config: Config, metrics: dict[str, Any]) -> Manifest:
    uri = config.run.directory(KIND)
    inputs = {
        "prepared": read_manifest(config.run.prepared, "prepared").digest,
        "settings": digest_of([config.coldstart.model_dump(), config.extend.model_dump(), config.model.model_dump()]),
    }
    with write_directory(uri, kind=KIND, inputs=inputs, config=config.model_dump(mode="json")) as draft:
        write_json(draft.path("metrics.json"), metrics)
        write_bytes(draft.path("report.md"), markdown(metrics).encode())
    return read_manifest(uri, KIND)
