"""Adds items to the current model: items that it does not know, with rows predicted from their texts.

    result = extend(config)

The model that results is a model directory like any other, below `models/`, and becomes the current one: scoring, the nightly
run and the endpoint recommend the new items without training. Rows of items that the model knows are not changed. Its manifest
names the model that was trained (`EXTENDED_FROM`).

Shapes: J trained items, N new ones, D width of the ID tables, L layers.
"""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import torch
from torch import Tensor

from cllm4rec.arrays.ids import Catalog
from cllm4rec.config import Config
from cllm4rec.data.item_texts import read_item_texts
from cllm4rec.data.tokenizer import Encoder
from cllm4rec.errors import ConfigError, DataError
from cllm4rec.extension.text_kernels import Texts
from cllm4rec.extension.text_reader import ShowCount, layers_of, read_texts
from cllm4rec.extension.text_regression import MAX_FITTED, TextRegression, fit, readings
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.backbone_files import load_backbone
from cllm4rec.model.cllm4rec import TABLES
from cllm4rec.model.packing import Table
from cllm4rec.model.precision import precision_on
from cllm4rec.model.saved_model import ModelMetadata
from cllm4rec.storage import artifacts, files
from cllm4rec.storage.artifacts import EXTENDED_FROM, Manifest, read_manifest, write_directory
from cllm4rec.storage.files import digest_of, join
from cllm4rec.storage.lease import hold
from cllm4rec.storage.registry import current_model, make_current
from cllm4rec.storage.tensors import map_tensors, save_tensors

logger = logging.getLogger(__name__)

MIN_TRAINED = 20
"""Fewer trained items with a text say too little about how texts and rows belong together."""
_ITEM_TABLES = (TABLES[Table.COLLABORATIVE_ITEMS], TABLES[Table.CONTENT_ITEMS])


@dataclasses.dataclass(frozen=True)
class Extension:
    """The result: what was added, and how well the regression predicts a trained item that is left out (`r2`, at most 1).

    model: the directory of the extended model, or of the current one if there was nothing to add.
    """

    model: str
    new_items: int
    fitted_items: int = 0
    reading: str = ""
    strength: float = 0.0
    r2: float = 0.0


def extend(config: Config, force: bool, show_count: ShowCount) -> Extension:
    """Add the items of `extend.items` (by default `data.items`) that the current model does not know.

    force: predict the rows of items that were added earlier again, too. Raises ConfigError without a source, ArtifactError
    without a model, DataError if too few trained items have a text, ResourceError if another process changes `models/`.
    """
    source = config.extend.items or config.data.items
    if source is None:
        raise ConfigError("extend has no texts of items to read; set data.items or extend.items")
    with hold(config.run.models, "an extension"):
        base_dir = current_model(config.output_dir)
        manifest = read_manifest(base_dir, "model")
        artifacts.verify_files(base_dir, manifest)
        catalog = Catalog.load_items(base_dir)
        if force:
            catalog = _first_items(catalog, _num_trained(manifest))
        texts = read_item_texts(source, config.data)
        new = sorted(text_id for text_id in texts if catalog.item_index(text_id) < 0)
        if not new:
            return Extension(base_dir, 0)
        logger.info(f"extend: {len(new):,} of {len(texts):,} items with a text are new")
        regression, predicted = _predict(config, base_dir, catalog, [texts[item_id] for item_id in new], show_count)
        inputs = {
            **manifest.inputs,
            EXTENDED_FROM: manifest.inputs.get(EXTENDED_FROM, manifest.digest),
            "added": digest_of([[item_id, texts[item_id]] for item_id in new]),
        }
        extended = _with_items(catalog, new, [texts[item_id] for item_id in new])
        why = f"{len(new):,} items added by their texts"

        def write(target: str) -> None:
            with write_directory(target, kind="model", inputs=inputs, config=config.model_dump(mode="json")) as draft:
                draft.counts |= {
                    **manifest.counts,
                    "items": extended.num_items,
                    "trained_items": _num_trained(manifest),
                }
                _write(draft.uri, base_dir, manifest, catalog.num_items, extended, predicted)

        make_current(config.output_dir, digest_of(inputs), why, config.promote.keep, write)
        return Extension(
            model=current_model(config.output_dir),
            new_items=len(new),
            fitted_items=len(regression.solution.dual_FD),
            reading=str(regression.reading),
            strength=regression.strength,
            r2=regression.solution.r2,
        )


