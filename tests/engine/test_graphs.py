"""CUDA-graph logic, tested with a fake recorder that replays by running again into the same memory.

What only a GPU can show is marked gpu.
"""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from msdd_fast import Tokenizer, accelerate
from msdd_fast.engine import decoder, graph_cache, graphs
from msdd_fast.errors import BackendUnavailableError
from tests.engine.test_parity import FLOAT32, latents


class Replayer:
    """Stands in for ``graphs.Recorder``. A replay poisons and refills the result, as a real graph overwrites it."""

    recorded = 0

    def __init__(self, device):
        self.previous = []

    @contextmanager
    def stream(self):
        yield

    def warm_up(self, run):
        run()

    def record(self, run):
        Replayer.recorded += 1
        result = run()
        index = len(self.previous)
        self.previous.append(result)
        return lambda: self.refresh(index), result

    def memory(self):
        return 12 * 2**20

    def refresh(self, index):
        for old, new in zip(_tensors(self.previous[index]), _tensors(self.again(index)), strict=True):
            old.copy_(new)


def _tensors(x):
    return [x] if isinstance(x, Tensor) else [t for t in x if isinstance(t, Tensor)]


@pytest.fixture
def replaying(monkeypatch):
    """Engines on the CPU that believe in graphs."""
    whole, staged = graphs.Graph.__init__, graphs.StageGraphs.__init__

    def init_whole(self, recorder, lock, example, decode):
        whole(self, recorder, lock, example, decode)
        recorder.again = lambda index: decode(self.inputs)

    def init_staged(self, recorder, example, stages, images, count):
        staged(self, recorder, example, stages, images, count)
        recorder.again = lambda index: list(stages(self.inputs))[index]

    monkeypatch.setattr(graphs.Graph, "__init__", init_whole)
    monkeypatch.setattr(graphs.StageGraphs, "__init__", init_staged)
    monkeypatch.setattr(graphs, "Recorder", lambda device: Replayer(device))
    for module in (graph_cache, decoder):
        monkeypatch.setattr(module, "use_graphs", lambda wanted, device: (True, "fake recorder"))
    monkeypatch.setattr(graph_cache, "records_programs", lambda device: False)
    Replayer.recorded = 0


# The fake recorder keeps one recording per recorder apart; engines here use one batch size at a time.
def test_padding_and_clones(cross, replaying):
    engine = accelerate(cross, dtype=torch.float32, batch_sizes=(4,))
    z = latents(cross, 9)
    plain = accelerate(cross, dtype=torch.float32, graphs=False)
    first = engine.decode(z[:3], 7)  # padded to 4
    assert (first - cross.decode(z[:3], 7)).abs().max() < FLOAT32
    kept = first.clone()
    second = engine.decode(z[4:8], 1)
    assert torch.equal(first, kept)  # a clone: not overwritten
    assert (second - cross.decode(z[4:8], 1)).abs().max() < FLOAT32
    assert (engine.decode(z, 3) - cross.decode(z, 3)).abs().max() < FLOAT32  # 4 + 4 + 1 padded
    assert Replayer.recorded == 1
    assert "12.0 MiB graphs" in str(engine.report())
    assert plain.graphs  # the fixture overrules


def test_without_copy_the_memory_is_the_graphs_own(cross, replaying):
    engine = accelerate(cross, dtype=torch.float32, batch_sizes=(2,))
    a = engine.decode(latents(cross, 2), copy=False)
    b = engine.decode(latents(cross, 2, seed=1), copy=False)
    assert a.data_ptr() == b.data_ptr()


def test_stream_has_a_graph_per_stage(cross, replaying):
    engine = accelerate(cross, dtype=torch.float32, batch_sizes=(2,))
    z, expected = latents(cross, 2), []
    cross.decode(z, 4, stage_callback=lambda r: expected.append(r.clean))
    for _ in range(2):
        images = [s.images for s in engine.stream(z, 4)]
        assert all((a - b).abs().max() < FLOAT32 for a, b in zip(images, expected, strict=True))
    assert Replayer.recorded == 4


