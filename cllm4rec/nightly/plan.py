"""The plan of a scoring run: its inputs, pinned by digest, its name, and its directories.

plan = plan_score(config)                   # the users of prepared/
plan = plan_score(config, nightly=True)     # and the new interactions in config.nightly.events
"""

from __future__ import annotations

import dataclasses
import datetime
from datetime import UTC
from typing import Any

from cllm4rec.config import Config, Source
from cllm4rec.errors import ArtifactError
from cllm4rec.nightly.events import events_digest
from cllm4rec.scoring.rules import rules_digest
from cllm4rec.staleness import settings_digest
from cllm4rec.storage import files
from cllm4rec.storage.artifacts import read_manifest
from cllm4rec.storage.files import digest_of, join
from cllm4rec.storage.registry import current_model
from cllm4rec.storage.table import current_run, published_attempt
from cllm4rec.storage.tombstones import Tombstones


@dataclasses.dataclass(frozen=True)
class ScorePlan:
    """One scoring run. `run_id` names its inputs; `attempt` counts its publications."""

    config: Config
    run_id: str
    attempt: int
    run_date: datetime.date
    model_dir: str
    model_version: str
    is_nightly: bool
    inputs: dict[str, str]
    """Digests of what the histories depend on."""
    num_known_users: int

    @property
    def events(self) -> Source | None:
        """The new interactions; None if the run does not read any."""
        return _events(self.config, self.is_nightly)

    @property
    def dump_dir(self) -> str:
        return self.config.run.dump

    @property
    def prepared_dir(self) -> str:
        return self.config.run.prepared

    @property
    def histories_dir(self) -> str:
        return join(self.config.run.nightly, "histories")

    @property
    def name(self) -> str:
        return f"{self.run_id}-{self.attempt}"

    @property
    def staging(self) -> str:
        """Below the table's folder, so that staged files are published without a copy."""
        return join(self.dump_dir, f"run={self.name}")

    @property
    def checkpoint_dir(self) -> str:
        """Named after the run: with the checkpoint of another run, this one would write nothing and succeed."""
        return join(self.config.run.runs, "score", self.name)

    @property
    def report_dir(self) -> str:
        return join(self.config.run.nightly, f"{self.run_date}-{self.name}")


def plan_score(config: Config, force: bool = False, nightly: bool = False) -> ScorePlan:
    """The run for this config. If its lists are not the current ones, or with `force`, it is a new attempt.

    Raises ArtifactError if the output of a stage is missing, DataError if a file of the rules or the events is missing.
    """
    model_dir, prepared_dir = current_model(config.output_dir), config.run.prepared
    model, prepared = read_manifest(model_dir, "model"), read_manifest(prepared_dir, "prepared")
    # A promoted model may be older than the data; users and items are then matched by id.
    if model_dir == config.run.model and model.inputs.get("prepared") != prepared.digest:
        raise ArtifactError(
            f"{model_dir} was trained on other data than {prepared_dir} holds; run cllm4rec pretrain and cllm4rec "
            "finetune again"
        )
    inputs = {
        "model": model.digest,
        "prepared": prepared.digest,
        "events": events_digest(_events(config, nightly), config.data.min_rating),
        "erased": Tombstones.load(config.output_dir).digest,
    }
    run_date = config.run_date or datetime.datetime.now(UTC).date()
    named: list[Any] = [inputs, settings_digest(config, "score"), rules_digest(config.score.rules), str(run_date)]
    run_id = digest_of(named)[:16]
    attempt = published_attempt(config.run.dump, run_id)
    if force or current_run(config.run.dump) != run_id:
        attempt += 1
    return ScorePlan(
        config=config,
        run_id=run_id,
        attempt=attempt,
        run_date=run_date,
        model_dir=files.absolute(model_dir),
        model_version=model.digest[:12],
        is_nightly=nightly,
        inputs=inputs,
        num_known_users=int(prepared.counts["users"]),
    )


def _events(config: Config, is_nightly: bool) -> Source | None:
    return config.nightly.events if is_nightly else None


def is_published(config: Config, nightly: bool = False) -> bool:
    """Whether the lists that readers see are those of this config."""
    return current_run(config.run.dump) == plan_score(config, nightly=nightly).run_id
