"""The directories of a run below its `output_dir`.

run = Run("s3://bucket/run")
run.model                        # s3://bucket/run/model
"""

from __future__ import annotations

import dataclasses

from cllm4rec.storage.files import join


@dataclasses.dataclass(frozen=True)
class Run:
    """Paths or URIs below an output_dir. docs/outputs.md describes their contents."""

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
        """The trained model. A promoted copy may be served instead (`storage.registry.current_model`)."""
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
        """Reports of scoring runs, and the histories that the last one read."""
        return join(self.output_dir, "nightly")

    @property
    def models(self) -> str:
        """Promoted models, and the pointer to the current one."""
        return join(self.output_dir, "models")

    @property
    def runs(self) -> str:
        """Metrics and checkpoints of unfinished stages."""
        return join(self.output_dir, "runs")

    def directory(self, name: str) -> str:
        """The directory of a stage or an experiment, by its name."""
        return join(self.output_dir, name)

    def unfinished(self, stage: str) -> str:
        """The metrics and checkpoints of a running stage. The stage removes this directory at its end."""
        return join(self.runs, stage)
