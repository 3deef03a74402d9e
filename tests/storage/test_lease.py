"""One writer at a time; the lease of a dead process is taken over."""

import json
import os
import subprocess
import sys
import time

import pytest

from cllm4rec.errors import ResourceError
from cllm4rec.storage import lease
from cllm4rec.storage.lease import hold


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write(path, **facts):
    mine = {"what": "run one", "host": lease.socket.gethostname(), "pid": os.getpid(), "token": "t"}
    path.write_text(json.dumps({**mine, "renewed": time.time(), **facts}))


def test_a_second_writer_is_refused_by_name_and_the_first_leaves_nothing(tmp_path):
    with hold(str(tmp_path / "dump"), "run one"):
        refused = rf"run one is at work on .*dump \(process {os.getpid()} on "
        with pytest.raises(ResourceError, match=refused), hold(str(tmp_path / "dump"), "run two"):
            pass
        with hold(str(tmp_path / "other"), "run two"):
            pass
    assert list(tmp_path.iterdir()) == []
    with hold(str(tmp_path / "dump"), "run two"):
        pass


def test_the_lease_of_an_interrupted_block_is_given_back(tmp_path):
    with pytest.raises(KeyboardInterrupt), hold(str(tmp_path / "dump"), "run one"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_dead_process_of_this_machine_loses_its_lease_at_once(tmp_path):
    write(tmp_path / "dump.lease", pid=dead_pid())
    with hold(str(tmp_path / "dump"), "run two"):
        assert json.loads((tmp_path / "dump.lease").read_text())["what"] == "run two"


def test_a_process_elsewhere_loses_it_when_it_was_not_renewed(tmp_path):
    write(tmp_path / "dump.lease", host="elsewhere", renewed=time.time() - lease.STALE_S + 30)
    with pytest.raises(ResourceError, match="on elsewhere"), hold(str(tmp_path / "dump"), "run two"):
        pass
    write(tmp_path / "dump.lease", host="elsewhere", renewed=time.time() - lease.STALE_S - 1)
    with hold(str(tmp_path / "dump"), "run two"):
        pass


def test_a_lease_that_is_just_being_written_is_held(tmp_path):
    (tmp_path / "dump.lease").write_text("")
    with pytest.raises(ResourceError, match="wait until it ends"), hold(str(tmp_path / "dump"), "run two"):
        pass
    old = time.time() - lease.STALE_S - 1
    os.utime(tmp_path / "dump.lease", (old, old))
    with hold(str(tmp_path / "dump"), "run two"):
        pass


def test_a_held_lease_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    with hold(str(tmp_path / "dump"), "run one"):
        first = json.loads((tmp_path / "dump.lease").read_text())["renewed"]
        give_up = time.monotonic() + 5
        while json.loads((tmp_path / "dump.lease").read_text() or "{}").get("renewed", first) == first:
            assert time.monotonic() < give_up
            time.sleep(0.02)


def test_a_process_elsewhere_is_not_taken_for_dead_by_a_number_of_this_machine(tmp_path):
    write(tmp_path / "dump.lease", host="elsewhere", pid=dead_pid())
    with pytest.raises(ResourceError, match="on elsewhere"), hold(str(tmp_path / "dump"), "run two"):
        pass


def test_a_process_of_another_user_is_alive(tmp_path, monkeypatch):
    def not_permitted(*_):
        raise PermissionError

    write(tmp_path / "dump.lease")
    monkeypatch.setattr(lease.os, "kill", not_permitted)
    with pytest.raises(ResourceError, match="run one is at work"), hold(str(tmp_path / "dump"), "run two"):
        pass


def test_a_lease_that_another_took_over_is_theirs(tmp_path, monkeypatch):
    """As after a pause of minutes: this process is neither to win it back nor to end it."""
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    with hold(str(tmp_path / "dump"), "run one"):
        write(tmp_path / "dump.lease", what="run two", token="another")
        theirs = (tmp_path / "dump.lease").read_text()
        time.sleep(0.4)
    assert (tmp_path / "dump.lease").read_text() == theirs


def test_a_lease_that_was_removed_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    with hold(str(tmp_path / "dump"), "run one"):
        (tmp_path / "dump.lease").unlink()
        time.sleep(0.4)
        assert list(tmp_path.iterdir()) == []


def test_of_two_who_find_a_dead_lease_one_is_refused(tmp_path, monkeypatch):
    """The other one found it dead as well, and removed what this one had made in its place."""
    write(tmp_path / "dump.lease", pid=dead_pid())
    monkeypatch.setattr(lease.time, "sleep", lambda _: write(tmp_path / "dump.lease", what="run three"))
    with pytest.raises(ResourceError, match="another run has just begun"), hold(str(tmp_path / "dump"), "run two"):
        pass
    assert json.loads((tmp_path / "dump.lease").read_text())["what"] == "run three"


def test_a_lease_is_renewed_again_after_the_storage_was_away(tmp_path, monkeypatch):
    failures = [OSError, OSError]

    def sometimes(*args):
        if failures:
            raise failures.pop()
        real(*args)

    real = lease.write_bytes
    monkeypatch.setattr(lease, "RENEW_S", 0.02)
    monkeypatch.setattr(lease, "write_bytes", sometimes)
    with hold(str(tmp_path / "dump"), "run one"):
        first = (tmp_path / "dump.lease").read_text()
        give_up = time.monotonic() + 5
        while (tmp_path / "dump.lease").read_text() in (first, ""):
            assert time.monotonic() < give_up
            time.sleep(0.02)


def test_a_lease_that_says_nothing_is_held(tmp_path):
    (tmp_path / "dump.lease").write_text("[]")
    with pytest.raises(ResourceError, match="wait until it ends"), hold(str(tmp_path / "dump"), "run two"):
        pass
