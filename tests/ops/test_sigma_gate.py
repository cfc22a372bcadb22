"""sigma_gate on every backend against its formula in float64."""

import pytest
import torch

from msdd_fast import ops
from msdd_fast.errors import BackendUnavailableError, InputError
from tests.ops.adaln import DTYPES, formula, per_row, randn, tables

NAMES = ("x", "y", "offset", "shift", "scale", "rms_weight", "logit", "weight")
# What the gate is made of: the weight of a row's product, or logits, and whether logits and offset are as wide as x.
KINDS = ["weight", "row", "element", "logit of elements", "offset of elements", "weight, offset of elements"]
SHAPES = [((2, 3, 96), 2), ((5, 33), 1), ((3, 2, 2, 40), 12), ((1, 7), 1), ((3, 768), 1), ((2, 1030), 1)]


def case(shape, groups, device, dtype, kind="weight", normed=True, other=None):
    """``other``: the dtype of all but x and y."""
    other = other or dtype
    width = shape[-1]
    x, y = (randn(*shape, seed=i).to(device, dtype) for i in range(2))
    shift, scale = tables(groups, width, 2, device, other)
    rms_weight = (1 + randn(width, seed=3)).to(device, other)
    wide = ("element", "offset of elements", "weight, offset of elements")
    offset = (randn(*shape[:-1], width if kind in wide else 1, seed=4) - 1).to(device, other)
    weight = (randn(width, seed=5) * width**-0.5).to(device, other) if kind.startswith("weight") else None
    wide = ("element", "logit of elements")
    logit = None if weight is not None else randn(*shape[:-1], width if kind in wide else 1, seed=6).to(device, other)
    norm = (shift, scale, rms_weight) if normed else (None, None, None)
    return x, y, offset, *norm, logit, weight


def gated(x, y, offset, logit, weight):
    """x_new in float64."""
    x, y, offset = x.double(), y.double(), offset.double()
    logit = (x * weight.double()).sum(-1, keepdim=True) if logit is None else logit.double()
    return x + torch.sigmoid(logit + offset) * y


def check(assert_near, backend, args):
    x, y, offset, shift, scale, rms_weight, logit, weight = args
    x_new, h = ops.sigma_gate(*args, backend=backend)
    eager, _ = ops.sigma_gate(*args, backend="eager")
    assert x_new.is_contiguous() and h.is_contiguous() and x_new.dtype == h.dtype == x.dtype
    assert_near(x_new, eager, gated(x, y, offset, logit, weight), x.dtype)
    if shift is None:
        assert h.shape == (0,)
        return
    # h is that of x_new as it was rounded: eager's of its own.
    eager_h = ops.norm_modulate(x_new, shift, scale, None, 1e-6, rms_weight, backend="eager")
    assert_near(h, eager_h, formula(x_new, shift, scale, None, rms_weight), x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_against_the_formula(backend, device, assert_near, shape, groups, dtype):
    check(assert_near, backend, case(shape, groups, device, dtype))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_gate(backend, device, assert_near, kind, normed):
    for dtype, other in ((torch.float32, None), (torch.bfloat16, torch.float32)):
        check(assert_near, backend, case((3, 2, 40), 3, device, dtype, kind, normed, other))


@pytest.mark.parametrize("kind", ["weight", "element"])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_a_closed_and_an_open_gate(backend, device, kind):
    """x itself and x + y, whatever the logit: the ends of the sigmoid are exact."""
    args = case((4, 50), 1, device, torch.float32, kind)
    x, y = args[:2]
    for offset, expected in ((-torch.inf, x), (-200.0, x), (200.0, x + y), (torch.inf, x + y)):
        x_new, _ = ops.sigma_gate(x, y, torch.full_like(args[2], offset), *args[3:], backend=backend)
        assert torch.equal(x_new, expected)


def test_nan_is_not_swallowed(backend, device):
    x, y, offset, *rest = case((3, 40), 1, device, torch.float32)
    offset[1] = torch.nan
    x_new, h = ops.sigma_gate(x, y, offset, *rest, backend=backend)
    assert x_new[1].isnan().all() and h[1].isnan().all()
    assert x_new[::2].isfinite().all() and h[::2].isfinite().all()


def test_rows_do_not_depend_on_their_batch_and_inputs_are_left_alone(backend, device):
    args = case((6, 33), 1, device, torch.bfloat16, "element")
    before = [a if a is None else a.clone() for a in args]
    whole = ops.sigma_gate(*args, backend=backend)
    halves = [[t[part] for t in args[:3]] + [*args[3:6], args[6][part], None] for part in (slice(2), slice(2, 6))]
    parts = [ops.sigma_gate(*half, backend=backend) for half in halves]
    for i in range(2):
        assert torch.equal(torch.cat([p[i] for p in parts]), whole[i])
    assert all(a is b or torch.equal(a, b) for a, b in zip(args, before, strict=True))


def test_strided_operands(backend, device):
    args = case((4, 3, 24), 4, device, torch.float32, "element")
    expected = ops.sigma_gate(*args, backend=backend)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) if t is not None and t.ndim == 3 else t for t in args]
    turned[5] = args[5].repeat_interleave(2)[::2]
    for out, want in zip(ops.sigma_gate(*turned, backend=backend), expected, strict=True):
        assert out.is_contiguous() and torch.equal(out, want)


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
@pytest.mark.parametrize(("shape", "groups"), [((0, 4, 8), 0), ((0, 8), 1), ((2, 0, 8), 1)])
def test_empty(shape, groups, name):
    x_new, h = ops.sigma_gate(*case(shape, groups, "cpu", torch.bfloat16), backend=name)
    assert x_new.shape == h.shape == shape