def test_a_second_stream_at_the_same_time_runs_without_graphs(cross, replaying):
    engine = accelerate(cross, dtype=torch.float32, batch_sizes=(1,))
    a, b = latents(cross, 1), latents(cross, 1, seed=1)
    pairs = list(zip(engine.stream(a), engine.stream(b), strict=True))
    assert (pairs[-1][0].images - cross.decode(a)).abs().max() < FLOAT32
    assert (pairs[-1][1].images - cross.decode(b)).abs().max() < FLOAT32
    assert engine._cache.get_stages(engine.request(a, streaming=True)).claim()


def test_a_failed_capture_falls_back_and_says_why(cross, replaying, monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Replayer, "record", fail)
    engine = accelerate(cross, dtype=torch.float32)
    z = latents(cross, 3)
    assert (engine.decode(z) - cross.decode(z)).abs().max() < FLOAT32
    assert "no: the capture of batch 8 failed: operation not permitted" in str(engine.report())
    with pytest.raises(BackendUnavailableError, match="graphs=True, but the capture of batch 8 failed"):
        accelerate(cross, dtype=torch.float32, graphs=True).decode(z)


def test_out_of_memory_in_a_capture_is_raised(cross, replaying, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no")

    engine = accelerate(cross, dtype=torch.float32)
    with monkeypatch.context() as m:
        m.setattr(Replayer, "record", fail)
        with pytest.raises(torch.OutOfMemoryError):
            engine.decode(latents(cross, 1))
    assert (engine.decode(latents(cross, 1)) - cross.decode(latents(cross, 1))).abs().max() < FLOAT32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_real_graphs(cross):
    tok = cross.cuda()
    try:
        engine = accelerate(tok, dtype=torch.float32, batch_sizes=(1, 4), graphs=True)
        engine.warmup()
        z = latents(tok, 6).cuda()
        expected = tok.decode(z, 3)
        for _ in range(3):
            assert (engine.decode(z, 3) - expected).abs().max() < FLOAT32
            assert (list(engine.stream(z[:4], 3))[-1].images - expected[:4]).abs().max() < FLOAT32
        assert engine.graphs
    finally:
        cross.cpu()


class Again:
    """Stands in for ``graphs.Graph``: decodes again."""

    full = 0  # how many captures are to find no memory

    def __init__(self, recorder, lock, example, decode):
        if Again.full:
            Again.full -= 1
            raise torch.OutOfMemoryError("no")
        self.decode = decode

    def replay(self, inputs, out=None):
        images = self.decode(inputs)
        return images if out is None else out.copy_(images)


def test_graphs_of_many_sizes_are_bounded_and_the_least_recently_used_go(replaying, monkeypatch):
    monkeypatch.setattr(graph_cache, "MAX_GRAPHS", 4)
    monkeypatch.setattr(graphs, "Graph", Again)
    engine = accelerate(Tokenizer.from_config("tiny-ssdd"), dtype=torch.float32, batch_sizes=(1,), graphs=True)
    first = torch.zeros(1, 4, 4, 4)
    expected = engine.decode(first)
    for i in range(12):
        engine.decode(torch.zeros(1, 4, 4, 5 + i))
        list(engine.stream(torch.zeros(1, 4, 4, 5 + i)))
        assert torch.equal(engine.decode(first), expected)
    kept = list(engine._cache._graphs)
    assert len(kept) == 4 and kept[-1].shape == (1, 4, 4, 4)
    assert len(engine._cache._stage_graphs) == 4


def test_out_of_memory_in_a_capture_drops_the_other_graphs_first(replaying, cross, monkeypatch):
    monkeypatch.setattr(graphs, "Graph", Again)
    engine = accelerate(cross, dtype=torch.float32, batch_sizes=(1, 2), graphs=True)
    z = latents(cross, 2)
    expected = engine.decode(z[:1])
    monkeypatch.setattr(Again, "full", 1)
    assert engine.decode(z).shape == (2, 3, 64, 64)
    assert [r.shape[0] for r in engine._cache._graphs] == [2]
    assert torch.equal(engine.decode(z[:1]), expected) and engine.graphs
    engine._cache._graphs.clear()
    monkeypatch.setattr(Again, "full", 2)
    with pytest.raises(torch.OutOfMemoryError):
        engine.decode(z)
