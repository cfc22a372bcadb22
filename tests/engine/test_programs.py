"""Recorded programs in the engine: a decode on a CPU is one native call, with the same bits as without."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from msdd_fast import Tokenizer, accelerate
from msdd_fast.backends import extension_status, load_extension, use_backend
from msdd_fast.engine import graph_cache, programs
from msdd_fast.engine.graph_cache import ANY_BATCH, MAX_GRAPHS
from msdd_fast.engine.programs import ProgramRecorder
from msdd_fast.errors import BackendUnavailableError
from msdd_fast.native.program import ALIGNMENT, CHUNK
from msdd_fast.ops import observe
from tests.engine.test_parity import FLOAT32, latents
from tests.perturbed import perturbed

if not extension_status()[0]:
    pytest.skip(f"msdd_fast._C {extension_status()[1]}", allow_module_level=True)


ROOT = Path(__file__).resolve().parents[2]
CPP_ATTENTION = "auto,attention=cpu"  # as a program has it at every size


@pytest.fixture(autouse=True)
def native_products(monkeypatch):
    """All products by the extension: PyTorch's cannot be recorded."""
    monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", "1")


@pytest.fixture
def threads():
    """``torch.set_num_threads``, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("bf16", ["0", "1"])
def test_the_same_bits_as_without(tok, bf16, monkeypatch):
    """Every kind of model, batch size, guidance and output; twice, since the second decode is the replay."""
    monkeypatch.setenv("MSDD_FAST_CPU_BF16", bf16)
    fast, plain = accelerate(tok, graphs=True), accelerate(tok, graphs=False, backend=CPP_ATTENTION)
    z = latents(tok, 9)
    for _ in range(2):
        for batch in (1, 3, 9):
            for options in ({}, {"cfg_scale": 1.7}, {"cfg_scale": 0.3, "out_dtype": torch.uint8}):
                images = fast.decode(z[:batch], 5, **options)
                assert torch.equal(images, plain.decode(z[:batch], 5, **options)), (batch, options)
        seeds = [3, 2**63 - 1, 0]
        assert torch.equal(fast.decode(z[:3], seeds), plain.decode(z[:3], seeds))
    if bf16 == "0":
        assert (fast.decode(z[:2]) - tok.decode(z[:2])).abs().max() < FLOAT32


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_decode_images_of_their_own(tok, threads, count):
    """With two images or more for each thread, also if they do not divide evenly. The bits are the same.

    All those batches share the programs of their threads.
    """
    threads(count)
    fast, plain = accelerate(tok, graphs=True), accelerate(tok, graphs=False, backend=CPP_ATTENTION)
    z = latents(tok, 8)
    expected = plain.decode(z, 5, cfg_scale=1.7)
    for batch in (8, 7, 6, 4, 3):
        for _ in range(3):
            assert torch.equal(fast.decode(z[:batch], 5, cfg_scale=1.7), expected[:batch])
            other = fast.decode(z[:batch].flip(0), 5, cfg_scale=1.7)  # no input or result of another replay is left
            assert not torch.equal(other, expected[:batch])
    out = torch.empty_like(expected)
    assert fast.decode(z, 5, cfg_scale=1.7, out=out) is out and torch.equal(out, expected)
    assert torch.equal(fast.decode(z, 5, cfg_scale=1.7, copy=False), expected)
    kinds = {request.shape[0]: type(graph).__name__ for request, graph in fast._cache._graphs.items()}
    assert kinds.pop(ANY_BATCH) == "ParallelDecode"
    assert kinds == dict.fromkeys({1: [], 2: [3], 3: [4, 3]}[count], "Graph")
    held = fast.graph_memory()["graphs"]
    assert held >= CHUNK
    fast.release()
    assert fast.graph_memory() == {} and torch.equal(fast.decode(z, 5, cfg_scale=1.7), expected)


@pytest.mark.parametrize("kind", [MemoryError, RuntimeError])
def test_a_recording_that_fails_in_its_second_thread_leaves_nothing(cross, threads, monkeypatch, kind):
    threads(2)
    fast, z, calls = accelerate(cross), latents(cross, 8), []
    expected = accelerate(cross, graphs=False).decode(z)
    original = ProgramRecorder.program

    def program(self, run):
        calls.append(self)
        if len(calls) % 2 == 0:
            raise kind("no more")
        return original(self, run)

    monkeypatch.setattr(ProgramRecorder, "program", program)
    if kind is MemoryError:
        with pytest.raises(MemoryError):
            fast.decode(z)
    else:
        assert (fast.decode(z) - expected).abs().max() < FLOAT32 and not fast.graphs
    assert fast.graph_memory() == {} and len(calls) == 2
    monkeypatch.undo()
    assert (fast.decode(z) - expected).abs().max() < FLOAT32


@pytest.mark.parametrize("count", [1, 2, 8])
def test_memory_grows_with_threads_not_with_the_batch(cross, threads, count):
    """The arenas of a few threads waste no more than one does; what a decode is predicted to hold has them in."""
    threads(count)
    fast = accelerate(cross, graphs=True, batch_sizes=64)
    held = set()
    for batch in (2 * count, 64):
        images = fast.decode(latents(cross, batch))
        held.add(fast.graph_memory()["graphs"] - count * ALIGNMENT)
        predicted = fast.plan(fast.request(latents(cross, batch))).bytes
        assert predicted == fast._budget.fixed + max(held) + images.nbytes
    assert held == {CHUNK}


def test_latents_of_any_layout(cross, threads):
    """Slices, transposed ones, of another dtype: what the threads read is contiguous."""
    threads(2)
    fast, z = accelerate(cross, graphs=True), latents(cross, 8)
    expected = fast.decode(z)
    assert torch.equal(fast.decode(torch.stack([z, -z], 1)[:, 0]), expected)
    assert torch.equal(fast.decode(z.transpose(1, 2).contiguous().transpose(1, 2)), expected)
    assert torch.equal(fast.decode(z.double()), expected)
    assert torch.equal(fast.decode(torch._neg_view(-z)), expected)
    assert torch.equal(fast.decode(z[:1].expand(8, -1, -1), [0] * 8), expected[:1].expand(8, -1, -1, -1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() on this platform")
def test_a_forked_child_decodes_batches():
    """Its OpenMP does not survive the fork: an operator of PyTorch on several threads, such as a large copy, hangs."""
    code = """
