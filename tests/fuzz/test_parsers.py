"""A short run of the coverage-guided fuzzers, where atheris is installed."""

import importlib.util
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris: pip install 'msdd-fast[fuzz]'")
@pytest.mark.parametrize("name", ["torch", "metadata"])
def test_parsers(name):
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.parsers", name, "50000"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
