"""Predicted memory against measured, the choice among ways to decode, what they change, and memory that runs out.

Measured is what PyTorch's allocator hands out, which its profiler records, and the arena of recorded programs: the same
on every machine and at every time.
"""

import gc
import itertools
import weakref

import pytest
import torch

from msdd_fast import Tokenizer, accelerate
from msdd_fast.backends import extension_status
from msdd_fast.engine import graph_cache
from msdd_fast.engine.memory import is_out_of_memory
from msdd_fast.errors import InputError
from msdd_fast.layers.request import WHOLE, Way
from msdd_fast.layers.tiles import spans, tiles
from tests.conftest import HAS_GPU
from tests.families.pid.models import captions
from tests.families.pid.models import latents as random_latents
from tests.families.pid.models import random_tokenizer as random_pid
from tests.families.ssdd.test_ssdd import random_tokenizer as random_ssdd

# Ops fused as in the engine: without the extension the eager ones write more.
fused = pytest.mark.skipif(not extension_status()[0], reason=extension_status()[1])
pytestmark = pytest.mark.usefixtures("one_thread")
FLOAT32 = 3e-5  # as in the tests of both families' engines


def peak(run):
    """Most bytes that tensors made in ``run`` hold at once on a CPU."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    del result
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


class Model:
    """An engine in float32 with its latents and conditions."""

    def __init__(self, family, **options):
        self.family = family
        self.tokenizer = random_ssdd() if family == "ssdd" else random_pid()
        self.given = {} if family == "ssdd" else {"text": captions(1), "sigma": 0.2}
        self.engine = self.make(**options)

    def make(self, **options):
        return accelerate(self.tokenizer, **{"dtype": torch.float32, "steps": 1, **options})

    def latents(self, batch, height, width):
        """Of images of this size."""
        cell = 8 if self.family == "ssdd" else 32
        return random_latents(batch, 4, height // cell, width // cell)

    def decode(self, z, engine=None, **options):
        return (engine or self.engine).decode(z, 3, **self.given, **options)

    def request(self, z):
        return self.engine.request(z, conditions=self.engine.conditions(z, **self.given))

    def ways(self, z):
        """Every kind of way, and the bytes predicted for it."""
        kinds = {}
        for way in self.engine.program.ways(self.request(z)):
            kinds.setdefault(str(way).split(",")[0], way)  # the largest of a kind
        batch = len(z)
        return {kind: self.engine._budget._plan(self.request(z), way, batch) for kind, way in kinds.items()}

    def decode_as(self, plan, z):
        conditions = self.engine.conditions(z, **self.given)
        inputs = self.engine.inputs(z, 3, conditions=conditions)
        with torch.no_grad():
            return self.engine._decode_as(plan, inputs, self.request(z), None, None, True)


@pytest.fixture
def recorded(monkeypatch):
    """Decodes of MSDD can be recorded wherever there is the extension."""
    monkeypatch.setenv("MSDD_FAST_NATIVE_LINEAR", "1")


@pytest.fixture(scope="module")
def ssdd():
    return Model("ssdd")


@pytest.fixture(scope="module")
def pid():
    return Model("pid")


@pytest.fixture
def model(request, ssdd, pid):
    return {"ssdd": ssdd, "pid": pid}[request.param]


both = pytest.mark.parametrize("model", ["ssdd", "pid"], indirect=True)


# --- Prediction. ---


@fused
@both
@pytest.mark.parametrize("size", [(1, 160, 64), (1, 96, 160), (2, 64, 160)])
def test_the_prediction_of_every_way(model, size):
    z = model.latents(*size)
    found = model.ways(z)
    assert list(found) == ["whole", "chunked", "tiled"]
    for plan in found.values():
        measured = model.engine._budget.fixed + peak(lambda plan=plan: model.decode_as(plan, z))
        assert abs(plan.bytes / measured - 1) < 0.15, plan
    batch, height, width = size
    assert model.engine.memory_for(height, width, batch) == found["whole"].bytes
    assert found["chunked"].bytes < found["whole"].bytes


@fused
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_prediction_of_msdd(cross, batch, cfg_scale):
    engine, side = accelerate(cross, dtype=torch.float32, graphs=False, cfg_scale=cfg_scale), cross.config.image_size
    z = torch.zeros(batch, *engine.family.example)
    measured = engine._budget.fixed + peak(lambda: engine.decode(z))
    assert abs(engine.memory_for(side, side, batch) / measured - 1) < 0.15


@fused
@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (2, 1), (4, 1), (4, 2), (7, 3)])
def test_the_prediction_of_recorded_programs(batch, threads, recorded):
    """Their arenas grow by 4 MiB at least, so it says nothing of tiny models. Two images a thread have one each."""
    torch.set_num_threads(threads)
    tokenizer = Tokenizer.from_pretrained("msdd-nano")
    side = tokenizer.config.image_size
    engine = accelerate(tokenizer, dtype=torch.float32)
    z = torch.zeros(batch, *engine.family.example)
    engine.decode(z)  # records
    assert engine.graphs, engine.graphs_reason
    arena = sum(engine.graph_memory().values())
    measured = engine._budget.fixed + arena + peak(lambda: engine.decode(z))
    assert abs(engine.memory_for(side, side, batch) / measured - 1) < 0.15


@fused
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 128, 128), (1, 192, 128), (2, 128, 160)])
def test_the_prediction_of_convolutions_of_the_extension(batch, height, width, recorded):
    tokenizer, z = Tokenizer.from_config("ssdd-xs-f8c4"), random_latents(batch, 4, height // 8, width // 8)
    plain = accelerate(tokenizer, dtype=torch.float32, steps=1, graphs=False)
    measured = plain._budget.fixed + peak(lambda: plain.decode(z))
    assert abs(plain.memory_for(height, width, batch) / measured - 1) < 0.05
    engine = accelerate(tokenizer, dtype=torch.float32, steps=1)
    engine.decode(z)  # records
    measured = engine._budget.fixed + sum(engine.graph_memory().values()) + peak(lambda: engine.decode(z))
    assert abs(engine.memory_for(height, width, batch) / measured - 1) < 0.15


def test_batches_that_do_not_run_at_once(ssdd):
    """Their images are copied to the result."""
    engine = ssdd.make(batch_sizes=2)
    one = engine.memory_for(128, 128, 2)
    assert engine.memory_for(128, 128, 6) == one + 6 * 3 * 128**2 * 4
    assert engine.memory_for(128, 128, 1) < one


# --- What ways change. ---


@both
def test_chunked_is_whole_up_to_rounding(model):
    """Heights and numbers of patches that parts do not divide."""
    z = model.latents(2, 96, 64)
    whole = model.decode_as(model.engine._budget._plan(model.request(z), WHOLE, 2), z)
    assert torch.equal(whole, model.decode(z))
    for parts in (4, 5):
        plan = model.engine._budget._plan(model.request(z), Way(parts=parts), 2)
        assert (model.decode_as(plan, z) - whole).abs().max() < FLOAT32


@both
def test_chunked_in_bfloat16_errs_no_more_than_whole(model, monkeypatch):
    monkeypatch.setenv("MSDD_FAST_CPU_BF16", "1")
    z = model.latents(1, 96, 64)
    exact, low = model.decode(z), model.make(dtype=torch.bfloat16)
    request = low.request(z, conditions=low.conditions(z, **model.given))
    inputs = low.inputs(z, 3, conditions=low.conditions(z, **model.given))
    with torch.no_grad():
        whole, parts = (low.program.decode(inputs, request._replace(way=way)) for way in (WHOLE, Way(parts=5)))
    errors = [(x - exact).square().mean().sqrt() for x in (whole, parts)]
    assert 0 < errors[1] < 1.2 * errors[0]


@both
def test_tiles_of_a_network_that_sees_only_its_pixel(model, monkeypatch):
    """Blending adds nothing of its own: the same image, and every pixel is covered."""
    z = model.latents(1, 192, 64)
    network, velocity = type(model.engine.program.network), None
    if model.family == "ssdd":
        monkeypatch.setattr(network, "velocity", lambda self, x, context, step: 0.5 * x + 1)
    else:
        velocity = network.velocity

        def pointwise(self, x, context, text, step):
            v = velocity(self, x, context, text, step)
            (high, wide), p = context.grid, self.patch
            pixels = x.view(len(x), 3, high, p, wide, p).permute(2, 4, 0, 3, 5, 1)
            return (0.5 * pixels + 1).reshape(v.shape)

        monkeypatch.setattr(network, "velocity", pointwise)
    whole, tiled = model.decode(z), model.decode(z, tile=128)
    assert (whole - tiled).abs().max() < 1e-5


@both
def test_tiles(model):
    z = model.latents(1, 192, 64)
    whole = model.decode(z)
    assert torch.equal(model.decode(z, tile=256), whole)  # no larger than a tile
    tiled = model.decode(z, tile=128)
    error = (tiled - whole).square().mean().sqrt() / whole.square().mean().sqrt()
    assert 1e-3 < error < 0.5
    noise = [random_latents(1, 3, 192, 64, seed=i) for i in range(1)]
    given = model.engine.decode(z, noise=noise, tile=128, **model.given)
    assert given.shape == whole.shape and not torch.equal(given, tiled)
    as_bytes = model.decode(z, tile=128, out_dtype=torch.uint8)
    assert as_bytes.dtype == torch.uint8 and as_bytes.shape == whole.shape


@pytest.mark.parametrize(("length", "side"), [(5, 8), (8, 8), (9, 8), (16, 8), (31, 8), (100, 16)])
def test_weights_add_up_to_one(length, side):
    total = torch.zeros(4 * length, 4 * 9)
    for tile in tiles((length, 9), side, 4, torch.device("cpu")):
        assert tile.rows.stop - tile.rows.start == min(side, length)
        weight = tile.down[:, None] * tile.across
        assert (weight > 0).all()
        total[tile.high, tile.wide] += weight
    torch.testing.assert_close(total, torch.ones_like(total))
    found = spans(length, side)
    overlaps = [a.stop - b.start for a, b in itertools.pairwise(found)]
    assert all(n >= side // 4 for n in overlaps)


# --- The choice. ---


@both
def test_max_memory_chooses_by_the_prediction(model):
    z = model.latents(1, 256, 192)
    request = model.request(z)
    plans = [model.engine._budget._plan(request, way, 1) for way in model.engine.program.ways(request)]
    engine, seen = model.make(batch_sizes=1), []
    engine.program.decode = lambda inputs, request, *_: seen.append(request.way) or torch.zeros(1, 3, 256, 192)
    for limit in sorted({plan.needed for plan in plans}, reverse=True):
        engine.max_memory = engine._budget.limit = limit
        engine.release()
        expected = next(plan for plan in plans if plan.needed <= limit)
        model.decode(z, engine)
        assert seen.pop() == expected.way and engine.memory_for(256, 192) == expected.bytes
    assert seen == []
    least = min(plan.needed for plan in plans)
    engine.max_memory = engine._budget.limit = least - 1
    engine.release()
    with pytest.raises(InputError, match=rf"max_memory must be at least {least} bytes for z of shape .* \(weights and"):
        model.decode(z, engine)


@fused
@both
def test_max_memory_holds(model):
    z = model.latents(1, 160, 64)
    for plan in model.ways(z).values():
        engine = model.make(batch_sizes=1, max_memory=plan.needed)
        measured = engine._budget.fixed + peak(lambda engine=engine: model.decode(z, engine))
        assert measured < 1.15 * plan.bytes <= 1.15 * engine.max_memory


def test_the_limit_leaves_room_for_the_heap(ssdd):
    """What an engine says that it holds is the least limit that it decodes whole in; more than its tensors take."""
    free = ssdd.make(batch_sizes=1)
    side = free.config.image_size
    limit = sum(free.memory.values())
    assert free.memory["activations of batch 1 (bound)"] > 1.7 * (free.memory_for(side, side) - free._budget.fixed)
    for less, way in ((0, "whole"), (1, "chunked")):
        engine = ssdd.make(batch_sizes=1, max_memory=limit - less)
        assert str(engine.plan(engine._example_request(1)).way).startswith(way)


def test_the_report_says_which_way(ssdd):
    z = ssdd.latents(1, 64, 64)
    assert "way  whole, " in str(ssdd.engine.report(z)) and "MiB predicted for an image of 64 x 64 px" in str(
        ssdd.engine.report(z)
    )
    chunked = ssdd.ways(z)["chunked"]
    report = ssdd.make(batch_sizes=1, max_memory=chunked.needed).report(z)
    assert report.way.startswith(f"chunked, {chunked.way.parts} parts, ")
    assert report.accuracy[0].max_abs < FLOAT32


def test_fewer_at_once_before_parts(ssdd):
    z = ssdd.latents(4, 64, 64)
    limit = ssdd.make(batch_sizes=2).plan(ssdd.request(z)).needed
    engine, seen = ssdd.make(batch_sizes=4, max_memory=limit), []
    decode = engine.program.decode
    engine.program.decode = lambda inputs, request, *rest: (
        seen.append((len(inputs.z), request.way)) or decode(inputs, request, *rest)
    )
    assert (engine.decode(z, 3) - ssdd.decode(z)).abs().max() < FLOAT32
    assert seen == [(2, WHOLE)] * 2


def test_streams_take_the_whole_batch_in_some_way(ssdd):
    z = ssdd.latents(2, 64, 96)
    chunked = ssdd.ways(z)["chunked"]
    engine = ssdd.make(max_memory=chunked.needed)
    (stage,) = engine.stream(z, 3)
    assert (stage.state - ssdd.decode(z)).abs().max() < FLOAT32
    assert next(p for p in engine._plans(ssdd.request(z)) if p.images >= 2).way.parts > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.engine.memory_for(0, 64), "height must be an integer >= 1, got 0"),
        (lambda m: m.engine.memory_for(64, "64"), "width must be an integer >= 1, got '64'"),
        (lambda m: m.engine.memory_for(64, 64, 0), "batch must be an integer >= 1, got 0"),
        (lambda m: m.engine.memory_for(64, 60), "width must be a multiple of 8, got 60"),
        (lambda m: m.decode(m.latents(1, 64, 64), tile=100), "tile must be a multiple of 128, got 100"),
        (lambda m: m.decode(m.latents(1, 64, 64), tile=64), "tile must be a multiple of 128, got 64"),
        (lambda m: m.decode(m.latents(1, 64, 64), tile="all"), "tile must be an integer >= 1, got 'all'"),
        (lambda m: m.make(max_memory=1000), r"max_memory must be at least \d+ bytes for z of shape .*, got 1000"),
        (lambda m: m.make(max_memory=0), "max_memory must be an integer >= 1, got 0"),
    ],
)
def test_bad_input(ssdd, call, message):
    with pytest.raises(InputError, match=message):
        call(ssdd)


def test_msdd_has_one_size(cross):
    engine, side = accelerate(cross, dtype=torch.float32), cross.config.image_size
    with pytest.raises(InputError, match=f"height and width must be {side}, as of all images of this model"):
        engine.memory_for(2 * side, side)
    with pytest.raises(InputError, match="tile must be None for MSDD, whose images have one size"):
        engine.decode(torch.zeros(1, *engine.family.example), tile=128)


# --- Memory that runs out all the same. ---

NO_MEMORY = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    ),
    "python": MemoryError(),
}


def short_of(engine, *ways, error):
    """Let decodes in these ways fail; returns those that are tried."""
    tried, decode = [], engine.program.decode

    def decode_or_fail(inputs, request, *rest):
        tried.append((request.way, len(inputs.z)))
        if request.way in ways or str(request.way).split(",")[0] in ways:
            raise error
        return decode(inputs, request, *rest)

    engine.program.decode = decode_or_fail
    return tried


@both
def test_the_next_smaller_way_is_taken(model):
    engine, z = model.make(max_memory=2**32), model.latents(2, 64, 32)
    tried = short_of(engine, "whole", error=NO_MEMORY["cpu" if model.family == "ssdd" else "gpu"])
    expected = model.decode(z)
    assert (model.decode(z, engine) - expected).abs().max() < FLOAT32
    assert [t[0] for t in tried] == [WHOLE, WHOLE, Way(parts=4)] and [t[1] for t in tried] == [2, 1, 2]
    assert any("64 x 32 px, whole, 8 at once, ran out of memory" in note for note in engine.notes)
    assert any("from now on chunked, 4 parts" in note for note in engine.notes)
    del tried[:]
    model.decode(z, engine)
    assert [t[0] for t in tried] == [Way(parts=4)]  # what failed is not tried again
    del tried[:]
    engine.release()
    model.decode(z, engine)
    assert tried[0][0] == WHOLE


def test_tiles_are_the_last_resort(ssdd):
    engine, z = ssdd.make(max_memory=2**32, batch_sizes=1), ssdd.latents(1, 192, 64)
    short_of(engine, "whole", "chunked", error=NO_MEMORY["gpu"])
    assert torch.equal(engine.decode(z, 3), ssdd.decode(z, tile=128))
    short_of(engine, "tiled", error=NO_MEMORY["gpu"])
    with pytest.raises(torch.OutOfMemoryError):
        engine.decode(z, 3)


def test_other_errors_come_through(ssdd):
    engine, z = ssdd.make(max_memory=2**32), ssdd.latents(1, 64, 32)
    tried = short_of(engine, "whole", error=RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        engine.decode(z)
    assert len(tried) == 1 and not any("ran out of memory" in note for note in engine.notes)


def test_without_max_memory_nothing_is_tried_again(ssdd):
    engine, z = ssdd.make(), ssdd.latents(1, 64, 32)
    tried = short_of(engine, "whole", error=NO_MEMORY["gpu"])
    with pytest.raises(torch.OutOfMemoryError):
        engine.decode(z)
    assert len(tried) == 1


def test_what_says_that_memory_ran_out():
    assert all(is_out_of_memory(e) for e in NO_MEMORY.values())
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("not enough memory"))


# --- Graphs. ---


@fused
@pytest.mark.parametrize("batch", [1, 2])
def test_release_frees_programs_and_their_arena(cross, recorded, batch):
    engine = accelerate(cross, dtype=torch.float32)
    z = torch.randn(batch, *engine.family.example, generator=torch.Generator().manual_seed(0))
    expected = engine.decode(z, 1)
    list(engine.stream(z, 1))
    recorder = engine._cache._recorder if batch == 1 else engine._cache._thread_recorders[0]
    arena = weakref.ref(recorder._arena)
    del recorder
    assert engine.graph_memory()["graphs"] > 0
    engine.release()
    gc.collect()
    assert arena() is None and engine.graph_memory() == {}
    assert torch.equal(engine.decode(z, 1), expected) and engine.graph_memory()["graphs"] > 0


@fused
def test_sizes_that_were_not_used_for_long_are_dropped(cross, monkeypatch, recorded):
    monkeypatch.setattr(graph_cache, "MAX_GRAPHS", 2)
    monkeypatch.setattr(graph_cache, "IMAGES_PER_THREAD", 4)  # a program for every batch size
    engine = accelerate(cross, dtype=torch.float32)
    for batch in (1, 2, 1, 3):
        engine.decode(torch.zeros(batch, *engine.family.example))
    assert {request.shape[0] for request in engine._cache._graphs} == {1, 3}


@fused
def test_a_recording_without_memory_does_not_switch_graphs_off(cross, monkeypatch, recorded):
    engine = accelerate(cross, dtype=torch.float32)
    z = torch.zeros(1, *engine.family.example)
    with monkeypatch.context() as short:
        short.setattr(engine._cache, "_capture", lambda request: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            engine.decode(z)
    assert engine.graphs
    engine.decode(z)
    assert engine._cache._graphs


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_release_gives_memory_back_to_the_gpu():
    tokenizer = Tokenizer.from_config("tiny").cuda()
    engine = accelerate(tokenizer, batch_sizes=8)
    engine.warmup()
    held = torch.cuda.memory_reserved()
    engine.release()
    assert torch.cuda.memory_reserved() < held and engine.graph_memory() == {}
