"""Backends from outside the package, and a choice that is one context's own."""

import contextvars
import os
import subprocess
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


def test_a_backend_from_outside_in_the_environment():
    program = """
import torch
from msdd_fast import ops
from msdd_fast.backends import register_backend
mine = register_backend("mine", lambda x: (True, ""))
ops.get_op("swiglu").register(mine, lambda a, b: a + 1)
assert ops.swiglu(torch.ones(2), torch.ones(2)).tolist() == [2.0, 2.0]
"""
    environment = {**os.environ, "MSDD_FAST_BACKEND": "auto,swiglu=mine"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


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
