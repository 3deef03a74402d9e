"""A trained model as a directory of safetensors and JSON files, each with a sha256 and none of them executable.

pretrained/ and model/
  tables.safetensors             the four ID tables and the dense parameters beside them, float32
  model.json                     sizes, longest prompt, kind of prompt, precision, temperature, id_width, residual
  users.parquet, items.parquet   the Catalog
  tokenizer/, prompts.json       as in prepared/
  backbone/                      reference.json (name, commit, digests) or the weights, and an adapter (`backbone_files`)
  metrics.jsonl                  all steps and epochs of the training
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from cllm4rec.arrays.ids import Catalog
from cllm4rec.data.prepared import PromptTokens
from cllm4rec.errors import ArtifactError
from cllm4rec.model.backbone_files import load_backbone
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.model.precision import precision_on
from cllm4rec.model.ranker import Ranker
from cllm4rec.storage import artifacts, files
from cllm4rec.storage.artifacts import Draft, Manifest
from cllm4rec.storage.tensors import map_tensors, save_tensors

Prompt = Literal["interactions", "recommendation"]

_BACKBONE_FILES = (".safetensors", ".json")
"""File types allowed in `backbone/`. transformers' `from_pretrained` would also load a pickle."""


@dataclasses.dataclass(frozen=True)
class ModelMetadata:
    """The content of `model.json`.

    width: that of the tables. id_width: `model.id_width`. residual: `CLLM4Rec.residual`. The file has no entries for None.
    """

    num_words: int
    num_users: int
    num_items: int
    width: int
    max_tokens: int
    prompt: Prompt
    bf16: bool
    temperature: float = 1.0
    id_width: int | None = None
    residual: bool | None = None

    @classmethod
    def load(cls, directory: str) -> ModelMetadata:
        """Raises ArtifactError if the file was written by another version."""
        try:
            return cls(**files.read_json(files.join(directory, "model.json")))
        except TypeError:
            raise ArtifactError(
                f"{directory}/model.json has other fields than this version writes; train again"
            ) from None

    def save(self, directory: str) -> None:
        known = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        files.write_json(files.join(directory, "model.json"), known)


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A loaded model directory: the ranker, the users and items that it knows, and its manifest."""

    ranker: Ranker
    catalog: Catalog
    prompt_tokens: PromptTokens
    manifest: Manifest

    @classmethod
    def from_pretrained(cls, directory: str, kind: str = "model", device: str | None = None) -> SavedModel:
        """Verify all digests, then load the model.

        device: by default a GPU if torch finds one, otherwise the CPU.
        Raises ArtifactError if the directory is damaged, of another kind, or not written by this package.
        """
        manifest = artifacts.read_manifest(directory, kind)
        artifacts.verify_files(directory, manifest)
        metadata = ModelMetadata.load(directory)
        catalog, prompt_tokens = Catalog.load_without_user_texts(directory), PromptTokens.load(directory)
        _check_sizes(directory, metadata, catalog, prompt_tokens)
        _refuse_pickles(directory)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        precision = precision_on(device, metadata.bf16)
        backbone = load_backbone(files.join(directory, "backbone"), metadata.max_tokens, precision, device)
        model = CLLM4Rec(
            backbone,
            catalog.token_space(metadata.num_words),
            std=0.0,
            temperature=metadata.temperature,
            id_width=metadata.id_width,
            residual=bool(metadata.residual),
        )
        stored = map_tensors(files.join(directory, "tables.safetensors"))
        for name, weight in model.own_parameters().items():
            if name not in stored or stored[name].shape != weight.shape:
                raise ArtifactError(
                    f"{directory}/tables.safetensors has no {name} of shape {tuple(weight.shape)}; train again"
                )
            weight.data.copy_(stored[name])
        model.train_only(())
        model.eval()
        model.compute_in(precision)
        model.to(device)
        return cls(
            Ranker(model, prompt_tokens.prompts, metadata.max_tokens, metadata.prompt), catalog, prompt_tokens, manifest
        )


def save_pretrained(
    draft: Draft, tables: dict[str, Tensor], metadata: ModelMetadata, *, prepared_dir: str, backbone_dir: str
) -> None:
    """Write all files of a model directory except `metrics.jsonl` to a draft.

    tables: `CLLM4Rec.own_parameters`: the four tables and the dense parameters beside them.
    """
    save_tensors(tables, draft.path("tables.safetensors"))
    metadata.save(draft.uri)
    shared = [name for name in files.list_files(prepared_dir) if name.startswith("tokenizer/")]
    for name in ["users.parquet", "items.parquet", "prompts.json", *shared]:
        files.copy_file(files.join(prepared_dir, name), draft.path(name))
    for name in files.list_files(backbone_dir):
        if name not in (artifacts.MANIFEST, "metrics.jsonl"):
            files.copy_file(files.join(backbone_dir, name), draft.path("backbone", name))
    draft.counts |= {"users": metadata.num_users, "items": metadata.num_items, "width": metadata.width}


def load_tables(directory: str, kind: str) -> dict[str, Tensor]:
    """The four tables of a finished directory and the dense parameters beside them, memory-mapped.

    Raises ArtifactError if a digest does not match.
    """
    artifacts.verify_files(directory, artifacts.read_manifest(directory, kind))
    return map_tensors(files.join(directory, "tables.safetensors"))


def _refuse_pickles(directory: str) -> None:
    for name in files.list_files(files.join(directory, "backbone")):
        if not name.endswith(_BACKBONE_FILES):
            raise ArtifactError(
                f"{directory}/backbone/{name} is neither safetensors nor JSON and could run code when loaded; remove "
                "the file or copy the directory again"
            )


def _check_sizes(directory: str, metadata: ModelMetadata, catalog: Catalog, prompt_tokens: PromptTokens) -> None:
    found = (prompt_tokens.num_words, catalog.num_users, catalog.num_items)
    expected = (metadata.num_words, metadata.num_users, metadata.num_items)
    if found != expected:
        raise ArtifactError(
            f"{directory} was trained for (words, users, items) = {expected}, but its catalog has {found}; "
            "copy the whole directory again or train again"
        )
