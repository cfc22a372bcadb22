"""gate_residual_norm_modulate on every backend against its formula in float64."""

import pytest
import torch

from msdd_fast import ops
from msdd_fast.errors import InputError
from tests.ops.adaln import DTYPES, LARGE, LAYOUTS, bad_splits, formula, per_row, randn, rms_weight, tables


def case(shape, groups, device, dtype, mean=0.0, table_dtype=None):
    x, y = (randn(*shape, seed=i, mean=mean).to(device, dtype) for i in range(2))
    return x, y, *tables(groups, shape[-1], 3, device, table_dtype or dtype)


def check(assert_near, backend, args, split, weight=None):
    x, y, gate, shift, scale = args
    x_new, h = ops.gate_residual_norm_modulate(*args, split, rms_weight=weight, backend=backend)
    eager, eager_h = ops.gate_residual_norm_modulate(*args, split, rms_weight=weight, backend="eager")
    assert x_new.is_contiguous() and h.is_contiguous()
    rows = x.shape[:-1].numel()
    gated = per_row(gate.double(), rows, split) * y.double().reshape(rows, -1)
    assert_near(x_new, eager, x.double() + gated.reshape(x.shape), x.dtype)
    # h is that of x_new as it was rounded: eager's of its own.
    eager_h = ops.norm_modulate(x_new, shift, scale, split, rms_weight=weight, backend="eager")
    assert_near(h, eager_h, formula(x_new, shift, scale, split, weight), x.dtype)
    torch.testing.assert_close(h, ops.norm_modulate(x_new, shift, scale, split, rms_weight=weight, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups", "split"), LAYOUTS)
def test_against_the_formula(backend, device, assert_near, shape, groups, split, dtype):
    check(assert_near, backend, case(shape, groups, device, dtype), split)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups", "split"), [*LAYOUTS[::2], *LARGE])
def test_rms_norm(backend, device, assert_near, shape, groups, split, dtype):
    weight = rms_weight(shape[-1], split, device, dtype)
    check(assert_near, backend, case(shape, groups, device, dtype), split, weight)


@pytest.mark.parametrize(("shape", "groups", "split"), LARGE)
def test_wide_rows_and_float32_tables(backend, device, assert_near, shape, groups, split):
    check(assert_near, backend, case(shape, groups, device, torch.bfloat16, table_dtype=torch.float32), split)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_mean_does_not_swallow_the_variance(backend, device, assert_near, dtype):
    check(assert_near, backend, case((4, 200), 1, device, dtype, mean=1000.0), None)


def test_eager_is_the_two_steps():
    args = case((2, 3, 24), 2, "cpu", torch.float64)
    x, y, gate, shift, scale = args
    x_new, h = ops.gate_residual_norm_modulate(*args, backend="eager")
    assert torch.equal(x_new, x + gate[:, None] * y)
    assert torch.equal(h, ops.norm_modulate(x_new, shift, scale, backend="eager"))


def test_strided_operands(backend, device):
    x, y, *rest = case((4, 3, 24), 4, device, torch.float32)
    expected = ops.gate_residual_norm_modulate(x, y, *rest, backend=backend)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, y)]
    for out, want in zip(ops.gate_residual_norm_modulate(*strided, *rest, backend=backend), expected, strict=True):
        assert out.is_contiguous() and torch.equal(out, want)


def test_inputs_are_left_alone(backend, device):
    args = case((2, 3, 24), 2, device, torch.float32)
    before = [a.clone() for a in args]
    ops.gate_residual_norm_modulate(*args, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


@pytest.mark.parametrize(("shape", "groups", "split"), [((0, 4, 8), 0, None), ((0, 8), 1, None), ((0, 2, 8), 2, 0)])
@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_empty_batches(shape, groups, split, name):
    for out in ops.gate_residual_norm_modulate(*case(shape, groups, "cpu", torch.bfloat16), split, backend=name):
        assert out.shape == shape


def test_eager_is_differentiable():
    args = [a.requires_grad_() for a in case((2, 3, 8), 2, "cpu", torch.float64)]
    assert torch.autograd.gradcheck(ops.gate_residual_norm_modulate, args)


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
@bad_splits
def test_rows_that_cannot_be_shared_out(name, split, groups, message):
    with pytest.raises(InputError, match=message):
        ops.gate_residual_norm_modulate(*case((4, 8), groups, "cpu", torch.float32), split, backend=name)


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_bad_input_has_one_text_on_every_backend(name):
    x, table = torch.zeros(4, 8), torch.zeros(2, 8)
    good = dict(x=x, y=x, gate=table, shift=table, scale=table)
    for change, message in (
        (dict(y=None), "y must be a tensor, got NoneType"),
        (dict(y=x[:2]), r"y must have the shape of x, \(4, 8\), got \(2, 8\)"),
        (dict(y=x.to("meta")), "y must be on the device of x, cpu, got meta"),
        (dict(gate=table[:, :7]), r"gate must be \(groups, 8\), got \(2, 7\)"),
        (dict(shift=table[:1]), r"shift must be \(2, 8\), got \(1, 8\)"),
        (dict(rms_weight=torch.zeros(2, 8)), r"rms_weight must be \(8,\), got \(2, 8\)"),
    ):
        with pytest.raises(InputError, match=message):
            ops.gate_residual_norm_modulate(**{**good, **change}, backend=name)
