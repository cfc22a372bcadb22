"""Ctrl-C and SIGTERM while the program is still importing: one line and the exit code, as at any other time."""

import re
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# The signal comes as the module of that name is about to be imported, in the thread that imports it.
PROGRAM = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), number)

module, number = sys.argv[1], int(sys.argv[2])
sys.meta_path.insert(0, Interrupt())
sys.argv[1:] = sys.argv[3:]
runpy.run_module("msdd_fast", run_name="__main__", alter_sys=True)
"""
ENDS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
MODULES = ("msdd_fast.commands.main", "argparse", "msdd_fast.commands.decode", "msdd_fast.commands.decoding", "torch")


def interrupted(module, number):
    words = [sys.executable, "-c", PROGRAM, module, str(int(number)), "decode", "no-such-file"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("end", ENDS, ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("module", MODULES)
def test_one_line_and_the_exit_code(module, end):
    number, code, message = end
    assert interrupted(module, number) == (code, "", f"msdd-fast: {message}\n")


def test_without_a_signal_the_program_runs():
    code, _, err = interrupted("no_such_module", signal.SIGINT)
    assert code == 1 and err.startswith("msdd-fast: error: ") and "no-such-file" in err


def test_the_command_starts_there_and_imports_little_before():
    """Until the handlers are in place, Ctrl-C gives Python's traceback."""
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^msdd-fast = "msdd_fast\.__main__:main"$', project, re.M)
    code = """
import sys
before = {*sys.modules}
import msdd_fast.__main__
slow = {"argparse", "logging", "importlib.resources", "msdd_fast.commands", "torch", "numpy"} & {*sys.modules} - before
sys.exit(", ".join(sorted(slow)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
