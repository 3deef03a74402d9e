"""How many of the kept items and users have a text, and what to look at if few have one.

Texts and interactions often come from different systems, which may spell the same id differently (`0000000003` and `3`).
Prepare changes no id, so such texts match nothing. That is not an error, but it must not go unnoticed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cllm4rec.data.formats import Role
from cllm4rec.typing import Array

logger = logging.getLogger(__name__)

FEW = 0.5
"""Below this share of items or users with a text, the unmatched ids are shown."""
EXAMPLES = 3
_SHOWN_CHARS = 24


def report_coverage(role: Role, ids: Array, texts: Sequence[str], strangers: Sequence[str]) -> dict[str, int]:
    """Log how many of `ids` have a text, with a warning if few have one. Returns the counts for the manifest.

    role: the source of the texts, "items" or "users". strangers: ids of that source that are not among `ids`.
    """
    bare = np.flatnonzero([not text for text in texts])
    with_text = len(ids) - len(bare)
    share = with_text / len(ids)
    logger.info(f"texts: {with_text:,} of {len(ids):,} {role} have one ({share:.0%})")
    if share < FEW and len(strangers):
        logger.warning(
            f"only {with_text:,} of {len(ids):,} {role} have a text in data.{role}: {_examples(role, ids[bare])} have none, "
            f"and the texts of {_examples(role, strangers)} belong to none of the {role} that are kept; if one is the other "
            "in another spelling, such as with leading zeros, write the ids in one way"
        )
    return {"of": len(ids), "with_text": with_text}


def _examples(role: Role, ids: Sequence[Any] | Array) -> str:
    """A few ids: those of items cut, of those of users only the pattern."""
    shown = [str(id_) if role == "items" else pattern_of(str(id_)) for id_ in ids[:EXAMPLES]]
    return ", ".join(id_ if len(id_) <= _SHOWN_CHARS else f"{id_[:_SHOWN_CHARS]}..." for id_ in shown)


def pattern_of(user_id: str) -> str:
    """What an id looks like without telling it: leading zeros stay, other digits become 9 and letters become a or A."""
    zeros = re.match(r"0*(?=\d)", user_id)
    kept = zeros.end() if zeros else 0
    rest = re.sub(r"\d", "9", user_id[kept:])
    rest = "".join("A" if letter.isupper() else "a" if letter.isalpha() else letter for letter in rest)
    return user_id[:kept] + rest
