"""Times of raw rows → Unix seconds, and what is implausible about them.

A number counts in the unit of the source (`time_unit`). A string is a number, a date in one of the common spellings, or one
in `time_format`. A row may have no time.
"""

from __future__ import annotations

import dataclasses
import email.utils
import functools
import logging
import math
import re
from datetime import UTC, date, datetime, time
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from cllm4rec.data.values import Refused, as_number
from cllm4rec.typing import Array

logger = logging.getLogger(__name__)

TimeUnit = Literal["s", "ms", "us", "ns"]
TICKS: dict[str, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

NO_TIME = 0
"""Of a row without a time. It counts as older than all others."""
MISSING = {"", "na", "n/a", "nan", "nat", "none", "null", "\\n"}
"""How exports spell a value that is not there, in lower case."""

BAD_TIME = "timestamp is in no known spelling (see time_format)"
FAR_TIME = "timestamp is outside of the years 1 to 9999 (see time_unit)"
FIRST, LAST = -62_135_596_800, 253_402_300_799
"""The years 1 to 9999."""
EARLIEST_YEAR = 1980
"""Earlier interactions are implausible."""

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
_ZONE = re.compile(r"\s*(UTC|GMT)$")
_DAY_AND_CLOCK = re.compile(r"(.+?)(?:[T,\s]+(\d{1,2}:\d{2}.*))?")
_DAYS = ("%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y", "%b %d, %Y", "%B %d, %Y", "%d %b %Y", "%d %B %Y", "%m %d, %Y")
"""Spellings beside ISO 8601 that mean one day only; the last one is reviewTime of Amazon. 1/2/2020 is not among them."""
_LOGS = ("%a %b %d %H:%M:%S %z %Y", "%a %b %d %H:%M:%S %Y")
"""Spellings of Twitter and of C."""


class UnixSeconds(int):
    """A time whose unit is known already: of a time type of Arrow."""


@dataclasses.dataclass(frozen=True)
class Clock:
    """How a source writes times."""

    unit: TimeUnit = "s"
    format: str | None = None
    """Of strptime; then times have no other spelling."""

    def seconds(self, value: Any) -> int:
        """Unix seconds, or NO_TIME. Dates without a time zone are UTC. Raises Refused."""
        if isinstance(value, UnixSeconds):
            return _in_range(value)
        if value is None or value != value or (isinstance(value, str) and value.strip().lower() in MISSING):
            return NO_TIME
        if self.format is not None:
            return _of_moment(_strptime(str(value).strip(), self.format))
        if isinstance(value, str) and not _NUMBER.fullmatch(value):
            return _of_moment(_date(value.strip()))
        if isinstance(value, int) and not isinstance(value, bool):
            return _in_range(value // TICKS[self.unit])
        return _in_range(as_number(value, BAD_TIME) / TICKS[self.unit])


IN_SECONDS = Clock()
"""Times are seconds since 1970, or dates."""


def _in_range(seconds: float) -> int:
    if not FIRST <= seconds <= LAST:
        raise Refused(FAR_TIME)
    return math.floor(seconds)


def _of_moment(moment: datetime | None) -> int:
    if moment is None:
        raise Refused(BAD_TIME)
    return math.floor((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _strptime(text: str, spelling: str) -> datetime | None:
    try:
        return datetime.strptime(text, spelling)
    except ValueError:
        return None


def _date(text: str) -> datetime | None:
    """A date in ISO 8601, RFC 2822 or one of the spellings above."""
    text = _ZONE.sub("", text)
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        pass
    match = _DAY_AND_CLOCK.fullmatch(text)
    day, clock = (_day(match[1].strip()), match[2] or "00:00") if match else (None, "")
    if day is not None:
        hours = _hours(clock)
        return datetime.combine(day, hours) if hours else None
    for spelling in _LOGS:
        if moment := _strptime(text, spelling):
            return moment
    try:
        return email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None


@functools.lru_cache(maxsize=1 << 14)
def _day(text: str) -> date | None:
    """Cached, because strptime is slow and days repeat."""
    days = (_strptime(text, spelling) for spelling in _DAYS)
    return next((moment.date() for moment in days if moment), None)


def _hours(clock: str) -> time | None:
    """The time of a day: 9:05, 09:05:30.5 +0200 or 9:05 PM."""
    try:
        return time.fromisoformat(("0" if clock[1] == ":" else "") + clock.replace(" ", ""))
    except ValueError:
        pass
    for spelling in ("%I:%M:%S %p", "%I:%M %p"):
        if moment := _strptime(clock, spelling):
            return moment.time()
    return None


def of_arrow(column: pa.ChunkedArray) -> list[UnixSeconds | None] | None:
    """The values of an Arrow column of times, however far; None for a column of another type."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        ticks, days = TICKS[kind.unit], 1
    elif pa.types.is_date64(kind):
        ticks, days = TICKS["ms"], 1
    elif pa.types.is_date32(kind):
        ticks, days, column = 1, 86_400, column.cast(pa.int32())
    else:
        return None
    values = column.cast(pa.int64()).to_pylist()
    return [None if value is None else UnixSeconds(value * days // ticks) for value in values]


def report_times(role: str, unit: TimeUnit, time_E: Array, now: datetime | None = None) -> dict[str, int]:
    """Count rows without a time and implausible times, and warn of the latter: their unit may be another one."""
    known = time_E[time_E != NO_TIME]
    next_year = (now or datetime.now(UTC)).year + 1
    late = known[known >= datetime(next_year + 1, 1, 1, tzinfo=UTC).timestamp()]
    early = known[known < datetime(EARLIEST_YEAR, 1, 1, tzinfo=UTC).timestamp()]
    for odd, extreme, what in ((late, np.max, f"after {next_year}"), (early, np.min, f"before {EARLIEST_YEAR}")):
        if len(odd):
            year = datetime.fromtimestamp(int(extreme(odd)), UTC).year
            logger.warning(
                f"{len(odd):,} of {len(time_E):,} rows of data.{role} have a time {what} (such as in {year}); data.{role}."
                f"time_unit is {unit}: choose s, ms, us or ns if it is another one, and write all times in one unit"
            )
    without = len(time_E) - len(known)
    if without:
        logger.info(f"  {without:,} rows without a time count as older than all others")
    return {"without": without, "late": len(late), "early": len(early)}
