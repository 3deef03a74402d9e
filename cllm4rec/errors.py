"""The error classes. Every message is one sentence that also says what to do.

Cllm4RecError
├── ConfigError        the YAML file or an override is invalid
├── DataError          the input rows or texts are invalid, or none remain after filtering
├── ArtifactError      a directory of a stage is missing, damaged or belongs to another run
├── ResourceError      the cluster or a disk has less than a run needs
├── TrainingError      a training run cannot continue (loss not finite, repeated worker failures)
└── AuditError         the recommendation lists failed a check; nothing was published
    └── PromotionError a new model is worse than the current one, which stays current
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

# Messages of Arrow, safetensors, Delta and Ray, which set no errno.
_FULL_DISK = ("No space left on device", "Disk quota exceeded", "OutOfDiskError")


class Cllm4RecError(Exception):
    """The base of all errors that a caller can act on. Commands print one line and exit with `exit_status`."""

    exit_status = 1
    details: Mapping[str, Any] = MappingProxyType({})
    """Additional fields for the command's `run.json`."""


class ConfigError(Cllm4RecError, ValueError):
    exit_status = 2


class DataError(Cllm4RecError, ValueError):
    pass


class ArtifactError(Cllm4RecError):
    pass


class ResourceError(Cllm4RecError):
    pass


class TrainingError(Cllm4RecError):
    pass


class AuditError(Cllm4RecError):
    exit_status = 3


class PromotionError(AuditError):
    def __init__(self, sentence: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(sentence)
        self.details = details or {}


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all its causes, outermost first, including errors that Ray wrapped on another machine (`.cause`)."""
    pending: list[object] = [error]
    seen: set[int] = set()
    while pending:
        current = pending.pop(0)
        if isinstance(current, BaseException) and id(current) not in seen:
            seen.add(id(current))
            yield current
            context = None if current.__suppress_context__ else current.__context__
            pending += [getattr(current, "cause", None), current.__cause__, context]


def is_full_disk(error: BaseException) -> bool:
    """Whether a full disk or an exhausted quota caused an error, in any library."""
    return any(
        getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(text in str(cause) for text in _FULL_DISK)
        for cause in causes(error)
    )
