"""An engine's ops repeat a decision only for arguments that would lead to it again."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from msdd_fast import ops, profiling
from msdd_fast.backends import extension_status, use_backend
from msdd_fast.engine.bound_ops import bind
from msdd_fast.errors import InputError
from msdd_fast.ops import Ops, get_op, observe

needs_extension = pytest.mark.skipif(not extension_status()[0], reason=extension_status()[1])


def tensors_of(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


def same(a, b):
    pairs = zip(tensors_of(a), tensors_of(b), strict=True)
    return all(x.dtype == y.dtype and x.stride() == y.stride() and torch.equal(x, y) for x, y in pairs)


class Counted:
    """A bound op that counts the calls that decide anew."""

    def __init__(self, name, backend="auto"):
        self.op, self.decided = getattr(bind(backend), name), 0
        function = self.op.function

        def count(*args, **options):
            self.decided += 1
            return function(*args, **options)

        self.op.function = count

    def __call__(self, *args):
        return self.op(*args)


def test_the_type_of_bound_ops_is_that_of_the_ops():
    assert {n for n in vars(Ops) if not n.startswith("_")} == set(ops.__all__)
    assert all(getattr(Ops, name) is getattr(ops, name) for name in ops.__all__)
    assert set(vars(bind("auto"))) == set(ops.__all__)


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize("name", ops.__all__)
def test_a_repeated_decision_gives_the_same_bits(name, backend):
    op, args = Counted(name, backend), get_op(name).example()
    plain = getattr(ops, name)
    for factor in (1, 2, 3):
        varied = [a * factor if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        usable = None if name == "quantize_rows" and backend == "cpu" else backend
        assert same(op(*varied), plain(*varied, backend=usable))
    assert op.decided == 1


X, SHIFT, SCALE = torch.randn(4, 6, 16), torch.randn(2, 16), torch.randn(2, 16)


@pytest.mark.parametrize(
    "change",
    [
        (X[:2], SHIFT, SCALE),
        (X.bfloat16(), SHIFT, SCALE),
        (X.transpose(0, 1).contiguous().transpose(0, 1), SHIFT, SCALE),
        (X, torch.randn(2, 32)[:, :16], SCALE),
        (X, SHIFT, SCALE.half()),
        (X, SHIFT, SCALE, 5),
        (X, SHIFT, SCALE, None, 1e-3),
        (X, torch.randn(16, 2).t(), SCALE),
    ],
)
def test_other_arguments_are_decided_anew(change):
    op = Counted("norm_modulate")
    for _ in range(2):
        op(X, SHIFT, SCALE)
    assert op.decided == 1
    for _ in range(2):
        assert same(op(*change), ops.norm_modulate(*change))
    assert op.decided >= 2
    assert same(op(X, SHIFT, SCALE), ops.norm_modulate(X, SHIFT, SCALE))


def test_bad_arguments_are_refused_after_good_ones():
    op = bind("auto").norm_modulate
    op(X, SHIFT, SCALE)
    op(X, SHIFT, SCALE)
    with pytest.raises(InputError, match="scale must be"):
        op(X, SHIFT, SCALE[:, :8])
    with pytest.raises(InputError, match="shift must have a floating point dtype"):
        op(X, SHIFT.int(), SCALE)
    with pytest.raises(InputError, match="x must be a tensor"):
        op(None, SHIFT, SCALE)


@needs_extension
def test_gradients_take_the_long_way():
    op = bind("auto").norm_modulate
    for _ in range(2):
        op(X, SHIFT, SCALE)
    x = X.clone().requires_grad_()
    op(x, SHIFT, SCALE).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert same(op(x, SHIFT, SCALE), op(X, SHIFT, SCALE))
    with pytest.raises(InputError, match="backend 'cpu' is for inference"):
        bound = bind("cpu").norm_modulate
        bound(X, SHIFT, SCALE)
        bound(x, SHIFT, SCALE)


class Modes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_extension
def test_whoever_watches_still_sees_every_call():
    op, seen = bind("auto").norm_modulate, []
    for _ in range(2):
        op(X, SHIFT, SCALE)
    with observe(lambda op, backend, args: seen.append((op.name, backend))):
        op(X, SHIFT, SCALE)
    assert seen == [("norm_modulate", "cpu")]
    with Modes() as mode:
        op(X, SHIFT, SCALE)
    assert mode.seen == ["msdd_fast.norm_modulate.cpu"]
    with profiling.recording(), torch.profiler.profile() as profiler:
        op(X, SHIFT, SCALE)
    assert "norm_modulate [cpu]" in {e.name for e in profiler.events()}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(X)
        assert type(op(fake, mode.from_tensor(SHIFT), mode.from_tensor(SCALE))) is type(fake)
        assert type(op(X, SHIFT, SCALE)) is type(fake)
    mapped = torch.vmap(lambda x: op(x, SHIFT[:1], SCALE[:1]))(X)
    assert torch.allclose(mapped, torch.stack([ops.norm_modulate(x, SHIFT[:1], SCALE[:1]) for x in X]), atol=1e-6)
    compiled = torch.compile(lambda x: op(x, SHIFT, SCALE), fullgraph=True, backend="aot_eager")
    assert same(compiled(X), op(X, SHIFT, SCALE))


def test_autocast_still_casts():
    q, k, v = (torch.randn(1, 4, 1, 16) for _ in range(3))
    op = bind("auto").attention
    for _ in range(2):
        assert op(q, k, v).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            assert op(q, k, v).dtype == torch.bfloat16
    assert op(q, k, v).dtype == torch.float32


@needs_extension
def test_auto_follows_use_backend_and_a_named_backend_does_not():
    taken = []
    for backend in ("auto", "cpu"):
        op = bind(backend).swiglu
        for choice in ("auto", "eager", "auto", "eager"):
            with ExitStack() as stack:
                stack.enter_context(use_backend(choice))
                seen = []
                op(X, X + 1)
                op(X, X + 2)
                plan = next(iter(op._kinds.values())).plans
                stack.enter_context(observe(lambda op, chosen, args, seen=seen: seen.append(chosen)))
                op(X, X + 1)
                taken.append(seen[0])
        assert len(plan) == 2  # one for each choice
    assert taken == ["cpu", "eager"] * 2 + ["cpu"] * 4


def test_one_tensor_given_twice_and_numbers_for_scalars():
    bound = bind("auto")
    for _ in range(3):
        assert same(bound.euler_step(X, X, torch.tensor(0.5)), ops.euler_step(X, X, 0.5))
        assert same(bound.euler_step(X, X + 1, 0.5), ops.euler_step(X, X + 1, 0.5))
    assert same(
        bound.start_noise(torch.tensor([1]), (3, 2, 2), patch_size=2),
        ops.start_noise(torch.tensor([1]), (3, 2, 2), patch_size=2),
    )


def test_threads_share_the_plans():
    op = bind("auto").swiglu
    inputs = [torch.randn(n, 16) for n in range(1, 40)]
    expected = [ops.swiglu(x, x + 1) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = list(pool.map(lambda x: op(x, x + 1), inputs))
            assert all(same(a, b) for a, b in zip(found, expected, strict=True))