import os, signal, torch
from msdd_fast import accelerate
from tests.perturbed import perturbed
torch.set_num_threads(2)
engine = accelerate(perturbed(), graphs=True)
z = torch.randn(8, *engine.family.example)
expected, out = engine.decode(z), torch.empty(8, 3, 64, 64)
child = os.fork()
if child == 0:
    signal.alarm(60)
    engine.decode(z, out=out)
    os._exit(bytes(out.numpy()) != bytes(expected.numpy()))
os._exit(os.waitpid(child, 0)[1] != 0)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_fewer_threads_than_a_program_was_recorded_for(cross, threads):
    """One thread then replays all of them, one after the other; more threads help."""
    fast, z = accelerate(cross, graphs=True), latents(cross, 6)
    threads(3)
    expected = fast.decode(z)
    for count in (1, 2, 5):
        threads(count)
        assert torch.equal(fast.decode(z), expected)


def test_several_steps(cross):
    fast = accelerate(cross, steps=3, graphs=True)
    plain = accelerate(cross, steps=3, graphs=False, backend=CPP_ATTENTION)
    z = latents(cross, 2)
    assert torch.equal(fast.decode(z, cfg_scale=2.0), plain.decode(z, cfg_scale=2.0))


def test_nothing_of_pytorch_runs_in_a_replay(cross):
    """The profiler sees the copies of inputs and output, and no other operator."""
    fast = accelerate(cross, graphs=True)
    z = latents(cross, 2)
    fast.decode(z)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        fast.decode(z)
    names = {e.name for e in profiler.events() if e.name.startswith("aten::")}
    computing = {
        "aten::mm",
        "aten::addmm",
        "aten::add",
        "aten::mul",
        "aten::native_layer_norm",
        "aten::cat",
        "aten::silu",
    }
    assert "aten::copy_" in names and not names & computing


