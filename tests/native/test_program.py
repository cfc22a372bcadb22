"""Recorded programs: the arena, what can be recorded, replays with new values, threads, forks."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F

from msdd_fast import backends, ops
from msdd_fast.engine.bound_ops import bind
from msdd_fast.errors import InputError
from msdd_fast.ops.linear import pack_linear

if not backends.extension_status()[0]:
    pytest.skip(f"msdd_fast._C {backends.extension_status()[1]}", allow_module_level=True)

from msdd_fast.native.program import CHUNK, SPARE, Arena, NotRecordableError, record, trim_heap


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def recorded(run, *keep):
    """(replay, result) of a function after a warm-up, as an engine does it."""
    expected = run()
    program, result = record(run, Arena(), keep)
    assert torch.equal(result, expected)
    return program, result


# --- The arena. ---


def test_blocks_are_reused_as_soon_as_nothing_refers_to_them():
    arena = Arena()
    a = arena.empty((100,), torch.float32)
    address = a.data_ptr()
    view = a[10:20]
    del a
    assert arena.empty((100,), torch.float32).data_ptr() != address  # the view is still there
    del view
    assert arena.empty((50,), torch.float64).data_ptr() == address
    assert arena.memory() < 2 * CHUNK


def test_the_arena_joins_free_neighbours():
    arena = Arena()
    parts = [arena.empty((CHUNK // 8,), torch.uint8) for _ in range(8)]
    first = min(p.data_ptr() for p in parts)
    del parts
    assert arena.empty((CHUNK,), torch.uint8).data_ptr() == first and arena.memory() < 2 * CHUNK


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 4, 5)])
def test_shapes_and_alignment(shape):
    for order in (torch.contiguous_format, *((torch.channels_last,) if len(shape) == 4 else ())):
        x = Arena().empty(shape, torch.bfloat16, order)
        assert x.shape == shape and x.is_contiguous(memory_format=order) and x.data_ptr() % 64 == 0


def test_blocks_that_the_collector_frees_in_the_middle_of_a_search():
    """It may run at any allocation, and in any thread."""

    class Free(list):
        def __iter__(self):
            for i, item in enumerate(list(super().__iter__())):
                if i == 1:
                    dropped.clear()
                yield item

    arena = Arena()
    blocks = [arena.empty((160 if i % 4 == 3 else 16,), torch.float32) for i in range(200)]  # by address
    kept, dropped = blocks[::2], blocks[1::4]
    del blocks
    arena.empty((1,), torch.float32)  # from here on the large blocks are free
    arena._free = Free(arena._free)
    kept += [arena.empty((160,), torch.float32) for _ in range(40)]
    ends = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in kept)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))


def test_blocks_that_other_threads_free():
    arena, wrong = Arena(), []
    interval = sys.getswitchinterval()

    def use(seed):
        values = [arena.empty((64 * (1 + i % 7),), torch.float32).fill_(seed) for i in range(50)]
        handed.append(values)

    handed = []
    end = threading.Event()

    def drop():
        while not end.is_set():
            if handed:
                values = handed.pop()
                if any(float(v.min()) != float(v.max()) for v in values):
                    wrong.append(values)

    droppers = [threading.Thread(target=drop) for _ in range(2)]
    sys.setswitchinterval(1e-5)
    try:
        for d in droppers:
            d.start()
        for seed in range(60):
            use(seed)
    finally:
        end.set()
        sys.setswitchinterval(interval)
        for d in droppers:
            d.join()
    assert wrong == []


def test_an_arena_goes_with_its_last_tensor():
    """Without the help of the garbage collector: a service that drops engines must not wait for it."""
    gc.collect()
    gc.disable()
    try:
        arena = Arena()
        gone = weakref.ref(arena)
        x = arena.empty((10,), torch.float32)
        y = arena.empty((10,), torch.float32)
        del y, arena
        assert gone() is None
        del x
    finally:
        gc.enable()


def test_a_tensor_outlives_the_arena():
    arena = Arena()
    x = arena.empty((1000,), torch.float32)
    x.fill_(3)
    del arena
    gc.collect()
    others = [bytearray(CHUNK + 64) for _ in range(4)]  # would take the chunk's place
    assert float(x.sum()) == 3000 and len(others) == 4


# --- What can be recorded. ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_are_native(dtype):
    """Every way in which the networks copy, with odd sizes; a replay sees new inputs."""
    x, y = randn(3, 5, 7).to(dtype), randn(2, 5, 7).to(torch.float32)

    def run():
        both = torch.cat([x, y.to(dtype)])
        out = both.new_empty(10, 5, 7)
        out[:5] = both
        out[5:].unflatten(0, (1, 5)).copy_(both[None])
        out[3:4].zero_()
        turned = out.transpose(0, 1).contiguous().reshape(5, -1).repeat(2, 3).flatten()
        return turned.view(2, -1).float().to(dtype).clone()

    program, result = recorded(run, x, y)
    x.neg_()
    y.add_(1)
    program.replay()
    assert torch.equal(result, run())


def test_copies_that_convert_broadcast_and_fill():
    x = randn(2, 6)

    def run():
        out = x.new_empty(4, 6)
        out[:2] = x[:1]
        out[2:] = 0.5
        out[3, 1:3] = x[0, 0]
        wide = torch.cat([out.to(torch.bfloat16), x])
        return torch.cat([wide.to(x), x.repeat((2, 1)).to(wide)])

    program, result = recorded(run, x)
    assert result.dtype == torch.float32
    x.neg_()
    program.replay()
    assert torch.equal(result, run())


def test_ops_see_new_values_scalars_included():
    x, v, u, seeds = randn(4, 2, 12), randn(4, 2, 12), randn(4, 2, 12), torch.tensor([1, 2])
    dt, scale, alpha, beta = (torch.tensor(s) for s in (-0.5, 1.5, 0.7, 0.3))

    bound = bind("cpu")

    def run():
        state = bound.cfg_euler(x, v, u, scale, dt)
        rows = bound.stage_transition(state, v, dt, alpha, beta, seeds, 1, 2, 0.0, u, scale)
        return bound.final_step(rows, rows, dt, 2, torch.uint8)

    program, result = recorded(run, x, v, u, seeds, dt, scale, alpha, beta)
    for tensor, value in ((x, 0.3), (dt, -0.2), (scale, 3.0), (alpha, 0.1), (beta, 0.9)):
        tensor.fill_(value)
    seeds.add_(7)
    program.replay()
    assert torch.equal(result, run())


def test_the_ops_of_pid_see_new_values():
    tokens, pixels, channels, width = 6, 4, 4, 16
    x, y, offset, shift, weight = (randn(*s) for s in ((6, 16), (6, 16), (6, 1), (1, 16), (16,)))
    y, shift = y + 1, shift - 1  # no tensor twice
    state, noise, seeds = randn(2, 3, 4, 6), randn(2, 3, 4, 6) + 1, torch.tensor([1, 2])
    t, t_next = torch.tensor(0.8), torch.tensor(0.3)
    first, second = randn(pixels * 2 * channels, width), randn(pixels * 4 * channels, width)
    biases = randn(len(first)), randn(len(second)) + 1
    packed = [pack_linear(w) for w in (first, second)]
    fc1, b1, fc2, b2 = randn(8, channels), randn(8), randn(channels, 8), randn(channels)
    stream, rms = randn(tokens, pixels, channels), randn(channels) + 1
    qkv, norm, cos, sin = randn(2, 3, 3, 2, 20), randn(1, 2, 20), randn(3, 10), randn(3, 10) + 1
    bound = bind("cpu")

    def run():
        s, h = bound.sigma_gate(x, y, offset, shift, y[:1], weight, None, y[0])
        h = bound.norm_modulate(h, shift, x[:1], None, 1e-6, weight)
        s, h = bound.gate_residual_norm_modulate(s, h, shift, x[1:2], y[1:2], None, 1e-6, weight)
        a = bound.pixel_modulate(stream, h, first, biases[0], rms, packed[0])
        out = bound.pixel_block(stream, a, s, second, biases[1], rms, fc1, b1, fc2, b2, packed[1])
        heads = bound.qk_norm_rope(qkv, norm, None, cos, sin)
        image = bound.sde_step(state, noise, t, t_next, seeds, 1)
        image = bound.sde_step(image, noise, t, t_next, None, 0, state, None, True)
        return torch.cat([out.flatten(), heads.flatten(), image.flatten()])

    program, result = recorded(run, x, y, offset, shift, weight, state, noise, seeds, t, t_next, packed, stream, rms)
    for tensor, value in ((t, 0.5), (t_next, 0.1), (shift, 0.2), (weight, 2.0)):
        tensor.fill_(value)
    x.neg_()
    stream.mul_(0.5)
    seeds.add_(7)
    program.replay()
    assert torch.equal(result, run())


INDEX = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda x: x + 1, "add"),
        (lambda x: x @ x, "matmul"),
        (lambda x: F.layer_norm(x, (4,)), "layer_norm"),
        (lambda x: x.new_zeros(3), "new_zeros"),
        (lambda x: x * float(x[0, 0]), "__float__"),
        (lambda x: x.view(-1) if x.sum() > 0 else x, "sum"),
        (lambda x: x.add_(1), "add_"),
        (lambda x: x[0, 0].item(), "item"),
        (lambda x: x[0].tolist(), "tolist"),
        (lambda x: x[x > 0], "gt"),
        (lambda x: x[[0, 2]], "__getitem__"),
        (lambda x: x[torch.tensor(1)], "tensor|__getitem__"),
        (lambda x: x.narrow(0, INDEX[0], 2), "narrow"),
        (lambda x: x.__setitem__([0, 2], x[:2]), "__setitem__"),
    ],
)
def test_what_a_replay_could_not_repeat_is_refused_by_name(run, name):
    x = torch.ones(4, 4)
    with pytest.raises(NotRecordableError, match=name):
        record(lambda: run(x), Arena())
    assert torch.equal(x, torch.ones(4, 4))  # refused before it ran
    program, result = record(lambda: x.clone(), Arena(), x)
    assert len(program) == 1 and torch.equal(result, x)


def test_one_recording_at_a_time_in_a_thread():
    program = backends.load_extension().Program()
    program.begin()
    try:
        with pytest.raises(ValueError, match="records a program already"):
            backends.load_extension().Program().begin()
    finally:
        program.end()


def test_an_error_in_an_op_ends_the_recording():
    x, y = torch.ones(2, 2), torch.ones(2, 3)
    with pytest.raises(InputError):
        record(lambda: ops.swiglu(x, y), Arena())
    assert torch.equal(record(x.clone, Arena(), x)[1], x)


# --- Replays. ---


def chain(calls=40):
    x, shift = randn(37, 64), torch.zeros(1, 64)

    def run():
        h = x
        for _ in range(calls):
            h = ops.norm_modulate(ops.swiglu(h, h, backend="cpu"), shift, shift, backend="cpu")
        return h

    return run, (x, shift)


def test_replays_are_equal_to_the_bit():
    run, keep = chain()
    program, result = recorded(run, *keep)
    expected = result.clone()
    for _ in range(2000):
        program.replay()
    assert torch.equal(result, expected) and expected.abs().max() > 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads):
    run, keep = chain()
    program, result = recorded(run, *keep)
    expected, before = result.clone(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            result.zero_()
            program.replay()
            assert torch.equal(result, expected)
    finally:
        torch.set_num_threads(before)


def test_programs_of_several_threads_at_once():
    programs = [(*recorded(*_flat(chain())), i) for i in range(4)]
    expected = [result.clone() for _, result, _ in programs]
    wrong = []

    def work(program, result, index):
        for _ in range(50):
            program.replay()
        if not torch.equal(result, expected[index]):
            wrong.append(index)

    workers = [threading.Thread(target=work, args=p) for p in programs]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert wrong == []


def _flat(pair):
    run, keep = pair
    return (run, *keep)


def in_a_process(code):
    """Run code that has ``program``, ``result`` and ``expected``; returns its exit code and what it said."""
    head = """
