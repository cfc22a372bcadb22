"""Micro-batching, with an engine that records what it decodes and waits until it may."""

import threading
from concurrent.futures import CancelledError

import pytest
import torch

from msdd_fast import accelerate
from msdd_fast.integrations.serve.batcher import Batcher, ClosedError, QueueFullError
from tests.perturbed import perturbed

WAIT = 10.0


class Engine:
    """Image i is its latent's value plus its seed. Latents of -1 cannot be decoded."""

    batch_sizes = (1, 4)

    def __init__(self):
        self.batches, self.free, self.busy = [], threading.Event(), threading.Event()
        self.free.set()

    def warmup(self):
        pass

    def decode(self, z, seeds, *, cfg_scale, out_dtype):
        self.batches.append((z.flatten().tolist(), cfg_scale, out_dtype))
        self.busy.set()
        assert self.free.wait(WAIT)
        if (z == -1).any():
            raise ValueError("cannot decode")
        return (z.flatten(1)[:, 0] + seeds).to(out_dtype)[:, None, None, None]


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def batcher(engine):
    """Held: the engine is busy with a first image, so that what a test submits gathers."""
    engine.free.clear()
    batcher = Batcher(engine, max_wait=0.0, max_queue=6)
    batcher.start().result(WAIT)
    first = submit(batcher, 100)
    assert engine.busy.wait(WAIT)
    yield batcher
    engine.free.set()
    batcher.close()
    assert first.result(WAIT).item() == 100


def submit(batcher, *values, seed=0, **kind):
    z = torch.tensor(values, dtype=torch.float32)[:, None]
    return batcher.submit(z, torch.arange(seed, seed + len(values)), **kind)


def values(future):
    return future.result(WAIT).flatten().tolist()


def test_what_waits_is_decoded_together_and_everybody_gets_his_own(batcher, engine):
    one, two, three = submit(batcher, 1), submit(batcher, 2, 3, seed=10), submit(batcher, 4, 5)
    assert batcher.waiting == 5
    engine.free.set()
    assert [values(f) for f in (one, two, three)] == [[1], [12, 14], [4, 6]]
    assert [b[0] for b in engine.batches] == [[100], [1, 2, 3], [4, 5]]  # a request is not torn apart
    assert batcher.waiting == 0


def test_a_later_request_fills_a_batch_that_one_before_it_does_not_fit(batcher, engine):
    futures = [submit(batcher, 1, 1, 1), submit(batcher, 2, 2), submit(batcher, 3)]
    engine.free.set()
    assert [values(f) for f in futures] == [[1, 2, 3], [2, 3], [3]]
    assert [b[0] for b in engine.batches[1:]] == [[1, 1, 1, 3], [2, 2]]


def test_one_batch_has_one_kind_and_the_oldest_decides(batcher, engine):
    kinds = [{}, {"cfg_scale": 2.0}, {"out_dtype": torch.float32}, {}]
    futures = [submit(batcher, i, **kind) for i, kind in enumerate(kinds)]
    wide = batcher.submit(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))
    engine.free.set()
    assert [values(f) for f in futures] == [[0], [1], [2], [3]] and values(wide) == [1]
    assert engine.batches[1:] == [
        ([0, 3], None, torch.uint8),
        ([1], 2.0, torch.uint8),
        ([2], None, torch.float32),
        ([1, 1], None, torch.uint8),
    ]


def test_a_full_queue_refuses_and_says_when_to_come_again(batcher, engine):
    submit(batcher, 1, 2, 3, 4)
    with pytest.raises(QueueFullError) as e:
        submit(batcher, 5, 6, 7)
    assert 1 <= e.value.retry_after <= 60
    assert batcher.waiting == 4
    submit(batcher, 5, 6)


def test_what_is_cancelled_leaves_the_queue(batcher, engine):
    gone, stays = submit(batcher, 1, 2), submit(batcher, 3)
    assert gone.cancel()
    assert batcher.waiting == 1
    engine.free.set()
    assert values(stays) == [3]
    assert [b[0] for b in engine.batches] == [[100], [3]]
    with pytest.raises(CancelledError):
        gone.result(WAIT)


def test_a_batch_that_has_begun_cannot_be_cancelled(batcher, engine):
    engine.busy.clear()
    future = submit(batcher, 1)
    engine.free.set()
    assert values(future) == [1]
    assert not future.cancel()


def test_one_that_cannot_be_decoded_fails_alone(batcher, engine):
    good, bad, other = submit(batcher, 1), submit(batcher, -1), submit(batcher, 2)
    engine.free.set()
    assert values(good) == [1] and values(other) == [2]
    with pytest.raises(ValueError, match="cannot decode"):
        bad.result(WAIT)
    assert values(submit(batcher, 3)) == [3]


def test_closing_decodes_what_waits_and_takes_nothing_more(batcher, engine):
    futures = [submit(batcher, i) for i in range(6)]
    threading.Timer(0.05, engine.free.set).start()
    batcher.close()
    assert all(f.done() for f in futures) and [values(f) for f in futures] == [[i] for i in range(6)]
    assert not batcher.alive
    with pytest.raises(ClosedError):
        submit(batcher, 1)


def test_a_request_larger_than_a_batch_runs_alone(batcher, engine):
    small, large = submit(batcher, 0), submit(batcher, 1, 2, 3, 4, 5)
    engine.free.set()
    assert values(large) == [1, 3, 5, 7, 9] and values(small) == [0]
    assert [len(b[0]) for b in engine.batches] == [1, 1, 5]


def test_it_waits_for_a_batch_to_fill_but_not_longer(engine):
    batcher = Batcher(engine, max_wait=60.0)
    batcher.start().result(WAIT)
    futures = [submit(batcher, i) for i in range(4)]  # a full batch need not wait
    assert [values(f) for f in futures] == [[0], [1], [2], [3]]
    late = submit(batcher, 1)
    assert not late.done()
    batcher.close()  # nor does the last one
    assert values(late) == [1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_died(engine):
    def fail(images, seconds):
        raise MemoryError

    batcher = Batcher(engine, max_wait=0.0, on_batch=fail)
    batcher.start().result(WAIT)
    engine.free.clear()
    last = submit(batcher, 1)
    assert engine.busy.wait(WAIT)
    waits = submit(batcher, 2)
    engine.free.set()
    assert values(last) == [1]
    with pytest.raises(ClosedError):
        waits.result(WAIT)
    batcher.close()
    assert not batcher.alive


def test_an_engine_that_does_not_warm_up_says_why():
    class Broken(Engine):
        def warmup(self):
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        Batcher(Broken()).start().result(WAIT)


def test_many_threads_and_a_real_engine_give_the_images_of_single_decodes():
    engine = accelerate(perturbed(), dtype=torch.float32, batch_sizes=(4,), validate=True)
    z = torch.randn(24, *engine.config.latent_shape, generator=torch.Generator().manual_seed(0))
    expected = [engine.decode(z[i : i + 1], i) for i in range(24)]
    batcher = Batcher(engine, max_wait=0.01)
    batcher.start().result(60)
    got = {}

    def ask(i):
        future = batcher.submit(z[i : i + 1], torch.tensor([i]), out_dtype=torch.float32)
        got[i] = future.result(60)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    batcher.close()
    for i in range(24):
        torch.testing.assert_close(got[i], expected[i], atol=1e-5, rtol=1e-5)