def test_results_are_copies_unless_copy_is_false(cross):
    fast = accelerate(cross, graphs=True)
    a = fast.decode(latents(cross, 1))
    kept = a.clone()
    b = fast.decode(latents(cross, 1, seed=1), copy=False)
    assert torch.equal(a, kept) and fast.decode(latents(cross, 1), copy=False).data_ptr() == b.data_ptr()
    out = torch.empty_like(a)
    assert fast.decode(latents(cross, 1), out=out) is out and torch.equal(out, kept)


def test_explicit_noise_runs_without_a_program(cross):
    fast = accelerate(cross, graphs=True)
    shapes = cross.config.stage_shapes((1,))
    noise = [torch.randn(1, *s, generator=torch.Generator().manual_seed(s[1])) for s in shapes]
    z = latents(cross, 1)
    assert (fast.decode(z, noise=noise) - cross.decode(z, noise=noise)).abs().max() < FLOAT32
    assert fast.graph_memory() == {}


def test_warmup_records(cross, threads):
    """Every size of batch_sizes, and asks no GPU for the time."""
    threads(2)
    fast = accelerate(cross, graphs=True, batch_sizes=(1, 3, 4, 8))
    fast.warmup()
    assert sorted(request.shape[0] for request in fast._cache._graphs) == [ANY_BATCH, 1, 3]


def test_few_programs_are_kept(cross, monkeypatch):
    """The least recently used goes first; memory is that of the largest, not of all."""
    monkeypatch.setattr(graph_cache, "IMAGES_PER_THREAD", 64)  # a program for every batch size
    fast = accelerate(cross, graphs=True, batch_sizes=(64,))
    for batch in range(1, MAX_GRAPHS + 6):
        fast.decode(latents(cross, batch))
        fast.decode(latents(cross, 1))
    programs = list(fast._cache._graphs)
    assert len(programs) == MAX_GRAPHS
    assert {p.shape[0] for p in programs} == {1, *range(7, MAX_GRAPHS + 6)}


@pytest.mark.parametrize(("batch", "what"), [(2, "batch 2"), (4, "an image for each thread")])
def test_what_cannot_be_recorded_runs_without_and_says_why(cross, monkeypatch, threads, batch, what):
    threads(2)
    monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", "0")
    fast = accelerate(cross, dtype=torch.float32)
    z = latents(cross, batch)
    assert (fast.decode(z) - cross.decode(z)).abs().max() < FLOAT32
    assert f"graphs  no: the capture of {what} failed: addmm computes in PyTorch, not in a native op" in str(
        fast.report()
    )
    with pytest.raises(BackendUnavailableError, match=f"graphs=True, but the capture of {what} failed: addmm"):
        accelerate(cross, dtype=torch.float32, graphs=True).decode(z)


def test_the_report_says_who_multiplies(cross, monkeypatch):
    fast = accelerate(cross, graphs=True)
    fast.decode(latents(cross, 1))
    text = str(fast.report())
    count = 2 + 1 + 2 * 5  # patches, context, final; 2 blocks of qkv, proj, SwiGLU, down and the context's kv
    assert f"products  {count} products of the extension: MSDD_FAST_NATIVE_LINEAR=1" in text and "graphs\n" in text
    monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", "0")
    assert f"products  {count} products of PyTorch: MSDD_FAST_NATIVE_LINEAR=0" in str(accelerate(cross).report())


def stages_of(tok, z):
    """Clean estimate and state of every stage, eager."""
    found = []
    tok.decode(z, stage_callback=lambda r: found.append((r.clean, r.state)))
    return found


