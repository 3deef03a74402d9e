"""What can go wrong, as a tree. Every message is one sentence that says what to do about it.

Cllm4RecError
├── ConfigError        the YAML file or an override is wrong
├── DataError          the input rows or texts are wrong, or nothing is left of them
├── ArtifactError      a directory between stages is missing, damaged or belongs to another run
├── ResourceError      the cluster or the disk has less than was asked for
├── TrainingError      a training run cannot go on (NaN, a worker lost too often)
└── AuditError         the recommendation lists are not what was promised; nothing was published
    └── PromotionError a new model is not good enough; the present one stays
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

# What Arrow, safetensors, Delta and Ray say instead of giving an errno.
_FULL_DISK = ("No space left on device", "Disk quota exceeded", "OutOfDiskError")


class Cllm4RecError(Exception):
    """Base of all errors a caller can act on; the jobs print it as one line and exit with `exit_status`."""

    exit_status = 1
    details: Mapping[str, Any] = MappingProxyType({})
    """What a command's last line of JSON holds beside the sentence."""


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
    """An error and all it was raised from, outermost first; also what Ray wrapped on another machine (`.cause`)."""
    waiting: list[object] = [error]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, BaseException) and id(one) not in seen:
            seen.add(id(one))
            yield one
            context = None if one.__suppress_context__ else one.__context__
            waiting += [getattr(one, "cause", None), one.__cause__, context]


def is_full_disk(error: BaseException) -> bool:
    """Whether a disk without room (or a quota) is behind an error, whichever library met it."""
    return any(
        getattr(one, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(words in str(one) for words in _FULL_DISK)
        for one in causes(error)
    )
