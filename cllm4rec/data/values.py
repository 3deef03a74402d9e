"""One value of a raw row → an id, a number or a text, as plain functions. A value that does not fit raises `Refused`."""

from __future__ import annotations

import math
import uuid
from decimal import Decimal
from typing import Any

MAX_TEXT_DEPTH = 8
MAX_WHOLE = 2**53
"""Above it, floats cannot distinguish neighboring whole numbers."""

NOT_UTF8 = "not UTF-8"
NUL = "NUL character"
BAD_UNICODE = "text is not valid Unicode"
NO_USER = "user id is missing, or neither a string nor a whole number"
NO_ITEM = "item id is missing, or neither a string nor a whole number"
LONG_USER, LONG_ITEM = "user id is longer than data.max_id_chars", "item id is longer than data.max_id_chars"
BAD_RATING = "rating is not a finite number"
TOO_DEEP = "text is nested too deeply"


class Refused(Exception):  # noqa: N818 - describes a row, not an error of the program
    """A record is refused; the message is the reason."""


def as_id(value: Any, missing: str, too_long: str, max_chars: int) -> str:
    """An id as a string without blanks around it.

    Whole numbers are ids too, also as floats, which pandas makes of a column with gaps; so are UUIDs, and bytes that are UTF-8.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise Refused(NOT_UTF8) from None
    if isinstance(value, uuid.UUID):
        value = str(value)
    if isinstance(value, float | Decimal):
        value = int(value) if value == value and -MAX_WHOLE <= value <= MAX_WHOLE and value == int(value) else None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise Refused(missing)
    id_ = clean(value)
    if len(id_) > max_chars:
        raise Refused(too_long)
    return id_


def clean(text: str) -> str:
    """Stripped text that Arrow can store. Raises Refused for NUL and lone surrogates, which JSON escapes can contain."""
    if "\0" in text:
        raise Refused(NUL)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise Refused(BAD_UNICODE) from None
    return text.strip()


def as_number(value: Any, reason: str, decimal: str = ".") -> float:
    """A finite number, or a string with one (CSV has only strings). decimal: what stands before its fraction."""
    if isinstance(value, str) and "," in value:
        if decimal != ",":
            raise Refused(f"{reason} (see decimal)")
        value = value.replace(",", ".")
    if value is None or isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        raise Refused(reason)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Refused(reason) from None
    if not math.isfinite(number):
        raise Refused(reason)
    return number


def as_text(value: Any, depth: int = 0) -> str:
    """A value as text: lists and dictionaries are joined, missing values are empty."""
    if isinstance(value, str):
        return value.strip()
    if depth > MAX_TEXT_DEPTH:
        raise Refused(TOO_DEEP)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return " ".join(part for part in (as_text(inner, depth + 1) for inner in value) if part)
    return "" if value is None or value != value else str(value)
