"""Backends from outside the package, and a choice that is one context's own."""

import contextvars
import os
import sys
import threading

import pytest
import torch

from msdd_fast import Tokenizer, accelerate, ops
from msdd_fast.backends import choice, register_backend, use_backend
from msdd_fast.backends.choice import backend_names, check_ops, current_choice, parse_choice
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.ops import get_op

X = torch.randn(4, 16)
NAMES = set(ops.__all__)


@pytest.fixture(scope="module")
def calls():
    """What the backend "mine", which only has swiglu, was given."""
    seen = []

    def swiglu(a, b):
        seen.append(a.shape)
        return torch.nn.functional.silu(a) * b

    mine = register_backend("mine", lambda x: (x.device.type == "cpu", f"needs a CPU, got {x.device}"))
    get_op("swiglu").register(mine, swiglu, lambda a, b: (a.shape[-1] % 16 == 0, "needs whole sixteens"))
    yield seen
    del choice._backends["mine"], get_op("swiglu").implementations["mine"]


def test_a_backend_from_outside_is_chosen_as_any_other(calls):
    assert "mine" in backend_names() and parse_choice("swiglu=mine").by_op == {"swiglu": "mine"}
    expected = ops.swiglu(X, X, backend="eager")
    for call in (lambda: ops.swiglu(X, X, backend="mine"), lambda: _within("mine"), lambda: _within("swiglu=mine")):
        before = len(calls)
        assert torch.equal(call(), expected) and len(calls) == before + 1
    with pytest.raises(BackendUnavailableError, match="mine: needs whole sixteens"):
        ops.swiglu(X[:, :8], X[:, :8], backend="mine")
    with pytest.raises(BackendUnavailableError, match="mine: euler_step has no such implementation"):
        ops.euler_step(X, X, 0.5, backend="mine")
    with pytest.raises(InputError, match=r"backend must be one of auto, eager, .*mine.*, got 'yours'"):
        parse_choice("yours")


def _within(text):
    with use_backend(text):
        return ops.swiglu(X, X)


def test_a_backend_from_outside_in_an_engine(calls):
    tok = Tokenizer.from_config("tiny")
    engine, before = accelerate(tok, dtype=torch.float32, backend="mine"), len(calls)
    z = torch.randn(1, 16, 32)
    expected = accelerate(tok, dtype=torch.float32).decode(z)
    assert (engine.decode(z) - expected).abs().max() < 5e-5 and len(calls) > before
    assert {c.op: c.backend for c in engine.report().ops}["swiglu"] == "mine"


def test_a_backend_from_outside_in_the_environment(fresh):
    program = """
import torch
from msdd_fast import ops
from msdd_fast.backends import register_backend
mine = register_backend("mine", lambda x: (True, ""))
ops.get_op("swiglu").register(mine, lambda a, b: a + 1)
assert ops.swiglu(torch.ones(2), torch.ones(2)).tolist() == [2.0, 2.0]
"""
    fresh(program, check=True, MSDD_FAST_BACKEND="auto,swiglu=mine")


def test_names_that_cannot_be_registered():
    for name in ("", "a,b", "a=b", "*"):
        with pytest.raises(InputError, match="a backend's name must not be empty nor contain"):
            register_backend(name, lambda x: (True, ""))
    for name in ("auto", "eager", "cpu"):
        with pytest.raises(InputError, match=f"the backend '{name}' is already registered"):
            register_backend(name, lambda x: (True, ""))


def test_the_ops_are_known_by_name():
    assert choice._ops == NAMES
    with pytest.raises(InputError, match="there is no op 'nothing'; known: attention, "):
        get_op("nothing")
    with pytest.raises(InputError, match="backend is chosen for the op 'nothing'"):
        check_ops(parse_choice("nothing=eager"))


def chosen():
    return get_op("swiglu").select(X, X)


def test_threads_have_choices_of_their_own():
    usual, seen = chosen(), {}
    barrier = threading.Barrier(2, timeout=10)

    def work(text):
        with use_backend(text):
            barrier.wait()
            seen[text] = chosen()
            barrier.wait()
        seen[text, "after"] = chosen()

    threads = [threading.Thread(target=work, args=(t,)) for t in ("eager", "auto,swiglu=eager")]
    other = threading.Thread(target=lambda: seen.setdefault("other", chosen()))
    with use_backend("eager"):
        other.start()
        other.join()
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert chosen() == "eager"
    assert chosen() == usual and seen.pop("other") == usual
    assert seen == {"eager": "eager", "auto,swiglu=eager": "eager", ("eager", "after"): usual,
                    ("auto,swiglu=eager", "after"): usual}  # fmt: skip


