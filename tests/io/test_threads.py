"""Threads of the commands: no more than usable cores, and no spinning where others need them."""

import os
import subprocess
import sys

import pytest
import torch

from msdd_fast.backends import environment
from msdd_fast.commands.main import MEASURE
from msdd_fast.io.arguments import pick_device
from msdd_fast.io.threads import WAIT_POLICY, wait_passively_if_busy


@pytest.fixture
def threads(monkeypatch):
    """Three of PyTorch, whatever the machine has; two usable cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(environment, "usable_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


def test_no_more_threads_than_usable_cores(threads, monkeypatch):
    pick_device("cpu")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    pick_device("cpu")
    assert torch.get_num_threads() == 1  # fewer stay
    torch.set_num_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    pick_device("cpu")
    assert torch.get_num_threads() == 3  # as told


@pytest.mark.parametrize(
    ("load", "given", "policy"), [(2.5, None, "passive"), (2.0, None, None), (9.0, "ACTIVE", "ACTIVE")]
)
def test_threads_wait_passively_on_a_busy_machine(load, given, policy, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setenv(WAIT_POLICY, "x")  # restored afterwards, whatever happens
    if given is None:
        monkeypatch.delenv(WAIT_POLICY)
    else:
        monkeypatch.setenv(WAIT_POLICY, given)
    wait_passively_if_busy()
    assert os.environ.get(WAIT_POLICY) == policy


def test_commands_ask_before_pytorch_is_there_and_those_that_measure_do_not():
    code = """
import sys
from msdd_fast.commands import main

main.wait_passively_if_busy = lambda: asked.append("torch" not in sys.modules)
for name in ("decode", "encode", "reconstruct", *main.MEASURE):
    asked = []
    try:
        main.main([name, "--no-such-option"])
    except SystemExit:
        pass
    print(name, *asked)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    asked = [line.split() for line in done.stdout.splitlines()]
    assert asked == [["decode", "True"], ["encode", "True"], ["reconstruct", "True"], *([n] for n in MEASURE)]
