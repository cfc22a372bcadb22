"""What users can ask of an engine, and what happens if they ask wrongly."""

import gc
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from msdd_fast import Tokenizer, accelerate, explain
from msdd_fast.engine import compute, graph_cache
from msdd_fast.engine.compute import compute_dtype
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.ops._patches import to_uint8
from tests.engine.test_parity import FLOAT32, latents


@pytest.fixture(scope="module")
def engine(cross):
    return accelerate(cross, dtype=torch.float32, batch_sizes=(2,))


def test_stream_is_the_decode_stage_by_stage(tok):
    engine = accelerate(tok, dtype=torch.float32, steps=2, cfg_scale=1.5)
    z, expected = latents(tok, 2), []
    tok.decode(z, 4, 2, 1.5, stage_callback=lambda r: expected.append((r.stage, r.clean, r.state)))
    seen = list(engine.stream(z, 4))
    assert [s.stage for s in seen] == [e[0] for e in expected]
    for got, (_, clean, state) in zip(seen, expected, strict=True):
        assert (got.images - clean).abs().max() < FLOAT32
        assert (got.state - state).abs().max() < FLOAT32
    assert torch.equal(seen[-1].images, engine.decode(z, 4))
    last = list(engine.stream(z, 4, out_dtype=torch.uint8))[-1]
    assert torch.equal(last.images, to_uint8(seen[-1].images)) and torch.equal(last.state, seen[-1].state)


def test_stream_leaves_the_callers_grad_mode_alone(engine, cross):
    for _ in engine.stream(latents(cross, 1)):
        assert torch.is_grad_enabled()


def test_decode_many_numbers_the_whole_stream(engine, cross):
    z = latents(cross, 7)
    whole = engine.decode(z, 20)
    parts = list(engine.decode_many(iter([z[:1], z[1:4], z[4:]]), 20))
    assert [len(p) for p in parts] == [1, 3, 3]
    assert (torch.cat(parts) - whole).abs().max() < FLOAT32


def test_decode_many_passes_an_error_of_the_source_on_in_its_place(engine, cross):
    def broken():
        yield latents(cross, 1)
        raise OSError("disk gone")

    images = engine.decode_many(broken())
    assert len(next(images)) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(images)


def test_decode_many_may_be_left_early(engine, cross):
    """The reader ends at once, or when the iterable that it is in returns: nothing waits for that."""
    before = threading.active_count()
    images = engine.decode_many(latents(cross, 1) for _ in range(1000))
    next(images)
    images.close()
    end = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_out_and_out_dtype(engine, cross):
    z = latents(cross, 3)
    expected = engine.decode(z, 5)
    out = torch.empty(3, 3, 64, 64)
    assert engine.decode(z, 5, out=out) is out and torch.equal(out, expected)
    assert torch.equal(engine.decode(z, 5, out_dtype=torch.uint8), to_uint8(expected))
    assert torch.equal(engine.decode(z, 5, out_dtype=torch.bfloat16), expected.bfloat16())
    assert engine.decode(z[:0]).shape == (0, 3, 64, 64)


def test_cfg_scale_of_a_call(engine, cross):
    z = latents(cross, 1)
    for scale in (0.0, 1.0, 3.0):
        assert (engine.decode(z, cfg_scale=scale) - cross.decode(z, cfg_scale=scale)).abs().max() < FLOAT32


def test_same_seed_same_bits(engine, cross):
    z = latents(cross, 2)
    first = engine.decode(z, [5, 2**63 - 1])
    engine.decode(latents(cross, 2, seed=9), 1)
    assert torch.equal(engine.decode(z, [5, 2**63 - 1]), first)
    assert not torch.equal(engine.decode(z, [5, 6])[1], first[1])


