"""Times as files spell them, and what is said about those that cannot be right."""

import logging
from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm4rec.data.times import BAD_TIME, FAR_TIME, NO_TIME, Clock, of_arrow, report_times
from cllm4rec.data.values import Refused

MOMENT = datetime(2020, 1, 31, 9, 5, 7, tzinfo=UTC)
DAY = int(datetime(2020, 1, 31, tzinfo=UTC).timestamp())
SECONDS = int(MOMENT.timestamp())


@pytest.mark.parametrize(
    "text",
    [
        "2020-01-31T09:05:07Z",
        " 2020-01-31 09:05:07 ",
        "2020-01-31 09:05:07.999999",
        "2020-01-31 11:05:07+02:00",
        "2020-01-31 11:05:07 +0200",
        "2020-01-31 09:05:07 UTC",
        "2020-01-31 09:05:07.123456 UTC",
        "2020-01-31T09:05:07.123456789Z",
        "2020-1-31 9:05:07",
        "2020/01/31 09:05:07",
        "31.01.2020 09:05:07",
        "31.1.2020, 9:05:07",
        "Jan 31, 2020 9:05:07 AM",
        "January 31, 2020 09:05:07",
        "31 Jan 2020 09:05:07",
        "01 31, 2020 09:05:07",
        "Fri, 31 Jan 2020 09:05:07 GMT",
        "Fri, 31 Jan 2020 10:05:07 +0100",
        "Fri Jan 31 09:05:07 +0000 2020",
        "Fri Jan 31 09:05:07 2020",
        str(SECONDS),
        f"{SECONDS}.9",
        "1.580461507e9",
    ],
)
def test_common_spellings_of_a_moment_are_one_number(text: str) -> None:
    assert Clock().seconds(text) == SECONDS


@pytest.mark.parametrize(
    "text", ["2020-01-31", "2020/1/31", "31.01.2020", "Jan 31, 2020", "31 January 2020", "01 31, 2020"]
)
def test_a_day_begins_at_midnight_utc(text: str) -> None:
    assert Clock().seconds(text) == DAY


@pytest.mark.parametrize("clock", ["12:30 AM", "12:30 PM", "1:30 PM"])
def test_hours_of_twelve_are_those_of_the_day(clock: str) -> None:
    hours = {"12:30 AM": 0.5, "12:30 PM": 12.5, "1:30 PM": 13.5}[clock]
    assert Clock().seconds(f"Jan 31, 2020 {clock}") == DAY + hours * 3600


@pytest.mark.parametrize(
    "value", ["01/02/2020", "yesterday", "2020-13-01", "2020-01-31 25:00", "2020-01-31 x", "1_000", True, [1]]
)
def test_what_is_no_time_or_could_be_two_is_refused(value: object) -> None:
    with pytest.raises(Refused, match="see time_format") as caught:
        Clock().seconds(value)
    assert str(caught.value) == BAD_TIME


@pytest.mark.parametrize("value", [None, "", "  ", "NA", "null", "NULL", "NaN", "None", "\\N", float("nan")])
def test_a_row_may_have_no_time(value: object) -> None:
    assert Clock().seconds(value) == NO_TIME
    assert Clock(format="%d/%m/%Y").seconds(value) == NO_TIME


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_numbers_count_in_the_unit_of_the_source(unit: str, factor: int) -> None:
    clock = Clock(unit)  # type: ignore[arg-type]
    for value in (SECONDS * factor, str(SECONDS * factor), float(SECONDS * factor), SECONDS * factor + factor - 1):
        assert clock.seconds(value) == SECONDS
    assert clock.seconds("2020-01-31T09:05:07") == SECONDS, "a date needs no unit"
    assert clock.seconds(-1) == -1


def test_milliseconds_taken_for_seconds_are_refused_with_the_setting_to_look_at() -> None:
    for value in (SECONDS * 1000, SECONDS * 10**6, -(10**12), 1e300, 10**400):
        with pytest.raises(Refused, match="time_unit"):
            Clock().seconds(value)


def test_a_format_decides_what_could_be_two_days() -> None:
    assert Clock(format="%d/%m/%Y").seconds("01/02/2020") == datetime(2020, 2, 1, tzinfo=UTC).timestamp()
    assert Clock(format="%m/%d/%Y").seconds("01/02/2020") == datetime(2020, 1, 2, tzinfo=UTC).timestamp()
    assert Clock(format="%Y%m%d").seconds(20200131) == DAY
    with pytest.raises(Refused):
        Clock(format="%d/%m/%Y").seconds("2020-01-31")


@given(st.integers(-(10**18), 10**18), st.sampled_from(["s", "ms", "us", "ns"]))
def test_times_of_arrow_are_floored_and_may_be_far(value: int, unit: str) -> None:
    (seconds,) = of_arrow(pa.chunked_array([pa.array([value], pa.timestamp(unit))])) or [None]
    assert seconds == value // {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]


def test_arrow_has_days_gaps_and_other_types() -> None:
    days = pa.array([date(2020, 1, 31), None])
    for column in (days, days.cast(pa.date64()), days.cast(pa.timestamp("us", "Europe/Berlin"))):
        assert of_arrow(pa.chunked_array([column])) == [DAY, None]
    assert of_arrow(pa.chunked_array([[1, 2]])) is None
    with pytest.raises(Refused, match=FAR_TIME[:20]):
        Clock().seconds((of_arrow(pa.chunked_array([pa.array([10**15], pa.timestamp("s"))])) or [None])[0])


def test_implausible_years_are_counted_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    now = datetime(2026, 5, 1, tzinfo=UTC)
    years = [datetime(year, 1, 1, tzinfo=UTC).timestamp() for year in (1971, 2020, 2027, 2028, 2400)]
    assert report_times("interactions", "ms", np.array([NO_TIME, *years], np.int64), now) == {
        "without": 1,
        "late": 2,
        "early": 1,
    }
    late, early = [record.getMessage() for record in caplog.records]
    assert "2 of 6 rows of data.interactions have a time after 2027 (such as in 2400)" in late
    assert "data.interactions.time_unit is ms" in late
    assert "1 of 6 rows of data.interactions have a time before 1980 (such as in 1971)" in early
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert report_times("interactions", "s", np.array([NO_TIME, years[1]], np.int64), now)["late"] == 0
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "1 rows without a time count" in caplog.text