def _num_trained(manifest: Manifest) -> int:
    return int(manifest.counts.get("trained_items", manifest.counts["items"]))


def _first_items(catalog: Catalog, number: int) -> Catalog:
    """The catalog without the items that were added after training."""
    texts, counts = catalog.item_texts[:number], catalog.item_counts[:number].tolist()
    return Catalog([], catalog.item_ids[:number].tolist(), [], texts, counts)


def _with_items(catalog: Catalog, new: list[str], texts: list[str]) -> Catalog:
    """The catalog with items that no one has interacted with behind its own."""
    counts = catalog.item_counts.tolist() + [0] * len(new)
    return Catalog([], catalog.item_ids.tolist() + new, [], catalog.item_texts + texts, counts)


def _predict(
    config: Config, base_dir: str, catalog: Catalog, new_texts: list[str], show_count: ShowCount
) -> tuple[TextRegression, dict[str, Tensor]]:
    """The regression, and the rows of the new items in both item tables by name."""
    has_text = np.array([bool(text) for text in catalog.item_texts])
    trained = np.flatnonzero(has_text & (catalog.item_counts > 0))
    if len(trained) < MIN_TRAINED:
        raise DataError(
            f"only {len(trained)} of the {catalog.num_items} items of the model have a text of their own, and extend learns from "
            f"at least {MIN_TRAINED} how texts and embeddings belong together; give data.items texts and train again"
        )
    # The rest would not be fitted, so the language model need not read it.
    trained = np.sort(trained[np.argsort(-catalog.item_counts[trained], kind="stable")[:MAX_FITTED]])
    trained_texts = [catalog.item_texts[item] for item in trained.tolist()]
    reader = _Reader(config, base_dir, show_count)
    texts = reader.read(trained_texts)
    tables = map_tensors(join(base_dir, "tables.safetensors"))
    rows_FD, content_FD = (tables[name].numpy()[trained] for name in _ITEM_TABLES)
    count_F = catalog.item_counts[trained]
    regression = fit(texts, rows_FD, count_F, list(readings(texts.layers, config.extend.reader)))
    content = fit(texts, content_FD, count_F, [regression.reading])
    layer = regression.reading.layer
    new = reader.read(new_texts, () if layer is None else (layer,))
    return regression, {
        name: torch.from_numpy(fitted.predict(new))
        for name, fitted in zip(_ITEM_TABLES, (regression, content), strict=True)
    }


class _Reader:
    """The tokenizer and the language model of a model directory. The model is loaded when a layer is first asked for."""

    def __init__(self, config: Config, model_dir: str, show_count: ShowCount) -> None:
        self._config, self._model_dir, self._show_count = config, model_dir, show_count
        self._encoder = Encoder.load(join(model_dir, "tokenizer"))
        self._backbone: Backbone | None = None

    def read(self, texts: list[str], layers: tuple[int, ...] | None = None) -> Texts:
        """layers: by default those that `extend.layers` and `extend.reader` ask for."""
        if self._config.extend.reader == "words" or layers == ():
            return Texts(texts)
        backbone = self._loaded()
        layers = layers_of(self._config.extend.layers, backbone.num_layers) if layers is None else layers
        return read_texts(texts, self._encoder, self._config.data.max_text_tokens, backbone, layers, self._show_count)

    def _loaded(self) -> Backbone:
        if self._backbone is None:
            metadata = ModelMetadata.load(self._model_dir)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            precision = precision_on(device, metadata.bf16)
            self._backbone = load_backbone(join(self._model_dir, "backbone"), metadata.max_tokens, precision, device)
            self._backbone.to(device)
        return self._backbone


def _write(
    target: str, base_dir: str, manifest: Manifest, num_kept: int, extended: Catalog, predicted: dict[str, Tensor]
) -> None:
    """The files of the extended model: those of the base, but for the items and their tables."""
    for name in manifest.files:
        if name not in ("tables.safetensors", "model.json", "items.parquet"):
            files.copy_file(join(base_dir, name), join(target, name))
    extended.save_items(target)
    dataclasses.replace(ModelMetadata.load(base_dir), num_items=extended.num_items).save(target)
    tables = map_tensors(join(base_dir, "tables.safetensors"))
    longer = {name: torch.cat([tables[name][:num_kept], rows]) for name, rows in predicted.items()}
    save_tensors({**tables, **longer}, join(target, "tables.safetensors"))
