"""Where tests look for real data and tokenizers, which are not part of the repository."""

import os
from collections.abc import Mapping
from pathlib import Path

DEFAULT = Path(__file__).parents[3] / "shared"


def shared_folder(environment: Mapping[str, str]) -> Path:
    """The folder that CLLM4REC_SHARED names; unset or empty, `shared` beside the checkout."""
    return Path(environment.get("CLLM4REC_SHARED") or DEFAULT)


SHARED = shared_folder(os.environ)
