"""Reads the texts of items outside of prepare, such as those of items that a model does not know yet."""

from __future__ import annotations

import tempfile

import numpy as np
import pyarrow as pa

from cllm4rec.config import DataConfig, Source
from cllm4rec.data.document_files import read_texts
from cllm4rec.data.ingest import check_refused, ingest
from cllm4rec.data.ray_data import LocalExecutor
from cllm4rec.data.records import Limits
from cllm4rec.data.sources import inspect


def read_item_texts(source: Source, data: DataConfig) -> dict[str, str]:
    """Item id → text, of all items of a source with a text; of a repeated item the last row, as in prepare.

    Read in this process, without Ray. Raises DataError and ConfigError as prepare does for `data.items`.
    """
    layout = inspect(source, "items", None)
    with tempfile.TemporaryDirectory() as staging:
        ingested = ingest([layout], Limits.of(data), staging, LocalExecutor())
        check_refused(ingested.refused, layout, ingested.rows_in[0], data.max_bad_fraction)
        rows = ingested.rows[0]
        selected = pa.table(
            {
                "text_file": pa.array(rows.text_file, pa.int32()),
                "text_row": pa.array(rows.text_row, pa.int32()),
                "item": pa.array(rows.item, pa.int32()),
                "place": pa.array(np.arange(len(rows)), pa.int64()),
            }
        )
        found: dict[int, tuple[int, str]] = {}
        for part, texts in read_texts(staging, ingested.text_files, selected):
            for item, place, text in zip(part["item"].to_pylist(), part["place"].to_pylist(), texts, strict=True):
                if item not in found or place > found[item][0]:
                    found[item] = (place, text)
    return {str(ingested.item_ids[item]): text for item, (_, text) in sorted(found.items()) if text}