def test_generators_that_end_in_any_order_leave_nothing_behind():
    def block(text):
        with use_backend(text):
            yield chosen()

    usual = chosen()
    first, second = block("eager"), block("auto")
    assert next(first) == "eager" and next(second) == usual
    first.close()
    assert chosen() == usual and current_choice() is parse_choice("auto")
    second.close()
    assert chosen() == usual and choice._scopes.get() == ()


def test_a_copied_context_keeps_its_choice():
    with use_backend("eager"):
        context = contextvars.copy_context()
    assert chosen() != "eager" and context.run(chosen) == "eager"


def test_compiled_functions_follow_the_thread_s_choice():
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(lambda x: ops.swiglu(x, x), fullgraph=True, backend=lambda g, _: graphs.append(g) or g)
    targets = []

    def work():
        before = len(graphs)
        compiled(X)
        targets.append(len(graphs) - before)

    with use_backend("eager"):
        work()
        thread = threading.Thread(target=work)  # outside of the block
        thread.start()
        thread.join()
        work()
    work()
    assert targets == [1, 1, 0, 0]


# --- Packages that are there but do not import. ---


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A package whose import raises; how often it was tried is in ``tried``."""
    from msdd_fast.backends import packages

    name = "msdd_fast_broken_package"
    (tmp_path / f"{name}.py").write_text(
        "import sys\nsys.tried = getattr(sys, 'tried', 0) + 1\nraise OSError('no lib')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "tried", 0, raising=False)
    packages._find_module.cache_clear()
    packages._import_problem.cache_clear()
    yield name
    packages._find_module.cache_clear()
    packages._import_problem.cache_clear()


def test_a_package_that_does_not_import_is_not_usable_and_says_why(broken):
    from msdd_fast.backends.packages import can_use_package, imports, is_installed

    class OnGPU:
        device = torch.device("cuda")

    for _ in range(3):
        assert is_installed(broken)
        assert imports(broken, "Broken") == (False, "Broken is installed but does not import: OSError: no lib")
        assert can_use_package(OnGPU(), "Broken", broken, "")[1].endswith("does not import: OSError: no lib")
    assert sys.tried == 1
    assert not is_installed("msdd_fast_no_such_package.part")


def test_a_damaged_extension_is_not_usable_and_says_why(monkeypatch):
    import importlib

    from msdd_fast.backends import extension

    def fail(name):
        raise OSError("bad magic")

    extension._probe.cache_clear()
    with monkeypatch.context() as m:
        m.setattr(importlib, "import_module", fail)
        assert extension.extension_status() in (
            (False, extension._explain(extension.build_info(), OSError("bad magic"))),
        )
    extension._probe.cache_clear()


# --- Threads. ---


@pytest.mark.parametrize(
    ("files", "quota"),
    [({"cpu.max": "150000 100000\n"}, 1.5), ({"cpu.max": "max 100000\n"}, None), ({}, None),
     ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
     ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None)],
)  # fmt: skip
def test_usable_cores_are_those_of_affinity_and_quota(files, quota, monkeypatch):
    from pathlib import Path

    from msdd_fast.backends import environment

    def read_text(self):
        name = str(self).removeprefix("/sys/fs/cgroup/")
        if name not in files:
            raise FileNotFoundError(name)
        return files[name]

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    with monkeypatch.context() as m:
        m.setattr(Path, "read_text", read_text)
        assert environment._cgroup_quota() == quota
        assert environment.usable_cores() == (8 if quota is None else 2)


def test_too_many_threads_and_a_busy_machine_are_said(monkeypatch):
    from msdd_fast.backends import environment

    monkeypatch.setattr(environment, "usable_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (7.0, 7.0, 7.0), raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    many, busy = environment.thread_problems()
    assert many == "4 threads for 2 usable cores: torch.set_num_threads(2)"
    assert busy.startswith("the load of 7.0 exceeds the 2 usable cores: start with OMP_WAIT_POLICY=passive")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert environment.thread_problems() == []
