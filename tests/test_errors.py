"""The causes of an error, through all wrappers."""

import errno

import pytest

from cllm4rec.errors import DataError, causes, is_full_disk


class WrapperError(Exception):
    """Like Ray's wrapper: its `cause` is the error of a task."""

    def __init__(self, cause):
        super().__init__("a task failed")
        self.cause = cause


def chained(inner, outer):
    try:
        try:
            raise inner
        except BaseException as error:
            raise outer from error
    except BaseException as error:
        return error


def test_causes_come_outermost_first_through_wrappers():
    inner, middle, outer = DataError("inner"), WrapperError(None), RuntimeError("outer")
    middle.cause = inner
    assert list(causes(chained(middle, outer))) == [outer, middle, inner]


def test_circular_causes_end():
    error = WrapperError(None)
    error.cause = error
    assert list(causes(error)) == [error]


def test_a_suppressed_context_is_not_a_cause():
    def raise_from_none():
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError:
            raise DataError("something else") from None

    with pytest.raises(DataError) as caught:
        raise_from_none()
    assert not is_full_disk(caught.value)


@pytest.mark.parametrize(
    "full",
    [
        OSError(errno.ENOSPC, "x"),
        OSError(errno.EDQUOT, "x"),
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),  # Arrow
        RuntimeError("OutOfDiskError: local disk is full"),  # Ray
    ],
)
def test_a_full_disk_is_detected_through_wrappers(full):
    assert is_full_disk(full)
    assert is_full_disk(WrapperError(full))
    assert is_full_disk(chained(WrapperError(full), RuntimeError("training stopped")))


def test_other_io_errors_are_not_a_full_disk():
    assert not is_full_disk(PermissionError(errno.EACCES, "Permission denied"))
    assert not is_full_disk(chained(FileNotFoundError("x"), DataError("y")))