def test_eager_is_differentiable():
    for kind in ("weight", "element"):
        args = case((2, 3, 8), 2, "cpu", torch.float64, kind)
        given = [a.requires_grad_() for a in args if a is not None]

        def run(*tensors, args=args):
            waiting = iter(tensors)
            return ops.sigma_gate(*(None if a is None else next(waiting) for a in args))

        assert torch.autograd.gradcheck(run, given)


def test_per_row_helper_of_these_tests_is_the_ops_rule():
    """12 rows of a table over 12 rows of x: each its own."""
    table = torch.arange(12.0)[:, None]
    assert torch.equal(per_row(table, 12, None), table)


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_limits_of_the_kernels_have_a_reason(name):
    with pytest.raises(BackendUnavailableError, match="works on rows of at most 8192 elements, got 8193"):
        ops.sigma_gate(*case((1, 8193), 1, "cpu", torch.float32), backend=name)
    with pytest.raises(BackendUnavailableError, match=r"works in float32, bfloat16 and float16, got torch\.float64"):
        ops.sigma_gate(*case((1, 8), 1, "cpu", torch.float64), backend=name)


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_bad_input_has_one_text_on_every_backend(name):
    good = dict(zip(NAMES, case((4, 8), 2, "cpu", torch.float32), strict=True))
    for change, message in (
        (dict(x=None), "x must be a tensor, got NoneType"),
        (dict(x=torch.zeros(())), r"x must be \(\*, D\) with D at least 1, got \(\)"),
        (dict(y=torch.zeros(3, 8)), r"y must have the shape of x, \(4, 8\), got \(3, 8\)"),
        (dict(y=torch.zeros(4, 8, device="meta")), "y must be on the device of x, cpu, got meta"),
        (dict(offset=None), "offset must be a tensor, got NoneType"),
        (dict(offset=torch.zeros(4)), r"offset must be \(4, 1\) or \(4, 8\), got \(4,\)"),
        (dict(offset=torch.zeros(4, 2)), r"offset must be \(4, 1\) or \(4, 8\), got \(4, 2\)"),
        (dict(logit=torch.zeros(4, 1)), "pass either logit or weight"),
        (dict(weight=None), "pass either logit or weight"),
        (dict(weight=None, logit=torch.zeros(1, 8)), r"logit must be \(4, 1\) or \(4, 8\), got \(1, 8\)"),
        (dict(weight=torch.zeros(7)), r"weight must be \(8,\), got \(7,\)"),
        (dict(shift=None), "shift, scale and rms_weight must be given together, or none of them"),
        (dict(rms_weight=torch.zeros(2, 8)), r"rms_weight must be \(8,\), got \(2, 8\)"),
        (dict(shift=torch.zeros(3, 8)), r"scale must be \(3, 8\), got \(2, 8\)"),
        (dict(eps=-1), "eps must be a finite number >= 0, got -1"),
    ):
        with pytest.raises(InputError, match=message):
            ops.sigma_gate(**{**good, **change}, backend=name)
