"""The cost of one op call: the bare C++ call is the op's own, and both sides of a comparison are measured."""

import pytest
import torch

from msdd_fast import ops
from msdd_fast.bench.timing import op_overhead, overhead_worker
from msdd_fast.bench.timing.machine import ROOT
from msdd_fast.errors import InputError


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(overhead_worker, "LOOPS", 1)
    monkeypatch.setattr(overhead_worker, "CALLS", 2)


@torch.no_grad()
def test_the_bare_call_computes_what_the_op_does():
    a, b = torch.randn(2, 64), torch.randn(2, 64)
    bare = overhead_worker.bare_call(lambda: ops.swiglu(a, b, backend="cpu"))
    expected = ops.swiglu(a, b, backend="cpu")
    bare.result.zero_()
    bare()
    assert torch.equal(bare.result, expected)
    assert overhead_worker.bare_call(lambda: ops.swiglu(a, b, backend="eager")) is None


@torch.no_grad()
def test_every_op_is_timed_in_three_ways(quick):
    arguments = op_overhead.examples()
    assert set(ops.__all__) - set(arguments) == {"quantize_rows"}  # an engine calls it inside the int8 layer
    for name, inputs in arguments.items():
        calls = overhead_worker.calls_of(name, inputs)
        times = {way: overhead_worker.nanoseconds(call) for way, call in calls.items()}
        assert set(times) == set(op_overhead.WAYS) and min(times.values()) > 0


def test_trees_are_measured_in_turns():
    found = op_overhead.measure([ROOT], rounds=1, only=["swiglu"])
    assert found[str(ROOT)]["swiglu"]["C"] < found[str(ROOT)]["swiglu"]["op"]
    lines = op_overhead.table({"tree": {"swiglu": {"op": 20000.0, "bound": 6000.0, "C": 1000.0}}})
    assert lines[0] == "tree" and lines[2].split() == ["swiglu", "20.00", "19.00", "6.00", "5.00", "1.00"]
    with pytest.raises(InputError, match=r"--only must name some of attention, .*, got nothing"):
        op_overhead.measure([ROOT], rounds=1, only=["nothing"])
    with pytest.raises(InputError, match=r"--root must be a tree with .venv/bin/python"):
        op_overhead.main(["--root", "/nonexistent"])
