"""The directories of one run, by name: what lies below an `output_dir`.

run = Run("s3://bucket/run")
run.model                        # s3://bucket/run/model
"""

from __future__ import annotations

import dataclasses

from cllm4rec.storage.files import join


@dataclasses.dataclass(frozen=True)
class Run:
    """Paths or URIs below an output_dir; docs/outputs.md describes what is in each."""

    output_dir: str

    @property
    def prepared(self) -> str:
        return join(self.output_dir, "prepared")

    @property
    def backbone(self) -> str:
        return join(self.output_dir, "backbone")

    @property
    def pretrained(self) -> str:
        return join(self.output_dir, "pretrained")

    @property
    def model(self) -> str:
        """The model as training left it; what is served may be a promoted copy (`storage.registry.current_model`)."""
        return join(self.output_dir, "model")

    @property
    def evaluation(self) -> str:
        return join(self.output_dir, "evaluation")

    @property
    def dump(self) -> str:
        """The Delta table with a list for every user."""
        return join(self.output_dir, "dump")

    @property
    def nightly(self) -> str:
        """Reports of scoring runs, and the histories the last one read."""
        return join(self.output_dir, "nightly")

    @property
    def models(self) -> str:
        """Promoted models and the pointer to the current one."""
        return join(self.output_dir, "models")

    @property
    def runs(self) -> str:
        """What unfinished stages need to resume."""
        return join(self.output_dir, "runs")

    def directory(self, name: str) -> str:
        """Any directory by its name: one of a stage, of which the name is data, or of an experiment."""
        return join(self.output_dir, name)

    def unfinished(self, stage: str) -> str:
        """Where a running stage keeps its metrics and checkpoints until it is done."""
        return join(self.runs, stage)
