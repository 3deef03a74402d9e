"""What nobody is recommended."""

import numpy as np
import pytest

from cllm4rec.catalog import Catalog
from cllm4rec.errors import DataError
from cllm4rec.scoring.rules import Rules, read_rules

CATALOG = Catalog([], ["apple", "book", "été"])


def read(tmp_path, content: bytes):
    (tmp_path / "deny.txt").write_bytes(content)
    return read_rules(str(tmp_path / "deny.txt"), CATALOG)


def test_a_deny_list_becomes_item_indices_and_unknown_ids_are_counted(tmp_path):
    rules, num_unknown = read(tmp_path, "été\n apple \r\n\napple\nghost\n".encode())
    assert rules.deny.tolist() == [0, 2]
    assert num_unknown == 1


def test_no_deny_list_denies_nothing(tmp_path):
    rules, num_unknown = read_rules(None, CATALOG)
    assert (rules.deny.tolist(), num_unknown) == ([], 0)
    rules, num_unknown = read(tmp_path, b"")
    assert (rules.deny.tolist(), num_unknown) == ([], 0)


def test_every_user_is_denied_the_same():
    assert Rules(np.array([1, 4])).denied(3).tolist() == [[1, 4]] * 3
    assert Rules().denied(2).tolist() == [[], []]


def test_a_deny_list_that_cannot_be_read_is_told_in_a_sentence(tmp_path):
    with pytest.raises(DataError, match=r"deny list .*nothing\.txt does not exist; correct score\.rules\.deny"):
        read_rules(str(tmp_path / "nothing.txt"), CATALOG)
    with pytest.raises(DataError, match="not UTF-8; write one item id a line"):
        read(tmp_path, b"\xff\xfe")