import os, sys, threading, time
sys.path.insert(0, os.getcwd())
from tests.native.test_program import chain, recorded
run, keep = chain(2)
program, result = recorded(run, *keep)
expected = result.clone()
"""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run([sys.executable, "-c", head + code], cwd=root, timeout=120, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_forked_children_replay():
    """Also while another thread of the parent replays, whose locks and team the child does not have."""
    code = """
other, other_result = recorded(*(lambda pair: (pair[0], *pair[1]))(chain(2)))
end = False
def work():
    while not end:
        other.replay()
worker = threading.Thread(target=work)
worker.start()
failed = 0
for _ in range(50):
    program.replay()
    child = os.fork()
    if child == 0:
        result.zero_()
        program.replay()
        os._exit(0 if bool((result == expected).all()) else 1)
    failed += os.waitpid(child, 0)[1] != 0
end = True
worker.join()
sys.exit(failed != 0)
"""
    assert in_a_process(code) == (0, "")


def test_memory_does_not_grow_with_replays():
    code = """
def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
for _ in range(1000):
    program.replay()
before = resident()
for _ in range(10_000):
    program.replay()
sys.exit(resident() > before + 2**20)
"""
    assert in_a_process(code) == (0, "")


def test_an_arena_in_one_piece():
    """Tensors of many sizes, each freed before the next: in pieces of their sizes none would fit another's."""
    arena, size = Arena(), 8 * CHUNK
    arena.reserve(size)
    room = arena.memory()
    assert size * (1 + SPARE) <= room < size * (1 + SPARE) + 2 * CHUNK
    for part in (3, 5, 7):
        tensor = arena.empty((part * size // 8,), torch.uint8)
        del tensor
    assert arena.memory() == room
    arena.reserve(size)  # there already
    assert arena.memory() == room


def test_trim_heap_may_always_be_called():
    trim_heap()
