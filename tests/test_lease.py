"""One writer at a time, and a dead one is no obstacle."""

import json
import os
import subprocess
import sys
import time

import pytest

from cllm4rec.errors import ResourceError
from cllm4rec.scoring import lease
from cllm4rec.scoring.lease import hold


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
    with pytest.raises(ResourceError, match="wait for its end"), hold(str(tmp_path / "dump"), "run two"):
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
