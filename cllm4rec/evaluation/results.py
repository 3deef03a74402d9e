"""The content of `evaluation/metrics.json`.

report = EvaluationReport.load(config.run.evaluation)
report.results["cllm4rec"]["recall@20"]["mean"]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cllm4rec.storage.files import join, read_json, write_json

Interval = Mapping[str, float]
"""`mean` and the ends `low` and `high` of its 95 % bootstrap interval."""
Results = Mapping[str, Mapping[str, Interval]]
"""Method → metric → mean and interval."""


@dataclasses.dataclass(frozen=True)
class EvaluationProtocol:
    """Every choice that the figures depend on.

    metrics: metric → its definition. interval: kind, confidence, samples and seed. baselines: baseline → how it was
    fitted and tuned. skipped: baseline → why it was not run.
    """

    split: dict[str, Any]
    read: str
    mask: str
    metrics: dict[str, str]
    ranking: str
    items_ranked: int
    users_evaluated: int
    users_dropped: int
    test_items: int
    interval: dict[str, Any]
    model_version: str
    baselines: dict[str, dict[str, Any]]
    skipped: dict[str, str]


@dataclasses.dataclass(frozen=True)
class PairedComparison:
    """`metric` of every method minus that of the best baseline, paired over users."""

    metric: str
    baseline: str
    difference: Mapping[str, Interval]


@dataclasses.dataclass(frozen=True)
class StratumResult:
    """`metric` of every method on a part of the users or items."""

    label: str
    users: int
    metric: str
    results: Mapping[str, Interval]


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """All figures of an evaluation. strata: what users or items are divided by → the parts.

    published: figures of others from the config (`source`, `note`, `results`: method → metric → value).
    """

    protocol: EvaluationProtocol
    results: Results
    comparison: PairedComparison
    strata: dict[str, list[StratumResult]]
    published: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Fields as dictionaries; without `published` if there are no such figures."""
        content = dataclasses.asdict(self)
        return content if self.published is not None else {key: content[key] for key in content if key != "published"}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EvaluationReport:
        return cls(
            protocol=EvaluationProtocol(**content["protocol"]),
            results=content["results"],
            comparison=PairedComparison(**content["comparison"]),
            strata={kind: [StratumResult(**part) for part in parts] for kind, parts in content["strata"].items()},
            published=content.get("published"),
        )

    def save(self, directory: str) -> None:
        write_json(join(directory, "metrics.json"), self.to_json())

    @classmethod
    def load(cls, directory: str) -> EvaluationReport:
        """Read `metrics.json`. Raises ArtifactError if it is missing or not JSON."""
        return cls.from_json(read_json(join(directory, "metrics.json")))
