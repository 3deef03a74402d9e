import os

import numpy as np
import psutil
import pytest
from support.parity import parity

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.documents import Documents
from cllm4rec.data.memory_map import memory_mapped
from cllm4rec.errors import ResourceError
from cllm4rec.metrics.protocol import Validation


def documents_of(num_bytes: int) -> Documents:
    one = parity().documents.take(np.arange(1))
    return one.take(np.zeros(num_bytes // one.num_bytes, int))


@pytest.mark.parametrize("at_once", [1, 7, 10_000])
def test_parts_come_back_as_one(at_once):
    documents = parity().documents
    cuts = range(0, len(documents), at_once)
    kept = memory_mapped(documents.take(np.arange(begin, min(begin + at_once, len(documents)))) for begin in cuts)
    assert kept.to_arrow().equals(documents.to_arrow())
    assert kept.target.tolist() == documents.target.tolist()
    some = np.array([3, 0, len(documents) - 1])
    assert kept.take(some).to_arrow().equals(documents.take(some).to_arrow())


def test_histories_on_disk_validate_alike():
    histories = parity().world.histories
    places = np.random.default_rng(0).permutation(len(histories.user))
    kept, whole = Validation(memory_mapped(map(histories.take, np.array_split(places, 3)))), Validation(histories)
    assert kept.users.tolist() == whole.users.tolist()
    assert (kept.read.tolist(), kept.relevant.tolist()) == (whole.read.tolist(), whole.relevant.tolist())
    few = kept.take(np.array([5, 2]))
    assert few.read.tolist() == [whole.read.tolist()[5], whole.read.tolist()[2]]


def test_what_is_kept_is_not_the_process_s_own_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    part = documents_of(num_bytes=4 << 20)

    def own_bytes() -> int:
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared

    before = own_bytes()
    kept = memory_mapped(part for _ in range(50))
    assert int(kept.main.values.sum() + kept.user.sum()) == 50 * int(part.main.values.sum() + part.user.sum())
    assert kept.num_bytes > 150 << 20
    assert own_bytes() - before < 40 << 20
    assert os.listdir(tmp_path) == []  # nothing to clean up, however the process ends


def test_a_full_disk_is_told_with_what_to_do(monkeypatch):
    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

        def tell(self):
            return 0

    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    with pytest.raises(ResourceError, match=r"No space left on device\); set TMPDIR"):
        memory_mapped([parity().documents])


def test_without_a_part_there_is_nothing_to_keep():
    with pytest.raises(ValueError, match="no part"):
        memory_mapped(iter(list[Documents]()))


def test_an_empty_part_is_one():
    nothing = parity().documents.take(np.empty(0, int))
    kept = memory_mapped([nothing, nothing])
    assert len(kept) == 0
    assert kept.main.tolist() == Ragged.from_lists([]).tolist() == []
