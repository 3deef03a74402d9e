"""What can go wrong, as a tree. Every message is one sentence that says what to do about it.

    Cllm4RecError
    ├── ConfigError        the YAML file or an override is wrong
    ├── DataError          the input rows or texts are wrong, or nothing is left of them
    ├── ArtifactError      a directory between stages is missing, damaged or belongs to another run
    ├── ResourceError      the cluster or the disk has less than was asked for
    ├── TrainingError      a training run cannot go on (NaN, a worker lost too often)
    └── AuditError         the recommendation lists are not what was promised; nothing was published
"""


class Cllm4RecError(Exception):
    """Base of all errors a caller can act on; the jobs print it as one line and exit with `exit_status`."""

    exit_status = 1


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