def test_a_stream_has_a_program_per_stage(cross):
    """Of any batch size; what it yields stays as it is when the next one runs."""
    fast = accelerate(cross, graphs=True)
    for batch in (8, 3):
        z = latents(cross, batch)
        expected = stages_of(cross, z)
        first = list(fast.stream(z))
        list(fast.stream(latents(cross, batch, seed=5), 9))
        again = [fast.stream(z), fast.stream(z)]  # the second one runs beside the first, without
        for run in (first, *again):
            for piece, (clean, state) in zip(run, expected, strict=True):
                assert (piece.images - clean).abs().max() < FLOAT32 and (piece.state - state).abs().max() < FLOAT32
    assert len(fast._cache._stage_graphs) == 2 and fast.graphs
    as_bytes = list(fast.stream(z, out_dtype=torch.uint8))[-1]
    assert torch.equal(as_bytes.images, fast.decode(z, out_dtype=torch.uint8))


def test_convolutions_of_pytorch_are_in_the_way(monkeypatch):
    monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", "0")
    tok = perturbed("tiny-ssdd")
    fast = accelerate(tok, dtype=torch.float32)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (fast.decode(z) - tok.decode(z)).abs().max() < 1e-4
    assert not fast.graphs and fast.graphs_reason == "SSDD's convolutions are PyTorch's, which a program cannot repeat"
    with pytest.raises(BackendUnavailableError, match="graphs=True cannot be had: SSDD's convolutions are PyTorch's"):
        accelerate(tok, graphs=True)


def test_no_arena_beside_the_tensors_of_the_warm_up(monkeypatch):
    """Else a decode takes twice the memory that was predicted, the first time."""
    seen = []
    monkeypatch.setattr(programs, "trim_heap", lambda: seen.append("trimmed"))
    recorder = ProgramRecorder()
    recorder.reserve(10 * CHUNK)
    recorder.warm_up(lambda: seen.append(recorder.memory()))
    assert seen == [0, "trimmed"]
    recorder.record(lambda: torch.empty(1))
    assert recorder.memory() >= 10 * CHUNK


def test_threads_share_an_engine(cross):
    fast = accelerate(cross, graphs=True)
    z = [latents(cross, 1 + i % 3, seed=i) for i in range(8)]
    expected = [fast.decode(x, i) for i, x in enumerate(z)]
    wrong = []

    def work(i):
        for _ in range(10):
            if not torch.equal(fast.decode(z[i], i), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert wrong == []


def test_training_on_changes_no_program(cross):
    tok = Tokenizer(cross.config)
    tok.load_state_dict(cross.state_dict())
    fast, z = accelerate(tok, graphs=True), latents(cross, 1)
    before = fast.decode(z)
    with torch.no_grad():
        for p in tok.parameters():
            p.add_(1)
    assert torch.equal(fast.decode(z), before)


def test_a_choice_of_backends_is_kept(cross):
    """A program has the C++ attention; a block that asks for another backend gets it."""
    fast, z = accelerate(cross, graphs=True), latents(cross, 1)
    fast.decode(z)
    seen = []
    with use_backend("eager"), observe(lambda op, backend, args: seen.append(backend)):
        assert (fast.decode(z) - cross.decode(z)).abs().max() < FLOAT32
    assert set(seen) == {"eager"}
    assert len(fast._cache._graphs) == 1


@pytest.mark.parametrize("level", ["avx512bf16", "avx2"])
def test_whose_products_are_taken(cross, monkeypatch, level):
    """By default the extension's where programs of them were measured faster."""
    monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", "auto")
    monkeypatch.setattr("msdd_fast.layers.linear.native.MEASURED_LEVELS", (level,))
    here = load_extension().linear_level() == level
    fast = accelerate(cross)
    fast.decode(latents(cross, 1))
    assert fast.graphs == here, fast.graphs_reason