def test_eight_threads(engine, cross):
    z = latents(cross, 8)
    expected = [engine.decode(z[i : i + 1], i) for i in range(8)]
    wrong = []

    def work(i):
        for _ in range(5):
            if not torch.equal(engine.decode(z[i : i + 1], i), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.slow
def test_ten_thousand_decodes(engine, cross):
    """No growth of memory, no drift."""
    import resource

    z = latents(cross, 3)
    first = {n: engine.decode(z[:n], n) for n in (1, 2, 3)}
    for i in range(500):
        engine.decode(z[: i % 3 + 1], i)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(9500):
        engine.decode(z[: i % 3 + 1], i)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20 * 1024  # KiB
    for n, images in first.items():
        assert torch.equal(engine.decode(z[:n], n), images)


def test_the_engine_does_not_keep_the_tokenizer(cross):
    tok = Tokenizer.from_config(cross.config)
    engine = accelerate(tok, dtype=torch.float32)
    gone = weakref.ref(tok)
    assert engine.report().accuracy
    del tok
    gc.collect()
    assert gone() is None
    report = engine.report()
    assert report.accuracy == () and report.ops


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are graphs here")
def test_graphs_that_cannot_be_had(cross, monkeypatch):
    monkeypatch.setattr(graph_cache, "can_record", lambda: (False, "programs need msdd_fast._C, which was not built"))
    with pytest.raises(
        BackendUnavailableError, match=r"graphs=True cannot be had: programs need msdd_fast._C, which was"
    ):
        accelerate(cross, graphs=True)
    assert "graphs  no: programs need msdd_fast._C, which was not built" in str(accelerate(cross).report())
    assert "graphs  no: not wanted (graphs=False)" in str(accelerate(cross, graphs=False).report())


@pytest.mark.parametrize("count", [1, 2])
def test_the_report_decodes_once_where_nothing_is_replayed(cross, monkeypatch, count):
    """What it compares with the eager model are then the images of the decode whose ops it lists."""
    engine, z = accelerate(cross, dtype=torch.float32, graphs=False), latents(cross, count)
    error = (engine.decode(z) - cross.decode(z, 0, engine.steps, engine.cfg_scale)).abs().max()
    decodes, decode = [], engine.program.decode
    monkeypatch.setattr(engine.program, "decode", lambda *args: decodes.append(len(args[0].z)) or decode(*args))
    report = engine.report(z)
    assert decodes == ([1] if count == 1 else [1, 2])
    assert report.accuracy[0].max_abs == float(error)
    assert report.ops == accelerate(cross, dtype=torch.float32).report(z).ops


@pytest.mark.parametrize(
    ("z", "arguments", "message"),
    [
        (torch.zeros(1, 128, 32), {}, r"z must have shape \(B, 16, 32\), got \(1, 128, 32\)"),
        (torch.zeros(1, 16, 32, dtype=torch.int64), {}, "z must be floating point, got torch.int64"),
        ([1.0], {}, "z must be a torch.Tensor, got list"),
        (None, {"seed": -1}, r"seed must be in \[0, 2\^63\)"),
        (None, {"seed": [1, 2, 3]}, "seed must be an int or 2 ints, one per image, got 3"),
        (None, {"cfg_scale": float("nan")}, "cfg_scale must be a finite number >= 0, got nan"),
        (None, {"out_dtype": torch.int8}, "out_dtype must be one of .*, got torch.int8"),
        (None, {"out": torch.zeros(2, 3, 64, 32)}, r"out must be torch.float32 \(2, 3, 64, 64\) on cpu, got"),
        (None, {"out": torch.zeros(2, 3, 64, 64).transpose(2, 3)}, "out must be contiguous, got strides"),
        (None, {"noise": [torch.zeros(2, 3, 8, 8)]}, "noise must hold 4 tensors, one per stage, got 1"),
    ],
)
def test_bad_arguments_of_decode(engine, z, arguments, message):
    with pytest.raises(InputError, match=message):
        engine.decode(torch.zeros(2, 16, 32) if z is None else z, **arguments)


def test_validate(cross):
    z = latents(cross, 3)
    z[1, 0, 0] = float("nan")
    with pytest.raises(InputError, match="z must be finite, got NaN or Inf in item 1"):
        accelerate(cross, validate=True).decode(z)


def test_max_memory_leaves_out_what_does_not_fit(cross):
    whole = accelerate(cross, dtype=torch.float32, batch_sizes=(1, 4))
    one = next(v for k, v in whole.memory.items() if k.startswith("activations")) // 4
    limit = whole.memory["weights"] + whole.memory["tables"] + 2 * one
    engine = accelerate(cross, dtype=torch.float32, batch_sizes=(1, 4), max_memory=limit)
    assert engine.batch_sizes == (1,)
    assert f"batch sizes 4 do not fit in max_memory={limit}" in str(engine.report())
    z = latents(cross, 3)
    assert (engine.decode(z) - whole.decode(z)).abs().max() < FLOAT32


def test_out_of_memory_leaves_the_engine_usable(engine, cross, monkeypatch):
    z = latents(cross, 1)
    expected = engine.decode(z)

    def fail(*_):
        raise torch.OutOfMemoryError("no")

    with monkeypatch.context() as m:
        m.setattr(engine.program.network, "velocity", fail)
        with pytest.raises(torch.OutOfMemoryError):
            engine.decode(z)
    assert torch.equal(engine.decode(z), expected)


def test_float32_instead_of_bfloat16_is_said(cross, monkeypatch):
    monkeypatch.setenv("MSDD_FAST_CPU_BF16", "0")
    engine = accelerate(cross, dtype=torch.bfloat16)
    assert engine.dtype == torch.float32
    assert "float32 (this CPU has no fast bfloat16 matrix product)" in str(engine.report())
    monkeypatch.setenv("MSDD_FAST_CPU_BF16", "maybe")
    with pytest.raises(InputError, match="MSDD_FAST_CPU_BF16 must be auto, 0 or 1, got 'maybe'"):
        accelerate(cross)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("avx512f avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2 avx512f", torch.float32)],
)
def test_the_processor_says_whether_bfloat16_is_fast(flags, dtype, monkeypatch):
    monkeypatch.setenv("MSDD_FAST_CPU_BF16", "auto")
    monkeypatch.setattr(Path, "read_text", lambda self: f"flags : {flags} \n")
    monkeypatch.setattr(compute, "_has_bf16_instructions", compute._has_bf16_instructions.__wrapped__)  # not the cache
    assert compute_dtype(torch.bfloat16, torch.device("cpu"))[0] == dtype


def test_explain_agrees_with_the_engine(tok):
    explained = explain(tok, batch_size=1, dtype=torch.float32, steps=2, cfg_scale=2.0)
    report = accelerate(tok, dtype=torch.float32, steps=2, cfg_scale=2.0).report()
    assert set(explained.ops) == set(report.ops)
    assert all(op.op in str(explained) for op in explained.ops)
