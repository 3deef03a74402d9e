"""Workers are started with jemalloc where it is, and with nothing else than what somebody chose."""

import os
import subprocess
import sys

import pytest

from cllm4rec import allocator

MAPPED = "print('libjemalloc' in open('/proc/self/maps').read())"


def uses_jemalloc(variables):
    done = subprocess.run([sys.executable, "-c", MAPPED], env=variables, capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"


@pytest.fixture
def nothing_chosen(monkeypatch):
    for name in ("LD_PRELOAD", "MALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(sys.platform != "linux", reason="Ray brings jemalloc along for Linux alone")
def test_a_process_started_so_uses_jemalloc(nothing_chosen):
    variables = {**os.environ, **allocator.environment()}
    assert uses_jemalloc(variables)
    assert not uses_jemalloc(allocator.without(variables))


@pytest.mark.parametrize("name", ["LD_PRELOAD", "MALLOC_CONF"])
def test_who_chose_an_allocator_keeps_it_and_hands_it_on(nothing_chosen, monkeypatch, name):
    monkeypatch.setenv(name, "other")
    assert allocator.environment() == {name: "other"}
