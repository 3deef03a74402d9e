"""CLLM4Rec: a recommender that joins a pretrained language model with user and item IDs.

    from cllm4rec import Recommender
    rec = Recommender.from_pretrained("runs/demo")
    rec.recommend(user_id="A000000000", k=5)

Importing the package is fast and starts nothing: each name below is imported when it is first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULE_OF = {
    "Recommender": "cllm4rec.scoring.recommender",
    "load_config": "cllm4rec.config",
    "prepare": "cllm4rec.python_api",
    "train": "cllm4rec.python_api",
}
"""Public name → the module that defines it."""

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
