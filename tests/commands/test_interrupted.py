"""Runs of decode and encode that are killed or terminated at random moments."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def interrupted(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.commands.interrupted", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_few():
    interrupted("decode", 4, 3)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["decode", "encode"])
def test_many(command):
    interrupted(command, 40, 20)
